"""The files of a split model: a pair of weights and metadata for each of its three components.

docs/formats.md describes them. All but sha256 and saved_at of the metadata is also in the header of the weights, so
that neither file can be changed or exchanged unnoticed. All files are on disk before the first is renamed, weights
before metadata. A crash between two renames leaves files that do not fit; they are refused until stored again.
"""

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from flapp.files import replacing, sha256_of_file, write_json
from flapp.model.files import FORMAT_VERSION, read_tensors, save_tensors
from flapp.untrusted import check_regular, one_line, printable, read_json

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = ("bottom", "trunk", "top")
WEIGHTS = ".safetensors"
FILE_NAME = re.compile(rf"(?P<name>.+)_(?P<p1>\d+)-(?P<p2>\d+)_(?P<component>{'|'.join(COMPONENTS)})\{WEIGHTS}")


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Metadata:
    """Describe one stored component, as docs/formats.md says."""

    format_version: Literal[1]
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


class StorageManager:
    """Say where the files of split models lie below a base folder."""

    @staticmethod
    def get_split_model_path(base: str | Path, name: str, p1: int, p2: int, component: str) -> Path:
        """Return the path of a component's weights.

        Raises ValueError for an unknown component, or a name that cannot be a file's.
        """
        check_component(component)
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"model name {name!r} cannot name a file: give one that has no / and no dot at the start")
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
            raise ValueError(f"{path} is not a file of weights: its name must end in {WEIGHTS}")
        return path.with_name(path.name.removesuffix(WEIGHTS) + "_metadata.json")

    @staticmethod
    def check(base: str | Path, name: str, p1: int, p2: int, overwrite: bool = False) -> None:
        """Raise ValueError when a split could not be stored below `base`; makes no folder."""
        for component in COMPONENTS:
            path = StorageManager.get_split_model_path(base, name, p1, p2, component)
            _check_free(path, overwrite)
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
    """Raise ValueError for a name that is not in COMPONENTS."""
    if component not in COMPONENTS:
        raise ValueError(f"component={component} is not known: choose one of {', '.join(COMPONENTS)}")


def write_components(
    contents: Mapping[Path, tuple[Mapping[str, "Tensor"], Mapping[str, Any]]], overwrite: bool = False
) -> list[Metadata]:
    """Write components and their metadata.

    contents: for the path of each component's weights, its tensors and SplitModel.facts(). Raises ValueError, with all
    old files intact, where one cannot be written.
    """
    from safetensors import SafetensorError

    for path in contents:
        _check_free(path, overwrite)
    written = []
    try:
        with ExitStack() as stack:  # renames in the reverse order: weights, then metadata
            for path in contents:
                path.parent.mkdir(parents=True, exist_ok=True)
            notes = [stack.enter_context(replacing(StorageManager.get_model_metadata_path(path))) for path in contents]
            for note, (path, (tensors, facts)) in zip(notes, contents.items(), strict=True):
                sha256 = save_tensors(tensors, stack.enter_context(replacing(path)), **facts)
                about = {"format_version": FORMAT_VERSION, **facts}
                now = datetime.now(UTC).isoformat(timespec="seconds")
                written.append(Metadata(**about, sha256=sha256, saved_at=now))
                write_json(note, asdict(written[-1]))
    except (OSError, SafetensorError) as error:
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
    """Raise ValueError for points that leave a component without a layer; num_layers=None: in a model of any size."""
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
            found = f"{where} says {key}={said}, its weights were saved with {key}={kept}"
            raise ValueError(f"{found}: store the split again")
    return metadata, tensors


def read_metadata(path: str | Path) -> Metadata:
    """Read the metadata of the weights at `path`; raises ValueError if the file does not have the SHA-256 in it."""
    path = Path(path)
    where = StorageManager.get_model_metadata_path(path)
    try:
        check_regular(path)
        found = sha256_of_file(path)
    except OSError as error:
        raise ValueError(_unreadable(path, error, "this component is missing")) from error
    try:
        metadata = Metadata(**read_json(where))
    except OSError as error:
        raise ValueError(_unreadable(where, error, "weights need their metadata")) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} is damaged ({one_line(error)}): store the split again") from error
    if metadata.sha256 != found:
        found = f"{path} has SHA-256 {found[:12]}, {where.name} says {metadata.sha256[:12]}"
        raise ValueError(f"{found}: one of them was changed, store the split again")
    return metadata


def _unreadable(path: Path, error: OSError, missing: str) -> str:
    """Return why a file cannot be read, with the fix; missing: what to say of a file that is not there."""
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    fix = f"{missing}, store the split again" if is_missing else "store the split again, or check its permissions"
    return f"{path} cannot be read ({error.strerror}): {fix}"


def _check_free(path: Path, overwrite: bool) -> None:
    for file in (path, StorageManager.get_model_metadata_path(path)):
        if not overwrite and file.exists():
            raise ValueError(f"{file} exists already: set overwrite to replace it, or give another name or folder")
