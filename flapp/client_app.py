"""The ClientApp: unpack the message, work on this client's own data, pack the reply."""

import time
from functools import lru_cache
from logging import INFO, WARNING

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.common import log

from flapp.client_data import ClientData, check_lives_here, clients_at, make_batches, open_client_data
from flapp.config import derive_seed, load
from flapp.messages import (
    NUM_EXAMPLES,
    Claim,
    Order,
    pack_claims,
    pack_reply,
    unpack_arrays,
    unpack_order,
)
from flapp.model import build_model
from flapp.mods import checkpoint_mod, describe, name_errors_mod
from flapp.settings import Config, DatasetConfig, ModelConfig, Site
from flapp.training import TrainResult, build_optimizer, evaluate, scheduled_lr, train

app = ClientApp(mods=[name_errors_mod, checkpoint_mod])


@app.query("attest")
def attest(message: Message, context: Context) -> Message:
    """Say which clients live at this node and what they hold, or why one cannot take part."""
    config, site = load(context.run_config, context.node_config)
    return pack_claims(message, [attest_client(message, config, site, name) for name in clients_at(config, site)])


def attest_client(message: Message, config: Config, site: Site, client_id: str) -> Claim:
    """Return one client's claim; what keeps it from taking part becomes the claim's fault, under its own name."""
    try:
        unpack_order(message)
        data = open_client_data(config, site, client_id)
    except Exception as error:  # noqa: BLE001 - one client's fault must not keep its node's others out
        return Claim(client_id, fault=describe(error))
    counts = f"{data.claim.train} train, {data.claim.val} val, {data.claim.test} test"
    log(INFO, "client %s: %s samples from %s", client_id, counts, data.path)
    return data.claim


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the received model on this client's training samples and send it back."""
    started = time.monotonic()
    config, order, data = begin(message, context)
    model = receive_model(config, message)
    lr = scheduled_lr(config.train.lr, config.train.schedule, order.server_round, config.num_rounds)
    result = fit(model, config, order, data, lr, config.train.epochs, config.train.steps, "train")
    metrics = {NUM_EXAMPLES: data.claim.train, "train-loss": result.loss, "seconds": time.monotonic() - started}
    return pack_reply(message, data.claim, metrics, ArrayRecord(model.state_dict()))


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Test the received model on this client's test samples, as it is and after local fine-tuning."""
    config, order, data = begin(message, context)
    model = receive_model(config, message)
    metrics: dict[str, int | float] = {NUM_EXAMPLES: data.claim.test} | test(model, config, data, "")
    if config.evaluate.personal_epochs and data.claim.test:
        settings = config.evaluate
        try:
            fit(model, config, order, data, settings.personal_lr, settings.personal_epochs, None, "personal")
            metrics |= test(model, config, data, "personal-")
        except FloatingPointError as error:  # the global model's test stands all the same
            log(WARNING, "client %s has no personalised test: %s", order.client_id, error)
    return pack_reply(message, data.claim, metrics)


def begin(message: Message, context: Context) -> tuple[Config, Order, ClientData]:
    """Read the config and the order of a message, which must be meant for a client that lives here, and its data."""
    order = unpack_order(message)
    config, site = load(context.run_config, context.node_config)
    check_lives_here(order.client_id, config, site)
    torch.set_num_threads(config.train.threads)
    return config, order, open_client_data(config, site, order.client_id)


def receive_model(config: Config, message: Message) -> torch.nn.Module:
    """Return this process's model, loaded with every parameter and buffer of the message."""
    model = cached_model(config.model, config.dataset, config.train.device)
    model.load_state_dict(unpack_arrays(message.content).to_torch_state_dict())
    return model


def fit(
    model: torch.nn.Module,
    config: Config,
    order: Order,
    data: ClientData,
    lr: float,
    epochs: int,
    steps: int | None,
    purpose: str,
) -> TrainResult:
    """Train in place; shuffling and dropout are drawn from (seed, client, round, purpose), whoever runs it."""
    seeds = [derive_seed(config.seed, order.client_id, order.server_round, purpose, use) for use in ("order", "noise")]
    batches = make_batches(config, data, "train", device_of(model), seeds[0])
    settings = config.train
    optimizer = build_optimizer(model, settings.optimizer, lr, settings.momentum, settings.weight_decay)
    return train(model, batches, optimizer, epochs, steps, seeds[1])


def test(model: torch.nn.Module, config: Config, data: ClientData, prefix: str) -> dict[str, int | float]:
    """Evaluate on this client's test samples and return the sums as metrics; `correct` only where there are classes."""
    found = evaluate(model, make_batches(config, data, "test", device_of(model), None))
    metrics: dict[str, int | float] = {f"{prefix}loss-sum": found.loss_sum}
    if config.dataset.classes:
        metrics[f"{prefix}correct"] = found.correct
    return metrics


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device that a model's parameters are on."""
    return next(model.parameters()).device


@lru_cache(maxsize=4)
def cached_model(model: ModelConfig, dataset: DatasetConfig, device: str) -> torch.nn.Module:
    """Build this process's model, whose weights every message replaces."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    built = build_model(model.name, dataset.shape, dataset.classes, model.image_size, model.dropout)
    return built.to(chosen)
