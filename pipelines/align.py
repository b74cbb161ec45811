"""Stage `align`: the trained decoder on the latest exposures, rewarded by what users did with them.

Its artifact is the model that is evaluated and registered. Where there is nothing to align with (no watch times, or
`align.enabled: false`) it holds no weights, points at those of `train` and says why.
"""

from __future__ import annotations

import dataclasses

from pipelines.align_loop import align_loop
from pipelines.exposures import known_quantiles
from pipelines.stage import StageContext, StageResult
from pipelines.train import trained
from schemas.config import Config


def run(context: StageContext) -> StageResult:
    """Weights and model.json in the stage's folder, or a manifest that points at the trained ones and the reason."""
    identity = context.plan.artifact("train")
    before = context.lake.manifest("train", identity) or {}
    model = {name: before[name] for name in ("codebook_version", "parameters", "trained_until")}
    reason = reason_to_skip(context)
    if reason:
        return StageResult(
            skipped=reason,
            notes=[f"Alignment was skipped: {reason}."],
            manifest=model | {"model": {"stage": "train", "identity": identity}},
        )
    result = trained(context, aligning(context.config), align_loop, str(context.lake.artifact("train", identity)))
    result.manifest |= {"model": {"stage": "align", "identity": context.identity}}
    return result


def reason_to_skip(context: StageContext) -> str | None:
    settings, days = context.config.align, context.calendar.train
    if not settings.enabled:
        return "align.enabled is false"
    if not known_quantiles(context.lake, context.pins["rewards"], days[-settings.days :]):
        return "no impression has a reward quantile, since the source has no watch times"
    return None


def aligning(config: Config) -> Config:
    """The training settings of one aligned pass."""
    settings = dataclasses.replace(
        config.train, mode="epochs", epochs=1, learning_rate=config.align.learning_rate, label_smoothing=0.0
    )
    return dataclasses.replace(config, train=settings)
