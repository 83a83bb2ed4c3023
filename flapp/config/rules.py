"""Check combinations of settings: find those that are invalid together, and say how to fix them."""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path

from flapp.config.schema import (
    RANKS_MAY_DIFFER,
    ROBUST_RULES,
    VALIDATION_FRACTION,
    WRITER_PARTITIONS,
    Config,
    ConfigError,
    StrategyConfig,
)
from flapp.model.layout import SIZES, variant_fault
from flapp.model.split.files import check_points, parse_points

PATHS = (  # settings that are paths; the apps run in another folder, so relative ones are refused
    *("home", "code", "dataset.source", "partition.mapping", "model.pretrained", "lora.adapter"),
    *("split.model_storage_dir", "distributed_data.shard_path", "distributed_data.manifest"),
    *("deployment.federation", "deployment.root_certificates", "deployment.client_keys"),
)
NEEDS_MALICIOUS = ("trimmed_mean", "krum", "multi_krum")  # values of strategy.robust
PRIVATE_RULES = ("fedit", "ffa", "rolora")  # of strategy.aggregation, for privacy=central
GROUPS = 16  # the clients of a round are cut into about this many groups
NAME_BYTES = 255  # the longest name that file systems take


def check_together(config: Config) -> None:
    """Raise ConfigError for the first setting that does not go with the others."""
    parts = (_run_faults, _code_faults, _data_faults, _evaluation_faults, _lora_faults, _rank_faults, _strategy_faults)
    for part in (*parts, _robust_faults, _privacy_faults, _central_faults, _runtime_faults, _split_faults):
        if fault := next(part(config), None):
            raise ConfigError(fault)


def _run_faults(config: Config) -> Iterator[str]:
    """Yield faults of paths, and of what names and resumes a run."""
    for setting in PATHS:
        value = reduce(getattr, setting.split("."), config)
        if value is not None and not Path(str(value)).is_absolute():
            yield f"{setting}={value} is relative, and the apps run in another folder: give an absolute path"
    run_name, name = config.run_name, Path(config.run_name)
    if not run_name.isprintable():
        yield f"run_name={run_name!r} has characters that cannot be printed: give a plain name"
    if name.is_absolute() or ".." in name.parts or not name.parts:
        yield f"run_name={run_name} leaves home/runs: give a plain name"
    if any(len(part.encode(errors="replace")) > NAME_BYTES for part in name.parts):
        yield f"run_name={run_name} has more than the {NAME_BYTES} bytes of a file name: give a shorter name"
    if config.resume_from is not None and not config.resume:
        yield f"resume_from={config.resume_from} has no effect without resume=true: add it"
    if config.resume_anyway and not config.resume:
        yield "resume_anyway=true has no effect without resume=true: add it"


def _data_faults(config: Config) -> Iterator[str]:
    """Yield faults of dataset, partition, shards and the model over them."""
    data, kind, model, shards = config.dataset, config.partition.kind, config.model, config.distributed_data
    images = len(data.shape) == 3
    if data.materialize is not None and not images:
        yield f"dataset.materialize={data.materialize} resizes images, dataset={data.name} has none: leave it out"
    if model.name not in ("linear", "custom") and not (images and data.classes):
        found = f"needs images with classes, dataset={data.name} has no {'classes' if images else 'images'}"
        yield f"model={model.name} {found}: set model=linear or model=custom"
    if model.image_size is not None and not images:
        yield f"model.image_size={model.image_size} resizes images, dataset={data.name} has none: set it to null"
    if model.name == "linear" and (model.channels is not None or model.dropout > 0):
        yield "model=linear has neither channels nor dropout: leave model.channels and model.dropout out"
    if fault := variant_fault(model.name, model.variant):
        yield fault
    if data.classes == 0 and kind != "iid":
        yield f"partition={kind} needs classes, dataset={data.name} has none: set partition=iid"
    for needing, setting in (("dirichlet", "alpha"), ("pathological", "classes_per_client")):
        if kind == needing and getattr(config.partition, setting) is None:
            yield f"partition={kind} needs partition.{setting}: set it to a number above 0"
    if data.augment is True and not images:
        yield f"dataset.augment=true changes images, dataset={data.name} has none: set dataset.augment=false"
    if shards.enabled and kind not in WRITER_PARTITIONS:
        choices = ", ".join(WRITER_PARTITIONS)
        yield f"partition={kind} cuts a shared artifact, shards are of whole writers: set it to one of {choices}"
    if shards.streaming and not shards.enabled:
        yield "distributed_data.streaming=true has no effect without distributed_data.enabled=true: add it"
    if shards.streaming and (data.augment or model.image_size is not None):
        fix = "set dataset.augment=false and model.image_size=null"
        yield f"distributed_data.streaming=true gives images as they are stored: {fix}"
    if data.normalization == "imagenet" and (not images or data.shape[2] != 3):
        found = f"needs images of 3 channels, got shape {list(data.shape)}"
        yield f"dataset.normalization=imagenet {found}: set dataset.normalization=half"


def _code_faults(config: Config) -> Iterator[str]:
    """Yield faults of targets in the user's own code."""
    model = config.model
    if model.name == "custom" and model.target is None:
        yield "model=custom needs your own network: set model.target=module:function"
    if model.name != "custom" and (model.target is not None or model.kwargs):
        yield f"model.target and model.kwargs are for model=custom, got model={model.name}: set model=custom"
    if model.name == "custom" and (model.channels is not None or model.dropout > 0):
        yield "model=custom takes its own arguments only: set model.kwargs, leave model.channels and model.dropout out"
    if config.evaluate.scores is not None and config.evaluate.metrics is None:
        found = f"evaluate.scores={config.evaluate.scores} needs sums, and evaluate.metrics is not set"
        yield f"{found}: set it to module:function"
    if config.train.momentum > 0 and ":" in config.train.optimizer:
        fix = "leave it out, or pass the momentum in your function"
        yield f"train.momentum={config.train.momentum} does not reach train.optimizer={config.train.optimizer}: {fix}"


def _evaluation_faults(config: Config) -> Iterator[str]:
    """Yield faults of evaluation, early stopping and validation samples."""
    stopping, evaluate, kind = config.stopping, config.evaluate, config.partition.kind
    for setting, metric in (("evaluate.objective", evaluate.objective), ("stopping.metric", stopping.metric)):
        yield from _metric_faults(config, setting, metric)
    fraction, best = evaluate.validation_fraction, evaluate.select == "best"
    given = f"evaluate.validation_fraction={fraction}"
    if fraction is not None and kind in WRITER_PARTITIONS:
        yield f"{given}: clients of partition={kind} have validation samples of their own: set it to null"
    if config.chooses and fraction == 0:
        chooser = "evaluate.select=best" if best else f"stopping.metric={stopping.metric}"
        fix = f"set it to null (which holds out {VALIDATION_FRACTION:g}) or to another fraction"
        yield f"{chooser} chooses by validation samples, and {given} holds out none: {fix}"
    every, rounds = f"evaluate.every={evaluate.every}", f"num_rounds={config.num_rounds}"
    if stopping.metric is not None and evaluate.every * (1 + stopping.patience) >= config.num_rounds:
        found = f"stopping.patience={stopping.patience} evaluations without progress, at {every}, do not fit into"
        yield f"{found} {rounds}: lower stopping.patience or evaluate.every"
    if best and evaluate.every >= config.num_rounds:
        yield f"evaluate.select=best has only the last round to choose from: lower {every} below {rounds}"


def _metric_faults(config: Config, setting: str, metric: str | None) -> Iterator[str]:
    """Yield faults of a setting that names a metric: evaluations must measure it."""
    fedsa, classes = config.strategy.aggregation == "fedsa", config.dataset.classes
    if metric not in (None, "loss") and not classes:
        yield f"{setting}={metric} needs classes, dataset={config.dataset.name} has none: set {setting}=loss"
    if metric == "personal_accuracy" and not (config.evaluate.personal_epochs > 0 or fedsa):
        yield f"{setting}={metric} needs fine-tuning: set evaluate.personal_epochs to 1 or more"
    if fedsa and metric in ("accuracy", "loss"):
        found = "is of the global model, which lacks every client's B with strategy.aggregation=fedsa"
        yield f"{setting}={metric} {found}: " + (f"set {setting}=personal_accuracy" if classes else "use another rule")


def _lora_faults(config: Config) -> Iterator[str]:
    """Yield faults of adapters and the rule that aggregates them."""
    name, lora, rule = config.strategy.name, config.lora, config.strategy.aggregation
    if name == "fedlora" and not lora.enabled:
        yield "FedLoRA needs a model with adapters: set lora=default (got lora=none)"
    if name != "fedlora" and lora.enabled:
        yield f"lora=default trains adapters, strategy={name} sends whole models: set strategy=fedlora or lora=none"
    if (name == "fedlora") != (rule is not None):
        found = f"strategy.aggregation={rule} is for adapters, strategy={name} has none: set strategy=fedlora"
        yield found if rule else "strategy=fedlora needs a rule: set strategy.aggregation"
    if lora.enabled and not lora.targets:
        yield "lora.targets is empty: name the layers that get adapters, such as [qkv,proj]"
    if rule == "fedsa" and not config.checkpoint.enabled:
        yield "strategy.aggregation=fedsa keeps each client's B in its chunk store: set checkpoint=recent"
    if rule == "fedsa" and lora.adapter is not None:
        yield "lora.adapter gives all clients one B, strategy.aggregation=fedsa gives each its own: use another rule"
    if (lora.rank_by_client is not None or lora.prune_gamma is not None) and config.strategy.weighting == "alignment":
        fix = "leave lora.rank_by_client and lora.prune_gamma out"
        yield f"strategy.weighting=alignment compares updates of one shape: {fix}"


def _rank_faults(config: Config) -> Iterator[str]:
    """Yield faults of ranks that differ or are pruned."""
    lora, rule = config.lora, f"strategy.aggregation={config.strategy.aggregation}"
    ranks = lora.rank_by_client or (lora.rank,)
    if lora.rank_by_client is not None and config.strategy.aggregation not in RANKS_MAY_DIFFER:
        fix = f"choose one of {', '.join(RANKS_MAY_DIFFER)}"
        yield f"lora.rank_by_client gives clients different ranks, which {rule} cannot aggregate: {fix}"
    if max(ranks) > lora.rank:
        yield f"lora.rank_by_client={list(ranks)} has a rank above lora.rank={lora.rank}: raise lora.rank"
    if lora.prune_gamma is not None and config.strategy.aggregation != "hetlora":
        found = f"lora.prune_gamma={lora.prune_gamma} lets clients prune their ranks, which {rule} does not do"
        yield f"{found}: set strategy.aggregation=hetlora or lora.prune_gamma=null"
    for setting, value, off in (("prune_penalty", lora.prune_penalty, 0), ("rank_min", lora.rank_min, 1)):
        if lora.prune_gamma is None and value > off:
            yield f"lora.{setting}={value} has no effect without lora.prune_gamma: set one, such as 0.75"
    if lora.rank_min > min(ranks):
        found = f"is more than the smallest rank that a client starts with, {min(ranks)}"
        yield f"lora.rank_min={lora.rank_min} {found}: lower lora.rank_min"


def _strategy_faults(config: Config) -> Iterator[str]:
    """Yield faults of local training, the server's rule and stores."""
    train, strategy, checkpoint = config.train, config.strategy, config.checkpoint
    rule, sampled = strategy.aggregation, sample_size(strategy.fraction_train, config.clients)
    if train.optimizer == "adamw" and train.momentum > 0:
        yield f"train.momentum={train.momentum} has no meaning for adamw: set train.optimizer=sgd or train.momentum=0"
    if strategy.server_optimizer is not None and rule not in (None, "fedit"):
        given = f"strategy.server_optimizer={strategy.server_optimizer}"
        yield f"{given} goes only with fedit and fedavg, got strategy.aggregation={rule}: use one of them"
    if strategy.server_lr is not None and strategy.server_optimizer is None:
        yield f"strategy.server_lr={strategy.server_lr} has no effect without strategy.server_optimizer: set one"
    if strategy.min_replies > sampled:
        found = f"strategy.min_replies={strategy.min_replies} can never be met with {sampled} clients in a round"
        yield f"{found}: lower it, or raise clients or strategy.fraction_train"
    if (strategy.min_clients or 0) > config.clients:
        yield f"strategy.min_clients={strategy.min_clients} is more than clients={config.clients}: lower it"
    if checkpoint.chunk_bytes is not None and checkpoint.chunk_num is not None:
        given = f"checkpoint.chunk_bytes={checkpoint.chunk_bytes} and checkpoint.chunk_num={checkpoint.chunk_num}"
        yield f"{given} are two ways to cut: set one of them to null"


def _robust_faults(config: Config) -> Iterator[str]:
    """Yield faults of an average that survives bad clients."""
    strategy, rule, given = config.strategy, config.strategy.aggregation, f"strategy.robust={config.strategy.robust}"
    if strategy.selected is not None and strategy.robust != "multi_krum":
        yield f"strategy.selected={strategy.selected} is for strategy.robust=multi_krum, got {given}: set it to null"
    if strategy.robust == "none":
        return
    if strategy.robust in NEEDS_MALICIOUS and strategy.malicious is None:
        yield f"{given} needs strategy.malicious: set it to the number of bad clients that a round may have"
    if rule is not None and rule not in ROBUST_RULES:
        found = f"replaces a plain average of A and B, which strategy.aggregation={rule} is not"
        yield f"{given} {found}: use {', '.join(ROBUST_RULES)} or fedavg"
    if strategy.weighting == "alignment":
        yield f"strategy.weighting=alignment is a defence of its own, it does not go with {given}: use num-examples"
    if (kind := config.privacy.kind) != "none":
        yield f"{given} looks for updates that differ, privacy={kind} hides them in noise: turn one of the two off"
    if strategy.target is not None:
        found = f"strategy.target={strategy.target} decides itself how replies are combined"
        yield f"{found}: set strategy.robust=none or leave strategy.target out"
    sampled, needed = sample_size(strategy.fraction_train, config.clients), fewest_replies(strategy)
    if sampled < needed:
        used = {"malicious": strategy.robust in NEEDS_MALICIOUS, "selected": strategy.selected is not None}
        lower = "".join(f"lower strategy.{name}={getattr(strategy, name)}, or " for name in used if used[name])
        found = f"{given} needs {needed} clients in a round, and a round has {sampled}"
        yield f"{found}: {lower}raise clients or strategy.fraction_train"


def _privacy_faults(config: Config) -> Iterator[str]:
    """Yield faults of differential privacy of any kind."""
    privacy, rule = config.privacy, config.strategy.aggregation
    if privacy.kind == "local" and rule not in (None, "fedit"):
        found = f"goes only with fedit and fedavg, got strategy.aggregation={rule}"
        yield f"privacy=local {found}: use one of them, or privacy=central"
    if privacy.kind != "none" and privacy.delta * config.clients >= 1:
        found = f"privacy.delta={privacy.delta} lets the whole update of one in {config.clients} clients leak"
        yield f"{found}: set it far below 1/clients, such as {0.01 / config.clients:.0e}"
    only_central = {"noise_multiplier": None, "count_noise": None, "noise": None, "clipping": "fixed"}
    for setting, off in only_central.items():
        if privacy.kind != "central" and (value := getattr(privacy, setting)) != off:
            yield f"privacy.{setting}={value} has no effect with privacy={privacy.kind}: set privacy=central"
    for setting in ("fraction_train", "fraction_evaluate"):
        fraction = getattr(config.strategy, setting)
        if privacy.publish == "totals" and sample_size(fraction, config.clients) < 2:
            found = f"adds up clients, and strategy.{setting}={fraction} of clients={config.clients} is one client"
            yield f"privacy.publish=totals {found}: raise one of them"
    if privacy.count_noise is not None and privacy.clipping == "fixed":
        yield f"privacy.count_noise={privacy.count_noise} has no effect: set privacy.clipping=adaptive"


def _central_faults(config: Config) -> Iterator[str]:
    """Yield what central privacy does not go with: other averages than a plain one, and choices by evaluations."""
    strategy = config.strategy
    if config.privacy.kind != "central":
        return
    if (rule := strategy.aggregation) not in (None, *PRIVATE_RULES):
        found = f"strategy.aggregation={rule} does more than average"
        yield f"privacy=central adds noise to an average, {found}: use {', '.join(PRIVATE_RULES)} or fedavg"
    if strategy.target is not None:
        found = f"strategy.target={strategy.target} averages in a way of its own"
        yield f"privacy=central adds noise to a plain average, {found}: leave it out"
    if strategy.weighting != "uniform":
        found = f"strategy.weighting={strategy.weighting}"
        yield f"privacy=central bounds what each client adds, {found} does not: set strategy.weighting=uniform"
    if strategy.norm_limit is not None:
        found = f"strategy.norm_limit={strategy.norm_limit} would leave some out, depending on other clients' data"
        yield f"privacy=central clips updates, {found}: set strategy.norm_limit=null"
    if strategy.min_replies > 1:
        found = f"strategy.min_replies={strategy.min_replies} could end the run when few are drawn"
        yield f"privacy=central draws a random number of clients, {found}: set strategy.min_replies=1"
    chosen = "chooses by evaluations, which privacy=central does not protect"
    if config.evaluate.select == "best":
        yield f"evaluate.select=best {chosen}: set evaluate.select=last"
    if config.stopping.metric is not None:
        yield f"stopping.metric={config.stopping.metric} {chosen}: set stopping.metric=null"


def _runtime_faults(config: Config) -> Iterator[str]:
    """Yield settings that only another runtime has."""
    deployment, inline = config.deployment, config.deployment.kind == "inline"
    if deployment.client_keys is not None and deployment.kind != "superlink":
        found = "pins keys of SuperNodes, and simulated nodes have none: leave it out, or set deployment=local"
        yield f"deployment.client_keys={deployment.client_keys} {found}"
    kinds = {"port": "simulation", "ray_address": "simulation", "address": "local", "root_certificates": "local"}
    for key, kind in kinds.items():
        if inline and (value := getattr(deployment, key)) is not None:
            yield f"deployment.{key}={value} is for deployment={kind}: add deployment={kind}"
    if deployment.workers is not None and not inline:
        fix = "leave it out, or set deployment=inline"
        yield f"deployment.workers={deployment.workers} is for deployment=inline: {fix}"


def _split_faults(config: Config) -> Iterator[str]:
    """Yield the reasons why the final model cannot be split: no folder, no ViT, or split points outside its layers."""
    split, name = config.split, config.model.name
    if not split.auto_save_split_models:
        return
    if split.model_storage_dir is None:
        yield "split.auto_save_split_models=true needs a folder: set split.model_storage_dir"
    if name not in SIZES:
        yield f"split.auto_save_split_models=true splits ViTs only, got model={name}: set split=none"
        return
    try:
        check_points(*parse_points(split.split_config), SIZES[name][1])
    except ValueError as error:
        yield f"split.split_config={split.split_config} does not go with model={name}: {error}"


def sample_size(fraction: float, clients: int) -> int:
    """Return how many of `clients` a fraction means: rounded, and at least one."""
    return max(1, round(fraction * clients))


def fewest_replies(strategy: StrategyConfig) -> int:
    """Return how many valid replies a round of training needs at least.

    A trimmed mean needs one value that is not trimmed, Krum 2 f + 3 clients of which f are bad (Blanchard et al. 2017).
    """
    bad, selected = strategy.malicious or 0, strategy.selected or 1
    least = {"none": 1, "norm_bound": 3, "median": 3, "trimmed_mean": 2 * bad + 1, "krum": 2 * bad + 3}
    least["multi_krum"] = max(2 * bad + 3, selected + bad + 2)
    return max(strategy.min_replies, least[strategy.robust])


def group_size(clients: int) -> int:
    """Return how many of a round's clients share a message: 1 below 32. From 32 on there are 16 to 24 messages."""
    return max(1, clients // GROUPS)


def count_messages(config: Config) -> int:
    """Return the largest number of messages that a phase sends when any node can serve any client."""
    drawn = (config.strategy.fraction_train, config.strategy.fraction_evaluate)
    counts = [sample_size(fraction, config.clients) for fraction in drawn]
    return max(-(-count // group_size(count)) for count in counts)
