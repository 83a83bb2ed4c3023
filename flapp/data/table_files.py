"""Files of tables, read some rows at a time: parquet, and Arrow's as `datasets` of Hugging Face saves them.

The same library downloads a dataset of the Hugging Face hub, once.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from flapp.data.artifact import DataError, locked, refusing, remove_leftovers
from flapp.data.folder import TEST, TRAIN, VALIDATION
from flapp.files import replacing_folder, sha256_of_file
from flapp.untrusted import check_regular, parse_json, printable, read_json

BATCH_BYTES = 8 << 20  # encoded images in memory
IMAGE_ROWS = 1024
BATCH_ROWS = 1 << 16  # of other columns
BUFFER_BYTES = 1 << 20  # of a parquet file, read at a time; without it, or with pre_buffer, a whole row group is read
BYTES = ("binary", "large_binary", "binary_view")
TEXTS = ("string", "large_string", "string_view")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
AGAIN = "copy or download it again"
SPLITS = {  # names of files and folders, and the split that they mean
    **dict.fromkeys(TRAIN, "train"),
    **dict.fromkeys(TEST, "test"),
    **dict.fromkeys((*VALIDATION, "dev"), "validation"),
}


class Table:
    """One file and what it says of itself.

    count: rows; types: of each column, as Arrow writes them; image_columns: those that may hold encoded images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path):
            check_regular(path)
            schema, self.count = self._read_head()
            self.types = {field.name: str(field.type) for field in schema}
            self.image_columns = [field.name for field in schema if _holds_images(field.type)]
            found = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
            self._features = dict(found.get("info", {}).get("features") or {})

    @cached_property
    def sha256(self) -> str:
        with _reading(self.path):
            return sha256_of_file(self.path)

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of the classes in a column of whole numbers, if the file states them."""
        feature = self._features.get(column)
        names = feature.get("names") if isinstance(feature, dict) else None
        if not names:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
            raise DataError(f"{self.path} has class names that are not a list of texts: {AGAIN}")
        if len(set(names)) < len(names):
            raise DataError(f"{self.path} has a class name twice for column {column}: give each class its own name")
        return names

    def read_columns(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Yield the values of columns, checked, as one Arrow array each, some rows at a time."""
        with _reading(self.path):
            for batch in self._batches(columns):
                arrays = [batch.column(name) for name in columns]
                for array in arrays:
                    array.validate(full=True)
                yield arrays

    def _read_head(self) -> tuple[Any, int]:
        """Return the schema and the number of rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.path.suffix == ".arrow":
            with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
                return stream.schema, sum(batch.num_rows for batch in stream)
        with pq.ParquetFile(self.path) as table:
            return table.schema_arrow, table.metadata.num_rows

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.path.suffix == ".arrow":
            with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
                yield from (batch.select(columns) for batch in stream)
            return
        with pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
            size = BATCH_ROWS if set(columns).isdisjoint(self.image_columns) else _image_rows(table.metadata)
            yield from table.iter_batches(size, columns=list(columns))


def find_tables(source: Path) -> dict[str, list[Path]]:
    """Return the files of tables in a folder by split; "" means that they name none, {} that there are no tables.

    source: one file, or a folder with parquet files, as the Hugging Face hub names them, or what save_to_disk of
    `datasets` wrote. Raises DataError for files that do not belong together.
    """
    if source.suffix in (".parquet", ".arrow") and source.is_file():
        return {"": [source]}
    if (source / "dataset_dict.json").exists():
        with refusing(source / "dataset_dict.json", AGAIN):
            names = read_json(source / "dataset_dict.json")["splits"]
            folders = {name: source / _plain(name) for name in names}
        if strange := [name for name in folders if name not in SPLITS]:
            found = f"{source} has the split {printable(strange[0])}, which is neither train nor test"
            raise DataError(f"{found}: set dataset.source={source}/SPLIT to divide one split")
        return {SPLITS[name]: _saved_files(folder) for name, folder in folders.items()}
    if (source / "state.json").exists():
        return {"": _saved_files(source)}
    return _find_parquet(source)


def _find_parquet(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    places: dict[Path, Path] = {}
    for path in sorted(chain(folder.glob("*.parquet"), folder.glob("*/*.parquet"), folder.glob("*/*/*.parquet"))):
        inner = path.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts):
            continue
        named = [SPLITS[part.lower()] for part in inner.parts[:-1] if part.lower() in SPLITS]
        named += [SPLITS[word] for word in re.split(r"[^a-z]", path.stem.lower())[:1] if word in SPLITS]
        found.setdefault(named[0] if named else "", []).append(path)
        place = Path(*(part for part in inner.parts[:-1] if part.lower() not in SPLITS))
        places.setdefault(place, path)
    if len(places) > 1:
        first, second = list(places.values())[:2]
        raise DataError(f"{first} and {second} are in different folders: set dataset.source to the folder of one")
    if "" in found and len(found) > 1:
        raise DataError(f"{found[''][0]} names no split, others do: name it train-... or test-..., or move it away")
    return found


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of one split that save_to_disk wrote."""
    path = folder / "state.json"
    with refusing(path, "save the dataset again with save_to_disk"):
        state = read_json(path)
        if state.get("_indices_data_files"):
            raise ValueError("it has indices of its own, as an old version of datasets wrote them")
        files = [folder / _plain(entry["filename"]) for entry in state["_data_files"]]
    if not files:
        raise DataError(f"{path} lists no files: save the dataset again with save_to_disk")
    return files


def _plain(name: object) -> str:
    """Return a name that is only a name, without a path to another folder; raises ValueError for any other."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{printable(repr(name), 80)} is not the name of a file beside it")
    return name


def _holds_images(kind: Any) -> bool:
    """Say whether a column is of bytes, or of {bytes, path} as `datasets` stores images."""
    inner = {kind.field(i).name: str(kind.field(i).type) for i in range(kind.num_fields)}
    if not str(kind).startswith("struct<"):
        return str(kind) in BYTES
    return inner.get("bytes") in BYTES or (inner.keys() == {"path"} and inner["path"] in TEXTS)


def _image_rows(metadata: Any) -> int:
    """Return how many rows have about BATCH_BYTES, by what a parquet file says of its row groups."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    size = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    return max(1, min(IMAGE_ROWS, int(BATCH_BYTES / max(1.0, size))))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a file into DataError."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        fix = 'install it with pip install -e ".[data]"'
        raise DataError(f"{path} is a table, and pyarrow, which reads tables, is missing: {fix}") from None
    with refusing(path, AGAIN):
        try:
            yield
        except (ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise ValueError(" ".join(str(error).split())) from error


def download_dataset(name: str, raw: Path, again: bool = False) -> Path:
    """Download a dataset of the hub, such as flwrlabs/femnist, into `raw` and return its folder there.

    It is saved by save_to_disk, with its images in it. A folder that is there already is kept, or with `again`
    replaced. Raises DataError if the hub cannot be reached or has no such dataset.
    """
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"dataset.hub={printable(name, 100)} is not a name on the hub: give owner/name")
    folder = raw / name.replace("/", "--")
    with locked(folder.with_name(f"{folder.name}.lock")):
        remove_leftovers(folder)
        if again or not folder.exists():
            with replacing_folder(folder) as partial:
                _save(name, partial)
    return folder


def _save(name: str, folder: Path) -> None:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub import logging as hub_logging
        from pyarrow import ArrowException
    except ImportError:
        fix = 'install what it needs with pip install -e ".[data]", or download the files and set dataset.source'
        raise DataError(f"{name} is downloaded by the datasets library, which is missing: {fix}") from None
    hub_logging.set_verbosity_error()  # each retry would be two lines; the error below says what failed
    try:
        load_dataset(name, cache_dir=str(folder / "cache")).save_to_disk(str(folder))
    except (OSError, ValueError, RuntimeError, DatasetsError, ArrowException) as error:
        said = printable(" ".join(str(error).split()) or type(error).__name__)
        fix = "check the name and the network, or download the files elsewhere and set dataset.source to their folder"
        raise DataError(f"{name} cannot be downloaded ({said}): {fix}") from error
    shutil.rmtree(folder / "cache")
