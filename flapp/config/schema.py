"""Every setting of flapp by name, type and range. The values are in conf/; load.py reads them."""

import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flapp.untrusted import printable

T = TypeVar("T")

RANKS_MAY_DIFFER = ("flora", "flexlora", "hetlora")  # rules of aggregation
VALIDATION_FRACTION = 0.2  # of the training samples, where something chooses and nothing else is said
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
    target: Target | None = None  # as above
    kwargs: Annotated[dict[str, Any], AfterValidator(Kwargs)] = Field(default_factory=Kwargs)
    layer_norm_eps: Positive | None = None
    activation: Literal["gelu", "quick_gelu"] | None = None
    pooling: Literal["token", "mean"] | None = None


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
    noise_multiplier: Positive | None = None  # as above
    clipping: Literal["fixed", "adaptive"] = "fixed"
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    clipping_lr: Positive = 0.2
    count_noise: Positive | None = None
    noise: Literal["seeded", "secure"] | None = None
    accountant: Literal["rdp", "pld"] = "rdp"


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


PROBLEMS = {  # what to say for pydantic's types of errors, with their context filled in
    "json_invalid": "has text that is not Unicode: use plain characters",
    "missing": "is missing: give it a value",
    "dataclass_type": "must be a group of settings",
    "int_type": "must be a whole number",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "greater_than": "is out of range: it must be more than {gt:g}",
    "greater_than_equal": "is out of range: it must be at least {ge:g}",
    "less_than": "is out of range: it must be less than {lt:g}",
    "less_than_equal": "is out of range: it must be at most {le:g}",
    "literal_error": "is not known: choose one of {expected}",
    "string_pattern_mismatch": "is not a target: write module:function, such as task:build_model",
}


def from_plain(cls: type[T], values: Any, prefix: str = "") -> T:
    """Return the settings `cls` of plain nested values, or raise ConfigError; prefix: of the names in the error."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values))  # strict JSON has lists for tuples, as YAML has
    except ValidationError as error:
        errors = error.errors(include_url=False)
        unknown = [each for each in errors if each["type"] == "unexpected_keyword_argument"]
        raise ConfigError(_describe((unknown or errors)[0], cls, prefix)) from None


def _describe(error: Mapping[str, Any], cls: type, prefix: str) -> str:
    """Say in one line what pydantic found wrong with one setting."""
    kind, found = error["type"], error["input"]
    path = [part for part in error["loc"] if isinstance(part, str)]  # without places in lists
    if kind != "unexpected_keyword_argument":
        path = [part for part in path if part.isidentifier() and part != "bool"]  # without members of unions
    key = prefix + ".".join(path)
    if kind == "unexpected_keyword_argument":
        siblings = [name.rpartition(".") for name in setting_types(cls)]
        close = hint(path[-1], [name for group, _, name in siblings if group == ".".join(path[:-1])])
        return f"{key} is not a setting{close}"
    context = error.get("ctx", {})
    choices = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
    problem = PROBLEMS.get(kind, printable(error["msg"])).format_map({**context, "expected": choices})
    if kind in ("bool_type", "literal_error") and TARGET in str(setting_types(cls).get(".".join(path))):
        problem += ", or module:function"
    if kind == "dataclass_type":
        return f"{key or 'the config'} {problem}, got {printable(found)}"
    if kind == "missing" or not key:
        return f"{key or 'the config'} {problem}"
    return f"{key}={printable(found)} {problem}" + (f", got {type(found).__name__}" if kind.endswith("_type") else "")


def setting_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return the annotation of every setting by its dotted name, those of groups included."""
    found: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if is_dataclass(annotation):
            found |= setting_types(typing.cast(type, annotation), f"{prefix}{name}.")
        found[prefix + name] = annotation
    return found


def hint(key: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: what was probably meant."""
    known = list(names)
    close = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(
        key, known, n=1, cutoff=0.5
    )
    return f": did you mean {close[0]}?" if close else ": see conf/config.yaml for the settings"
