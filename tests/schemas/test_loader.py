"""The configuration is strict, and its errors name the file, the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from schemas.config import Config, TrainConfig
from schemas.errors import ConfigError
from schemas.loader import from_mapping, load_config, to_mapping
from tests.conftest import REPOSITORY


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "conf").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert from_mapping(Config, yaml.safe_load(yaml.safe_dump(to_mapping(config))), "round trip") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {}", ["unknown key trian", "'train'"]),
        ("train: {epohcs: 3}", ["train.epohcs", "'epochs'"]),
        ("train: {epochs: many}", ["train.epochs", "int", "'many'"]),
        ("train: {epochs: true}", ["train.epochs", "int"]),
        ("train: [1]", ["train", "section"]),
        ("split: {by: weeks}", ["split.by", "'days'", "'user'"]),
        ("targets: {positive: [clicks]}", ["targets.positive", "'clicks'", "click"]),
        ("tokenize: {codes: [8, 8]}", ["tokenize.codes", "3"]),
        ("tokenize: {codes: many}", ["tokenize.codes", "int", "'many'"]),
        ("tokenize: {codes: [8, 0, 8]}", ["tokenize.codes", "at least 1"]),
        ("model: {heads: 7}", ["model.heads", "divide"]),
        ("source: {first_day: 2026-13-01x}", ["source.first_day", "YYYY-MM-DD"]),
        ("source: {future_days: -1}", ["source.future_days", "null"]),
        ("a: [", ["not valid YAML"]),
        ("- 1", ["mapping"]),
    ],
)
def test_bad_configuration_is_one_clear_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_overrides_win_over_the_file_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 3}")
    assert load_config(path, {"train.epochs": 5}).train.epochs == 5
    with pytest.raises(ConfigError, match=r"train\.epoch;"):
        load_config(path, {"train.epoch": 5})


def test_codes_are_one_number_or_one_a_level(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "tokenize: {codes: 16}")).tokenize.sizes == (16, 16, 16)
    config = load_config(write(tmp_path, "tokenize: {codes: [4, 8], levels: 2}"))
    assert config.tokenize.sizes == (4, 8)
    assert from_mapping(Config, yaml.safe_load(yaml.safe_dump(to_mapping(config))), "round trip") == config


def test_resources_are_no_part_of_an_identity() -> None:
    config = Config()
    assert "num_workers" in to_mapping(config.train)
    assert "num_workers" not in to_mapping(config.train, identity=True)
    assert "path" not in to_mapping(config.source, identity=True)


def test_a_later_setting_is_part_of_an_identity_where_it_is_not_the_default() -> None:
    rowwise = TrainConfig(table_optimizer="rowwise")
    assert to_mapping(TrainConfig())["table_optimizer"] == "adamw"
    assert "table_optimizer" not in to_mapping(TrainConfig(), identity=True)
    assert to_mapping(rowwise, identity=True)["table_optimizer"] == "rowwise"
