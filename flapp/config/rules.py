"""Settings that are fine alone but not together, each with what is wrong and how to mend it."""

from functools import reduce
from pathlib import Path

from flapp.config.schema import (
    RANKS_MAY_DIFFER,
    VALIDATION_FRACTION,
    WRITER_PARTITIONS,
    Config,
    ConfigError,
    DeploymentConfig,
)
from flapp.model.layout import SIZES
from flapp.model.split.files import check_points, parse_points

PATHS = (
    ("home",),
    ("dataset", "source"),
    ("partition", "mapping"),
    ("model", "pretrained"),
    ("lora", "adapter"),
    ("split", "model_storage_dir"),
    ("distributed_data", "shard_path"),
    ("distributed_data", "manifest"),
    ("deployment", "federation"),
    ("deployment", "root_certificates"),
    ("deployment", "client_keys"),
)

GROUPS = 16  # that many clients are cut into, about
NAME_BYTES = 255  # that a file system takes for one name


def check_together(config: Config) -> None:
    """Refuse settings that are fine alone but not together: (broken, what is wrong and how to mend it)."""
    for path in PATHS:
        value = reduce(getattr, path, config)
        if value is not None and not Path(str(value)).is_absolute():
            setting = ".".join(path)
            raise ConfigError(
                f"{setting}={value} is relative, and the apps run in another folder: give an absolute path"
            )
    images, train, strategy = len(config.dataset.shape) == 3, config.train, config.strategy
    shards, lora = config.distributed_data, config.lora
    stopping, every = config.stopping, config.evaluate.every
    sampled = sample_size(strategy.fraction_train, config.clients)
    rules = [
        *name_rules(config.run_name),
        (
            config.resume_from is not None and not config.resume,
            f"resume_from={config.resume_from} goes back in a run that has begun: add resume=true",
        ),
        (
            config.resume_anyway and not config.resume,
            "resume_anyway=true resumes a run although its source or data changed: add resume=true",
        ),
        (
            config.dataset.materialize is not None and not images,
            f"dataset.materialize={config.dataset.materialize} resizes images, dataset={config.dataset.name} has none: "
            "leave it out",
        ),
        (
            config.model.name != "linear" and not (images and config.dataset.classes),
            f"model={config.model.name} classifies images, dataset={config.dataset.name} has none: set model=linear",
        ),
        (
            config.dataset.classes == 0 and config.partition.kind != "iid",
            f"partition={config.partition.kind} needs classes, dataset={config.dataset.name} has none: "
            "set partition=iid",
        ),
        (
            config.partition.kind == "dirichlet" and config.partition.alpha is None,
            "partition=dirichlet needs partition.alpha: set it to a number above 0",
        ),
        (
            config.partition.kind == "pathological" and config.partition.classes_per_client is None,
            "partition=pathological needs partition.classes_per_client: set it to a number above 0",
        ),
        (
            config.dataset.augment and not images,
            f"dataset.augment=true changes images, dataset={config.dataset.name} has none: set dataset.augment=false",
        ),
        (
            shards.enabled and config.partition.kind not in WRITER_PARTITIONS,
            f"partition={config.partition.kind} cuts a shared artifact, distributed_data.enabled=true has shards of "
            f"whole writers: set partition to one of {', '.join(WRITER_PARTITIONS)}",
        ),
        (
            shards.streaming and not shards.enabled,
            "distributed_data.streaming=true streams shards: set distributed_data.enabled=true",
        ),
        (
            shards.streaming and (config.dataset.augment or config.model.image_size is not None),
            "distributed_data.streaming=true gives images as they are stored: set dataset.augment=false and "
            "model.image_size=null",
        ),
        *metric_rules(config, "evaluate.objective", config.evaluate.objective),
        *metric_rules(config, "stopping.metric", config.stopping.metric),
        *validation_rules(config),
        (
            stopping.metric is not None and every * (1 + stopping.patience) >= config.num_rounds,
            f"stopping.patience={stopping.patience} evaluations, one in evaluate.every={every} rounds, are never over "
            f"before num_rounds={config.num_rounds}: lower stopping.patience or evaluate.every",
        ),
        (
            config.evaluate.select == "best" and every >= config.num_rounds,
            f"evaluate.select=best has only the last round to choose from: lower evaluate.every={every} below "
            f"num_rounds={config.num_rounds}",
        ),
        (
            config.dataset.normalization == "imagenet" and (not images or config.dataset.shape[2] != 3),
            f"dataset.normalization=imagenet needs images of 3 channels, got shape {list(config.dataset.shape)}: "
            "set dataset.normalization=half",
        ),
        (
            train.optimizer == "adamw" and train.momentum > 0,
            f"train.momentum={train.momentum} has no meaning for adamw: set train.optimizer=sgd or train.momentum=0",
        ),
        (
            strategy.name == "fedlora" and not lora.enabled,
            "FedLoRA needs a model with adapters: set lora=default (got lora=none)",
        ),
        (
            strategy.name != "fedlora" and lora.enabled,
            f"lora=default trains adapters, strategy={strategy.name} sends whole models: set strategy=fedlora "
            "or lora=none",
        ),
        (
            (strategy.name == "fedlora") != (strategy.aggregation is not None),
            f"strategy.aggregation={strategy.aggregation} does not go with strategy={strategy.name}: it is a rule for "
            "adapters, which strategy=fedlora has",
        ),
        (
            lora.enabled and not lora.targets,
            "lora.targets is empty: name the layers that get adapters, such as [qkv,proj]",
        ),
        (
            lora.rank_by_client is not None and strategy.aggregation not in RANKS_MAY_DIFFER,
            f"lora.rank_by_client gives clients different ranks, which strategy.aggregation={strategy.aggregation} "
            f"cannot aggregate: choose one of {', '.join(RANKS_MAY_DIFFER)}",
        ),
        (
            max(lora.rank_by_client or (0,)) > lora.rank,
            f"lora.rank_by_client={list(lora.rank_by_client or ())} has more than lora.rank={lora.rank}, the largest: "
            "raise lora.rank",
        ),
        (
            lora.prune_gamma is not None and strategy.aggregation != "hetlora",
            f"lora.prune_gamma={lora.prune_gamma} lets clients prune their ranks, which "
            f"strategy.aggregation={strategy.aggregation} does not do: set strategy.aggregation=hetlora or "
            "lora.prune_gamma=null",
        ),
        (
            lora.prune_gamma is None and lora.prune_penalty > 0,
            f"lora.prune_penalty={lora.prune_penalty} has no effect without lora.prune_gamma: set one, such as 0.75",
        ),
        (
            lora.prune_gamma is None and lora.rank_min > 1,
            f"lora.rank_min={lora.rank_min} has no effect without lora.prune_gamma: set one, such as 0.75",
        ),
        (
            lora.rank_min > min(lora.rank_by_client or (lora.rank,)),
            f"lora.rank_min={lora.rank_min} is more than the smallest rank that a client starts with, "
            f"{min(lora.rank_by_client or (lora.rank,))}: lower lora.rank_min",
        ),
        (
            strategy.aggregation == "fedsa" and not config.checkpoint.enabled,
            "strategy.aggregation=fedsa keeps each client's B in its chunk store: set checkpoint=recent (got "
            "checkpoint.enabled=false)",
        ),
        (
            (lora.rank_by_client is not None or lora.prune_gamma is not None) and strategy.weighting == "alignment",
            "strategy.weighting=alignment compares updates of one shape: leave lora.rank_by_client and "
            "lora.prune_gamma out",
        ),
        (
            strategy.server_optimizer is not None and strategy.aggregation not in (None, "fedit"),
            f"strategy.server_optimizer={strategy.server_optimizer} steps along an average, which "
            f"strategy.aggregation={strategy.aggregation} is not: use fedit or fedavg",
        ),
        (
            strategy.server_lr is not None and strategy.server_optimizer is None,
            f"strategy.server_lr={strategy.server_lr} has no effect without strategy.server_optimizer: set one",
        ),
        (
            strategy.aggregation == "fedsa" and lora.adapter is not None,
            "lora.adapter gives all clients one B, strategy.aggregation=fedsa leaves each its own: choose another rule",
        ),
        (
            config.model.name == "linear" and (config.model.channels is not None or config.model.dropout > 0),
            "model=linear has neither channels nor dropout: leave model.channels and model.dropout out",
        ),
        (
            config.privacy.enabled and strategy.aggregation not in (None, "fedit"),
            f"privacy.enabled=true perturbs all that was sent, strategy.aggregation={strategy.aggregation} has only a "
            "part sent back: use fedit or fedavg",
        ),
        (
            config.privacy.enabled and config.privacy.delta * config.clients >= 1,
            f"privacy.delta={config.privacy.delta} lets the whole update of one in {config.clients} clients leak: "
            f"set it far below 1/clients, such as {0.01 / config.clients:.0e}",
        ),
        (
            strategy.min_replies > sampled,
            f"strategy.min_replies={strategy.min_replies} can never be met with {sampled} clients in a round: "
            "lower it, or raise clients or strategy.fraction_train",
        ),
        (
            config.checkpoint.chunk_bytes is not None and config.checkpoint.chunk_num is not None,
            f"checkpoint.chunk_bytes={config.checkpoint.chunk_bytes} and checkpoint.chunk_num="
            f"{config.checkpoint.chunk_num} are two ways to cut: set one of them to null",
        ),
        (
            (strategy.min_clients or 0) > config.clients,
            f"strategy.min_clients={strategy.min_clients} is more than clients={config.clients}: lower it",
        ),
        (
            config.deployment.client_keys is not None and config.deployment.kind != "superlink",
            f"deployment.client_keys={config.deployment.client_keys} pins keys of SuperNodes, and simulated nodes have "
            "none: leave it out, or set deployment=local",
        ),
        *runtime_rules(config.deployment),
    ]
    for broken, message in rules:
        if broken:
            raise ConfigError(message)
    if config.split.auto_save_split_models:
        check_split(config)


def runtime_rules(settings: DeploymentConfig) -> list[tuple[bool, str]]:
    """Return the rules for settings that only another runtime has."""
    of_simulation = {"port": settings.port, "ray_address": settings.ray_address}
    of_local = {"address": settings.address, "root_certificates": settings.root_certificates}
    inline = settings.kind == "inline"
    return [
        *(
            (inline and value is not None, f"deployment.{key}={value} is for deployment={kind}: add deployment={kind}")
            for kind, group in (("simulation", of_simulation), ("local", of_local))
            for key, value in group.items()
        ),
        (
            settings.workers is not None and not inline,
            f"deployment.workers={settings.workers} is for deployment=inline: leave it out, or set deployment=inline",
        ),
    ]


def name_rules(run_name: str) -> list[tuple[bool, str]]:
    """Return the rules for the name of a run, which names folders: inside home/runs, and of a file system's names."""
    name = Path(run_name)
    too_long = [part for part in name.parts if len(part.encode(errors="replace")) > NAME_BYTES]
    return [
        (
            not run_name.isprintable(),
            f"run_name={run_name!r} has characters that cannot be printed: give a plain name",
        ),
        (
            name.is_absolute() or ".." in name.parts or not name.parts,
            f"run_name={run_name} leaves home/runs: give a plain name",
        ),
        (
            bool(too_long),
            f"run_name={run_name} has more than the {NAME_BYTES} bytes of a file name: give a shorter name",
        ),
    ]


def metric_rules(config: Config, setting: str, metric: str | None) -> list[tuple[bool, str]]:
    """Return the rules for a setting that names a metric of evaluations: the metric must be measured."""
    fedsa = config.strategy.aggregation == "fedsa"
    personal = config.evaluate.personal_epochs > 0 or fedsa
    return [
        (
            metric not in (None, "loss") and config.dataset.classes == 0,
            f"{setting}={metric} needs classes, dataset={config.dataset.name} has none: set {setting}=loss",
        ),
        (
            metric == "personal_accuracy" and not personal,
            f"{setting}={metric} needs fine-tuning: set evaluate.personal_epochs to 1 or more",
        ),
        (
            fedsa and metric in ("accuracy", "loss"),
            f"{setting}={metric} is of the global model, which lacks every client's B with "
            f"strategy.aggregation=fedsa: "
            + (f"set {setting}=personal_accuracy" if config.dataset.classes else "choose another rule"),
        ),
    ]


def validation_rules(config: Config) -> list[tuple[bool, str]]:
    """Return the rules for what is held out for validation: whatever chooses needs some, and shards have their own."""
    fraction, writers = config.evaluate.validation_fraction, config.partition.kind in WRITER_PARTITIONS
    best, metric = config.evaluate.select == "best", config.stopping.metric
    chooser = "evaluate.select=best" if best else f"stopping.metric={metric}"
    return [
        (
            fraction is not None and writers,
            f"evaluate.validation_fraction={fraction} holds out training samples, and clients of "
            f"partition={config.partition.kind} have validation samples of their own: set it to null",
        ),
        (
            config.chooses and fraction == 0,
            f"{chooser} chooses by validation samples, and evaluate.validation_fraction={fraction} holds out none: set "
            f"it to null (which holds out {VALIDATION_FRACTION:g}) or to another fraction",
        ),
    ]


def check_split(config: Config) -> None:
    """Refuse a final model that could not be stored split: no folder for it, no ViT, or points it has no layers for."""
    split, name = config.split, config.model.name
    if split.model_storage_dir is None:
        raise ConfigError("split.auto_save_split_models=true needs a folder: set split.model_storage_dir")
    if name not in SIZES:
        raise ConfigError(f"split.auto_save_split_models=true splits a ViT, which model={name} is not: set split=none")
    try:
        check_points(*parse_points(split.split_config), SIZES[name][1])
    except ValueError as error:
        raise ConfigError(f"split.split_config={split.split_config} does not go with model={name}: {error}") from error


def sample_size(fraction: float, clients: int) -> int:
    """Return how many of `clients` a fraction means: rounded, and at least one."""
    return max(1, round(fraction * clients))


def group_size(clients: int) -> int:
    """Return how many clients share a message in a round of so many: 1 below 32, and 16 to 31 groups for more."""
    return max(1, clients // GROUPS)


def count_messages(config: Config) -> int:
    """Return the most messages of a phase in which nodes can serve any client."""
    drawn = (config.strategy.fraction_train, config.strategy.fraction_evaluate)
    counts = [sample_size(fraction, config.clients) for fraction in drawn]
    return max(-(-count // group_size(count)) for count in counts)
