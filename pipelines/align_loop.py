"""Alignment: the training loop with one more term, the policy loss of `model.gbpo` on what users did with exposures.

Both terms come from one forward pass: next-token loss on the positive targets, policy loss on those with an advantage.
Advantages are relative to the whole batch, so they do not depend on the number of workers. Targets with neither are
left out before the pass.
"""

from __future__ import annotations

from typing import Any

import ray.train
import torch
from torch import Tensor

from model.gbpo import advantages, policy_loss
from model.positives import keep_targets
from model.requests import Requests
from pipelines.collate import EVERY_TARGET
from pipelines.example_stream import Batch, Segment
from pipelines.exposures import Exposures, load_exposures
from pipelines.train_loop import Step, Training, limited_threads, share
from pipelines.training_data import open_data
from schemas.config import Config
from schemas.feedback import mask_of


def align_loop(settings: dict[str, Any]) -> None:
    """`settings`: see `pipelines.train_loop`; `initial` is the model to align."""
    config: Config = settings["config"]
    context = ray.train.get_context()
    with torch.random.fork_rng(devices=[]), limited_threads(config.train.threads):
        days = settings["calendar"].train[-config.align.days :]
        data = open_data(config, settings["lake"], settings["calendar"], settings["pins"], days, EVERY_TARGET)
        Aligning(settings, data, context.get_world_rank(), context.get_world_size()).run()


class Aligning(Training):
    further = ("policy_loss", "share_up", "share_down")

    _loaded: tuple[Segment, Exposures] | None = None

    def objective(self, batch: Batch) -> Step:
        """L_Gen + weight * J_GBPO over the whole batch's targets (OneRec-V2, section 3.1.2)."""
        judged, positive_T, advantage_T, old_TL = self._judged(batch)
        order = judged.target_impressions.argsort()
        known = judged.target_impressions[order]
        mine, weight = share(judged, self.rank, self.world)
        place = order[torch.searchsorted(known, mine.target_impressions)]
        nll_TL, item_nll = self._nll(mine, positive_T[place])
        positive, advantage = positive_T[place].float() * weight, advantage_T[place] * weight
        item_nll = item_nll * weight
        policy_T = policy_loss(-nll_TL, old_TL[place], advantage, self.config.align.unit)
        positives = max(int(positive_T.sum()), 1)
        exposed = max(int((advantage_T != 0).sum()), 1)
        loss = (nll_TL * positive[:, None]).sum() / (positives * self.data.levels)
        loss = loss + self.config.train.item_loss * item_nll / positives
        loss = (loss + self.config.align.weight * policy_T.sum() / exposed) * self.world
        nll_L = (nll_TL.detach() * positive[:, None]).sum(0)
        sums = [policy_T.detach().sum(), (advantage > 0).sum(), (advantage < 0).sum(), item_nll.detach()]
        further = torch.stack(sums[: len(self.further)])
        return Step(loss, nll_L, int(positive.sum()), further)

    def _judged(self, batch: Batch) -> tuple[Requests, Tensor, Tensor, Tensor]:
        """The targets that matter, whether each is positive, its advantage and its behaviour."""
        requests = batch.requests
        found = self._exposures(batch.segment).of(requests.target_impressions.cpu())
        quantile_T, negative_T, old_TL = (values.to(self.device) for values in found)
        advantage_T = advantages(quantile_T, negative_T, self.config.align.top_share)
        positive_T = (requests.target_feedback & mask_of(self.config.targets.positive)) != 0
        keep_T = positive_T | (advantage_T != 0)
        keep_T[0] |= ~keep_T.any()  # a batch is never empty; a target with neither adds nothing
        return keep_targets(requests, keep_T), positive_T[keep_T], advantage_T[keep_T], old_TL[keep_T]

    def _exposures(self, segment: Segment) -> Exposures:
        if self._loaded is None or self._loaded[0] != segment:
            version, levels = self.data.catalogue.codebook_version, self.data.levels
            pins = self.settings["pins"]
            self._loaded = (segment, load_exposures(self.data.lake, pins, segment.days, version, levels))
        return self._loaded[1]
