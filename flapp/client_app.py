"""The ClientApp: unpack the message, work on this client's own data, pack the reply."""

import hashlib
import time
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from flapp.config import derive_seed, load
from flapp.data import (
    ClientLoader,
    DataError,
    OfflineDataset,
    Partition,
    ensure_artifacts,
    label_histogram,
    load_partition,
)
from flapp.messages import (
    NUM_EXAMPLES,
    Claim,
    MessageError,
    Order,
    pack_claims,
    pack_reply,
    source_digest,
    unpack_arrays,
    unpack_order,
    versions,
)
from flapp.model import build_model
from flapp.mods import name_errors_mod
from flapp.settings import Config, ConfigError, DatasetConfig, ModelConfig, Site
from flapp.training import TrainResult, build_optimizer, evaluate, scheduled_lr, train

app = ClientApp(mods=[name_errors_mod])


@app.query("attest")
def attest(message: Message, context: Context) -> Message:
    """Say which clients live at this node and what they hold, or why one cannot take part."""
    config, site = load(context.run_config, context.node_config)
    return pack_claims(message, [attest_client(message, config, name) for name in clients_at(config, site)])


def attest_client(message: Message, config: Config, client_id: str) -> Claim:
    """Return one client's claim; what keeps it from taking part becomes the claim's fault, under its own name."""
    try:
        unpack_order(message)
        return make_claim(config, client_id)
    except (ConfigError, DataError, MessageError, OSError) as error:
        return Claim(client_id, fault=" ".join(str(error).split()))


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the received model on this client's training samples and send it back."""
    started = time.monotonic()
    config, order = begin(message, context)
    model = receive_model(config, message)
    claim = make_claim(config, order.client_id)
    lr = scheduled_lr(config.train.lr, config.train.schedule, order.server_round, config.num_rounds)
    result = fit(model, config, order, lr, config.train.epochs, config.train.steps, "train")
    metrics = {NUM_EXAMPLES: claim.train, "train-loss": result.loss, "seconds": time.monotonic() - started}
    return pack_reply(message, claim, metrics, ArrayRecord(model.state_dict()))


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Test the received model on this client's test samples, as it is and after local fine-tuning."""
    config, order = begin(message, context)
    model = receive_model(config, message)
    claim = make_claim(config, order.client_id)
    metrics: dict[str, int | float] = {NUM_EXAMPLES: claim.test} | test(model, config, order, "")
    if config.evaluate.personal_epochs and claim.test:
        fit(model, config, order, config.train.lr, config.evaluate.personal_epochs, None, "personal")
        metrics |= test(model, config, order, "personal-")
    return pack_reply(message, claim, metrics)


def begin(message: Message, context: Context) -> tuple[Config, Order]:
    """Read the config and the order of a message, which must be meant for a client that lives here."""
    order = unpack_order(message)
    config, site = load(context.run_config, context.node_config)
    if order.client_id not in clients_at(config, site):
        raise ConfigError(f"a message for client {order.client_id} reached the node of {clients_at(config, site)}")
    torch.set_num_threads(config.train.threads)
    return config, order


def clients_at(config: Config, site: Site) -> list[str]:
    """Name the clients at a node: its own id in a deployment, every num_partitions-th client in a simulation."""
    if site.client_id is not None:
        return [site.client_id]
    if site.num_partitions < 1:
        raise ConfigError("node-config has no client-id: start the SuperNode with --node-config 'client-id=\"0\"'")
    return [str(i) for i in range(site.partition_id, config.clients, site.num_partitions)]


def receive_model(config: Config, message: Message) -> torch.nn.Module:
    """Return this process's model, loaded with every parameter and buffer of the message."""
    model = cached_model(config.model, config.dataset, config.train.device)
    model.load_state_dict(unpack_arrays(message.content).to_torch_state_dict())
    return model


def fit(
    model: torch.nn.Module, config: Config, order: Order, lr: float, epochs: int, steps: int | None, purpose: str
) -> TrainResult:
    """Train in place; shuffling and dropout are drawn from (seed, client, round, purpose), whoever runs it."""
    settings = config.train
    seeds = [derive_seed(config.seed, order.client_id, order.server_round, purpose, use) for use in ("order", "noise")]
    batches = client_batches(config, order.client_id, "train", settings.batch_size, seeds[0])
    optimizer = build_optimizer(model, settings.optimizer, lr, settings.momentum, settings.weight_decay)
    return train(model, batches, optimizer, epochs, steps, seeds[1])


def test(model: torch.nn.Module, config: Config, order: Order, prefix: str) -> dict[str, int | float]:
    """Evaluate on this client's test samples and return the sums as metrics; `correct` only where there are classes."""
    batches = client_batches(config, order.client_id, "test", config.evaluate.batch_size, None)
    found = evaluate(model, batches)
    metrics: dict[str, int | float] = {f"{prefix}loss-sum": found.loss_sum}
    if config.dataset.classes:
        metrics[f"{prefix}correct"] = found.correct
    return metrics


def client_batches(config: Config, client_id: str, split: str, batch_size: int, seed: int | None) -> ClientLoader:
    """Return the loader over one client's samples of a split."""
    partition = cached_partition(config)
    indices = getattr(partition, split)[int(client_id)]
    dataset = cached_dataset(config.data_dir, config.dataset, split)
    return ClientLoader(dataset, indices, batch_size, seed, config.model.image_size)


@lru_cache(maxsize=1024)
def make_claim(config: Config, client_id: str) -> Claim:
    """Count and digest what a client holds: the digest covers both artifacts and the client's indices in them."""
    if client_id not in {str(i) for i in range(config.clients)}:
        raise ConfigError(f"client-id {client_id} is not one of the {config.clients} clients 0 to {config.clients - 1}")
    partition = cached_partition(config)
    digest, counts, modified = hashlib.sha256(), {}, 0.0
    for split in ("train", "test"):
        dataset = cached_dataset(config.data_dir, config.dataset, split)
        indices = getattr(partition, split)[int(client_id)]
        digest.update(dataset.artifact.digest.encode() + indices.astype("<i8").tobytes())
        modified = max(modified, (dataset.artifact.path / "labels.npy").stat().st_mtime)
        counts[split] = len(indices)
    labels = cached_dataset(config.data_dir, config.dataset, "train").artifact.labels[partition.train[int(client_id)]]
    histogram = tuple(label_histogram(labels, config.dataset.classes))
    return Claim(
        client_id,
        counts["train"],
        counts["test"],
        histogram,
        digest.hexdigest(),
        modified,
        source_digest(),
        versions(),
    )


# What follows survives from message to message inside one process (a Ray actor); in a deployment every message
# is a process of its own and builds only what it needs.


@lru_cache(maxsize=4)
def cached_model(model: ModelConfig, dataset: DatasetConfig, device: str) -> torch.nn.Module:
    """Build a model whose weights are about to be replaced by a message's."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    built = build_model(model.name, dataset.shape, dataset.classes, model.image_size, model.dropout)
    return built.to(chosen)


@lru_cache(maxsize=8)
def cached_dataset(data: Path, settings: DatasetConfig, split: str) -> OfflineDataset:
    """Open a split, preparing an embedded dataset on first use; raises DataError when it is not as configured."""
    dataset = OfflineDataset(ensure_artifacts(data, settings.name) / split, normalization=settings.normalization)
    found = (tuple(dataset.images.shape[1:]), len(dataset.classes))
    if found != (settings.shape, settings.classes):
        raise DataError(
            f"dataset {settings.name} has samples of shape {found[0]} in {found[1]} classes, the config says "
            f"{settings.shape} in {settings.classes}: set dataset.shape and dataset.classes"
        )
    return dataset


@lru_cache(maxsize=8)
def cached_partition(config: Config) -> Partition:
    """Read the partition of this config's dataset, making and saving it if this process is the first to ask."""
    artifacts = [cached_dataset(config.data_dir, config.dataset, split).artifact for split in ("train", "test")]
    settings = {
        "kind": config.partition.kind,
        "clients": config.clients,
        "seed": config.partition.seed,
        "alpha": config.partition.alpha,
        "min_size": config.partition.min_size,
        "classes_per_client": config.partition.classes_per_client,
    }
    key = derive_seed(*settings.values(), *[artifact.digest for artifact in artifacts])
    path = config.data_dir / config.dataset.name / "partitions" / f"{config.partition.kind}-{key:016x}.safetensors"
    return load_partition(path, train_labels=artifacts[0].labels, test_labels=artifacts[1].labels, **settings)
