"""The ClientApp: read the message, work on this client's own data, pack the reply."""

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from logging import DEBUG, INFO, WARNING

import torch
from flwr.app import Array, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import update_console_handler

from flapp.architecture import adapt, build, choose_device, pruned_rank
from flapp.base import find_base, load_base, receive_base
from flapp.client.data import clients_at, make_batches
from flapp.client.mods import checkpoint_mod, describe, group_mod, name_errors_mod, own_mods_mod, privacy_mod
from flapp.client.store import private_key
from flapp.client.task import Task, check_code, read_task
from flapp.config.load import derive_seed, load
from flapp.config.schema import Config, ConfigError, DatasetConfig, ModelConfig
from flapp.custom import own
from flapp.messages import (
    NUM_EXAMPLES,
    SUMS,
    VAL,
    Claim,
    HeldArray,
    MessageError,
    as_record,
    pack,
    pack_claims,
    pack_reply,
    unpack_arrays,
    unpack_instructions,
    views,
)
from flapp.model.files import to_numpy
from flapp.model.lora import adapted_layers, tail_norm, truncate_state
from flapp.privacy import find_sigma
from flapp.probe import optimizer_of, probe
from flapp.training import StepRules, evaluate, keep_freed_memory, scheduled_lr, seeded, train

# name_errors_mod is there twice: for a group's message as a whole, and for each client of the group.
app = ClientApp(mods=[name_errors_mod, group_mod, name_errors_mod, checkpoint_mod, privacy_mod, own_mods_mod])
update_console_handler(timestamps=True)  # in the process that runs the app
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # tensors over arrays are only read


@app.query("attest")
def attest(message: Message, context: Context) -> Message:
    """Report which clients this node serves and what data they have, or why a client cannot take part."""
    try:
        config, node_config = load(context.run_config, context.node_config)
    except ConfigError:
        unpack_instructions(message)  # raises if the server runs other source code, which is the likelier reason
        raise
    names = clients_at(config, node_config)
    try:
        task = Task.of(unpack_instructions(message), config, node_config)
        check_code(task)
    except ValueError as error:
        return pack_claims(message, [Claim(name, fault=describe(error)) for name in names])
    return pack_claims(message, [make_claim(task.for_client(name)) for name in names])


def make_claim(task: Task) -> Claim:
    """Return one client's claim; whatever keeps the client from taking part becomes the claim's fault."""
    config, base = task.config, task.instructions.base
    try:
        if config.privacy.kind == "local":
            find_sigma(config.privacy)  # fails without its package, before the first round
        data = task.data
        if config.targets and task.node_config.client_id is not None:  # otherwise the server has tried it
            probe(config, next(iter(make_batches(config, data, "train", torch.device("cpu"), None))))
        held = find_base(config.models_dir, base) if base else ""
    except Exception as error:  # noqa: BLE001 - one client's fault must not keep out other clients of its node
        return Claim(task.client_id, fault=describe(error))
    counts = f"{data.claim.train} train, {data.claim.val} val, {data.claim.test} test"
    level = DEBUG if task.node_config.num_partitions else INFO
    task.log(level, "client %s: %s samples from %s", task.client_id, counts, data.path)
    return replace(data.claim, base_digest=held)


@app.query("base")
def take_base(message: Message, context: Context) -> Message:
    """Store the frozen base, which the train messages build on."""
    digest = unpack_instructions(message).base
    config, _ = load(context.run_config, context.node_config)
    receive_base(config.models_dir, digest, as_tensors(unpack_arrays(message.content)))
    return Message(RecordDict(), reply_to=message)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the received model on this client's training samples and send it back."""
    started = time.monotonic()
    task = read_task(message, context)
    config, instructions, claim = task.config, task.instructions, task.data.claim
    model = receive_model(task, message)
    restore_own(model, task, context)
    lr = scheduled_lr(config.train.lr, config.train.schedule, instructions.server_round, config.num_rounds)
    learn = partial(fit, model, task, lr, config.train.epochs, config.train.steps, "train")
    if config.lora.prune_gamma is None:
        loss, state = learn(), model.state_dict()
    else:
        loss, state = prune(model, config, learn)
    metrics = {NUM_EXAMPLES: claim.train, "train-loss": loss, "seconds": time.monotonic() - started}
    if instructions.private:
        kept = {key: pack(to_numpy(state[key])) for key in instructions.private}
        context.state[private_key(task.client_id)] = as_record(kept)
    trained = {key: HeldArray(to_numpy(state[key])) for key in instructions.returns or state}
    return pack_reply(message, claim, metrics, as_record(trained))


def prune(model: torch.nn.Module, config: Config, learn: Callable[..., float]) -> tuple[float, dict[str, torch.Tensor]]:
    """Train with a penalty on the last ranks, and cut them off if they weigh less afterwards (HetLoRA's self-pruning).

    Return the training loss, and the state dict in the rank that this client has from now on.
    """
    rank = pruned_rank(config.lora, next(iter(adapted_layers(model).values())).rank)
    before = tail_norm(model, rank).item()
    loss = learn(lambda: config.lora.prune_penalty * tail_norm(model, rank))
    state = model.state_dict()
    return loss, truncate_state(state, rank) if tail_norm(model, rank).item() < before else state


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate the received model as it is, and personalised, by private tensors or fine-tuning, if the run does so.

    Both are measured on the client's test samples and, where the run validates, on its validation samples.
    """
    task = read_task(message, context)
    claim = task.data.claim
    model = receive_model(task, message)
    metrics: dict[str, int | float] = {NUM_EXAMPLES: claim.test} | evaluate_local(model, task, "")
    if claim.test or claim.val:
        try:
            if personalize(model, task, context):
                metrics |= evaluate_local(model, task, "personal-")
        except FloatingPointError as error:  # the evaluation of the global model still counts
            text = "client %s has no personalised test: %s"
            task.log(WARNING, text, task.client_id, error, instead="a client has no personalised test")
    return pack_reply(message, claim, metrics)


def personalize(model: torch.nn.Module, task: Task, context: Context) -> bool:
    """Personalise the global model by this client's private tensors or by fine-tuning; return whether it was done."""
    settings = task.config.evaluate
    if task.instructions.private:
        restore_own(model, task, context)
    elif settings.personal_epochs:
        fit(model, task, settings.personal_lr, settings.personal_epochs, None, "personal")
    return bool(task.instructions.private or settings.personal_epochs)


def receive_model(task: Task, message: Message) -> torch.nn.Module:
    """Return this process's model with every tensor of the message in place, and zeros for those that a client keeps.

    Over a base, only the tensors that the instructions name get gradients. Raises MessageError when message and base do
    not make up the model.
    """
    config, instructions = task.config, task.instructions
    keep_freed_memory()
    if torch.get_num_threads() != config.train.threads:
        torch.set_num_threads(config.train.threads)
    tensors = as_tensors(unpack_arrays(message.content))
    if not instructions.base:
        built_by = own(config, "model.target")
        place = (config.train.device, config.train.compile)
        model = cached_model(config.model, config.dataset, config.seed, *place, built_by)
        model.load_state_dict(tensors)
        return model
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_A")} or {config.lora.rank}
    model, base = cached_adapted_model(config, instructions.base, min(ranks), own(config, "model.target"))
    state = model.state_dict()
    tensors |= {key: torch.zeros_like(tensor) for key, tensor in state.items() if key in instructions.private}
    if missing := state.keys() - base - tensors.keys():
        raise MessageError(f"neither the message nor base {instructions.base[:12]} has {min(missing)}")
    model.load_state_dict(tensors, strict=False)
    trained = {*instructions.returns, *instructions.private}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)
    return model


def restore_own(model: torch.nn.Module, task: Task, context: Context) -> None:
    """Load the tensors that a client keeps to itself, as of the last round that the server accepted, if there is one.

    Raises MessageError when there was such a round but its tensors are lost.
    """
    instructions = task.instructions
    if not instructions.private or not instructions.accepted_round:
        return
    kept = context.state.array_records.get(private_key(task.client_id))
    if kept is None or kept.keys() != set(instructions.private):
        raise MessageError(
            f"client {task.client_id} has lost its private tensors of round {instructions.accepted_round}: bring back "
            "its checkpoint store, or start a new run"
        )
    model.load_state_dict(as_tensors(kept), strict=False)


def as_tensors(record: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return tensors over the arrays of a record, without a copy. They are only ever read: the model copies them."""
    return {key: torch.from_numpy(values) for key, values in views(record).items()}


def fit(
    model: torch.nn.Module,
    task: Task,
    lr: float,
    epochs: int,
    steps: int | None,
    purpose: str,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> float:
    """Train in place and return the mean loss.

    Shuffling and dropout are drawn from (seed, client, round, purpose), whoever runs it.
    """
    settings, key = task.config.train, (task.config.seed, task.client_id, task.instructions.server_round, purpose)
    seeds = [derive_seed(*key, use) for use in ("order", "noise")]
    batches = make_batches(task.config, task.data, "train", device_of(model), seeds[0])
    optimizer = optimizer_of(task.config, model, lr)
    loss = own(task.config, "train.loss")
    rules = StepRules(settings.accumulate, settings.clip_norm, settings.proximal_mu, settings.precision, penalty, loss)
    return train(model, batches, optimizer, epochs, steps, seeds[1], rules)


def evaluate_local(model: torch.nn.Module, task: Task, prefix: str) -> dict[str, int | float]:
    """Return sums over this client's test samples and, with `val-` before their names, over its validation samples."""
    metrics: dict[str, int | float] = {}
    loss, count = own(task.config, "train.loss"), own(task.config, "evaluate.metrics")
    for split, start in (("test", ""), ("val", VAL)):
        if split in task.data.splits:
            found = evaluate(model, make_batches(task.config, task.data, split, device_of(model), None), loss, count)
            metrics[f"{start}{prefix}loss-sum"] = found.loss_sum
            if task.config.dataset.classes:
                metrics[f"{start}{prefix}correct"] = found.correct
            metrics |= {f"{start}{prefix}{SUMS}{name}": value for name, value in found.sums.items()}
    return metrics


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device that a model's parameters are on."""
    return next(model.parameters()).device


@lru_cache(maxsize=4)
def cached_model(
    model: ModelConfig, dataset: DatasetConfig, seed: int, device: str, compiled: bool, built_by: object
) -> torch.nn.Module:
    """Build this process's model, whose weights every message replaces; built_by: the user's own function, if any."""
    with drawn_as_by_server(seed, built_by):
        return place(build(model, dataset), device, compiled)


@lru_cache(maxsize=4)
def cached_adapted_model(
    config: Config, base_digest: str, rank: int, built_by: object
) -> tuple[torch.nn.Module, frozenset[str]]:
    """Build this process's model over a base, with adapters of `rank`; return it with the keys of the base."""
    with drawn_as_by_server(config.seed, built_by):
        model = build(config.model, config.dataset)
        adapt(model, config.lora, rank)
    base = load_base(config.models_dir, base_digest)
    if odd := model.load_state_dict(base, strict=False).unexpected_keys:
        raise MessageError(f"base {base_digest[:12]} has {odd[0]}, but model={config.model.name} does not")
    return place(model, config.train.device, config.train.compile), frozenset(base)


def drawn_as_by_server(seed: int, built_by: object) -> AbstractContextManager[None]:
    """Draw a model of the user's own as the server does: it may hold random numbers that are not in its state."""
    return seeded(derive_seed(seed, "model")) if built_by else nullcontext()


def place(model: torch.nn.Module, device: str, compiled: bool) -> torch.nn.Module:
    """Move a model to its device, and compile it on first use if asked to."""
    model.to(choose_device(device))
    if compiled:
        model.compile()
    return model
