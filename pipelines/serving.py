"""The registered model's `predict`: rows of a frame in, the best items of each row out.

A row holds `user_id` and, as lists in time order, `item_ids`, `ts_us` and optionally `feedback`, `play_ms` and
`duration_ms`, and the static fields `attributes` ("name=value"). `request_ts_us` is the time of the request (default:
the newest event). Items that the catalogue does not know are dropped and counted; a user without events gets the answer
for an empty history. Rows pass through the same collate code as in training.

A model that reads long histories finds the arrays of the user's newest row of `lifelong_sequences` in the lists
`lifelong_item_ids`, `lifelong_ts_us` and so on; items that the catalogue does not know stay there, unknown as in training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from model.requests import Requests
from pipelines.bundle import Bundle, load_bundle
from pipelines.collate import requests_of
from pipelines.long_histories import ARRAYS, LongRows
from schemas.tables import TRAINING_EXAMPLES

EVENT_LISTS = {"ts_us": -1, "play_ms": -1, "duration_ms": -1, "feedback": 0}  # what stands for a list not given
LONG_LISTS = EVENT_LISTS | {"author_ids": -1, "weights": 1}
BATCH_ROWS = 256

INPUTS = Schema(
    [
        ColSpec(DataType.long, "user_id"),
        ColSpec(Array(DataType.long), "item_ids"),
        ColSpec(Array(DataType.long), "ts_us"),
        ColSpec(Array(DataType.long), "feedback", required=False),
        ColSpec(Array(DataType.long), "play_ms", required=False),
        ColSpec(Array(DataType.long), "duration_ms", required=False),
        ColSpec(Array(DataType.string), "attributes", required=False),
        ColSpec(DataType.long, "request_ts_us", required=False),
        *(ColSpec(Array(DataType.long), f"lifelong_{name}", required=False) for name in ARRAYS),
    ]
)
OUTPUTS = Schema(
    [
        ColSpec(DataType.long, "user_id"),
        ColSpec(Array(DataType.long), "item_ids"),
        ColSpec(Array(DataType.double), "scores"),
        ColSpec(DataType.long, "unknown_items"),
    ]
)
PARAMS = ParamSchema(
    [
        ParamSpec("k", DataType.long, 10),
        ParamSpec("beam", DataType.long, 50),
        ParamSpec("mask_history", DataType.boolean, False),
    ]
)


class LazyRecModel(PythonModel):
    """Loads the bundle once and answers frames."""

    def load_context(self, context: Any) -> None:
        self.bundle = load_bundle(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        return recommend(self.bundle, model_input, **{"k": 10, "beam": 50, "mask_history": False, **(params or {})})


def recommend(bundle: Bundle, frame: pd.DataFrame, k: int, beam: int, mask_history: bool) -> pd.DataFrame:
    """The best k items of each row of `frame`, with their log-probabilities as scores."""
    parts = [
        _answer(bundle, frame.iloc[start : start + BATCH_ROWS], k, beam, mask_history)
        for start in range(0, len(frame), BATCH_ROWS)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=OUTPUTS.input_names())


def _answer(bundle: Bundle, frame: pd.DataFrame, k: int, beam: int, mask_history: bool) -> pd.DataFrame:
    requests, unknown = requests_from(frame, bundle)
    with torch.inference_mode():
        ranking = bundle.ranker.ranking(requests, k, max(beam, k), mask_history)
    items, scores = ranking.items.numpy(), ranking.scores.numpy()
    kept = items >= 0
    return pd.DataFrame(
        {
            "user_id": frame["user_id"].to_numpy(),
            "item_ids": [bundle.catalogue.item_ids[row[keep]].tolist() for row, keep in zip(items, kept, strict=True)],
            "scores": [row[keep].astype(float).tolist() for row, keep in zip(scores, kept, strict=True)],
            "unknown_items": unknown,
        }
    )


def requests_from(frame: pd.DataFrame, bundle: Bundle) -> tuple[Requests, list[int]]:
    """Rows as requests without targets, and how many unknown items each row lost."""
    rows, unknown, given = [], [], frame.to_dict("records")
    for row in given:
        example, lost = _example(row, bundle)
        rows.append(example)
        unknown.append(lost)
    table = pa.Table.from_pylist(rows, schema=TRAINING_EXAMPLES.schema)
    requests = requests_of(table, bundle.catalogue)
    if bundle.lifelong_length:
        requests = _long_rows(given, bundle).given_to(requests, np.arange(len(given)))
    return requests, unknown


def _long_rows(rows: list[dict[str, Any]], bundle: Bundle) -> LongRows:
    """The long histories of the rows, empty where none is given."""
    item_ids = [_list_of(row, "lifelong_item_ids", []) for row in rows]
    arrays = {"items": bundle.catalogue.dense(np.concatenate(item_ids))}
    for name, fill in LONG_LISTS.items():
        lists = [_list_of(row, f"lifelong_{name}", np.full(len(i), fill)) for row, i in zip(rows, item_ids, strict=True)]
        arrays[ARRAYS[name]] = np.concatenate(lists)
    return LongRows(np.arange(len(rows)), np.cumsum([0, *map(len, item_ids)]), arrays)


def _example(row: dict[str, Any], bundle: Bundle) -> tuple[dict[str, Any], int]:
    """One row of `training_examples` that asks for a recommendation, and the number of items dropped."""
    item_ids = _list_of(row, "item_ids", [])
    known = bundle.catalogue.dense(item_ids) >= 0 if len(item_ids) else np.zeros(0, bool)
    lists = {name: _list_of(row, name, np.full(len(item_ids), fill))[known] for name, fill in EVENT_LISTS.items()}
    ts_us = lists["ts_us"]
    now = int(_given(row.get("request_ts_us"), ts_us[-1] + 1 if len(ts_us) else 0))
    example: dict[str, Any] = {f"context_{name}": values.tolist() for name, values in lists.items()}
    example |= {
        "user_id": int(row["user_id"]),
        "date": np.datetime64(now, "us").astype("datetime64[D]").astype(object),
        "slice_us": now,
        "attributes": list(_given(row.get("attributes"), [])),
        "context_item_ids": item_ids[known].tolist(),
        "context_author_ids": [-1] * int(known.sum()),  # the item table knows them
        "request_ids": [0],
        "request_ts_us": [now],
        "history_end": [int(known.sum())],
        "target_start": [0, 0],
    }
    empty = ("target_impression_ids", "target_item_ids", "target_play_ms", "target_duration_ms", "target_feedback")
    return example | {name: [] for name in empty}, int((~known).sum())


def _list_of(row: dict[str, Any], name: str, default: Any) -> np.ndarray:
    return np.asarray(_given(row.get(name), default), dtype=np.int64)


def _given(value: Any, default: Any) -> Any:
    """The value, or the default where the column is absent or the cell empty."""
    return default if value is None or (np.isscalar(value) and pd.isna(value)) else value
