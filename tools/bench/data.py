"""Batches of CIFAR-10 at 224 pixels, against torchvision's dataset, transforms and DataLoader."""

import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from flapp.data.artifact import open_artifact, write_artifact
from flapp.data.images import NORMALIZATIONS, materialize
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineCIFAR10
from tools.bench import Row, measure

IMAGES, SIZE, BATCH = 4096, 224, 32
MEASURED = 640  # images per epoch for slow baselines and for `waiting`; otherwise our loader reads all IMAGES
STEP = 0.020  # seconds
CLIENTS = 6
CLASSES = [f"class {i}" for i in range(10)]


class LocalCIFAR10(CIFAR10):
    """torchvision's CIFAR-10 for files of its format with random pixels; their checksums are not checked."""

    train_list: ClassVar = [[f"data_batch_{i}", None] for i in range(1, 6)]
    meta: ClassVar = CIFAR10.meta | {"md5": None}

    def _check_integrity(self) -> bool:
        return True


class Float32Memmap(Dataset[tuple[Tensor, int]]):
    """A raw memmap: float32 (N, 3, 224, 224) without a header. The whole of CIFAR-10 would take 36 GB."""

    def __init__(self, path: Path) -> None:
        self.images = np.memmap(path, np.float32, "r", shape=(MEASURED, 3, SIZE, SIZE))

    def __len__(self) -> int:
        return MEASURED

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[index].copy()), 0


def prepare(folder: Path) -> None:
    """Write one set of random images in four forms.

    They are torchvision's files, an artifact as stored, one resized ahead, and a raw float32 memmap.
    """
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, IMAGES)
    theirs = folder / CIFAR10.base_folder
    theirs.mkdir()
    planes = images.transpose(0, 3, 1, 2).reshape(IMAGES, -1)
    for i, rows in enumerate(np.array_split(np.arange(IMAGES), 5), 1):
        batch = {"data": planes[rows], "labels": labels[rows].tolist()}
        (theirs / f"data_batch_{i}").write_bytes(pickle.dumps(batch))
    (theirs / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({CIFAR10.meta["key"]: CLASSES}))
    for name in ("native", "resized"):
        write_artifact(folder / name / "cifar10" / "train", images, labels, CLASSES)
    ahead = open_artifact(materialize(folder / "resized" / "cifar10" / "train", SIZE))
    ahead.images[:MEASURED].astype(np.float32).tofile(folder / "seed.bin")


def consume(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for _ in batches:
        pass


def rows() -> list[Row]:
    """Prepare the images in a temporary folder and measure on one thread, as a client of a simulation runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            return [*speed(Path(folder)), *waiting(Path(folder)), *memory(Path(folder))]
    finally:
        torch.set_num_threads(threads)


def speed(folder: Path) -> list[Row]:
    """Time epochs of shuffled batches, all in the page cache."""
    statistics_ = NORMALIZATIONS["imagenet"]
    assert statistics_
    pipeline = [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize(*statistics_)]
    chosen = np.random.default_rng(1).permutation(IMAGES)[:MEASURED]
    theirs: Subset[Any] = Subset(LocalCIFAR10(folder, transform=transforms.Compose(pipeline)), chosen.tolist())
    native, resized = (OfflineCIFAR10(folder / name) for name in ("native", "resized"))
    loader = partial(ClientLoader, indices=np.arange(IMAGES), batch_size=BATCH, seed=0, image_size=SIZE)
    loaders: dict[str, Iterable[tuple[Tensor, Tensor]]] = {
        "torchvision": DataLoader(theirs, BATCH, shuffle=True),
        "seed": DataLoader(Float32Memmap(folder / "seed.bin"), BATCH, shuffle=True),
        "uint8": loader(resized, output="uint8"),
        "float32": loader(resized),
        "exact": loader(resized, exact=True),
        "native": loader(native),
    }
    epochs = {name: partial(consume, batches) for name, batches in loaders.items()}
    images = {name: MEASURED if name in ("torchvision", "seed") else IMAGES for name in epochs}
    seconds = {name: total / images[name] for name, total in measure(epochs, repeats=9).items()}
    pair = {name: epochs[name] for name in ("torchvision", "float32")}
    busy = {name: t / images[name] for name, t in measure(pair, repeats=15, clock=time.process_time).items()}
    ratio = {name: seconds["torchvision"] / seconds[name] for name in epochs}
    saved = 100 * (1 - busy["float32"] / busy["torchvision"])
    against = "torchvision CIFAR10 + PIL Resize + ToTensor + Normalize"
    memmap = "a raw float32 memmap, 4 times the bytes"
    what, exact = "float32 normalized batch from resized-ahead uint8", f"{ratio['exact']:.1f}x with exact=True"
    return [
        Row("uint8 batch from resized-ahead images", against, ratio["uint8"], 50),
        Row(what, against, ratio["float32"], 10, note=exact),
        Row("the same", memmap, seconds["seed"] / seconds["float32"], 1, note="both in the page cache"),
        Row("native 32 -> 224, float32", against, ratio["native"], 4, note="the same bytes as PIL"),
        Row("CPU saved per sample, float32", against, saved, 90, unit="%"),
    ]


def waiting(folder: Path) -> list[Row]:
    """Measure how long a training loop waits for each next batch when its step keeps one core busy for STEP."""
    indices, square = np.arange(MEASURED), torch.ones(256, 256)
    result = []
    for name in ("resized", "native"):
        waits, batches = [], iter(ClientLoader(OfflineCIFAR10(folder / name), indices, BATCH, 0, SIZE))
        for _ in range(MEASURED // BATCH):
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
            while time.perf_counter() - start < STEP:
                square @ square
        median, worst = 1e3 * statistics.median(waits), 1e3 * max(waits[1:])
        note = f"worst {worst:.2f} ms after the first batch, which takes {1e3 * waits[0]:.1f} ms"
        what = f"wait for the loader, float32 from {name}"
        result.append(Row(what, f"a step of {1e3 * STEP:.0f} ms", median, 0.1, False, " ms", note))
    return result


def memory(folder: Path) -> list[Row]:
    """Compare the memory that one and several processes need for the same data, uint8 batches of an epoch each."""
    one, several = (sum(memory_of_clients(folder, clients)) for clients in (1, CLIENTS))
    note = f"{one / 2**20:.0f} and {several / 2**20:.0f} MiB (PSS) beyond what each process had before"
    against = "one process"
    return [Row(f"memory of {CLIENTS} processes on one artifact, uint8", against, several / one, 1.2, False, note=note)]


def memory_of_clients(folder: Path, clients: int) -> list[int]:
    """Run processes that each read a whole epoch; return the bytes that each gains by it, while all of them live."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(clients, timeout=120), context.Queue()
    started = [context.Process(target=read_epoch, args=(folder, barrier, answers), daemon=True) for _ in range(clients)]
    for process in started:
        process.start()
    try:
        return [answers.get(timeout=120) for _ in started]
    finally:
        for process in started:
            process.join()


def read_epoch(folder: Path, barrier: Barrier, answers: "Queue[Any]") -> None:
    """Put into `answers` how much the proportional set size grows from before an epoch to its last batch."""
    torch.set_num_threads(1)
    consume(ClientLoader(OfflineCIFAR10(folder / "native"), np.arange(BATCH), BATCH, 0, output="uint8"))
    barrier.wait()
    before = psutil.Process().memory_full_info().pss
    barrier.wait()
    batches = iter(ClientLoader(OfflineCIFAR10(folder / "resized"), np.arange(IMAGES), BATCH, 0, SIZE, output="uint8"))
    for _ in range(IMAGES // BATCH):
        next(batches)
    barrier.wait()
    answers.put(psutil.Process().memory_full_info().pss - before)
    barrier.wait()
