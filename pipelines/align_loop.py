"""Alignment: the training loop with one more term, the policy loss of `model.gbpo` on what users did with exposures.

Both terms come from one forward pass: next-token loss on the positive targets, policy loss on those with an advantage; of
the codes, and with an item head of the item as a whole, since rankings go by both.
Advantages are relative to the whole batch, so they do not depend on the number of workers. Targets with neither are
left out before the pass.
"""

from __future__ import annotations

from typing import Any

import ray.train
import torch
from torch import Tensor

from model.gbpo import advantages, nll_weights, policy_loss
from model.positives import keep_targets
from model.requests import Requests
from pipelines.collate import EVERY_TARGET
from pipelines.example_stream import Batch, Segment
from pipelines.exposures import Exposures, load_exposures
from pipelines.train_loop import ITEM_LOSS, Step, Training, limited_threads, share
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
    of_item_head = (ITEM_LOSS, "item_policy_loss")

    _loaded: tuple[Segment, Exposures] | None = None

    def objective(self, batch: Batch) -> Step:
        """L_Gen + weight * J_GBPO over the whole batch's targets (OneRec-V2, section 3.1.2)."""
        judged, positive_T, advantage_T, old_TL = self._judged(batch)
        order = judged.target_impressions.argsort()
        known = judged.target_impressions[order]
        mine, weight = share(judged, self.rank, self.world)
        place = order[torch.searchsorted(known, mine.target_impressions)]
        positive, advantage = positive_T[place].float() * weight, advantage_T[place] * weight
        positives = max(int(positive_T.sum()), 1)
        exposed = max(int((advantage_T != 0).sum()), 1)
        config = self.config

        def weigh(log_probs_P: Tensor, rows: slice) -> Tensor:
            policy_P = config.align.weight * nll_weights(log_probs_P, advantage[rows]) / exposed
            return positive[rows] / positives + policy_P

        nll_TL, outputs = self._nll(mine, weigh)
        policy_T = policy_loss(-nll_TL, old_TL[place], advantage, config.align.unit)
        loss = (nll_TL * positive[:, None]).sum() / (positives * self.data.levels)
        loss = loss + config.align.weight * policy_T.sum() / exposed
        sums = [policy_T.detach().sum(), (advantage > 0).sum(), (advantage < 0).sum()]
        if outputs.item_nll is not None and outputs.item_log_probs is not None:
            loss = loss + config.train.item_loss * outputs.item_nll
            log_probs_T = outputs.item_log_probs
            sums += [-(log_probs_T * positive).sum(), -nll_weights(log_probs_T, advantage).sum()]
        nll_L = (nll_TL.detach() * positive[:, None]).sum(0)
        return Step(loss * self.world, nll_L, int(positive.sum()), torch.stack(sums))

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
