"""Every setting of flapp by name, type and range; the values live in conf/, the ways to them in config.py."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

RANKS_MAY_DIFFER = ("flora", "flexlora", "hetlora")  # rules of aggregation
VALIDATION_FRACTION = 0.2  # of the training samples, where something chooses and nothing else is said
WRITER_PARTITIONS = ("natural", "round_robin", "random", "manual")  # made with the shards, of whole writers


class ConfigError(ValueError):
    """A setting that cannot be used, said in one line that names the key and the fix."""


@dataclass(frozen=True)
class Bound:
    """A range: at least `ge`, more than `gt`, at most `le`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None

    def broken_by(self, value: float) -> str | None:
        """Say what the value should have been, or None when it is in range."""
        if self.ge is not None and not value >= self.ge:
            return f"at least {self.ge}"
        if self.gt is not None and not value > self.gt:
            return f"more than {self.gt}"
        if self.le is not None and not value <= self.le:
            return f"at most {self.le}"
        return None


Count = Annotated[int, Bound(ge=1)]
Natural = Annotated[int, Bound(ge=0)]
Positive = Annotated[float, Bound(gt=0)]
NotNegative = Annotated[float, Bound(ge=0)]
Fraction = Annotated[float, Bound(gt=0, le=1)]
Dropout = Annotated[float, Bound(ge=0, le=0.99)]


@dataclass(frozen=True)
class DatasetConfig:
    name: str
    shape: tuple[Count, ...]
    classes: Natural
    normalization: Literal["none", "half", "imagenet"]
    source: str | None
    download: bool
    materialize: Count | None
    augment: bool


@dataclass(frozen=True)
class PartitionConfig:
    kind: Literal["dirichlet", "iid", "pathological", "natural", "round_robin", "random", "manual"]
    seed: Natural
    min_size: Count
    alpha: Positive | None
    classes_per_client: Count | None
    mapping: str | None


@dataclass(frozen=True)
class ModelConfig:
    name: str
    image_size: Count | None
    dropout: Dropout
    channels: Count | None
    pretrained: str | None


@dataclass(frozen=True)
class LoRAConfig:
    enabled: bool
    rank: Count
    alpha: Positive
    targets: tuple[str, ...]
    dropout: Dropout
    rank_by_client: tuple[Count, ...] | None
    prune_gamma: Annotated[float, Bound(gt=0, le=0.999)] | None
    prune_penalty: NotNegative
    rank_min: Count
    adapter: str | None


@dataclass(frozen=True)
class StrategyConfig:
    name: Literal["fedavg", "fedlora"]
    aggregation: Literal["fedit", "ffa", "rolora", "fedsa", "flora", "fedex", "flexlora", "hetlora"] | None
    fraction_train: Fraction
    fraction_evaluate: Fraction
    weighting: Literal["num-examples", "uniform", "alignment"]
    server_optimizer: Literal["fedadam", "fedyogi", "fedavgm"] | None
    server_lr: Positive | None
    server_momentum: Annotated[float, Bound(ge=0, le=0.999)]
    norm_limit: Annotated[float, Bound(gt=1)] | None
    max_weight_share: Fraction | None
    min_replies: Count
    min_clients: Count | None
    wait_for_clients: Positive
    timeout: Positive


@dataclass(frozen=True)
class TrainConfig:
    optimizer: Literal["adamw", "sgd"]
    lr: Positive
    schedule: Literal["cosine", "constant"]
    momentum: Annotated[float, Bound(ge=0, le=1)]
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


@dataclass(frozen=True)
class EvaluateConfig:
    every: Count
    personal_epochs: Natural
    personal_lr: Positive
    batch_size: Count
    central: bool
    objective: Literal["accuracy", "personal_accuracy", "loss"]
    select: Literal["last", "best"]
    validation_fraction: Annotated[float, Bound(ge=0, le=0.9)] | None


@dataclass(frozen=True)
class StoppingConfig:
    metric: Literal["accuracy", "personal_accuracy", "loss"] | None
    patience: Count
    min_delta: NotNegative


@dataclass(frozen=True)
class ResultsConfig:
    tensorboard: bool


@dataclass(frozen=True)
class CheckpointConfig:
    enabled: bool
    keep_rounds: Count | None
    chunk_bytes: Count | None
    chunk_num: Count | None
    on_error: Literal["fail", "warn"]
    replay: bool


@dataclass(frozen=True)
class PrivacyConfig:
    enabled: bool
    clipping_norm: Positive
    epsilon: Positive
    delta: Annotated[float, Bound(gt=0, le=1)]


@dataclass(frozen=True)
class SplitConfig:
    model_storage_dir: str | None
    auto_save_split_models: bool
    split_config: str


@dataclass(frozen=True)
class DistributedDataConfig:
    enabled: bool
    shard_path: str | None
    manifest: str | None
    streaming: bool
    strict_check: bool


@dataclass(frozen=True)
class DeploymentConfig:
    kind: Literal["inline", "simulation", "superlink"]
    workers: Natural | None
    federation: str | None
    address: str | None
    root_certificates: str | None
    client_keys: str | None
    port: Annotated[int, Bound(ge=1, le=65535)] | None
    client_cpus: Count
    client_gpus: NotNegative
    total_cpus: Count | None
    ray_address: str | None


@dataclass(frozen=True)
class NodeConfig:
    """What only this node knows: its client id and folders in a deployment, or its place among the simulated nodes."""

    client_id: str | None = None
    shard_path: str | None = None
    checkpoint_dir: str | None = None
    home: str | None = None
    partition_id: int = 0
    num_partitions: int = 0


@dataclass(frozen=True)
class Config:
    home: str
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

    @property
    def chooses(self) -> bool:
        """Say whether this run chooses by evaluations: when to stop, or which round to end with."""
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
