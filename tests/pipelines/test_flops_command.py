"""`lazyrec flops`: peers of equal depth, the paper's tables, and names it does not know."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipelines.cli import main
from pipelines.flops import answer, paper_rows, report
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.model_config import ModelConfig
from schemas.model_sizes import SIZES, peers
from tests.conftest import REPOSITORY


def test_peers_have_the_layers_of_the_model() -> None:
    found = peers(SIZES["v2-1b"])
    assert {name: (c.encoder_layers, c.layers) for name, c in found.items()} == {
        "decoder-only": (0, 18),
        "encoder-decoder 1:1": (9, 9),
        "encoder-decoder 1:2": (6, 12),
    }
    assert "lazy" in peers(found["encoder-decoder 1:1"])
    assert list(peers(replace(ModelConfig(), layers=1))) == ["decoder-only"]


def test_the_papers_own_arithmetic_comes_out() -> None:
    rows = paper_rows()
    assert all(abs(row.difference) < 0.002 for row in rows if row.table == "1")
    assert all(abs(row.difference) < 0.01 for row in rows if row.table in "34" and row.what == "GFLOPs")
    lazy = [row for row in rows if row.table == "2" and row.row.startswith("lazy") and row.what != "GFLOPs"]
    assert len(lazy) == 3 and all(abs(row.difference) < 0.05 for row in lazy)


def test_operations_are_split_and_shared_by_the_targets() -> None:
    one, five = (report(Config(), "v2-0.1b", 512, k).costs[0] for k in (1, 5))
    assert one.context_gflops == pytest.approx(5 * five.context_gflops)
    assert five.trained_gflops == pytest.approx(3 * (five.context_gflops + five.target_gflops))


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "--config", str(REPOSITORY / "conf" / "demo.yaml"), "--size", "v2-moe-4b"]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert found["models"][0]["name"] == "v2-moe-4b (lazy)" and len(found["paper"]) > 30
    assert any("encoder-decoder 1:2" in line for line in printed)
    assert json.dumps(answer(report(Config(), None, None, 2)))
    with pytest.raises(ConfigError, match="--size x is none of"):
        report(Config(), "x", None, 5)
    with pytest.raises(ConfigError, match="at least 1"):
        report(Config(), None, 0, 5)
