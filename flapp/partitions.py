"""Who holds which sample of the artifact that clients share; needs no PyTorch."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from flapp.config.load import derive_seed
from flapp.config.schema import WRITER_PARTITIONS, Config
from flapp.custom import blaming, own, source_of
from flapp.data.artifact import (
    FILES,
    Artifact,
    DataError,
    check_samples,
    kind_of,
    open_verified,
    read_meta,
    refuse_rows,
)
from flapp.data.partition import Partition, hold_out, load_partition
from flapp.data.shards.manifest import load_manifest
from flapp.data.sources import MADE_BY, check_preparation, ensure_artifacts, is_own, named
from flapp.files import Stamp, stamp_of


def open_partition(config: Config) -> Partition:
    """Return who holds which sample of the shared artifact."""
    return cached_partition(config, stamp_of_shared_files(config))


def prepared(config: Config) -> Path:
    """Return the folder of the dataset; if it is missing, it is made when flapp or the user's own code can make it."""
    function, name = own(config, "dataset.target"), config.dataset.name
    if function and is_own(name):
        found = f"dataset.name={name} is a dataset of flapp's own, and dataset.target makes another"
        raise DataError(f"{found}: choose another dataset.name")

    def make() -> Any:
        with blaming(f"dataset.target={config.dataset.target} fails", function):
            return function() if function else None

    text = source_of(function, str(config.dataset.target)) if function else ""
    source = f"{MADE_BY}{hashlib.sha256(text.encode()).hexdigest()}" if function else ""
    return ensure_artifacts(config.data_dir, name, make if function else None, source)


def class_names(config: Config) -> list[str]:
    """Return the names of the classes, [] if the data are not here; raises DataError for shards without a manifest."""
    if config.distributed_data.enabled:
        return list(load_manifest(config.manifest_path).kind.classes)
    folder = config.data_dir / config.dataset.name / "train"
    return list(read_meta(folder)["classes"]) if (folder / "meta.json").exists() else []


def stamp_of_shared_files(config: Config) -> Stamp:
    """Return a stamp that changes when a file of the shared artifact, or of a partition by writer, is written."""
    splits, by_writer = _shared_files(config)
    found = tuple(map(stamp_of, splits))
    if config.dataset.target or any(len(each) == 1 for each in found):  # data of the user's own, or a file is missing
        prepared(config)
        found = tuple(map(stamp_of, splits))
    return (*found, stamp_of(by_writer))


@lru_cache(maxsize=8)
def _shared_files(config: Config) -> tuple[list[str], str]:
    """Return the paths of the files of both splits, and of a partition by writer; each message needs them."""
    folder = config.data_dir / config.dataset.name
    splits = [str(folder / split / name) for split in ("train", "test") for name in FILES]
    return splits, str(folder / "partitions" / f"{config.partition.kind}.safetensors")


@lru_cache(maxsize=8)
def cached_partition(config: Config, files: Stamp) -> Partition:
    """Read the partition, or make it if no process has done so yet; its val is held out for validation."""
    dataset = config.data_dir / config.dataset.name
    artifacts = [open_verified(dataset / split) for split in ("train", "test")]
    check_splits(config, *artifacts)
    folder = dataset / "partitions"
    if config.partition.kind in WRITER_PARTITIONS:
        return read_writer_partition(config, folder / f"{config.partition.kind}.safetensors")
    names = ("seed", "alpha", "min_size", "classes_per_client")
    settings: dict[str, Any] = {"kind": config.partition.kind, "clients": config.clients}
    settings |= {name: getattr(config.partition, name) for name in names}
    key = derive_seed(*settings.values(), *[artifact.digest for artifact in artifacts])
    path = folder / f"{config.partition.kind}-{key:016x}.safetensors"
    labels = {"train_labels": artifacts[0].labels, "test_labels": artifacts[1].labels}
    partition = load_partition(path, has_classes=bool(config.dataset.classes), **labels, **settings)
    if not config.held_out:
        return partition
    seed = derive_seed(config.partition.seed, "validation")
    return hold_out(partition, artifacts[0].labels, config.held_out, seed)


def check_splits(config: Config, train: Artifact, test: Artifact) -> None:
    """Raise DataError unless both splits are of one preparation and hold what the settings say.

    That is, samples of the same dtype and shape in both, and images if a setting needs images.
    """
    settings = config.dataset
    given = {
        "dataset.materialize=null": settings.materialize,
        "dataset.augment=false": settings.augment is True,
        "dataset.normalization=half": settings.normalization == "imagenet",
        "model.image_size=null": config.model.image_size,
    }
    check_preparation(train.path.parent, train.preparation, test.preparation)
    for artifact in (train, test):
        check_samples(artifact, settings.shape, settings.classes, settings.normalization)
        refuse_rows(artifact, given)
    kinds = [(kind_of(a.images.dtype, a.images.shape), kind_of(a.labels.dtype, a.labels.shape)) for a in (train, test)]
    if kinds[0] != kinds[1]:
        found = " and tests on ".join(f"{samples} with labels {labels}" for samples, labels in kinds)
        raise DataError(f"dataset {settings.name} trains on {found}: write both alike")


def read_writer_partition(config: Config, path: Path) -> Partition:
    """Read the partition by writer that was exported with the shards; raises DataError if it has other clients."""
    name = config.dataset.name
    column = "" if name == "femnist" else " dataset.client_column=COLUMN"
    fix = (
        f"make it with python -m tools.prepare_data {named(name)} dataset.source=DIR{column} "
        f"partition={config.partition.kind} clients={config.clients} distributed_data.enabled=false"
    )
    if not path.exists():
        raise DataError(f"partition={config.partition.kind} has no {path}: {fix}")
    partition = load_partition(path)
    if not partition.val:
        raise DataError(f"{path} has no validation samples, so an older flapp wrote it: {fix}")
    if len(partition.train) != config.clients:
        raise DataError(f"{path} is of {len(partition.train)} clients: set clients={len(partition.train)}")
    return partition
