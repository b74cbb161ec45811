"""What training reads, at pinned versions: codes and fields of the catalogue as of the last train day, the stream of train
requests, and a sample of validation requests."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from model.decoder import Decoder
from model.item_table import ItemTable
from model.positives import Positives, take_rows
from model.requests import Requests
from pipelines.catalogue import Catalogue, load_catalogue
from pipelines.collate import ExampleCollate, HistoryLimit, concat_requests
from pipelines.evaluation_data import EvaluationData
from pipelines.example_roles import load_roles
from pipelines.example_stream import TABLE, ExampleStream, empty_requests, read_segment, segments_of
from pipelines.item_fields import item_table
from pipelines.long_histories import long_histories
from pipelines.sampling import hash_of
from pipelines.split import Role, Roles
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.feedback import mask_of
from schemas.lake import Lake

VALIDATION_SAMPLE = 2000  # requests


@dataclass
class TrainingData:
    config: Config
    lake: Lake
    calendar: Calendar
    catalogue: Catalogue
    items: ItemTable
    roles: Roles
    stream: ExampleStream

    @property
    def levels(self) -> int:
        return self.catalogue.levels

    @property
    def engaged_mask(self) -> int:
        return mask_of(self.config.sequences.engaged)

    @property
    def positive_mask(self) -> int:
        return mask_of(self.config.targets.positive)

    def train_positives(self) -> Positives:
        """What baselines are fitted on."""
        version, mask = self.stream.version, self.positive_mask
        return EvaluationData(self.lake, version, self.catalogue, self.roles, self.calendar, mask).train_positives()

    def validation(self) -> Requests:
        """At most VALIDATION_SAMPLE requests of the validation role with a known positive; read once."""
        return self._validation

    @cached_property
    def _validation(self) -> Requests:
        config, version = self.config, self.stream.version
        collate = collate_for(config, self.catalogue, self.roles, "validation")
        chosen = empty_requests()
        for segment in segments_of(self.lake, version, self.calendar.validation, config.train.segment_rows):
            chosen = concat_requests([chosen, read_segment(self.lake, version, segment, collate)])
            hashes = hash_of(chosen.user_ids.numpy(), chosen.ts_us.numpy(), config.train.seed)
            kept = np.sort(np.argsort(hashes, kind="stable")[:VALIDATION_SAMPLE])
            chosen = take_rows(chosen, torch.from_numpy(kept))
        return chosen if self.stream.long is None else next(self.stream.long.given_to([chosen]))

    def description(self, decoder: Decoder) -> dict[str, Any]:
        """What model.json says beside the sizes."""
        return {
            "codebook_version": self.catalogue.codebook_version,
            "trained_until": self.calendar.trained_until.isoformat(),
            "positive_mask": self.positive_mask,
            "parameters": sum(p.numel() for p in decoder.parameters()),
            "training_examples": self.stream.version,
        }


def open_data(
    config: Config,
    lake: Lake,
    calendar: Calendar,
    pins: Mapping[str, int],
    days: Sequence[datetime.date] | None = None,
    loss_mask: int | None = None,
) -> TrainingData:
    """The stream of `days` (default: all train days) with the targets of `loss_mask` (default: the positives)."""
    until = calendar.trained_until
    catalogue = load_catalogue(lake, pins["semantic_ids"], calendar.fit_day, until)
    fields = item_table(lake, pins["items"], catalogue, config.model.hash_buckets, until)
    roles = load_roles(lake, pins[TABLE], config, calendar)
    collate = collate_for(config, catalogue, roles, "train", loss_mask)
    long = long_histories(config, lake, pins, catalogue, config.model.lifelong_length)
    stream = ExampleStream(lake, pins[TABLE], calendar.train if days is None else days, collate, config.train, long)
    return TrainingData(config, lake, calendar, catalogue, fields, roles, stream)


def collate_for(
    config: Config, catalogue: Catalogue, roles: Roles, role: Role, loss_mask: int | None = None
) -> ExampleCollate:
    """Requests of the role with a target that bears a loss, and the history that the model reads."""
    limit = HistoryLimit(config.model.short_length, config.model.positive_length, mask_of(config.sequences.engaged))
    mask = mask_of(config.targets.positive) if loss_mask is None else loss_mask
    return ExampleCollate(catalogue, roles, role, mask, limit)
