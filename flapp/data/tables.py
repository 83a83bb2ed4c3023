"""Images in tables: parquet files, and folders that the `datasets` library of Hugging Face saves.

A table has a column of images, one of labels, and may have one that says whose each sample is:

    images     bytes, or struct {bytes, path} as `datasets` has it, where path is read only if bytes is null
    labels     whole numbers, with class names if the file states them, or texts
    clients    whole numbers or texts

Only these columns are read, some rows at a time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flapp.data.artifact import DataError
from flapp.data.decode import Encoded, RawSplit, read_image
from flapp.data.folder import divide
from flapp.data.shards.source import MOST_CLASSES
from flapp.data.table_files import TEXTS, Table, find_tables
from flapp.untrusted import printable

IMAGE_NAMES = ("image", "img", "images", "picture", "photo")
LABEL_NAMES = ("label", "labels", "target", "class", "category", "fine_label", "character")
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The names of the columns; image and label are found if they are None; without client there are no clients."""

    image: str | None = None
    label: str | None = None
    client: str | None = None


def open_tables(
    source: Path, columns: Columns, test_fraction: float | None, seed: int, classes: Sequence[str] = ()
) -> tuple[dict[str, RawSplit], list[str]]:
    """Return the splits of tables, and the names of the classes.

    source: see find_tables. A source without a test split is divided as a folder is (see `divide`), or stays whole with
    test_fraction=None. classes: the names that labels must have, in their order; without them labels decide. Raises
    DataError naming the file, the column and the fix.
    """
    files = _choose_splits(source, find_tables(source))
    tables = {split: [Table(path) for path in paths] for split, paths in files.items()}
    every = [table for split in tables.values() for table in split]
    found = _find_columns(every[0], columns)
    _check_alike(every, found)
    by_text = bool(columns.label or classes)
    labels, clients, names = _read_labels(tables, found, by_text, classes)
    rows = {split: np.arange(len(labels[split])) for split in tables}
    origin = dict.fromkeys(tables, "")
    if len(tables) == 1 and test_fraction is not None:
        (whole,) = tables
        members = {name: np.flatnonzero(labels[whole] == i).tolist() for i, name in enumerate(names)}
        parts = divide({name: of for name, of in members.items() if of}, test_fraction, seed)
        rows = {split: np.sort(np.array([row for of in by.values() for row in of])) for split, by in parts.items()}
        origin = {split: f"{split} of {test_fraction} by {seed}" for split in rows}
        tables, labels = dict.fromkeys(rows, tables[whole]), dict.fromkeys(rows, labels[whole])
        clients = dict.fromkeys(rows, clients[whole])
    splits, root = {}, (source if source.is_dir() else source.parent).resolve()
    for split, chosen in rows.items():
        images = partial(_images, tables[split], str(found.image), chosen, root)
        facts = [origin[split], found.image, found.label, found.client, [table.sha256 for table in tables[split]]]
        sha256 = hashlib.sha256(json.dumps([*facts, names]).encode()).hexdigest()
        whose = [clients[split][row] for row in chosen] if clients[split] else ()
        splits[split] = RawSplit(_naming(tables[split], chosen), labels[split][chosen], images, sha256, whose)
    return splits, names


def _choose_splits(source: Path, found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Return the files of train and test, or those of train if a source has no others."""
    if not found:
        raise DataError(f"{source} holds no parquet files and no saved dataset: point dataset.source at such a folder")
    if found.keys() == {""}:
        return {"train": found[""]}
    if "train" not in found:
        raise DataError(f"{source} has files of {' and '.join(found)}, none of train: add them, or name one file")
    if "validation" in found and "test" in found:
        log.warning("%s has train, validation and test: validation is left out", source)
    test = found.get("test") or found.get("validation")
    return {"train": found["train"]} | ({"test": test} if test else {})


def _find_columns(table: Table, given: Columns) -> Columns:
    """Return the name of every column; raises DataError for one that is missing or cannot be told."""
    types = table.types
    for setting, name in (("image", given.image), ("label", given.label), ("client", given.client)):
        if name is not None and name not in types:
            raise DataError(f"{_listed(table)} and not {printable(name)}: set dataset.{setting}_column to one of them")
    image = given.image or _only(table.image_columns, IMAGE_NAMES)
    if image is None:
        raise DataError(f"{_listed(table)}: say which has the images, dataset.image_column=NAME")
    if image not in table.image_columns:
        fix = "set dataset.image_column to a column of bytes, or of {bytes, path}"
        raise DataError(f"{table.path} has column {image} of type {types[image]}, which is no encoded image: {fix}")
    could = [name for name in types if name not in (image, given.client) and _plain_type(types[name]) in WHOLE + TEXTS]
    named = [name for name in could if table.class_names(name)]
    label = given.label or ("label" if "label" in could else None) or _only(named, LABEL_NAMES)
    label = label or _only([name for name in could if name in LABEL_NAMES], ())
    odd = next((name for name in LABEL_NAMES if name in types and name not in (*could, image, given.client)), None)
    if label is None and odd is not None:
        kind = printable(types[odd], 80)
        found = f"{table.path} has column {odd} of type {kind}, and labels are whole numbers or texts"
        raise DataError(f"{found}: convert the column, or set dataset.label_column to another one")
    if label is None:
        raise DataError(f"{_listed(table)}: say which has the labels, dataset.label_column=NAME")
    for setting, name in (("label", label), ("client", given.client)):
        if name is not None and _plain_type(types[name]) not in WHOLE + TEXTS:
            fix = f"convert it, or set dataset.{setting}_column to a column of whole numbers or texts"
            raise DataError(f"{table.path} has column {name} of type {printable(types[name], 80)}: {fix}")
    return Columns(image, label, given.client)


def _listed(table: Table) -> str:
    listed = ", ".join(f"{name} ({kind})" for name, kind in table.types.items())
    return f"{table.path} has the columns {printable(listed)}"


def _only(found: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the one that is found or, of several, the only one with one of these names."""
    return found[0] if len(found) == 1 else _only([name for name in found if name in names], ()) if names else None


def _plain_type(name: str) -> str:
    """Return the value type of Arrow's dictionary type, and any other type as it is."""
    return name.removeprefix("dictionary<values=").partition(",")[0]


def _check_alike(tables: Sequence[Table], columns: Columns) -> None:
    """Raise DataError unless all files have these columns with the same types and class names."""
    for table in tables:
        for name in filter(None, (columns.image, columns.label, columns.client)):
            first = tables[0]
            if name not in table.types:
                raise DataError(f"{table.path} has no column {name}, {first.path} has it: write all files alike")
            if table.types[name] != first.types[name]:
                found, other = (printable(each.types[name], 80) for each in (table, first))
                found = f"{table.path} has {found} for column {name}, {first.path} has {other}"
                raise DataError(f"{found}: write all files alike")
        if table.class_names(columns.label or "") != tables[0].class_names(columns.label or ""):
            found = f"{table.path} and {tables[0].path} have different class names for column {columns.label}"
            raise DataError(f"{found}: write all files alike")


Read = tuple[dict[str, np.ndarray], dict[str, list[str]], list[str]]  # labels and clients by split, class names


def _read_labels(tables: dict[str, list[Table]], columns: Columns, by_text: bool, classes: Sequence[str]) -> Read:
    """Read the labels and clients of all splits; by_text: whether texts may be classes, sorted by name."""
    table, label = next(iter(tables.values()))[0], str(columns.label)
    is_text = _plain_type(table.types[label]) in TEXTS
    if is_text and not by_text:
        found = f"{table.path} has texts in column {label}, and labels are whole numbers"
        raise DataError(f"{found}: set dataset.label_column={label} to make each different text a class")
    numbers: dict[str, int] = {}  # of each different text, as they come
    values, clients = dict[str, np.ndarray](), dict[str, list[str]]()
    for split, files in tables.items():
        read = [_read_file(each, columns, numbers if is_text else None) for each in files]
        if not any(len(found) for found, _ in read):
            raise DataError(f"{files[0].path} has no rows: give the split {split} samples")
        values[split] = np.concatenate([found for found, _ in read])
        clients[split] = [client for _, whose in read for client in whose]
    if is_text:
        names = sorted(numbers)
        place = np.argsort([numbers[name] for name in names])
    else:
        names = table.class_names(label) or list(classes)
        for split, files in tables.items():
            _check_range(files, label, values[split], len(names))
        if not names:  # each different number is a class, which it names
            known = np.unique(np.concatenate(list(values.values())))
            names = [str(number) for number in known]
            values = {split: np.searchsorted(known, found) for split, found in values.items()}
        place = np.arange(len(names))
    if len(classes or names) < 2:
        found = f"{table.path} has one class, {printable(names[0], 80)}, in column {label}"
        raise DataError(f"{found}: there must be two or more, or set dataset.label_column to another column")
    if len(names) > MOST_CLASSES:
        found = f"{table.path} has {len(names):,} different values in column {label}, at most {MOST_CLASSES:,} can be"
        raise DataError(f"{found} classes: set dataset.label_column to another column")
    if classes:
        if strange := sorted(set(names) - set(classes)):
            found = f"{table.path} has the unknown class {printable(strange[0], 80)} in column {label}"
            raise DataError(f"{found}: set dataset.label_column to another column, or correct it")
        place = np.array([classes.index(name) for name in names])[place]
    return {split: place[found] for split, found in values.items()}, clients, list(classes or names)


def _read_file(table: Table, columns: Columns, numbers: dict[str, int] | None) -> tuple[np.ndarray, list[str]]:
    """Return the labels, int64, and the clients in a file; texts become their numbers, new ones the next numbers."""
    wanted = [name for name in (columns.label, columns.client) if name is not None]
    labels, clients, known = [np.empty(0, np.int64)], list[str](), dict[str, str]()
    row = 0
    for arrays in table.read_columns(wanted):
        for name, array in zip(wanted, arrays, strict=True):
            if array.null_count:
                at = row + int(np.flatnonzero(np.asarray(array.is_null()))[0])
                raise DataError(f"{table.path} has nothing in column {name} in row {at}: fill it in, or remove the row")
        if numbers is None:
            labels.append(np.asarray(arrays[0].cast("int64", safe=False)))
        else:
            texts = arrays[0].to_pylist()
            labels.append(np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64))
            _check_texts(table, columns.label, numbers)
        if columns.client:
            texts = [str(value) for value in arrays[1].to_pylist()]
            _check_texts(table, columns.client, texts)
            clients += [known.setdefault(text, text) for text in texts]
        row += len(arrays[0])
    return np.concatenate(labels), clients


def _check_texts(table: Table, column: str | None, texts: Iterable[str]) -> None:
    """Raise DataError for the name of a class or client that cannot be shown."""
    odd = next((text for text in texts if not text or not text.isprintable()), None)
    if odd is not None:
        found = f"{table.path} has {printable(repr(odd), 80)} in column {column}"
        raise DataError(f"{found}: give classes and clients names of printable characters")


def _check_range(files: Sequence[Table], column: str, labels: np.ndarray, classes: int) -> None:
    """Raise DataError for a label below 0 or above the last class; classes: their number, 0 if unknown."""
    bad = (labels < 0) | (labels >= (classes or np.inf))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        found = f"{_naming(files, np.arange(len(labels)))(row)} has label {labels[row]} in column {column}"
        wanted = f"labels are 0 to {classes - 1}" if classes else "labels are not below 0"
        raise DataError(f"{found}, and {wanted}: correct it, or remove the row")


def _naming(tables: Sequence[Table], rows: np.ndarray) -> Callable[[int], str]:
    """Return a function that names rows[i] for messages; the files count as one table."""
    starts = np.cumsum([0, *(table.count for table in tables)])

    def name(index: int) -> str:
        number = int(np.searchsorted(starts, rows[index], "right")) - 1
        return f"{tables[number].path} row {rows[index] - starts[number]}"

    return name


def _images(tables: Sequence[Table], column: str, rows: np.ndarray, root: Path) -> Iterator[Encoded]:
    """Yield the encoded images in some rows, in ascending order, of several files; a batch is in memory."""
    first = 0  # row of a batch
    for table in tables:
        for (batch,) in table.read_columns([column]):
            here, rows = np.split(rows, [np.searchsorted(rows, first + len(batch))])
            for value in batch.take(here - first):
                yield _encoded(value.as_py(), root)
            first += len(batch)


def _encoded(value: Any, root: Path) -> Encoded:
    """Return the bytes of an image, or why there are none; root: the only folder in which a path is read."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is not None:
        return value
    if path is None:
        return "the table has no image there"
    said = f"the table has only the path {printable(path, 80)}"
    try:
        file = Path(os.path.realpath(root / path))
    except ValueError as error:  # it has a zero byte
        return f"{said}, which cannot be read: {error}"
    if not file.is_relative_to(root):
        return f"{said}, which is outside {root}"
    read = read_image(file)
    return f"{said}, which cannot be read: {read}" if isinstance(read, str) else read
