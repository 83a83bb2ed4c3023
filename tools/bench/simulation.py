"""CPU time per round of a simulation, against a bare PyTorch loop over the same work and against stock Flower.

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
from dataclasses import asdict, astuple, dataclass, replace
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
INLINE = ("deployment=inline", "deployment.workers=1")
TWO_WORKERS = ("deployment=inline", "deployment.workers=2")
BARE, STOCK = "bare PyTorch loop", "stock Flower"
NO_EVALUATION = ("evaluate.every=1000000", "strategy.fraction_evaluate=0.0001", "evaluate.personal_epochs=0")
LIMIT_SECONDS = 600.0
DRAWN = 50  # clients per round of W2
NUMBERS = itertools.count()
Way = Callable[[], Usage]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    clients: int  # of W1 and W2
    drawn: int  # clients that train in a round of W1
    rounds: tuple[int, int, int]  # measured rounds of W1, W2 and W3
    ray_rounds: tuple[int, int]  # measured rounds of W1 and W2 in Ray; 0 leaves the row of W1 out
    turns: int  # how often each comparison is measured
    many: int  # clients of the row about the cost of a round
    most: int  # clients of the row about the time to start; 0 leaves it out


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
        """Run flapp by its own command: inline with one worker, unless another runtime is given."""
        path = self.home / "runs" / f"{self.name}-{next(NUMBERS)}"
        words = [*self.words, *NO_EVALUATION, *(runtime or INLINE), f"num_rounds={self.rounds}"]
        words += [f"home={self.home}", f"run_name={path.name}", "--format", "json"]
        command = [sys.executable, "-m", "tools.run", *words]
        return watch(command, path / "metrics.jsonl", b'"kind": "round"', self.rounds, LIMIT_SECONDS)

    def run_bare(self, module: str = "bare", *arguments: str) -> Usage:
        """Run the bare loop, or another module of tools.bench that does the same work."""
        ends = self.home / f"{self.name}-{next(NUMBERS)}"
        command = [sys.executable, "-m", f"tools.bench.{module}", str(self.work()), str(ends), *arguments]
        return watch(command, ends, b"end", self.rounds, LIMIT_SECONDS)

    def run_stock(self) -> Usage:
        """Run stock Flower with a node for each client."""
        return self.run_bare("stock", str(self.config().clients))

    def config(self) -> Config:
        return compose([f"home={self.home}", *self.words, f"num_rounds={self.rounds}"])

    def work(self) -> Path:
        """Return the file that tells the bare loop and stock Flower what to do, written once."""
        path = self.home / f"{self.name}-{self.rounds}.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(as_work(self.config(), path))))
        return path


def as_work(config: Config, path: Path) -> Work:
    """Turn this config's work into a Work for the bare loop; the parts and the start are written beside `path`."""
    from safetensors.torch import save_file

    seed, dataset, parts = config.seed, config.dataset, open_partition(config).train
    files = {kind: str(path.with_suffix(f".{kind}")) for kind in ("npz", "safetensors")}
    np.savez(files["npz"], rows=np.concatenate(parts), offsets=np.cumsum([0, *map(len, parts)]))
    model: dict[str, Any] = {key: getattr(config.model, key) for key in ("name", "image_size", "dropout", "channels")}
    model |= {"shape": dataset.shape, "classes": dataset.classes}
    torch.manual_seed(derive_seed(seed, "model"))
    save_file(build_model(**model).state_dict(), files["safetensors"])
    clients = sorted(map(str, range(config.clients)))
    count, rounds = sample_size(config.strategy.fraction_train, config.clients), range(1, config.num_rounds + 1)
    drawn = [sorted(Random(derive_seed(seed, i, TRAIN)).sample(clients, count)) for i in rounds]
    return Work(
        model=model,
        data=str(config.data_dir / dataset.name / "train"),
        parts=files["npz"],
        start=files["safetensors"],
        seed=seed,
        drawn=[[int(client) for client in each] for each in drawn],
        lrs=[scheduled_lr(config.train.lr, config.train.schedule, i, config.num_rounds) for i in rounds],
        train=asdict(config.train),
    )


def workload(name: str, home: Path, words: str, drawn: int, counted: int, clients: int) -> Workload:
    """Return a workload of `clients`, `drawn` of them a round, on the dataset of its name."""
    words += f" dataset=custom dataset.name={name} checkpoint=off clients={clients}"
    return Workload(name, home, (*words.split(), f"strategy.fraction_train={drawn / clients}"), counted)


def cnn(home: Path, clients: int, drawn: int, counted: int) -> Workload:
    """Return W1, with images of noise."""
    draw, name = np.random.default_rng(0), f"w1-{clients}-{drawn}"
    for split, size in (("train", 50 * clients), ("test", clients)):
        images, labels = draw.integers(0, 256, (size, 32, 32, 3), np.uint8), draw.integers(0, 10, size)
        write_artifact(home / "data" / name / split, images, labels, classes=[str(i) for i in range(10)])
    words = "model=cnn partition=iid dataset.shape=[32,32,3] dataset.classes=10 train.optimizer=sgd train.lr=0.01"
    words += " train.schedule=constant train.weight_decay=0.0 train.batch_size=10 train.epochs=1"
    return workload(name, home, words, drawn, counted, clients)


def linear(home: Path, clients: int, drawn: int, counted: int, samples: int = 10) -> Workload:
    """Return W2, on a linear function with noise."""
    draw, name = np.random.default_rng(0), f"w2-{clients}x{samples}-{drawn}"
    for split, size in (("train", samples * clients), ("test", clients)):
        x = draw.normal(size=(size, 10)).astype(np.float32)
        y = x @ np.linspace(-1, 1, 10, dtype=np.float32) + draw.normal(scale=0.1, size=size).astype(np.float32)
        write_artifact(home / "data" / name / split, x, y.astype(np.float32), classes=[])
    words = "experiment=toy_regression dataset.shape=[10] dataset.classes=0 dataset.normalization=none"
    return workload(name, home, words, drawn, counted, clients)


def in_turns(turns: int, **ways: Way) -> dict[str, Usage]:
    """Run each way in turn, A B C A B C ..., and return the medians of their costs."""
    found: dict[str, list[Usage]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            found[name].append(way())
    return {name: Usage(*map(median, zip(*map(astuple, each), strict=True))) for name, each in found.items()}


def told(name: str, used: Usage) -> str:
    """Return the costs of a way in words: CPU and wall time of a round, peak memory, and start-up."""
    round_ = f"{used.cpu:.3g} s CPU, {used.wall:.3g} s, {used.pss / 2**20:.0f} MiB"
    return f"{name} {round_}, first round done after {used.start:.1f} s"


def at_most(what: str, against: str, target: float, unit: str = "x") -> Row:
    """Return a row without a ratio yet, for a figure that should be small."""
    return Row(what, against, None, target, higher_is_better=False, unit=unit)


def compare(turns: int, ways: Mapping[str, Way], *rows: tuple[Row, Callable[..., float]]) -> list[Row]:
    """Run the ways in turn. Each row's function gets their costs, in this order, and returns the row's figure.

    The costs are the note of the first row. If a run fails, its error is the note of all rows.
    """
    try:
        found = in_turns(turns, **ways)
    except CommandError as error:
        return [replace(row, note=str(error)) for row, _ in rows]
    first, *others = (replace(row, ratio=figure(*found.values())) for row, figure in rows)
    return [replace(first, note="; ".join(told(*item) for item in found.items())), *others]


def cpu(base: Usage, ours: Usage) -> float:
    return ours.cpu / base.cpu


def wall(base: Usage, ours: Usage) -> float:
    return ours.wall / base.wall


def start(base: Usage, ours: Usage) -> float:
    return ours.start / base.start


def cnn_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W1 with the bare loop, in one worker and in two."""
    work = cnn(home, scale.clients, scale.drawn, scale.rounds[0])
    what = f"W1, inline, {scale.drawn} of {scale.clients:,} clients"
    return compare(
        scale.turns,
        {"bare": work.run_bare, "one worker": work.run_flapp, "two workers": partial(work.run_flapp, *TWO_WORKERS)},
        (at_most(f"{what}, 1 worker", BARE, 1.10), lambda bare, one, two: one.cpu / bare.cpu),
        (at_most(f"{what}, 2 workers", BARE, 1.15), lambda bare, one, two: two.cpu / bare.cpu),
        (at_most(f"{what}, 2 workers, wall time", "1 worker", 0.65), lambda bare, one, two: two.wall / one.wall),
    )


def private_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W1 with central privacy and without. All clients train: Poisson sampling would draw a varying number."""
    plain = cnn(home, scale.drawn, scale.drawn, scale.rounds[0])
    private = replace(plain, name=f"{plain.name}-private", words=(*plain.words, "privacy=central"))
    row = at_most(f"W1, inline, {scale.drawn} clients, privacy=central, wall time", "privacy=none", 1.10)
    return compare(scale.turns, {"none": plain.run_flapp, "central": private.run_flapp}, (row, wall))


def linear_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W2 with the bare loop, and measure the growth of metrics.jsonl."""
    work = linear(home, scale.clients, DRAWN, scale.rounds[1])
    what = f"W2, inline, {DRAWN} of {scale.clients:,} clients"
    size = at_most(f"{what}: metrics.jsonl per client and round", "-", 150, " B")
    ways: dict[str, Way] = {"bare": work.run_bare, "one worker": work.run_flapp}
    row = at_most(f"{what}, 1 worker", BARE, 1.25)
    return compare(scale.turns, ways, (row, cpu), (size, lambda *_: line_bytes(home / "runs", work) / DRAWN))


def line_bytes(runs: Path, work: Workload) -> float:
    """Return by how many bytes a round makes metrics.jsonl grow, in the last run of a workload."""
    last = max(runs.glob(f"{work.name}-*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = last.read_bytes().splitlines(keepends=True)
    return sum(len(line) for line in lines if 1 < json.loads(line)["round"] < work.rounds) / work.counted


def digits_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare W3, which keeps client stores, with the bare loop, which keeps nothing."""
    work = Workload("w3", home, ("experiment=digits_fedavg",), scale.rounds[2])
    row = at_most("W3, inline, 10 clients with stores, 1 worker", f"{BARE} without stores", 1.10)
    return compare(scale.turns, {"bare": work.run_bare, "one worker": work.run_flapp}, (row, cpu))


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
    return found + compare(1, {"stock": stock, "inline": work.run_flapp}, (row, start))


def scale_rows(home: Path, scale: Scale) -> list[Row]:
    """Compare few clients with many: the cost of a round of equal size, and the time to start."""

    def ways(few: int, many: int, counted: int, samples: int) -> dict[str, Way]:
        counts = {"few": few, "many": many}
        return {name: linear(home, count, 20, counted, samples).run_flapp for name, count in counts.items()}

    row = at_most(f"20 of {scale.many:,} clients, inline", "20 of 100 clients", 1.2)
    found = compare(scale.turns, ways(100, scale.many, scale.rounds[1], 10), (row, cpu))
    if scale.most:
        row = at_most(f"{scale.most:,} clients, inline: command to first round", f"{scale.clients:,} clients", 3.3)
        found += compare(1, ways(scale.clients, scale.most, 2, 2), (row, start))
    return found


def rows(short: bool = False) -> list[Row]:
    """Measure everything, or the short form."""
    scale = SHORT if short else LONG
    groups = (cnn_rows, private_rows, linear_rows, digits_rows, ray_rows, scale_rows)
    with tempfile.TemporaryDirectory(prefix="flapp-bench-") as folder:
        return [row for group in groups for row in group(Path(folder), scale)]
