"""Prepare a dataset once: convert its raw files into the format that all runs read.

    python -m tools.prepare_data dataset=digits                              embedded, needs no files
    python -m tools.prepare_data dataset=custom dataset.name=mine dataset.source=DIR   your images, in folders by class
    python -m tools.prepare_data dataset=custom dataset.name=mine dataset.source=DIR 'dataset.shape=[224,224,3]'
        scaled and cropped, if they have different sizes
    python -m tools.prepare_data dataset=custom dataset.name=mine dataset.source=DIR dataset.client_column=writer_id
        clients=100 partition=natural      from parquet files: shards, and the same samples as one artifact
    python -m tools.prepare_data dataset=custom dataset.name=mine dataset.hub=OWNER/NAME dataset.download=true
    python -m tools.prepare_data dataset=cifar10 dataset.source=DIR          from torchvision's files in DIR
    python -m tools.prepare_data dataset=cifar100 dataset.download=true      downloaded by torchvision
    python -m tools.prepare_data dataset=cifar10 dataset.source=DIR dataset.materialize=224   also resized, 9.0 GB
    python -m tools.prepare_data dataset=femnist dataset.source=DIR clients=100 partition=natural
        shards, and the same samples as one artifact
    python -m tools.prepare_data experiment=femnist_fedavg dataset.source=DIR              shards only

Settings are written as for a run; overwrite=true replaces what is there. After an interruption, run the same command
again. Exits 0 when everything is prepared; otherwise 1, and the last line says what is wrong.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flapp.config.load import compose
from flapp.config.schema import WRITER_PARTITIONS, Config, ConfigError
from flapp.data.artifact import DataError, arrays_sha256, locked, open_artifact, resized_folder, write_rows, writing
from flapp.data.decode import Decoded, RawSplit, UnreadableError, decode_splits
from flapp.data.folder import open_folder
from flapp.data.shards.build import export_artifacts, write_shards
from flapp.data.shards.source import FEMNIST, read_kind
from flapp.data.shards.source import Source as ShardSource
from flapp.data.sources import (
    EMBEDDED,
    check_preparation,
    cifar_files,
    cifar_sha256,
    download_cifar,
    is_own,
    is_prepared,
    read_cifar,
)
from flapp.data.table_files import download_dataset, find_tables
from flapp.data.tables import Columns, open_tables
from flapp.untrusted import one_line
from tools.cli import as_called, errors_in_one_line

SPLITS = ("train", "test")
HUB = {FEMNIST.dataset: "flwrlabs/femnist"}
NO_FILES = (
    ", a folder with a folder of images for each class or with parquet files; or write the dataset with "
    "flapp.data.write_artifact"
)
MOST_LINES = 20  # about images that cannot be read
Content = tuple[np.ndarray, np.ndarray, Sequence[str]]  # images, labels, classes
Source = tuple[str, Callable[[], Content]]  # the SHA-256 of what a split is made from, and a function that reads it


def prepare(settings: Config, overwrite: bool) -> Iterator[str]:
    """Prepare the dataset of `settings` and yield a line about each result; raises DataError, ConfigError."""
    dataset, name = settings.dataset, settings.dataset.name
    if name == FEMNIST.dataset:
        yield from prepare_shards(settings, overwrite)
        return
    if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise ConfigError(f"dataset.name={name!r} must be the name of a folder in {settings.data_dir}")
    kind = prepare_flapps if is_own(name) else prepare_shards if dataset.client_column else prepare_own
    with locked(settings.data_dir / f"{name}.lock"):
        try:
            yield from kind(settings, overwrite)
        finally:
            with suppress(OSError):  # it is not there, or not empty because something was written to it
                (settings.data_dir / name).rmdir()


def prepare_flapps(settings: Config, overwrite: bool) -> Iterator[str]:
    """Write both splits of one of flapp's own datasets."""
    dataset, folder = settings.dataset, settings.data_dir / settings.dataset.name
    for split, (sha256, load) in find_sources(settings, overwrite).items():
        if is_new := not is_made(folder / split, sha256, overwrite):
            write_native(folder / split, load, sha256, dataset.shape, dataset.classes)
        yield describe(folder / split, is_new)
        yield from prepare_resized(folder / split, dataset.materialize, overwrite)


def prepare_resized(native: Path, size: int | None, overwrite: bool) -> Iterator[str]:
    """Write a split resized to `size`, if that is set."""
    if size is None:
        return
    artifact, folder = open_artifact(native), resized_folder(native, size)
    if is_new := not is_made(folder, artifact.digest, overwrite):
        from flapp.data.images import materialize  # imports PyTorch

        with bar(folder.name, len(artifact.labels)) as progress:
            materialize(native, size, progress)
    yield describe(folder, is_new)


def prepare_own(settings: Config, overwrite: bool) -> Iterator[str]:
    """Decode the images of the user's own dataset and write both splits of it, or none."""
    dataset, folder = settings.dataset, settings.data_dir / settings.dataset.name
    if (kind := settings.partition.kind) in WRITER_PARTITIONS:
        fix = "add dataset.client_column=COLUMN, or leave partition out"
        raise ConfigError(f"partition={kind} needs a client for each sample, and no column names one: {fix}")
    raw, classes = open_raw(settings, find_files(settings, overwrite))
    settled = [list(dataset.shape), dataset.normalization, dataset.skip_unreadable]  # they decide the artifact too
    sources = {
        split: hashlib.sha256(json.dumps([found.sha256, *settled]).encode()).hexdigest() for split, found in raw.items()
    }
    made = [is_made(folder / split, sha256, overwrite, "files or settings") for split, sha256 in sources.items()]
    if all(made):
        check_preparation(folder, *(open_artifact(folder / split).preparation for split in SPLITS))
    else:
        decoded, lines = decode_all(settings, raw)
        yield from lines
        write_own(folder, decoded, classes, sources, dataset.normalization)
    for split in raw:
        yield describe(folder / split, not all(made))
        yield from prepare_resized(folder / split, dataset.materialize, overwrite)


def decode_all(settings: Config, raw: dict[str, RawSplit]) -> tuple[dict[str, Decoded], list[str]]:
    """Decode the images of all splits, and return lines on those that are left out."""
    dataset = settings.dataset
    with bar("decoding", sum(len(found.labels) for found in raw.values())) as progress:
        shape = FEMNIST.shape if dataset.name == FEMNIST.dataset else dataset.shape or None
        decoded, bad = decode_splits(raw, shape, dataset.skip_unreadable, settings.data_dir, progress)
    count = "1 image cannot be read and is" if len(bad) == 1 else f"{len(bad):,} images cannot be read and are"
    return decoded, [*listed(bad), f"{count} left out"] if bad else []


def open_raw(settings: Config, source: Path) -> tuple[dict[str, RawSplit], list[str]]:
    """Return the encoded images of each split of a dataset in files, and the names of its classes.

    With a client column, samples are not divided into splits here: the shards divide each client's samples.
    """
    dataset, is_femnist = settings.dataset, settings.dataset.name == FEMNIST.dataset
    if columns := read_columns(settings, source):
        columns = replace(columns, client=columns.client or "writer_id") if is_femnist else columns
        fraction = None if columns.client else dataset.test_fraction
        raw, classes = open_tables(source, columns, fraction, settings.seed, FEMNIST.classes if is_femnist else ())
    else:
        with bar("hashing", None) as progress:
            raw, classes = open_folder(source, dataset.test_fraction, settings.seed, progress)
    if dataset.classes not in (0, len(classes)):
        raise DataError(f"{source} has {len(classes)} classes, not {dataset.classes}: leave dataset.classes out")
    return raw, classes


def read_columns(settings: Config, source: Path) -> Columns | None:
    """Return the columns of a source of tables, None for any other.

    Raises ConfigError if columns are set for a source without tables, and DataError for a source that may not be read.
    """
    columns = Columns(settings.dataset.image_column, settings.dataset.label_column, settings.dataset.client_column)
    try:
        tables = find_tables(source)
    except PermissionError as error:
        fix = "allow it with chmod, or choose another dataset.source"
        raise DataError(f"{source} may not be read ({error.strerror}): {fix}") from error
    if tables:
        return columns
    if columns != Columns():
        raise ConfigError(f"{source} has no parquet files, and only they have columns: leave dataset.*_column out")
    return None


def find_files(settings: Config, overwrite: bool) -> Path:
    """Return the folder or file of the raw files, downloading them first if the settings say so."""
    dataset, name = settings.dataset, settings.dataset.name
    if dataset.target:
        raise ConfigError(f"dataset.target={dataset.target} makes dataset={name} on first use: start a run")
    if dataset.download and dataset.source:
        raise ConfigError("dataset.source and dataset.download=true are two sources: leave one of them out")
    if dataset.hub and not dataset.download:
        raise ConfigError(f"dataset.hub={dataset.hub} is a download: add dataset.download=true")
    hub = dataset.hub or HUB.get(name)
    if dataset.download and hub:
        return download_dataset(hub, Path(settings.home) / "raw", overwrite)
    if dataset.download:
        raise ConfigError(f"dataset={name} is downloaded from the Hugging Face hub: add dataset.hub=OWNER/NAME")
    if dataset.source is None:
        others = ", or dataset.download=true" if hub else NO_FILES
        raise ConfigError(f"dataset={name} needs its files: add dataset.source=DIR{others}")
    return Path(dataset.source)


def write_own(
    folder: Path, decoded: dict[str, Decoded], classes: Sequence[str], sources: dict[str, str], normalization: str
) -> None:
    """Write the artifacts of all splits, or none; remove the old dataset's partitions by writer."""
    channels = decoded["train"].shape[2]
    if normalization == "imagenet" and channels != 3:
        raise DataError(f"dataset.normalization=imagenet needs 3 channels, the images have {channels}: leave it out")
    if missing := set(range(len(classes))) - set(decoded["train"].labels.tolist()):
        raise DataError(f"class {classes[min(missing)]} has no training image that can be read: repair one")
    preparation = hashlib.sha256("".join(sources[split] for split in SPLITS).encode()).hexdigest()
    with ExitStack() as stack:
        for split, images in decoded.items():
            target = folder / split
            into = stack.enter_context(writing(target))
            write = partial(write_rows, target, images.read_rows, images.images.shape, images.labels, classes)
            write = partial(write, normalization=normalization, into=into, preparation=preparation)
            with bar(split, len(images.labels)) as progress:
                write(sources[split], progress=progress)
    for kind in WRITER_PARTITIONS:
        (folder / "partitions" / f"{kind}.safetensors").unlink(missing_ok=True)


def find_sources(settings: Config, overwrite: bool) -> dict[str, Source]:
    """Return the source of each split, downloading it first if the settings say so."""
    dataset, name = settings.dataset, settings.dataset.name
    for key in ("hub", "image_column", "label_column", "client_column"):
        if getattr(dataset, key) is not None:
            raise ConfigError(f"dataset.{key} does not apply to dataset={name}: leave it out")
    if name in EMBEDDED:
        if dataset.source or dataset.download:
            raise ConfigError(f"dataset={name} is embedded: leave out dataset.source and dataset.download")
        splits, classes = EMBEDDED[name]()
        contents = {split: (*arrays, classes) for split, arrays in splits.items()}
        return {split: (arrays_sha256(*splits[split]), partial(contents.__getitem__, split)) for split in SPLITS}
    if not (dataset.source or dataset.download):
        raise ConfigError(f"dataset={name} needs its files: add dataset.source=DIR, or dataset.download=true")
    raw, folder = Path(dataset.source or Path(settings.home) / "raw"), settings.data_dir / name
    load = {split: partial(read_cifar, name, raw, split) for split in SPLITS}
    if dataset.download and not overwrite and is_prepared(folder):  # do not download again just to compare
        return {split: (open_artifact(folder / split).source_sha256, load[split]) for split in SPLITS}
    if dataset.download:
        download_cifar(name, raw)
    return {split: (cifar_sha256(cifar_files(name, raw, split)), load[split]) for split in SPLITS}


def write_native(folder: Path, load: Callable[[], Content], sha256: str, shape: Sequence[int], classes: int) -> None:
    """Write the artifact of a split; raises DataError if its images are not what the settings say."""
    images, labels, names = load()
    if ((*images.shape[1:],), len(names)) != ((*shape,), classes):
        found = f"{folder.parent.name} has images of shape {list(images.shape[1:])} in {len(names)} classes"
        asked = f"dataset.shape={list(shape)} and dataset.classes={classes}"
        raise DataError(f"{found}, not {asked}: set both to match the files")
    with bar(folder.name, len(labels)) as progress:
        write = partial(write_rows, progress=progress, dtype=images.dtype)
        write(folder, lambda a, b: images[a:b], images.shape, labels, names, sha256)


def is_made(folder: Path, source_sha256: str, overwrite: bool, source: str = "files") -> bool:
    """Say whether an artifact is there and need not be written; raises DataError if it has another source."""
    if overwrite or not (folder / "meta.json").exists():
        return False
    if open_artifact(folder).source_sha256 != source_sha256:
        raise DataError(f"{folder} was made from other {source}: add overwrite=true to replace it")
    return True


def describe(folder: Path, is_new: bool) -> str:
    """Return a line on an artifact."""
    if not is_new:
        return f"{folder}: already prepared, nothing to do (overwrite=true replaces it)"
    artifact = open_artifact(folder)
    shape = "x".join(map(str, artifact.images.shape[1:]))
    return f"{folder}: {len(artifact.labels):,} samples of {shape}, {artifact.images.nbytes / 1e6:,.1f} MB"


def listed(lines: Sequence[str]) -> list[str]:
    """Return at most MOST_LINES lines, and how many more there are."""
    more = len(lines) - MOST_LINES
    return [f"  {line}" for line in lines[:MOST_LINES]] + ([f"  and {more:,} more"] if more > 0 else [])


def prepare_shards(settings: Config, overwrite: bool) -> Iterator[str]:
    """Write one shard per client and, unless distributed_data is enabled, a shared artifact too."""
    dataset, partition = settings.dataset, settings.partition
    if dataset.materialize is not None:
        fix = "leave dataset.materialize out"
        raise ConfigError(f"dataset={dataset.name} becomes shards, which are not resized: {fix}")
    is_femnist, files = dataset.name == FEMNIST.dataset, find_files(settings, overwrite)
    source: Path | ShardSource = files
    if not is_femnist or read_columns(settings, files):
        raw, classes = open_raw(settings, files)
        decoded, lines = decode_all(settings, raw)
        yield from lines
        facts = {"shape": decoded["train"].shape, "classes": classes, "normalization": dataset.normalization}
        try:
            kind = read_kind({"dataset": dataset.name, **facts})
        except ValueError as error:
            raise DataError(f"{files} cannot become shards, {one_line(error)}: set dataset.shape") from error
        source = ShardSource(kind, decoded, progress=True)
    manifest = write_shards(
        source,
        settings.shards_dir,
        partition.kind,
        settings.clients,
        partition.seed,
        Path(partition.mapping) if partition.mapping else None,
        test_fraction=dataset.test_fraction,
        overwrite=overwrite,
        progress=True,
    )
    totals = manifest.facts["totals"]
    counts = ", ".join(f"{totals[split]:,} {split}" for split in ("train", "val", "test"))
    yield f"{manifest.folder}: shards of {len(manifest):,} clients, {totals['writers']:,} writers, {counts} samples"
    if not settings.distributed_data.enabled:
        saved = export_artifacts(manifest.path, settings.data_dir / dataset.name)
        yield f"{saved.parents[1]}: the same samples as one shared artifact, partitioned by {saved.name}"


@contextmanager
def bar(name: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Show a progress bar for images; total: how many, if that is known."""
    with tqdm(total=total, unit="image", desc=name, disable=None, file=sys.stderr) as shown:
        yield shown.update


@errors_in_one_line(ConfigError, DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the dataset on the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(as_called(__doc__))
        return 0
    started = time.monotonic()
    try:
        given = [word for word in words if word.startswith("overwrite=")]  # it is not a setting of runs
        if wrong := [word for word in given if word not in ("overwrite=true", "overwrite=false")]:
            raise ConfigError(f"{wrong[0]} must be true or false")
        settings = compose([word for word in words if word not in given], Path.cwd(), preparing=True)
        for line in prepare(settings, given[-1:] == ["overwrite=true"]):
            print(line)
    except UnreadableError as error:
        print("\n".join(listed(error.lines)), file=sys.stderr)
        raise
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; fix that, or choose another home") from error
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return 130
    print(f"done in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
