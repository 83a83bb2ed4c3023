"""CPU time a round of a simulation, against a bare PyTorch loop over the same work and against stock Flower.

    python -m tools.benchmark simulation             1,000 clients; also 10,000 and 100,000; about 15 minutes
    python -m tools.benchmark simulation --short     100 and 2,000 clients, fewer rounds; under 3 minutes

Three workloads: W1, a CNN of 8.5 million parameters, 50 images a client, batches of 10, one epoch; W2, a linear model
of 11 parameters, 10 samples a client, 2 steps; W3, digits_fedavg with its client stores, against a loop without stores.
They evaluate only in the last round, which is not counted. A ratio compares the CPU-seconds per round of all processes
of a run, unless its row names something else.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch

from flapp.config.load import compose, derive_seed
from flapp.config.rules import sample_size
from flapp.config.schema import Config
from flapp.data.artifact import write_artifact
from flapp.messages import TRAIN
from flapp.model.build import build_model
from flapp.partitions import open_partition
from flapp.training import scheduled_lr
from tools.bench import Row
from tools.bench.bare import Work
from tools.bench.usage import CommandError, Usage, watch

RAY = ("deployment=simulation",)
BARE, STOCK = "bare PyTorch loop", "stock Flower"
NO_EVALUATION = ("evaluate.every=1000000", "strategy.fraction_evaluate=0.0001", "evaluate.personal_epochs=0")
LIMIT_SECONDS = 600.0
DRAWN = 50  # clients a round of W2
NUMBERS = itertools.count()
Way = Callable[[], Usage]


def inline(workers: int) -> tuple[str, ...]:
    """Return the settings of flapp's own simulation."""
    return ("deployment=inline", f"deployment.workers={workers}")


@dataclass(frozen=True)
class Scale:
    """How much is measured: clients of W1 and W2, W1's sample, rounds that count, turns; and clients of the scale rows.

    rounds: of W1, W2 and W3, ray_rounds: of W1 and W2 in Ray; 0 leaves the row out.
    """

    clients: int
    drawn: int
    rounds: tuple[int, int, int]
    ray_rounds: tuple[int, int]
    turns: int
    many: int
    most: int


LONG = Scale(clients=1000, drawn=10, rounds=(3, 100, 5), ray_rounds=(3, 20), turns=3, many=10_000, most=100_000)
SHORT = Scale(clients=100, drawn=4, rounds=(2, 40, 1), ray_rounds=(0, 10), turns=1, many=2_000, most=0)


@dataclass(frozen=True)
class Workload:
    """A federation to run in several ways: its settings without rounds and runtime, and the rounds that count."""

    name: str
    home: Path
    words: tuple[str, ...]
    counted: int

    @property
    def rounds(self) -> int:
        """Return all rounds: with the first, which warms up, and the last, which evaluates."""
        return self.counted + 2

    def run_flapp(self, *runtime: str) -> Usage:
        """Run flapp by its own command."""
        path = self.home / "runs" / self.new_name()
        words = [*self.words, *NO_EVALUATION, *runtime, f"num_rounds={self.rounds}", f"run_name={path.name}"]
        command = [sys.executable, "-m", "tools.run", f"home={self.home}", *words, "--format", "json"]
        return watch(command, path / "metrics.jsonl", b'"kind": "round"', self.rounds, LIMIT_SECONDS)

    def run_bare(self) -> Usage:
        """Run the bare loop."""
        ends = self.home / self.new_name()
        command = [sys.executable, "-m", "tools.bench.bare", str(self.work()), str(ends)]
        return watch(command, ends, b"end", self.rounds, LIMIT_SECONDS)

    def run_stock(self) -> Usage:
        """Run stock Flower with a node for each client."""
        ends, nodes = self.home / self.new_name(), str(self.config().clients)
        command = [sys.executable, "-m", "tools.bench.stock", str(self.work()), str(ends), nodes]
        return watch(command, ends, b"end", self.rounds, LIMIT_SECONDS)

    def config(self) -> Config:
        return compose([f"home={self.home}", *self.words, f"num_rounds={self.rounds}"])

    def work(self) -> Path:
        """Return the file that tells the bare loop and stock Flower what to do, written once."""
        path = self.home / f"{self.name}-{self.rounds}.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(as_work(self.config(), path))))
        return path

    def new_name(self) -> str:
        return f"{self.name}-{next(NUMBERS)}"


def as_work(config: Config, path: Path) -> Work:
    """Return the same work as this config's for the bare loop; arrays are written beside `path`."""
    from safetensors.torch import save_file

    data, train, seed = config.data_dir / config.dataset.name / "train", config.train, config.seed
    parts = open_partition(config).train
    names = {part: path.with_suffix(f".{part}") for part in ("rows.npy", "offsets.npy", "safetensors")}
    np.save(names["rows.npy"], np.concatenate(parts))
    np.save(names["offsets.npy"], np.cumsum([0, *map(len, parts)]))
    dataset, settings = config.dataset, config.model
    model: dict[str, Any] = {"name": settings.name, "shape": dataset.shape, "classes": dataset.classes}
    model |= {"image_size": settings.image_size, "dropout": settings.dropout, "channels": settings.channels}
    torch.manual_seed(derive_seed(seed, "model"))
    save_file(build_model(**model).state_dict(), names["safetensors"])
    clients = sorted(map(str, range(config.clients)))
    count, rounds = sample_size(config.strategy.fraction_train, config.clients), range(1, config.num_rounds + 1)
    return Work(
        model=model,
        images=str(data / "images.npy"),
        labels=str(data / "labels.npy"),
        rows=str(names["rows.npy"]),
        offsets=str(names["offsets.npy"]),
        start=str(names["safetensors"]),
        seed=seed,
        drawn=[
            [int(name) for name in sorted(Random(derive_seed(seed, i, TRAIN)).sample(clients, count))] for i in rounds
        ],
        lrs=[scheduled_lr(train.lr, train.schedule, i, config.num_rounds) for i in rounds],
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        batch_size=train.batch_size,
        epochs=train.epochs,
        steps=train.steps,
    )


def cnn(home: Path, clients: int, drawn: int, counted: int) -> Workload:
    """Return W1, with images of noise."""
    draw = np.random.default_rng(0)
    for split, each in (("train", 50), ("test", 1)):
        shape = (clients * each, 32, 32, 3)
        images, labels = draw.integers(0, 256, shape, dtype=np.uint8), draw.integers(0, 10, len(range(shape[0])))
        write_artifact(home / "data" / f"noise-{clients}" / split, images, labels, classes=[str(i) for i in range(10)])
    words = ["model=cnn", "dataset=custom", f"dataset.name=noise-{clients}", "dataset.shape=[32,32,3]"]
    words += ["dataset.classes=10", "partition=iid", "train.optimizer=sgd", "train.lr=0.01", "train.schedule=constant"]
    words += ["train.weight_decay=0.0", "train.batch_size=10", "train.epochs=1", "checkpoint=off", f"clients={clients}"]
    return Workload("w1", home, (*words, f"strategy.fraction_train={drawn / clients}"), counted)


def linear(home: Path, clients: int, drawn: int, counted: int, samples: int = 10) -> Workload:
    """Return W2, on a linear function with noise."""
    draw, name = np.random.default_rng(0), f"line-{clients}x{samples}"
    for split, each in (("train", samples), ("test", 1)):
        x = draw.normal(size=(clients * each, 10)).astype(np.float32)
        y = x @ np.linspace(-1, 1, 10, dtype=np.float32) + draw.normal(scale=0.1, size=len(x)).astype(np.float32)
        write_artifact(home / "data" / name / split, x, y.astype(np.float32), classes=[])
    words = ["experiment=toy_regression", "dataset=custom", f"dataset.name={name}", "dataset.shape=[10]"]
    words += ["dataset.classes=0", "dataset.normalization=none", "checkpoint=off", f"clients={clients}"]
    return Workload(
        f"w2-{clients}x{samples}-{drawn}", home, (*words, f"strategy.fraction_train={drawn / clients}"), counted
    )


def in_turns(turns: int, **ways: Way) -> dict[str, Usage]:
    """Run each way in turn, A B C A B C ..., and return the medians of their costs."""
    found: dict[str, list[Usage]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            found[name].append(way())
    keys = Usage.__dataclass_fields__
    return {name: Usage(**{key: median(getattr(u, key) for u in each) for key in keys}) for name, each in found.items()}


def told(found: Mapping[str, Usage]) -> str:
    """Return the costs of each way in words: CPU and wall time of a round, peak memory, and start-up."""
    return "; ".join(
        f"{name} {used.cpu:.3g} s CPU, {used.wall:.3g} s, {used.pss / 2**20:.0f} MiB, "
        f"first round done after {used.start:.1f} s"
        for name, used in found.items()
    )


def at_most(what: str, against: str, target: float, unit: str = "x") -> Row:
    """Return a row without a ratio yet, for a figure that should be small."""
    return Row(what, against, None, target, higher_is_better=False, unit=unit)


def compare(turns: int, ways: Mapping[str, Way], *rows: tuple[Row, Callable[..., float]]) -> list[Row]:
    """Run ways in turn and return each row with its figure of their costs, given in the order of the ways.

    The costs are the note of the first row. If a run fails, its error is the note of all rows.
    """
    try:
        found = in_turns(turns, **ways)
    except CommandError as error:
        return [replace(row, note=str(error)) for row, _ in rows]
    notes = [told(found)] + [""] * (len(rows) - 1)
    return [
        replace(row, ratio=figure(*found.values()), note=note) for (row, figure), note in zip(rows, notes, strict=True)
    ]


def cpu(base: Usage, ours: Usage) -> float:
    return ours.cpu / base.cpu


def start(base: Usage, ours: Usage) -> float:
    return ours.start / base.start


def cnn_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W1 with the bare loop, in one worker and in two."""
    work = cnn(home, scale.clients, scale.drawn, scale.rounds[0])
    what = f"W1, inline, {scale.drawn} of {scale.clients:,} clients"
    one, two = (partial(work.run_flapp, *inline(workers)) for workers in (1, 2))
    return compare(
        scale.turns,
        {"bare": work.run_bare, "one worker": one, "two workers": two},
        (at_most(f"{what}, 1 worker", BARE, 1.10), lambda bare, one, two: one.cpu / bare.cpu),
        (at_most(f"{what}, 2 workers", BARE, 1.15), lambda bare, one, two: two.cpu / bare.cpu),
        (at_most(f"{what}, 2 workers, wall time", "1 worker", 0.65), lambda bare, one, two: two.wall / one.wall),
    )


def linear_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W2 with the bare loop, and measure the growth of metrics.jsonl."""
    work = linear(home, scale.clients, DRAWN, scale.rounds[1])
    what = f"W2, inline, {DRAWN} of {scale.clients:,} clients"
    size = at_most(f"{what}: metrics.jsonl a client and round", "-", 150, " B")
    return compare(
        scale.turns,
        {"bare": work.run_bare, "one worker": partial(work.run_flapp, *inline(1))},
        (at_most(f"{what}, 1 worker", BARE, 1.25), cpu),
        (size, lambda *_: line_bytes(home / "runs", work) / DRAWN),
    )


def line_bytes(runs: Path, work: Workload) -> float:
    """Return by how many bytes a round makes metrics.jsonl grow, in the last run of a workload."""
    last = max(runs.glob(f"{work.name}-*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = last.read_bytes().splitlines(keepends=True)
    sizes = [len(line) for line in lines if 1 < json.loads(line)["round"] < work.rounds]
    return sum(sizes) / work.counted


def digits_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W3, which keeps client stores, with the bare loop, which keeps nothing."""
    work = Workload("w3", home, ("experiment=digits_fedavg",), scale.rounds[2])
    row = at_most("W3, inline, 10 clients with stores, 1 worker", f"{BARE} without stores", 1.10)
    ways: dict[str, Way] = {"bare": work.run_bare, "one worker": partial(work.run_flapp, *inline(1))}
    return compare(scale.turns, ways, (row, cpu))


def ray_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare simulations in Ray with those of stock Flower, once each; and inline's start with Flower's."""
    found = []
    if scale.ray_rounds[0]:
        work = cnn(home, scale.clients, scale.drawn, scale.ray_rounds[0])
        row = at_most(f"W1, Ray, {scale.drawn} of {scale.clients:,} clients", STOCK, 1.0)
        found += compare(1, {"stock": work.run_stock, "flapp": partial(work.run_flapp, *RAY)}, (row, cpu))
    work = linear(home, scale.clients, DRAWN, scale.ray_rounds[1])
    stock = cache(work.run_stock)  # once, for both rows
    row = at_most(f"W2, Ray, {DRAWN} of {scale.clients:,} clients", STOCK, 1.0)
    found += compare(1, {"stock": stock, "flapp": partial(work.run_flapp, *RAY)}, (row, cpu))
    row = at_most(f"W2, inline, {scale.clients:,} clients: command to first round", STOCK, 0.15)
    return found + compare(1, {"stock": stock, "inline": partial(work.run_flapp, *inline(1))}, (row, start))


def scale_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare rounds of the same size among few clients and among many, and how long many take to start."""

    def ways(few: int, many: int, counted: int, samples: int) -> dict[str, Way]:
        works = {"few": linear(home, few, 20, counted, samples), "many": linear(home, many, 20, counted, samples)}
        return {name: partial(work.run_flapp, *inline(1)) for name, work in works.items()}

    row = at_most(f"20 of {scale.many:,} clients, inline", "20 of 100 clients", 1.2)
    found = compare(scale.turns, ways(100, scale.many, scale.rounds[1], 10), (row, cpu))
    if scale.most:
        row = at_most(f"{scale.most:,} clients, inline: command to first round", f"{scale.clients:,} clients", 3.3)
        found += compare(1, ways(scale.clients, scale.most, 2, 2), (row, start))
    return found


def rows(short: bool = False) -> list[Row]:
    """Measure everything, or the short form."""
    scale = SHORT if short else LONG
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="flapp-bench-") as folder:
        for group in (cnn_rows, linear_rows, digits_rows, ray_rows, scale_rows):
            found += group(Path(folder), scale)
    return found
