"""Prepare a dataset once: turn its raw files into what every run opens.

    python -m tools.prepare_data dataset=digits                              embedded, needs no files
    python -m tools.prepare_data dataset=cifar10 dataset.source=DIR          from torchvision's files in DIR
    python -m tools.prepare_data dataset=cifar100 dataset.download=true      downloaded by torchvision
    python -m tools.prepare_data dataset=cifar10 dataset.source=DIR dataset.materialize=224   also resized, 7.5 GB
    python -m tools.prepare_data dataset=femnist dataset.source=DIR clients=100 partition=natural
        shards, and the same samples as one artifact
    python -m tools.prepare_data experiment=femnist_fedavg dataset.source=DIR              shards only

Settings are written as for a run; overwrite=true replaces what is there. After an interruption, run the same command
again. Exits 0 when everything is prepared, 1 with one line that says what is wrong.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from flapp.data.artifact import DataError, ReadRows, arrays_sha256, locked, open_artifact, resized_folder, write_rows
from flapp.data.shards.build import export_artifacts, write_shards
from flapp.data.sources import CIFAR, EMBEDDED, cifar_files, cifar_sha256, download_cifar, is_prepared, read_cifar
from tools.cli import as_called

SPLITS = ("train", "test")
Content = tuple[ReadRows, tuple[int, ...], np.ndarray, Sequence[str]]  # read rows, shape, labels, classes
Source = tuple[str, Callable[[], Content]]  # the SHA-256 of what a split is made from, and a function that reads it


def prepare(settings: Config, overwrite: bool) -> Iterator[str]:
    """Prepare the dataset of `settings` and yield a line on each thing prepared; raises DataError, ConfigError."""
    dataset, folder = settings.dataset, settings.data_dir / settings.dataset.name
    if dataset.name == "femnist":
        yield from prepare_shards(settings, overwrite)
        return
    with locked(settings.data_dir / f"{dataset.name}.lock"):
        sources = find_sources(settings, overwrite)
        for split in SPLITS:
            yield prepare_split(folder / split, sources[split], dataset.shape, dataset.classes, overwrite)
            if dataset.materialize:
                yield prepare_resized(folder / split, dataset.materialize, overwrite)


def find_sources(settings: Config, overwrite: bool) -> dict[str, Source]:
    """Return the source of each split, downloading it first if the settings say so."""
    dataset, name = settings.dataset, settings.dataset.name
    if name in EMBEDDED:
        if dataset.source or dataset.download:
            raise ConfigError(f"dataset={name} is embedded: leave out dataset.source and dataset.download")
        splits, classes = EMBEDDED[name]()
        return {split: embedded_source(*arrays, classes) for split, arrays in splits.items()}
    if name not in CIFAR:
        known = ", ".join((*EMBEDDED, *CIFAR, "femnist"))
        raise ConfigError(
            f"dataset={name} cannot be prepared: choose one of {known}, or write it with flapp.data.write_artifact"
        )
    if not (dataset.source or dataset.download):
        raise ConfigError(f"dataset={name} needs its files: add dataset.source=DIR, or dataset.download=true")
    raw, folder = Path(dataset.source or Path(settings.home) / "raw"), settings.data_dir / name
    load = {split: partial(load_cifar, name, raw, split) for split in SPLITS}
    if dataset.download and not overwrite and is_prepared(folder):  # then nothing is downloaded to compare with it
        return {split: (open_artifact(folder / split).source_sha256, load[split]) for split in SPLITS}
    if dataset.download:
        download_cifar(name, raw)
    return {split: (cifar_sha256(cifar_files(name, raw, split)), load[split]) for split in SPLITS}


def embedded_source(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Source:
    """Return a split that is in memory as a source."""
    return arrays_sha256(images, labels), lambda: (lambda a, b: images[a:b], images.shape, labels, classes)


def load_cifar(name: str, raw: Path, split: str) -> Content:
    """Read one split of CIFAR's files; planes become pixels block by block."""
    planes, labels, classes = read_cifar(name, cifar_files(name, raw, split))
    return lambda a, b: planes[a:b].transpose(0, 2, 3, 1), (len(planes), 32, 32, 3), labels, classes


def prepare_split(folder: Path, source: Source, shape: Sequence[int], classes: int, overwrite: bool) -> str:
    """Write the artifact in `folder` unless it exists, and return a line on it."""
    sha256, load = source
    if is_there(folder, sha256, overwrite):
        return already(folder)
    read, found, labels, names = load()
    if (found[1:], len(names)) != (tuple(shape), classes):
        raise DataError(
            f"{folder.parent.name} has images of shape {list(found[1:])} in {len(names)} classes, not "
            f"dataset.shape={list(shape)} and dataset.classes={classes}: set both to what it has"
        )
    with bar(folder, len(labels)) as progress:
        write_rows(folder, read, found, labels, names, sha256, progress=progress)
    return describe(folder)


def prepare_resized(native: Path, size: int, overwrite: bool) -> str:
    """Write the artifact `<native>@<size>` unless it exists, and return a line on it."""
    from flapp.data.images import materialize  # imports PyTorch

    folder, artifact = resized_folder(native, size), open_artifact(native)
    if is_there(folder, artifact.digest, overwrite):
        return already(folder)
    with bar(folder, len(artifact.labels)) as progress:
        materialize(native, size, progress)
    return describe(folder)


def is_there(folder: Path, source_sha256: str, overwrite: bool) -> bool:
    """Say whether the artifact exists; raises DataError when it was made from another source."""
    if overwrite or not (folder / "meta.json").exists():
        return False
    if open_artifact(folder).source_sha256 != source_sha256:
        raise DataError(f"{folder} was made from other files: add overwrite=true to replace it")
    return True


def prepare_shards(settings: Config, overwrite: bool) -> Iterator[str]:
    """Write one shard per client and, unless distributed_data is enabled, a shared artifact too."""
    name = settings.dataset.name
    if settings.dataset.source is None:
        raise ConfigError(f"dataset={name} needs its files: add dataset.source=DIR")
    if settings.dataset.download or settings.dataset.materialize:
        raise ConfigError(f"dataset={name} has neither download nor sizes: leave out dataset.download and materialize")
    mapping = settings.partition.mapping
    manifest = write_shards(
        Path(settings.dataset.source),
        settings.shards_dir,
        settings.partition.kind,
        settings.clients,
        settings.partition.seed,
        Path(mapping) if mapping else None,
        overwrite=overwrite,
        progress=True,
    )
    totals = manifest.facts["totals"]
    counts = ", ".join(f"{totals[split]:,} {split}" for split in ("train", "val", "test"))
    yield f"{manifest.folder}: shards of {len(manifest):,} clients, {totals['writers']:,} writers, {counts} samples"
    if not settings.distributed_data.enabled:
        partition = export_artifacts(manifest.path, settings.data_dir / name)
        yield f"{partition.parents[1]}: the same samples as one shared artifact, partitioned by {partition.name}"


def describe(folder: Path) -> str:
    """Return one line on an artifact."""
    artifact = open_artifact(folder)
    shape = "x".join(map(str, artifact.images.shape[1:]))
    return f"{folder}: {len(artifact.labels):,} samples of {shape}, {artifact.images.nbytes / 1e6:,.1f} MB"


def already(folder: Path) -> str:
    """Return the line on an artifact that was prepared earlier."""
    return f"{folder}: already prepared, nothing to do (overwrite=true replaces it)"


@contextmanager
def bar(folder: Path, total: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar for the images of one folder."""
    with tqdm(total=total, unit="image", desc=folder.name, disable=None, file=sys.stderr) as shown:
        yield shown.update


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the dataset on the command line; returns the exit status."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        print(as_called(__doc__))
        return 0
    started = time.monotonic()
    try:
        overwrite = take_overwrite(overrides)
        for line in prepare(compose(overrides, Path.cwd()), overwrite):
            print(line)
    except (ConfigError, DataError) as error:
        print(as_called(f"error: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; fix that, or choose another home", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    print(f"done in {time.monotonic() - started:.1f} s")
    return 0


def take_overwrite(overrides: list[str]) -> bool:
    """Take overwrite=true or false out of `overrides`: it is not a setting of runs. Raises ConfigError otherwise."""
    given = [word for word in overrides if word.startswith("overwrite=")]
    overrides[:] = [word for word in overrides if word not in given]
    if wrong := [word for word in given if word not in ("overwrite=true", "overwrite=false")]:
        raise ConfigError(f"{wrong[0]} must be true or false")
    return given[-1:] == ["overwrite=true"]


if __name__ == "__main__":
    sys.exit(main())
