"""YAML to the frozen configuration and back: strict, and clear about what is wrong and where."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from schemas.config import Config
from schemas.errors import ConfigError

T = TypeVar("T")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a YAML file; `overrides` maps dotted keys ("train.epochs") to values that win over the file.

    Raises ConfigError naming the file, the key and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; see conf/ for the ones that ship.")
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, found {type(data).__name__}.")
    for key, value in (overrides or {}).items():
        set_dotted(data, key, value)
    return from_mapping(Config, data, str(path))


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: {parent!r} is a value, not a section.")
    data[last] = value


def from_mapping(cls: type[T], data: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Builds the dataclass `cls` from plain data. Raises ConfigError for unknown keys, wrong types, bad values."""
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(hints)}."
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
    values = {key: convert(hints[key], value, where, f"{prefix}{key}") for key, value in data.items()}
    lacking = [f.name for f in dataclasses.fields(cls) if f.name not in values and _is_required(f)]  # type: ignore[arg-type]
    if lacking:
        raise ConfigError(f"{where}: {prefix}{lacking[0]} is missing; add it.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the type `hint`; a wrong type raises ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        lists = [a for a in kinds if typing.get_origin(a) is tuple and isinstance(value, (list, tuple))]
        return convert((lists or kinds)[0], value, where, key)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where}: {key} is {value!r}; choose one of {', '.join(map(repr, arguments))}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: {key} must be a list, found {value!r}.")
        return tuple(convert(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} must be a section of keys, found {value!r}.")
        return from_mapping(hint, value, where, f"{key}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is datetime.date and isinstance(value, str):
        return parse_date(value, f"{where}: {key}")
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{where}: {key} must be {hint.__name__}, found {value!r}.")


def parse_date(text: str, what: str = "--date") -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{what} is {text!r}; write a date as YYYY-MM-DD.") from error


def to_mapping(value: Any, identity: bool = False) -> Any:
    """A dataclass as plain data that YAML and JSON can hold; `identity` leaves out the resource fields, and those that
    came later and have their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_mapping(getattr(value, f.name), identity)
            for f in dataclasses.fields(value)
            if not (identity and _outside(f, getattr(value, f.name)))
        }
    if isinstance(value, tuple):
        return [to_mapping(item, identity) for item in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value


def _outside(field: dataclasses.Field[Any], value: Any) -> bool:
    return bool(field.metadata.get("resource") or (field.metadata.get("later") and value == field.default))
