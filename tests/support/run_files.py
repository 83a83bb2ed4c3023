"""Write run directories of any size as flapp leaves them, drawn from a seed, without running anything."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from flapp.checkpoint.manager import ChunkManager

MODEL_BYTES = 40_000
PHASES = dict(configure=0.02, send=0.03, train=0.6, aggregate=0.05, evaluate=0.2, central=0.05, save=0.05)  # noqa: C408
SPREAD = ("min", "p10", "median", "p90", "max")
Line = dict[str, Any]


def write_run(
    path: Path,
    rounds: int = 4,
    clients: int = 3,
    classes: int = 10,
    seed: int = 0,
    old: bool = False,
    status: str | None = "finished",
    **settings: Any,
) -> Path:
    """Write a run directory; old=True leaves out what later versions write, status=None metrics.json."""
    path.mkdir(parents=True)
    config = {
        "home": str(path.parent.parent),
        "run_name": path.name,
        "seed": seed,
        "clients": clients,
        "num_rounds": rounds,
        "dataset": {"name": "made", "classes": classes},
        "train": {"lr": 0.01},
        "evaluate": {"every": 1, "objective": "accuracy" if classes else "loss"},
        "checkpoint": {"enabled": True},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config | settings, sort_keys=False))
    write_lines(path, lines_of(rounds, clients, classes, seed, old))
    if not old:
        write_lines(path, clients_of(clients, classes, seed), "clients.jsonl")
    if status:
        (path / "metrics.json").write_text(json.dumps(summary_of(path, rounds, clients, status, old), indent=1))
    return path


def write_lines(path: Path, lines: Iterable[Line], name: str = "metrics.jsonl") -> None:
    """Write a file of lines in a run directory anew."""
    (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_in(path: Path) -> list[Line]:
    """Return the lines of the metrics.jsonl of a run directory."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def add_lines(path: Path, *lines: Line) -> None:
    """Add lines to the metrics.jsonl of a run directory."""
    write_lines(path, [*lines_in(path), *lines])


def change_train(path: Path, server_round: int, **values: Any) -> None:
    """Change values of the line about the training of a round."""
    keys = {"kind": "train", "round": server_round}
    write_lines(path, [line | values if keys.items() <= line.items() else line for line in lines_in(path)])


def add_store(path: Path, rounds: int) -> Path:
    """Save a small model per round into a store; half of the model never changes."""
    with ChunkManager(path, keep_rounds=2) as store:
        for server_round in range(1, rounds + 1):
            model = {"base": torch.zeros(5000), "head": torch.full((5000,), float(server_round))}
            store.save_model_chunks(model, server_round, {}, config_digest="c" * 64)
    return path


def lines_of(rounds: int, clients: int, classes: int, seed: int, old: bool = False) -> Iterator[Line]:
    """Yield the lines of metrics.jsonl of a run in which learning goes well."""
    draw = np.random.default_rng(seed)
    names = [str(i) for i in range(clients)]
    roster: Line = {"kind": "roster", "round": 0, "time": 0.0, "clients": clients, "refused": {}, "warnings": {}}
    yield roster
    for server_round in range(1, rounds + 1):
        skill = 1 - 0.9 * np.exp(-3 * server_round / rounds)
        common = {"round": server_round, "time": float(server_round)}
        yield {"kind": "train", **common, "loss": 2.3 * (1.02 - skill), **exchange(names, draw, up=True)}
        figures = evaluation(names, skill, classes, draw)
        yield {"kind": "evaluate", **common, **figures, **exchange(names, draw, up=False)}
        if not old:
            seconds = {name: part * draw.uniform(0.9, 1.1) for name, part in PHASES.items()}
            stored = {"bytes": MODEL_BYTES * min(server_round, 3), "stored": MODEL_BYTES // 2, "total": MODEL_BYTES}
            whole = sum(seconds.values()) * 1.01
            yield {"kind": "round", **common, "seconds": whole, "phases": seconds, "store": stored}


def clients_of(clients: int, classes: int, seed: int) -> Iterator[Line]:
    """Yield the lines of clients.jsonl."""
    held = np.random.default_rng((seed, 1)).integers(0, 40, (clients, classes)).tolist()
    for client, labels in enumerate(held):
        samples = {"train": sum(labels) or 100, "val": 0, "test": 25}
        line: Line = {"kind": "client", "round": 0, "client": str(client), "shard_digest": "d" * 64}
        yield line | samples | {"labels": labels}


def exchange(names: list[str], draw: np.random.Generator, up: bool) -> Line:
    """Return the fields that every line of an exchange has; the last client fails now and then."""
    failed = names[-1:] if len(names) > 1 and draw.random() < 0.25 else []
    replied = names[:-1] if failed else names
    sent, returned = dict.fromkeys(names, MODEL_BYTES), dict.fromkeys(replied, MODEL_BYTES * up)
    return {
        "client_seconds": {name: round(float(draw.uniform(0.1, 0.6)), 3) for name in replied},
        "asked": len(names),
        "replies": len(replied),
        "absent": [],
        "absent_count": 0,
        "failures": [{"client": name, "reason": "sent no reply in time"} for name in failed],
        "bytes_down": sum(sent.values()),
        "bytes_up": sum(returned.values()),
        "client_bytes_down": sent,
        "client_bytes_up": returned,
        "seconds": 0.5,
    }


def evaluation(names: list[str], skill: float, classes: int, draw: np.random.Generator) -> Line:
    """Return the global and the personalised figures of a round."""
    found: Line = {}
    for prefix, level in (("", skill), ("personal_", min(1.0, skill + 0.03))):
        each = np.clip(draw.normal(level, 0.05, len(names)), 0, 1)
        found[f"{prefix}loss"] = 2.3 * (1.05 - level)
        found[f"{prefix}loss_spread"] = spread(2.3 * (1.05 - each))
        found[f"{prefix}accuracy"] = float(each.mean()) if classes else None
        if classes:
            found[f"{prefix}accuracy_spread"] = spread(each)
            found[f"{prefix}accuracy_by_client"] = dict(zip(names, each.tolist(), strict=True))
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(SPREAD, np.percentile(values, [0, 10, 50, 90, 100]).tolist(), strict=True))


def summary_of(path: Path, rounds: int, clients: int, status: str, old: bool) -> Line:
    """Return metrics.json."""
    sent = {"bytes_up": rounds * clients * MODEL_BYTES, "bytes_down": 2 * rounds * clients * MODEL_BYTES}
    summary: Line = {"status": status, "rounds": rounds, **sent, "seconds": 1.0 * rounds, "run_dir": str(path)}
    if status == "failed":
        return summary | {"error": f"round {rounds + 1}: 1 of {clients} clients gave a valid train reply"}
    summary |= {"objective": 0.9, "accuracy": 0.9, "loss": 0.2, "personal_accuracy": 0.93, "model_sha256": "m" * 64}
    new = {"best_round": rounds, "best_value": 0.9, "stopped_early": False, "selected_round": rounds}
    return summary | ({} if old else new)
