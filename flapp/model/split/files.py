"""The files of a split model: a pair of weights and metadata for each of its three components.

    <base>/bottom/<name>_<p1>-<p2>_bottom.safetensors
                  <name>_<p1>-<p2>_bottom_metadata.json
    <base>/trunk/...  <base>/top/...

The metadata is a JSON object of the fields of Metadata. All but sha256 and saved_at are in the header of the weights
too, so that neither file can be changed, or exchanged, without the other showing it.

A pair is replaced as one: both files are written beside as .new, then the weights are renamed, then the metadata.
Whoever reads after a crash between the two renames finds the metadata that fits the weights still under .new.
"""

import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.files import sha256_of_file
from flapp.model.files import FORMAT_VERSION, read_tensors, save_tensors
from flapp.untrusted import check_regular, printable, read_json

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = ("bottom", "trunk", "top")
WEIGHTS = ".safetensors"
FILE_NAME = re.compile(rf"(?P<name>.+)_(?P<p1>\d+)-(?P<p2>\d+)_(?P<component>{'|'.join(COMPONENTS)})\{WEIGHTS}")


@dataclass(frozen=True)
class Metadata:
    """What is said of one stored component.

    Layers are start_layer to end_layer - 1 of num_layers. num_parameters leaves out the parameters that `tied` names,
    {own name: "component:name there"}, which are the same as another component's, so that the three add up to the whole
    model's count. memory_mb is of all tensors held, tied ones too, in units of 2**20 bytes. model_sha256 names the
    model that was split: of a ViT its file's SHA-256, otherwise one of its tensors.
    """

    format_version: int
    model_type: str
    model_class: str
    name: str
    component: str
    split_points: list[int]
    start_layer: int
    end_layer: int
    num_layers: int
    num_parameters: int
    tied: dict[str, str]
    dtype: str
    memory_mb: float
    config: dict[str, Any]
    model_sha256: str
    sha256: str
    saved_at: str

    def facts(self) -> dict[str, Any]:
        """Return the fields that the header of the weights repeats."""
        return {key: value for key, value in asdict(self).items() if key not in ("sha256", "saved_at")}


@dataclass(frozen=True)
class Unsaved:
    """A component on its way to disk: where to, its tensors, and its Metadata.facts()."""

    path: Path
    tensors: Mapping[str, "Tensor"]
    facts: Mapping[str, Any]


class StorageManager:
    """Say where the files of split models lie below a base folder."""

    @staticmethod
    def get_split_model_path(base: str | Path, name: str, p1: int, p2: int, component: str) -> Path:
        """Return the path of a component's weights; raises ValueError for a component or name that cannot be."""
        check_component(component)
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"model name {name!r} cannot be part of a file's name: give one without / or a dot first")
        return Path(base) / component / f"{name}_{p1}-{p2}_{component}{WEIGHTS}"

    @staticmethod
    def get_model_name(run_name: str) -> str:
        """Return the name of the files of a run's model."""
        return run_name.replace("/", "-")

    @staticmethod
    def get_model_metadata_path(path: str | Path) -> Path:
        """Return the path of the metadata that belongs to the weights at `path`."""
        path = Path(path)
        if path.suffix != WEIGHTS:
            raise ValueError(f"{path} is no file of weights: its name must end in {WEIGHTS}")
        return path.with_name(path.name.removesuffix(WEIGHTS) + "_metadata.json")

    @staticmethod
    def create_storage_directories(base: str | Path) -> None:
        """Make the three folders below `base`; raises ValueError when that is refused."""
        for component in COMPONENTS:
            folder = Path(base) / component
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{folder} cannot be made ({error.strerror}): name another storage folder") from error

    @staticmethod
    def prepare(base: str | Path, name: str, p1: int, p2: int, overwrite: bool = False) -> None:
        """Make the folders for a split that comes later; raises ValueError when it could not be stored there."""
        StorageManager.create_storage_directories(base)
        StorageManager.check(base, name, p1, p2, overwrite)

    @staticmethod
    def check(base: str | Path, name: str, p1: int, p2: int, overwrite: bool = False) -> None:
        """Raise ValueError when a split could not be stored below `base`; makes no folder."""
        for component in COMPONENTS:
            path = StorageManager.get_split_model_path(base, name, p1, p2, component)
            if not overwrite:
                _check_free(path)
            nearest = next(folder for folder in path.parents if os.path.exists(folder))
            if not nearest.is_dir():
                raise ValueError(f"{nearest} is not a folder: name another storage folder")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise ValueError(f"{nearest} is not writable: change its permissions or name another folder")

    @staticmethod
    def find_splits(base: str | Path) -> list[tuple[str, int, int]]:
        """List the splits that have any component below `base`: (name, p1, p2)."""
        found = (FILE_NAME.fullmatch(path.name) for path in Path(base).glob(f"*/*{WEIGHTS}"))
        return sorted({(match["name"], int(match["p1"]), int(match["p2"])) for match in found if match})


def check_component(component: str) -> None:
    """Refuse a name that is no component's."""
    if component not in COMPONENTS:
        raise ValueError(f"component={component} is not known: choose one of {', '.join(COMPONENTS)}")


def write_components(unsaved: Sequence[Unsaved], overwrite: bool = False) -> list[Metadata]:
    """Write components and their metadata, none before all are on disk; raises ValueError, old files intact."""
    from safetensors import SafetensorError

    if not overwrite:
        for one in unsaved:
            _check_free(one.path)
    path = Path()
    try:
        written = []
        for one in unsaved:
            path = one.path
            _settle(path)
            written.append(_stage(one))
        for one in unsaved:
            path = one.path
            os.replace(_new(path), path)
            _settle(path)
    except (OSError, SafetensorError) as error:
        for one in unsaved:
            _drop_staged(one.path)
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written ({reason}): free space or name another folder") from error
    return written


def parse_points(text: str) -> tuple[int, int]:
    """Read split points as people write them, "2-10"; raises ValueError."""
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found is None:
        raise ValueError(f"split points {text!r} are not two numbers with a dash between, such as 2-10")
    return int(found[1]), int(found[2])


def check_points(split_point_1: int, split_point_2: int, num_layers: int | None = None) -> None:
    """Refuse points that leave a component without a layer; without num_layers, those that no model has."""
    points = f"split points {split_point_1} and {split_point_2}"
    if type(split_point_1) is not int or type(split_point_2) is not int:
        raise ValueError(f"{points} must be whole numbers")
    if not 0 < split_point_1 < split_point_2 < (num_layers or split_point_2 + 1):
        of = f" of a model of {num_layers} layers" if num_layers else ""
        raise ValueError(f"{points}{of} are not possible: 0 < p1 < p2 < layers, so that each component has a layer")


def read_component(path: str | Path) -> tuple[Metadata, dict[str, "Tensor"]]:
    """Read a component of write_components, each tensor once and into aligned memory.

    Raises ValueError when a file is missing or damaged, or when weights and metadata do not belong together.
    """
    path = Path(path)
    metadata = read_metadata(path)
    tensors, header = read_tensors(path)
    for key, value in metadata.facts().items():
        if header.get(key) != value:
            where = StorageManager.get_model_metadata_path(path)
            said, kept = printable(value), printable(header.get(key))
            raise ValueError(f"{where} says {key}={said}, its weights were saved with {key}={kept}")
    return metadata, tensors


def read_metadata(path: str | Path) -> Metadata:
    """Read the metadata of the weights at `path`, whose SHA-256 must be the one it names; raises ValueError."""
    path = Path(path)
    where = StorageManager.get_model_metadata_path(path)
    try:
        check_regular(path)
        found = sha256_of_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): this component is missing") from error
    if (newer := _newer(path, found)) is not None:
        return newer
    metadata = _parse(where)
    if metadata.sha256 != found:
        raise ValueError(
            f"{path} has SHA-256 {found[:12]}, {where.name} says {metadata.sha256[:12]}: one of them was changed, "
            "store the split again"
        )
    return metadata


def _stage(one: Unsaved) -> Metadata:
    """Write both files beside where they belong."""
    one.path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = save_tensors(one.tensors, _new(one.path), **one.facts)
    saved_at = datetime.now(UTC).isoformat(timespec="seconds")
    facts: dict[str, Any] = {"format_version": FORMAT_VERSION, **one.facts}
    metadata = Metadata(**facts, sha256=sha256, saved_at=saved_at)
    with _new(StorageManager.get_model_metadata_path(one.path)).open("w") as file:
        file.write(json.dumps(asdict(metadata), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync(one.path.parent)
    return metadata


def _settle(path: Path) -> None:
    """Finish a replacement whose weights are in place already; a crash may have been before its second rename."""
    where = StorageManager.get_model_metadata_path(path)
    if path.is_file() and _new(where).exists() and _newer(path, sha256_of_file(path)) is not None:
        os.replace(_new(where), where)
        _sync(path.parent)


def _drop_staged(path: Path) -> None:
    """Remove what was staged; where the weights have been renamed already, their metadata stays."""
    _new(path).with_name(_new(path).name + ".tmp").unlink(missing_ok=True)
    if _new(path).exists():
        _new(StorageManager.get_model_metadata_path(path)).unlink(missing_ok=True)
        _new(path).unlink()


def _newer(path: Path, sha256: str) -> Metadata | None:
    """Return the metadata that a crash left under .new, if it is of weights with this digest."""
    where = _new(StorageManager.get_model_metadata_path(path))
    try:
        metadata = _parse(where)
    except ValueError:
        return None
    return metadata if metadata.sha256 == sha256 else None


def _check_free(path: Path) -> None:
    for file in (path, StorageManager.get_model_metadata_path(path)):
        if file.exists():
            raise ValueError(f"{file} exists already: set overwrite to replace it, or give another name or folder")


def _parse(where: Path) -> Metadata:
    try:
        values = read_json(where)
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror}): weights need their metadata") from error
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error}): store the split again") from error
    if (fault := next(_faults(values), None)) is not None:
        raise ValueError(f"{where} is damaged ({printable(fault)}): store the split again")
    return Metadata(**values)


def _faults(values: Any) -> Iterator[str]:
    """Yield what keeps plain values from being Metadata."""
    if not isinstance(values, dict):
        yield "it is no object"
        return
    types = typing.get_type_hints(Metadata)
    yield from (f"{key} is missing" for key in types if key not in values)
    yield from (f"{key} is no field" for key in values if key not in types)
    for field in fields(Metadata):
        if type(values[field.name]) is not (typing.get_origin(types[field.name]) or types[field.name]):
            yield f"{field.name} is {values[field.name]!r}"
    if values["format_version"] != FORMAT_VERSION:
        yield f"format_version is {values['format_version']}, this program reads {FORMAT_VERSION}"


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
