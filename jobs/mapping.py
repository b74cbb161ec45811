"""The mapping of a source's own columns to ours, held against the columns that its files have. Starts no engine.

Both the readers and `lazyrec check` ask here, so that what the check lets through can be read.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import types

from schemas.errors import ContractViolation
from schemas.feedback import FLAGS
from schemas.source import ItemColumns, ItemMapping, LogColumns, LogMapping, SourceConfig, UserColumns, UserMapping

RoleMapping = LogMapping | ItemMapping | UserMapping
ATTRIBUTE = "attribute "  # before the name of a column that is kept as 'name=value'
VECTOR = "vector "  # before the name of a column that is kept as a vector of that name
LISTED = {ATTRIBUTE: "attributes", VECTOR: "vectors"}  # the keys that name such columns
# How each field is read; every other one is text.
KINDS = {
    "user_id": "id",
    "item_id": "id",
    "author_id": "id",
    "ts": "time",
    "duration_ms": "number",
    "play_ms": "number",
    "rating": "number",
    **dict.fromkeys(FLAGS, "flag"),
    "tags": "texts",
    "behaviour_log_probs": "floats",
    "upload_date": "day",
    "withdrawn": "day",
}
KUAIRAND_LOG = LogMapping(
    LogColumns(
        user_id="user_id",
        item_id="video_id",
        ts="time_ms",
        play_ms="play_time_ms",
        duration_ms="duration_ms",
        scene="tab",
        click="is_click",
        long_view="long_view",
        like="is_like",
        follow="is_follow",
        comment="is_comment",
        forward="is_forward",
        profile_enter="is_profile_enter",
        hate="is_hate",
    ),
    "log_*",
)
KUAIRAND_ITEMS = ItemMapping(
    ItemColumns(
        item_id="video_id", author_id="author_id", upload_date="upload_dt", duration_ms="video_duration", tags="tag"
    ),
    "video_features_basic*",
    ("video_type", "upload_type", "music_type", "visible_status"),
)
KUAIRAND_USERS = UserMapping(UserColumns(user_id="user_id"), "user_features*")
MOVIELENS_LOG = LogMapping(LogColumns(user_id="userId", item_id="movieId", ts="timestamp", rating="rating"), "ratings")
MOVIELENS_ITEMS = ItemMapping(ItemColumns(item_id="movieId", title="title", tags="genres"), "movies")


@dataclass(frozen=True)
class Cell:
    """A field of ours, the source's column behind it, and the type that it has there."""

    field: str
    name: str
    type: pa.DataType

    @property
    def kind(self) -> str:
        return "floats" if self.field.startswith(VECTOR) else KINDS.get(self.field, "text")


def mapping_of(source: SourceConfig) -> SourceConfig:
    """The source as a mapped one: itself, or the mapping that the files of its kind always have."""
    if source.kind == "kuairand":
        read = dataclasses.replace(source, kind="mapped", ts_unit="ms", ids="integer", list_separator=",", log=KUAIRAND_LOG)
        return dataclasses.replace(read, items=KUAIRAND_ITEMS, users=KUAIRAND_USERS)
    if source.kind != "movielens":
        return source
    return dataclasses.replace(source, kind="mapped", ts_unit="s", ids="integer", log=MOVIELENS_LOG, items=MOVIELENS_ITEMS)


def role_mappings(source: SourceConfig) -> dict[str, RoleMapping]:
    """The mappings of a mapped source by role."""
    mappings = {"log": source.log, "items": source.items, "users": source.users}
    return {role: mapping for role, mapping in mappings.items() if mapping is not None}


def columns_of(mapping: RoleMapping) -> dict[str, str]:
    """The source's column behind each mapped field, attributes and vectors included."""
    named = {field.name: getattr(mapping.columns, field.name) for field in dataclasses.fields(mapping.columns)}
    found = {field: name for field, name in named.items() if name is not None}
    for prefix, listed in LISTED.items():
        found |= {prefix + name: name for name in getattr(mapping, listed, ())}
    return found


def cells_of(file: str, role: str, columns: Mapping[str, str], present: Mapping[str, pa.DataType], unit: str) -> list[Cell]:
    """The mapped columns of a file. Raises ContractViolation for one that is not there or cannot be read."""
    faults = column_faults(file, role, columns, present, unit)
    if faults:
        raise ContractViolation(faults[0])
    return [Cell(field, name, present[name]) for field, name in columns.items()]


def column_faults(
    file: str, role: str, columns: Mapping[str, str], present: Mapping[str, pa.DataType], unit: str
) -> list[str]:
    """What is wrong with the mapped columns of a file, a sentence each."""
    found = []
    for field, name in columns.items():
        key = key_of(role, field)
        if name not in present:
            found.append(f"{file}: there is no column {name!r} ({key}); {nearest(name, present)}.")
        elif remedy := unreadable(Cell(field, name, present[name]), unit):
            found.append(f"{file}: column {name!r} ({key}) is of type {present[name]}; {remedy}.")
    return found


def key_of(role: str, field: str) -> str:
    """The configuration's key of a field."""
    listed = next((listed for prefix, listed in LISTED.items() if field.startswith(prefix)), f"columns.{field}")
    return f"source.{role}.{listed}"


def nearest(name: str, present: Iterable[str]) -> str:
    by_lower = {column.lower(): column for column in present}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    if close:
        return f"the nearest are {', '.join(map(repr, close))}"
    shown = list(by_lower.values())
    return f"the file has {', '.join(map(repr, shown[:12]))}{' and more' if len(shown) > 12 else ''}"


def unreadable(cell: Cell, unit: str) -> str | None:
    """Why the type does not serve the field, with the remedy; null where it does."""
    dtype, kind = cell.type, cell.kind
    text, number = is_text(dtype), is_number(dtype)
    if kind == "time" and number:
        return None if unit in ("s", "ms", "us") else "set source.ts_unit to s, ms or us"
    good = {
        "id": text or number,
        "time": text or types.is_timestamp(dtype) or types.is_date(dtype),
        "number": text or number,
        "flag": text or number or types.is_boolean(dtype),
        "text": text or number or types.is_boolean(dtype) or types.is_date(dtype),
        "texts": text or (is_list(dtype) and (is_text(dtype.value_type) or is_number(dtype.value_type))),
        "floats": text or (is_list(dtype) and is_number(dtype.value_type)),
        "day": text or types.is_timestamp(dtype) or types.is_date(dtype),
    }
    wanted = {
        "id": "an id is an integer or text",
        "time": "a time is a timestamp, ISO 8601 text, or a number with source.ts_unit",
        "number": "it must be a number",
        "flag": "a flag is 0 or 1, true or false, or a count",
        "text": "it must be text",
        "texts": "it must be a list of texts, or one text with source.list_separator",
        "floats": "it must be a list of numbers, or one text with spaces",
        "day": "it must be a date",
    }
    return None if good[kind] else wanted[kind]


def is_text(dtype: pa.DataType) -> bool:
    return types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype)


def is_number(dtype: pa.DataType) -> bool:
    return types.is_integer(dtype) or types.is_floating(dtype) or types.is_decimal(dtype)


def is_list(dtype: pa.DataType) -> bool:
    return types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype)
