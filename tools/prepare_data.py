"""Prepare a dataset once: from its raw files to artifacts that every run opens without reading anything twice.

    python -m tools.prepare_data dataset=digits                              embedded, needs no files
    python -m tools.prepare_data dataset=cifar10 dataset.source=DIR          torchvision's files, already there
    python -m tools.prepare_data dataset=cifar100 dataset.download=true      fetched by torchvision
    python -m tools.prepare_data dataset=cifar10 dataset.source=DIR dataset.materialize=224   also resized, 7.5 GB
    python -m tools.prepare_data dataset=femnist dataset.source=DIR clients=100 partition=natural
        shards, and the same as one artifact
    python -m tools.prepare_data experiment=femnist_fedavg dataset.source=DIR              shards only

Settings are written as for a run; overwrite=true replaces what is there. What was interrupted goes on where it
stopped when the same command is given again. Exits 0 when all is there, 1 with one line that says what is wrong.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from flapp.data.artifact import DataError, arrays_sha256, locked, open_artifact, read_meta, write_rows
from flapp.data.blocks import ReadRows
from flapp.data.cifar import CIFAR, cifar_files, cifar_sha256, download_cifar, read_cifar
from flapp.data.embedded import EMBEDDED, is_prepared
from flapp.data.materialized import materialize, materialized_folder
from flapp.data.shards.build import export_artifacts, write_shards
from tools.running.called import as_called

SPLITS = ("train", "test")
Content = tuple[ReadRows, tuple[int, ...], np.ndarray, Sequence[str]]  # read rows, shape, labels, classes


@dataclass(frozen=True)
class Source:
    """A split that can be written: the SHA-256 of what it is made from, and a function that reads that."""

    sha256: str
    load: Callable[[], Content]


def prepare(settings: Config, overwrite: bool) -> list[str]:
    """Prepare what `settings` name and return a line on each thing that is now there; raises DataError, ConfigError."""
    dataset, folder = settings.dataset, settings.data_dir / settings.dataset.name
    if dataset.name == "femnist":
        return prepare_shards(settings, overwrite)
    with locked(settings.data_dir / f"{dataset.name}.lock"):
        sources = find_sources(settings, overwrite)
        lines = []
        for split in SPLITS:
            lines.append(prepare_split(folder / split, sources[split], dataset.shape, dataset.classes, overwrite))
            if dataset.materialize:
                lines.append(prepare_materialized(folder / split, dataset.materialize, overwrite))
    return lines


def find_sources(settings: Config, overwrite: bool) -> dict[str, Source]:
    """Return where each split comes from, after a download if one is asked for."""
    dataset = settings.dataset
    if dataset.name in EMBEDDED:
        if dataset.source or dataset.download:
            raise ConfigError(f"dataset={dataset.name} is embedded: leave out dataset.source and dataset.download")
        splits, classes = EMBEDDED[dataset.name]()
        return {split: embedded_source(*arrays, classes) for split, arrays in splits.items()}
    if dataset.name not in CIFAR:
        known = ", ".join((*EMBEDDED, *CIFAR, "femnist"))
        raise ConfigError(
            f"dataset={dataset.name} cannot be prepared: choose one of {known}, or write it with "
            "flapp.data.write_artifact"
        )
    if not (dataset.source or dataset.download):
        raise ConfigError(
            f"dataset={dataset.name} needs its files: add dataset.source=DIR where they are, or dataset.download=true"
        )
    raw, folder = Path(dataset.source or Path(settings.home) / "raw"), settings.data_dir / dataset.name
    if dataset.download and not overwrite and is_prepared(folder):
        # What was fetched and prepared once is not fetched again to see that it is still the same.
        stored = {split: open_artifact(folder / split).source_sha256 for split in SPLITS}
        return {split: Source(stored[split], partial(load_cifar, dataset.name, raw, split)) for split in SPLITS}
    if dataset.download:
        download_cifar(dataset.name, raw)
    return {split: cifar_source(dataset.name, raw, split) for split in SPLITS}


def embedded_source(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Source:
    """Return arrays that are in memory as a Source."""
    return Source(arrays_sha256(images, labels), lambda: (lambda a, b: images[a:b], images.shape, labels, classes))


def cifar_source(name: str, raw: Path, split: str) -> Source:
    """Return one split of CIFAR's files as a Source."""
    return Source(cifar_sha256(cifar_files(name, raw, split)), partial(load_cifar, name, raw, split))


def load_cifar(name: str, raw: Path, split: str) -> Content:
    """Read one split of CIFAR's files; planes become pixels block by block."""
    planes, labels, classes = read_cifar(name, cifar_files(name, raw, split))
    return lambda a, b: planes[a:b].transpose(0, 2, 3, 1), (len(planes), 32, 32, 3), labels, classes


def prepare_split(folder: Path, source: Source, shape: Sequence[int], classes: int, overwrite: bool) -> str:
    """Write the artifact in `folder` unless it is there, and return a line on it."""
    if is_there(folder, source.sha256, overwrite):
        return f"{folder}: already prepared, nothing to do (overwrite=true replaces it)"
    read, found, labels, names = source.load()
    if (found[1:], len(names)) != (tuple(shape), classes):
        raise DataError(
            f"{folder.parent.name} has images of shape {list(found[1:])} in {len(names)} classes, not "
            f"dataset.shape={list(shape)} and dataset.classes={classes}: set both to what it has"
        )
    with bar(folder, len(labels)) as progress:
        write_rows(folder, read, found, labels, names, source.sha256, progress=progress)
    return describe(folder)


def prepare_materialized(native: Path, size: int, overwrite: bool) -> str:
    """Write the artifact `<native>@<size>` unless it is there, and return a line on it."""
    folder = materialized_folder(native, size)
    if is_there(folder, open_artifact(native).digest, overwrite):
        return f"{folder}: already prepared, nothing to do (overwrite=true replaces it)"
    with bar(folder, len(open_artifact(native).labels)) as progress:
        materialize(native, size, progress)
    return describe(folder)


def is_there(folder: Path, source_sha256: str, overwrite: bool) -> bool:
    """Say whether the artifact is there and from this source; raises DataError when it is from another one."""
    if overwrite or not (folder / "meta.json").exists():
        return False
    open_artifact(folder)
    if read_meta(folder).get("source_sha256") != source_sha256:
        raise DataError(f"{folder} was made from other files: add overwrite=true to replace it")
    return True


def prepare_shards(settings: Config, overwrite: bool) -> list[str]:
    """Cut a dataset of writers into a folder per client, and unless shards are enabled into a shared artifact too."""
    if settings.dataset.source is None:
        raise ConfigError(f"dataset={settings.dataset.name} needs its files: add dataset.source=DIR where they are")
    if settings.dataset.download or settings.dataset.materialize:
        raise ConfigError(
            f"dataset={settings.dataset.name} is cut into shards as it is: leave out dataset.download "
            "and dataset.materialize"
        )
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
    lines = [f"{manifest.folder}: shards of {len(manifest):,} clients, {totals['writers']:,} writers, {counts} samples"]
    if not settings.distributed_data.enabled:
        partition = export_artifacts(manifest.path, settings.data_dir / settings.dataset.name)
        lines.append(f"{partition.parents[1]}: the same samples as one shared artifact, dealt by {partition.name}")
    return lines


def describe(folder: Path) -> str:
    """Return one line on what is in a folder."""
    artifact = open_artifact(folder)
    shape = "x".join(map(str, artifact.images.shape[1:]))
    return f"{folder}: {len(artifact.labels):,} samples of {shape}, {artifact.images.nbytes / 1e6:,.1f} MB"


@contextmanager
def bar(folder: Path, total: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar for the images of one folder."""
    with tqdm(total=total, unit="image", desc=folder.name, disable=None, file=sys.stderr) as shown:
        yield shown.update


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the command line names; returns the exit status."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        print(as_called(__doc__))
        return 0
    started = time.monotonic()
    try:
        # Not a setting of runs, so Hydra must not see it.
        overwrite = take_overwrite(overrides)
        for line in prepare(compose(overrides, Path.cwd()), overwrite):
            print(line)
    except (ConfigError, DataError) as error:
        print(as_called(f"error: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; mend that, or choose another home", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(f"done in {time.monotonic() - started:.1f} s")
    return 0


def take_overwrite(overrides: list[str]) -> bool:
    """Take overwrite=true or false out of `overrides`; raises ConfigError for another value."""
    given = [word for word in overrides if word.startswith("overwrite=")]
    overrides[:] = [word for word in overrides if word not in given]
    if wrong := [word for word in given if word not in ("overwrite=true", "overwrite=false")]:
        raise ConfigError(f"{wrong[0]} must be true or false")
    return given[-1:] == ["overwrite=true"]


if __name__ == "__main__":
    sys.exit(main())
