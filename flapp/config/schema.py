"""Every setting of flapp by name, type and range. The values are in conf/; load.py reads them."""

import json
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from flapp.model.layout import Variant

ROBUST_RULES = ("fedit", "ffa", "rolora")  # rules of aggregation that a robust average goes with
RANKS_MAY_DIFFER = ("flora", "flexlora", "hetlora")  # rules of aggregation
VALIDATION_FRACTION = 0.2  # of the training samples, if evaluations decide something and no fraction is set
WRITER_PARTITIONS = ("natural", "round_robin", "random", "manual")  # made with the shards, of whole writers


class ConfigError(ValueError):
    """A setting cannot be used. The message is one line that names the setting, what was found and the fix."""


STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)  # "3" is not 3, 1 is not true

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, le=0.99)]
TARGET = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
Target = Annotated[str, Field(pattern=f"^{TARGET}$")]  # something in the user's own code, module:name


TARGET_SETTINGS = (
    *("dataset.target", "dataset.augment", "model.target", "train.loss", "train.optimizer", "train.mods"),
    *("evaluate.metrics", "evaluate.scores", "strategy.target"),
)


class Kwargs(dict[str, Any]):
    """Keyword arguments, which are never changed and so have a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


@dataclass(frozen=True, config=STRICT)
class DatasetConfig:
    name: str
    shape: tuple[Count, ...]
    classes: Natural
    normalization: Literal["none", "half", "imagenet"]
    source: str | None
    download: bool
    materialize: Count | None
    augment: bool | Target
    target: Target | None = None  # runs of an older flapp, which tools read, lack this and what follows
    hub: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    skip_unreadable: bool = False
    image_column: str | None = None
    label_column: str | None = None
    client_column: str | None = None

    @property
    def samples(self) -> tuple[tuple[int, ...], int, str]:
        """Return what all samples are: shape, number of classes, normalization."""
        return self.shape, self.classes, self.normalization


@dataclass(frozen=True, config=STRICT)
class PartitionConfig:
    kind: Literal["dirichlet", "iid", "pathological", "natural", "round_robin", "random", "manual"]
    seed: Natural
    min_size: Count
    alpha: Positive | None
    classes_per_client: Count | None
    mapping: str | None


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    name: str
    image_size: Count | None
    dropout: Dropout
    channels: Count | None
    pretrained: str | None
    target: Target | None = None  # older runs lack this and what follows
    kwargs: Annotated[dict[str, Any], AfterValidator(Kwargs)] = Field(default_factory=Kwargs)
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    activation: Literal["gelu", "quick_gelu"] | None = None
    pooling: Literal["token", "mean"] | None = None

    @property
    def variant(self) -> Variant:
        """Return what a ViT's tensors do not show."""
        return Variant(self.layer_norm_eps, self.activation, self.pooling)


@dataclass(frozen=True, config=STRICT)
class LoRAConfig:
    enabled: bool
    rank: Count
    alpha: Positive
    targets: tuple[str, ...]
    dropout: Dropout
    rank_by_client: tuple[Count, ...] | None
    prune_gamma: Annotated[float, Field(gt=0, le=0.999)] | None
    prune_penalty: NotNegative
    rank_min: Count
    adapter: str | None


@dataclass(frozen=True, config=STRICT)
class StrategyConfig:
    name: Literal["fedavg", "fedlora"]
    aggregation: Literal["fedit", "ffa", "rolora", "fedsa", "flora", "fedex", "flexlora", "hetlora"] | None
    fraction_train: Fraction
    fraction_evaluate: Fraction
    weighting: Literal["num-examples", "uniform", "alignment"]
    server_optimizer: Literal["fedadam", "fedyogi", "fedavgm"] | None
    server_lr: Positive | None
    server_momentum: Annotated[float, Field(ge=0, le=0.999)]
    norm_limit: Annotated[float, Field(gt=1)] | None
    max_weight_share: Fraction | None
    min_replies: Count
    min_clients: Count | None
    wait_for_clients: Positive
    timeout: Positive
    target: Target | None
    # runs of an older flapp, which tools read, lack what follows
    robust: Literal["none", "norm_bound", "trimmed_mean", "median", "krum", "multi_krum"] = "none"
    clip_multiple: Positive = 2.0
    malicious: Count | None = None
    selected: Count | None = None


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    optimizer: Literal["adamw", "sgd"] | Target
    lr: Positive
    schedule: Literal["cosine", "constant"]
    momentum: Annotated[float, Field(ge=0, le=1)]
    weight_decay: NotNegative
    batch_size: Count
    epochs: Count
    steps: Count | None
    accumulate: Count
    clip_norm: Positive | None
    proximal_mu: NotNegative
    precision: Literal["float32", "bfloat16"]
    compile: bool
    device: Literal["auto", "cpu", "cuda"]
    threads: Count
    loss: Target | None
    mods: tuple[Target, ...] | None


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    every: Count
    personal_epochs: Natural
    personal_lr: Positive
    batch_size: Count
    central: bool
    objective: Literal["accuracy", "personal_accuracy", "loss"]
    select: Literal["last", "best"]
    metrics: Target | None
    scores: Target | None
    validation_fraction: Annotated[float, Field(ge=0, le=0.9)] | None


@dataclass(frozen=True, config=STRICT)
class StoppingConfig:
    metric: Literal["accuracy", "personal_accuracy", "loss"] | None
    patience: Count
    min_delta: NotNegative


@dataclass(frozen=True, config=STRICT)
class ResultsConfig:
    tensorboard: bool


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    enabled: bool
    keep_rounds: Count | None
    chunk_bytes: Count | None
    chunk_num: Count | None
    on_error: Literal["fail", "warn"]
    replay: bool


@dataclass(frozen=True, config=STRICT)
class PrivacyConfig:
    kind: Literal["none", "local", "central"]
    clipping_norm: Positive
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Positive | None = None  # older runs lack this and what follows
    clipping: Literal["fixed", "adaptive"] = "fixed"
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    clipping_lr: Positive = 0.2
    count_noise: Positive | None = None
    noise: Literal["seeded", "secure"] | None = None
    accountant: Literal["rdp", "pld"] = "rdp"
    publish: Literal["all", "totals"] = "all"


@dataclass(frozen=True, config=STRICT)
class SplitConfig:
    model_storage_dir: str | None
    auto_save_split_models: bool
    split_config: str


@dataclass(frozen=True, config=STRICT)
class DistributedDataConfig:
    enabled: bool
    shard_path: str | None
    manifest: str | None
    streaming: bool
    strict_check: bool


@dataclass(frozen=True, config=STRICT)
class DeploymentConfig:
    kind: Literal["inline", "simulation", "superlink"]
    workers: Natural | None
    federation: str | None
    address: str | None
    root_certificates: str | None
    client_keys: str | None
    port: Annotated[int, Field(ge=1, le=65535)] | None
    client_cpus: Count
    client_gpus: NotNegative
    total_cpus: Count | None
    ray_address: str | None


@dataclass(frozen=True, config=STRICT)
class NodeConfig:
    """What only this node knows: its client id and folders in a deployment, or its place among the simulated nodes.

    allow_code: packages and folders whose code the run's targets may name.
    """

    client_id: str | None = None
    shard_path: str | None = None
    checkpoint_dir: str | None = None
    home: str | None = None
    allow_code: tuple[str, ...] = ()
    partition_id: int = 0
    num_partitions: int = 0


@dataclass(frozen=True, config=STRICT)
class Config:
    home: str
    code: str | None
    run_name: str
    experiment: str
    seed: Natural
    clients: Count
    num_rounds: Count
    resume: bool
    resume_from: Count | None
    resume_anyway: bool
    dataset: DatasetConfig
    partition: PartitionConfig
    model: ModelConfig
    lora: LoRAConfig
    strategy: StrategyConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    stopping: StoppingConfig
    results: ResultsConfig
    checkpoint: CheckpointConfig
    split: SplitConfig
    privacy: PrivacyConfig
    distributed_data: DistributedDataConfig
    deployment: DeploymentConfig

    def __hash__(self) -> int:  # caches look a config up for every message, and it has a hundred settings
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = hash(tuple(getattr(self, field.name) for field in fields(self)))
        return int(self.__dict__["_hash"])

    @cached_property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """Return what the settings name in the user's own code, each target after its setting."""
        found = []
        for setting in TARGET_SETTINGS:
            group, _, key = setting.partition(".")
            value = getattr(getattr(self, group), key)
            named = value if isinstance(value, tuple) else (value,)
            found += [(setting, target) for target in named if isinstance(target, str) and ":" in target]
        return tuple(found)

    @property
    def chooses(self) -> bool:
        """Return whether this run uses evaluations to decide when to stop or which round's model to keep."""
        return self.evaluate.select == "best" or self.stopping.metric is not None

    @property
    def held_out(self) -> float:
        """Return the share of each client's training samples that is held out for validation."""
        fraction = self.evaluate.validation_fraction
        if fraction is not None or self.partition.kind in WRITER_PARTITIONS:  # writers' samples are split already
            return fraction or 0.0
        return VALIDATION_FRACTION if self.chooses else 0.0

    @property
    def validates(self) -> bool:
        """Say whether evaluations also measure the clients' validation samples; choices and objective go by these."""
        return self.partition.kind in WRITER_PARTITIONS or self.held_out > 0

    @property
    def data_dir(self) -> Path:
        return Path(self.home) / "data"

    @property
    def shards_dir(self) -> Path:
        return Path(self.distributed_data.shard_path or self.data_dir / self.dataset.name / "shards")

    @property
    def manifest_path(self) -> Path:
        return Path(self.distributed_data.manifest or self.shards_dir)

    @property
    def models_dir(self) -> Path:
        return Path(self.home) / "models"

    @property
    def runs_dir(self) -> Path:
        return Path(self.home) / "runs"
