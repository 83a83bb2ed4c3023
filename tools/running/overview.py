"""Describe what a run is about to do: in three lines, or in one line for a job of a sweep.

The JSON event `started` has the same facts as fields: run_dir, rounds, model, parameters, trained_parameters, dataset,
samples ({"train", "test"}, null unless the data are prepared on this machine), clients, partition, clients_a_round,
evaluate_every, strategy, aggregation, bytes_down and bytes_up (the model's bytes for one client in one training round,
without the headers of messages).
"""

import math
from typing import Any

from flapp.architecture import plan
from flapp.config.rules import sample_size
from flapp.config.schema import Config
from flapp.data.artifact import open_artifact
from flapp.data.shards.manifest import load_manifest
from flapp.data.sources import is_prepared
from flapp.model.layout import Layout
from flapp.strategy.fedlora import global_keys
from flapp.strategy.lora_rules import RULES
from tools.cli import count, in_bytes

FLOAT32 = 4  # bytes of a number in every tensor of our models


def overview(config: Config, is_here: bool = True) -> dict[str, Any]:
    """Return these facts without building the model. Raises ValueError when it cannot be built.

    is_here: whether the run's data are on this machine.
    """
    layout = plan(config.model, config.dataset, config.lora)
    counts = {key: math.prod(shape) for key, shape in layout.tensors.items()}
    down, up = traffic(config, layout)
    kind, alpha, classes = config.partition.kind, config.partition.alpha, config.partition.classes_per_client
    shape = {"dirichlet": f" alpha={alpha}", "pathological": f" classes={classes}"}.get(kind, "")
    return {
        "run_dir": str(config.runs_dir / config.run_name),
        "rounds": config.num_rounds,
        "model": config.model.name,
        "parameters": sum(counts.values()),
        "trained_parameters": sum(counts[key] for key in layout.trained),
        "dataset": config.dataset.name,
        "samples": count_samples(config) if is_here else None,
        "clients": config.clients,
        "partition": f"{kind}{shape}",
        "evaluate_every": config.evaluate.every,
        "clients_a_round": sample_size(config.strategy.fraction_train, config.clients),
        "strategy": config.strategy.name,
        "aggregation": config.strategy.aggregation,
        "bytes_down": down,
        "bytes_up": up,
    }


def traffic(config: Config, layout: Layout) -> tuple[int, int]:
    """Return the bytes of tensors that a client receives and sends in a training round.

    A rule that sends A and B in turn counts as the mean of two rounds. A client of lower rank sends less.
    """
    sent, _ = global_keys(layout.tensors, layout.trained, config.strategy.aggregation)
    sizes = {key: FLOAT32 * math.prod(layout.tensors[key]) for key in sent}
    down = sum(sizes.values())
    if config.strategy.aggregation is None:
        return down, down
    rule = RULES[config.strategy.aggregation]

    def is_returned(key: str, server_round: int) -> bool:
        layer, _, part = key.rpartition(".")
        return layer not in layout.adapters or part in {f"lora_{factor}" for factor in rule.travels(server_round)}

    return down, sum(size for key, size in sizes.items() for number in (1, 2) if is_returned(key, number)) // 2


def count_samples(config: Config) -> dict[str, int] | None:
    """Return the training and test samples of all clients, or None while the data are not prepared."""
    if config.distributed_data.enabled:
        if not config.manifest_path.exists():
            return None
        totals = load_manifest(config.manifest_path).facts["totals"]
        return {split: totals[split] for split in ("train", "test")}
    folder = config.data_dir / config.dataset.name
    if not is_prepared(folder):
        return None
    return {split: len(open_artifact(folder / split).labels) for split in ("train", "test")}


def start_lines(run_name: str, facts: dict[str, Any]) -> list[str]:
    """Return the facts as three lines."""
    model, clients, strategy = _parts(facts)
    samples, every = facts["samples"], facts["evaluate_every"]
    held = f" ({samples['train']:,} training and {samples['test']:,} test samples)" if samples else ""
    interval = "after every round" if every == 1 else f"after every {every} rounds and after the last"
    down, up = in_bytes(facts["bytes_down"]), in_bytes(facts["bytes_up"])
    return [
        f"run {run_name} in {facts['run_dir']}",
        f"{model} on {facts['dataset']}{held}, {clients} ({facts['partition']})",
        f"{strategy}, evaluated {interval}; in a training round a client receives {down} and sends {up}",
    ]


def job_line(words: list[str], facts: dict[str, Any]) -> str:
    """Return the facts about one job of a sweep, with its own settings, as one line."""
    model, clients, strategy = _parts(facts)
    return f"starting: {' '.join(words)}; {model} on {facts['dataset']}, {clients}; {strategy}"


def _parts(facts: dict[str, Any]) -> tuple[str, str, str]:
    """Return the model, the clients and the strategy as both texts name them."""
    parameters, trained = facts["parameters"], facts["trained_parameters"]
    part = f", {trained:,} trained" if trained < parameters else ""
    clients, drawn = facts["clients"], facts["clients_a_round"]
    counted = count(clients, "client") + (f", {drawn:,} a round" if drawn < clients else "")
    rule = f" ({facts['aggregation']})" if facts["aggregation"] else ""
    model = f"{facts['model']} ({parameters:,} parameters{part})"
    return model, counted, f"{facts['strategy']}{rule}, {count(facts['rounds'], 'round')}"
