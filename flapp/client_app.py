"""The ClientApp: unpack the message, work on this client's own data, pack the reply."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from logging import DEBUG, INFO, WARNING

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log
from flwr.common.logger import update_console_handler

from flapp.architecture import adapt, build, choose_device, pruned_rank
from flapp.base import find_base, load_base, receive_piece
from flapp.client.data import (
    ClientData,
    check_lives_here,
    clients_at,
    files_looked_up_once,
    make_batches,
    open_client_data,
)
from flapp.client.mods import checkpoint_mod, describe, group_mod, name_errors_mod, privacy_mod
from flapp.client.store import private_key
from flapp.config.load import derive_seed, load
from flapp.config.schema import Config, ConfigError, DatasetConfig, ModelConfig, NodeConfig
from flapp.messages import (
    METRICS,
    NUM_EXAMPLES,
    VAL,
    Claim,
    HeldArray,
    Instructions,
    MessageError,
    as_record,
    pack,
    pack_claims,
    pack_reply,
    unpack_arrays,
    unpack_instructions,
    unpack_piece,
    views,
)
from flapp.model.lora import adapted_layers, tail_norm, truncate_state
from flapp.privacy import find_sigma
from flapp.training import StepRules, TrainResult, build_optimizer, evaluate, keep_freed_memory, scheduled_lr, train

app = ClientApp(mods=[group_mod, name_errors_mod, checkpoint_mod, privacy_mod])
update_console_handler(timestamps=True)  # in the process that runs the app
# Tensors over the bytes of a message are only ever read: the model copies them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


@app.query("attest")
def attest(message: Message, context: Context) -> Message:
    """Say which clients live at this node and what they hold, or why one cannot take part."""
    try:
        config, site = load(context.run_config, context.node_config)
    except ConfigError:
        unpack_instructions(message)  # other source code is the likelier fault
        raise
    with files_looked_up_once(message.metadata.message_id):
        order: Callable[[], Instructions] = cache(partial(unpack_instructions, message))
        return pack_claims(message, [attest_client(order, config, site, name) for name in clients_at(config, site)])


def attest_client(unpack: Callable[[], Instructions], config: Config, site: NodeConfig, client_id: str) -> Claim:
    """Return one client's claim; what keeps it from taking part becomes the claim's fault, under its own name."""
    try:
        order = unpack()
        if config.privacy.enabled:
            find_sigma(config.privacy)  # fails without its package, before the first round
        data = open_client_data(config, site, client_id)
        base = find_base(config.models_dir, order.base) if order.base else ""
    except Exception as error:  # noqa: BLE001 - one client's fault must not keep its node's others out
        return Claim(client_id, fault=describe(error))
    counts = f"{data.claim.train} train, {data.claim.val} val, {data.claim.test} test"
    log(DEBUG if site.num_partitions else INFO, "client %s: %s samples from %s", client_id, counts, data.path)
    return replace(data.claim, base_digest=base)


@app.query("base")
def keep_piece(message: Message, context: Context) -> Message:
    """Keep a piece of the frozen base, which is put in place when the last has come."""
    order = unpack_instructions(message)
    config, _ = load(context.run_config, context.node_config)
    index, count, arrays = unpack_piece(message.content)
    tensors = arrays.to_torch_state_dict()
    missing = receive_piece(config.models_dir, order.base, context.node_id, index, count, tensors)
    return Message(RecordDict({METRICS: MetricRecord({"missing": missing})}), reply_to=message)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the received model on this client's training samples and send it back."""
    started = time.monotonic()
    config, order, data = begin(message, context)
    model = receive_model(config, order, message, context)
    lr = scheduled_lr(config.train.lr, config.train.schedule, order.server_round, config.num_rounds)
    learn = partial(fit, model, config, order, data, lr, config.train.epochs, config.train.steps, "train")
    if config.lora.prune_gamma is None:
        result, state = learn(), model.state_dict()
    else:
        result, state = prune(model, config, learn)
    metrics = {NUM_EXAMPLES: data.claim.train, "train-loss": result.loss, "seconds": time.monotonic() - started}
    if order.private:
        kept = {key: pack(state[key].cpu().numpy()) for key in order.private}
        context.state[private_key(order.client_id)] = as_record(kept)
    return pack_reply(message, data.claim, metrics, pack_tensors(state, order.returns or state))


def pack_tensors(state: Mapping[str, torch.Tensor], keys: Iterable[str]) -> ArrayRecord:
    """Return some tensors of a model, which may change once the reply has left."""
    return as_record({key: HeldArray(state[key].cpu().numpy()) for key in keys})


def prune(
    model: torch.nn.Module, config: Config, learn: Callable[..., TrainResult]
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """Train with a penalty on the last ranks, and cut them off if they weigh less afterwards (HetLoRA's self-pruning).

    Return what training did, and the state dict in the rank that this client has from now on.
    """
    rank = pruned_rank(config.lora, next(iter(adapted_layers(model).values())).rank)
    before = tail_norm(model, rank).item()
    result = learn(lambda: config.lora.prune_penalty * tail_norm(model, rank))
    state = model.state_dict()
    return result, truncate_state(state, rank) if tail_norm(model, rank).item() < before else state


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate the received model, in this client's own rank: as it is, and after fine-tuning on its training samples.

    Both are measured on its test samples and, where the run validates, on its validation samples.
    """
    config, order, data = begin(message, context)
    model = receive_model(config, replace(order, accepted_round=0), message, context)
    metrics: dict[str, int | float] = {NUM_EXAMPLES: data.claim.test} | evaluate_local(model, config, data, "")
    if data.claim.test or data.claim.val:
        try:
            if personalize(model, config, order, data, context):
                metrics |= evaluate_local(model, config, data, "personal-")
        except FloatingPointError as error:  # the global model's test stands all the same
            log(WARNING, "client %s has no personalised test: %s", order.client_id, error)
    return pack_reply(message, data.claim, metrics)


def personalize(
    model: torch.nn.Module, config: Config, order: Instructions, data: ClientData, context: Context
) -> bool:
    """Make the global model this client's own, by its private tensors or by fine-tuning; say whether it is."""
    settings = config.evaluate
    if order.private:
        model.load_state_dict(own_tensors(model, order, context), strict=False)
    elif settings.personal_epochs:
        fit(model, config, order, data, settings.personal_lr, settings.personal_epochs, None, "personal")
    return bool(order.private or settings.personal_epochs)


def begin(message: Message, context: Context) -> tuple[Config, Instructions, ClientData]:
    """Read the config and the order of a message, which must be meant for a client that lives here, and its data."""
    order = unpack_instructions(message)
    config, site = load(context.run_config, context.node_config)
    check_lives_here(order.client_id, config, site)
    keep_freed_memory()
    if torch.get_num_threads() != config.train.threads:
        torch.set_num_threads(config.train.threads)
    return config, order, open_client_data(config, site, order.client_id)


def receive_model(config: Config, order: Instructions, message: Message, context: Context) -> torch.nn.Module:
    """Return this process's model with every tensor of the message, and of those it keeps to itself, in place.

    Only what the order asks for gets gradients. Raises MessageError when message and base do not make up the model.
    """
    tensors = {key: torch.from_numpy(values) for key, values in views(unpack_arrays(message.content)).items()}
    if not order.base:
        model = cached_model(config.model, config.dataset, config.train.device, config.train.compile)
        model.load_state_dict(tensors)
        return model
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_A")} or {config.lora.rank}
    model, base = cached_adapted_model(config, order.base, min(ranks))
    tensors |= own_tensors(model, order, context)
    if missing := model.state_dict().keys() - base - tensors.keys():
        raise MessageError(f"neither the message nor base {order.base[:12]} has {min(missing)}")
    model.load_state_dict(tensors, strict=False)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in order.returns or key in order.private)
    return model


def own_tensors(model: torch.nn.Module, order: Instructions, context: Context) -> dict[str, torch.Tensor]:
    """Return the tensors that a client keeps to itself, as of the last round that the server took; zeros before one.

    Raises MessageError when there was such a round but its tensors are lost.
    """
    if not order.private or not order.accepted_round:
        return {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items() if key in order.private}
    kept = context.state.array_records.get(private_key(order.client_id))
    if kept is None or kept.keys() != set(order.private):
        raise MessageError(
            f"client {order.client_id} has lost what it kept to itself in round {order.accepted_round}: bring back "
            "its checkpoint store, or start a new run"
        )
    return {key: torch.from_numpy(values) for key, values in views(kept).items()}


def fit(
    model: torch.nn.Module,
    config: Config,
    order: Instructions,
    data: ClientData,
    lr: float,
    epochs: int,
    steps: int | None,
    purpose: str,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> TrainResult:
    """Train in place; shuffling and dropout are drawn from (seed, client, round, purpose), whoever runs it."""
    seeds = [derive_seed(config.seed, order.client_id, order.server_round, purpose, use) for use in ("order", "noise")]
    batches = make_batches(config, data, "train", device_of(model), seeds[0])
    settings = config.train
    optimizer = build_optimizer(model, settings.optimizer, lr, settings.momentum, settings.weight_decay)
    rules = StepRules(settings.accumulate, settings.clip_norm, settings.proximal_mu, settings.precision, penalty)
    return train(model, batches, optimizer, epochs, steps, seeds[1], rules)


def evaluate_local(model: torch.nn.Module, config: Config, data: ClientData, prefix: str) -> dict[str, int | float]:
    """Evaluate on this client's test samples and on its validation samples, if it has the split, never on others.

    Return the sums as metrics, those of validation with `val-` before them; `correct` only where there are classes.
    """
    metrics: dict[str, int | float] = {}
    for split, start in (("test", ""), ("val", VAL)):
        if split in data.splits:
            found = evaluate(model, make_batches(config, data, split, device_of(model), None))
            metrics[f"{start}{prefix}loss-sum"] = found.loss_sum
            if config.dataset.classes:
                metrics[f"{start}{prefix}correct"] = found.correct
    return metrics


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device that a model's parameters are on."""
    return next(model.parameters()).device


@lru_cache(maxsize=4)
def cached_model(model: ModelConfig, dataset: DatasetConfig, device: str, compiled: bool) -> torch.nn.Module:
    """Build this process's model, whose weights every message replaces."""
    return place(build(model, dataset), device, compiled)


@lru_cache(maxsize=4)
def cached_adapted_model(config: Config, base_digest: str, rank: int) -> tuple[torch.nn.Module, frozenset[str]]:
    """Build this process's model over a base, with adapters of `rank`; return it with the keys of the base."""
    model = build(config.model, config.dataset)
    adapt(model, config.lora, rank)
    base = load_base(config.models_dir, base_digest)
    if odd := model.load_state_dict(base, strict=False).unexpected_keys:
        raise MessageError(f"base {base_digest[:12]} has {odd[0]}, which model={config.model.name} has not")
    return place(model, config.train.device, config.train.compile), frozenset(base)


def place(model: torch.nn.Module, device: str, compiled: bool) -> torch.nn.Module:
    """Move a model to its device, and have it compiled on first use if it is to be."""
    model.to(choose_device(device))
    if compiled:
        model.compile()
    return model
