"""Tables of images: what is read from parquet files and saved datasets, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flapp.data.artifact import DataError
from flapp.data.decode import UnreadableError, decode_splits
from flapp.data.folder import divide
from flapp.data.tables import Columns, open_tables
from tests.support.pictures import encode
from tests.support.refusals import refused
from tests.support.tables import NAMES, as_dataset, draw_images, write_parquet

LABELS = np.arange(30) % 3
IMAGES = draw_images(30)
BYTES = [encode(image) for image in IMAGES]
Read = dict[str, tuple[np.ndarray, list[int]]]


def read(
    source: Path, tmp_path: Path, *columns: str | None, test_fraction: float | None = 0.2
) -> tuple[Read, list[str]]:
    """Return the pixels and labels of each split, and the classes."""
    raw, classes = open_tables(source, Columns(*columns), test_fraction, 7)
    decoded, _ = decode_splits(raw, None, False, tmp_path)
    return {split: (found.images, found.labels.tolist()) for split, found in decoded.items()}, classes


def by_pyarrow(folder: Path) -> Path:
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        write_parquet(folder / f"{split}.parquet", 7, image=BYTES[part], label=LABELS[part])
    return folder


def in_many_files(folder: Path) -> Path:
    for number, start in enumerate(range(0, 20, 5)):
        path = folder / f"data/train-0000{number}-of-00004.parquet"
        write_parquet(path, picture=BYTES[start : start + 5], target=LABELS[start : start + 5].astype(np.uint8))
    write_parquet(folder / "data/test-00000-of-00001.parquet", picture=BYTES[20:], target=LABELS[20:].astype(np.uint8))
    return folder


def in_folders(folder: Path) -> Path:
    for split, part in (("training", slice(0, 20)), ("validation", slice(20, 30))):
        structs = [{"bytes": content, "path": "gone.png"} for content in BYTES[part]]
        write_parquet(folder / split / "0000.parquet", note=["x"] * len(structs), img=structs, label=LABELS[part])
    return folder


def by_datasets(folder: Path) -> Path:
    whole = as_dataset(IMAGES, LABELS)
    whole.select(range(20)).to_parquet(folder / "train-00000-of-00001.parquet")
    whole.select(range(20, 30)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def saved_to_disk(folder: Path) -> Path:
    whole = as_dataset(IMAGES, LABELS)
    splits = {"train": whole.select(range(20)), "test": whole.select(range(20, 30))}
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    return folder


@pytest.mark.parametrize("write", [by_pyarrow, in_many_files, in_folders, by_datasets, saved_to_disk])
def test_every_form_of_a_table_gives_the_images_in_it(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    found, classes = read(write(tmp_path / "source"), tmp_path)
    assert classes == (NAMES if write in (by_datasets, saved_to_disk) else ["0", "1", "2"])
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        assert np.array_equal(found[split][0], IMAGES[part])
        assert found[split][1] == LABELS[part].tolist()


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_table_without_a_test_split_is_divided_as_a_folder_is(tmp_path: Path, form: str) -> None:
    source = write_parquet(tmp_path / "all.parquet", image=BYTES, label=LABELS)
    if form == "saved":
        source = tmp_path / "saved"
        as_dataset(IMAGES, LABELS).save_to_disk(source)
    found, classes = read(source, tmp_path)
    members = {name: [row for row in range(30) if LABELS[row] == i] for i, name in enumerate(classes)}
    for split, rows in divide(members, 0.2, 7).items():
        wanted = sorted(row for of in rows.values() for row in of)
        assert np.array_equal(found[split][0], IMAGES[wanted])
        assert found[split][1] == LABELS[wanted].tolist()
    whole, _ = read(source, tmp_path, test_fraction=None)
    assert whole.keys() == {"train"}
    assert np.array_equal(whole["train"][0], IMAGES)


def test_the_images_of_a_table_can_be_read_again_and_are_named_by_file_and_row(tmp_path: Path) -> None:
    raw, _ = open_tables(in_many_files(tmp_path), Columns(), 0.2, 0)
    train = raw["train"]
    assert next(train.images()) == BYTES[0]
    for _ in range(2):
        assert list(train.images()) == BYTES[:20]
    for row in (0, 4, 5, 7, 19):
        assert train.name(row) == f"{tmp_path}/data/train-0000{row // 5}-of-00004.parquet row {row % 5}"


def test_a_table_that_loses_rows_while_it_is_read_is_named_with_the_first_row_that_is_gone(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=BYTES, label=LABELS)
    raw, _ = open_tables(path, Columns(), None, 0)
    write_parquet(path, image=BYTES[:25], label=LABELS[:25])
    with refused(DataError, r"a\.parquet row 25 is gone, the source changed while it was read: start again"):
        decode_splits(raw, None, False, tmp_path)


def test_columns_are_named_by_settings_where_they_cannot_be_told(tmp_path: Path) -> None:
    coarse, other = (LABELS + 1) % 3, draw_images(30, seed=1)
    path = write_parquet(
        tmp_path / "a.parquet", left=BYTES, right=[encode(image) for image in other], fine_label=LABELS, target=coarse
    )
    with pytest.raises(
        DataError, match=r"a\.parquet has the columns left \(binary\), .*: .*dataset\.image_column=NAME"
    ):
        read(path, tmp_path)
    with pytest.raises(DataError, match=r"the columns .*: .*dataset\.label_column=NAME"):
        read(path, tmp_path, "right")
    found, _ = read(path, tmp_path, "right", "target", test_fraction=None)
    assert np.array_equal(found["train"][0], other)
    assert found["train"][1] == coarse.tolist()


def test_texts_are_labels_only_if_the_column_is_named_and_then_classes_are_sorted(tmp_path: Path) -> None:
    texts = [["wolf", "bear", "fox"][label] for label in LABELS]
    path = write_parquet(tmp_path / "a.parquet", image=BYTES, label=pa.array(texts).dictionary_encode())
    with pytest.raises(DataError, match=r"a\.parquet has texts in column label.*: set dataset\.label_column=label"):
        read(path, tmp_path)
    found, classes = read(path, tmp_path, None, "label", test_fraction=None)
    assert classes == ["bear", "fox", "wolf"]
    assert [classes[label] for label in found["train"][1]] == texts


def test_numbers_without_names_are_classes_named_by_the_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=BYTES, label=LABELS * 5 + 101)
    found, classes = read(path, tmp_path, test_fraction=None)
    assert classes == ["101", "106", "111"]
    assert found["train"][1] == LABELS.tolist()


def test_an_image_that_is_only_a_path_is_read_in_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    paths = ["a/0.png", "../1.png", "2.png", "circle.png", "\0.png"]
    write_parquet(folder / "train.parquet", image=[{"path": path} for path in paths], label=[0, 1, 1, 0, 1])
    (folder / "a").mkdir()
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "a/0.png").write_bytes(BYTES[0])
    (tmp_path / "1.png").write_bytes(BYTES[1])
    raw, _ = open_tables(folder, Columns(), None, 0)
    first, outside, missing, circle, zero = raw["train"].images()
    assert first == BYTES[0]
    assert "outside" in str(outside)
    assert "No such file" in str(missing)
    assert "symbolic links" in str(circle)
    assert "null byte" in str(zero)


def test_null_and_damaged_images_are_listed_by_row_and_left_out_on_request(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[*BYTES[:3], None, BYTES[4][:30], *BYTES[5:]], label=LABELS)
    raw, _ = open_tables(path, Columns(), None, 0)
    with pytest.raises(
        UnreadableError, match=r"2 of 30 images cannot be read, the first is .*a\.parquet row 3 \(the table"
    ):
        decode_splits(raw, None, False, tmp_path)
    decoded, lines = decode_splits(raw, None, True, tmp_path)
    assert ["row 3" in lines[0], "row 4" in lines[1]] == [True, True]
    assert np.array_equal(decoded["train"].images, np.delete(IMAGES, [3, 4], axis=0))


def test_the_source_has_another_sha256_if_files_columns_or_the_division_change(tmp_path: Path) -> None:
    def sha256(path: Path, *columns: str, test_fraction: float | None = 0.2, seed: int = 0) -> str:
        return open_tables(path, Columns(*columns), test_fraction, seed)[0]["train"].sha256

    path = write_parquet(tmp_path / "a.parquet", image=BYTES, label=LABELS, other=LABELS)
    same = write_parquet(tmp_path / "b.parquet", image=BYTES, label=LABELS, other=LABELS)
    assert sha256(path) == sha256(same)
    changed = write_parquet(tmp_path / "c.parquet", image=BYTES[::-1], label=LABELS, other=LABELS)
    found = [sha256(path), sha256(changed), sha256(path, "image", "other"), sha256(path, seed=1)]
    assert len({*found, sha256(path, test_fraction=0.3), sha256(path, test_fraction=None)}) == 6


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(path: Path, **columns: Any) -> None:
    write_parquet(path, **{"image": BYTES, "label": LABELS} | columns)


def emptied(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def label(row: int, value: Any) -> Callable[[Path], None]:
    values = [value if i == row else int(other) for i, other in enumerate(LABELS)]
    return lambda path: rewrite(path, label=pa.array(values))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, r"test\.parquet is damaged \(Parquet magic bytes.*: copy or download it again"),
    "not parquet": (lambda path: path.write_text("a,b\n1,2\n"), r"test\.parquet is damaged"),
    "empty": (lambda path: path.write_bytes(b""), r"test\.parquet is damaged"),
    "another column": (lambda path: write_parquet(path, image=BYTES, labels=LABELS), "train.parquet has it: write all"),
    "other types": (lambda path: rewrite(path, label=LABELS.astype(np.int8)), "test.parquet has int8 for column label"),
    "null label": (label(4, None), r"test\.parquet has nothing in column label in row 4: fill it in"),
    "negative label": (label(5, -1), r"test\.parquet row 5 has label -1 in column label, and labels are not below 0"),
    "zero rows": (emptied, r"test\.parquet has no rows: give the split test samples"),
    "beside others": (lambda path: path.rename(path.with_name("more.parquet")), r"more\.parquet names no split"),
    "elsewhere": (lambda path: rewrite(path.parent / "other/test.parquet"), "other/test.* are in different folders"),
    "without train": (lambda path: (path.parent / "train.parquet").unlink(), "has files of test, none of train"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_with_a_fault_are_refused_in_one_line_with_file_column_and_fix(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "source"
    for split in ("train", "test"):
        rewrite(folder / f"{split}.parquet")
    damage, said = WRONG[name]
    damage(folder / "test.parquet")
    with refused(DataError, said):
        open_tables(folder, Columns(), 0.2, 0)


def test_columns_that_are_missing_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    more = {"score": LABELS / 2, "name": ["a\nb"] * 30, "all": ["a"] * 30, "four": [4] * 30}
    path = write_parquet(tmp_path / "a.parquet", image=BYTES, label=LABELS, **more)
    for columns, said in (
        (("picture",), r"the columns image \(binary\), .* and not picture: set dataset\.image_column"),
        (("label",), r"column label of type int64, which is no encoded image"),
        ((None, "score"), r"column score of type double: convert it, or set dataset\.label_column to a col"),
        ((None, None, "who"), r"and not who: set dataset\.client_column"),
        ((None, None, "score"), r"column score of type double: convert it, or set dataset\.client_column"),
        ((None, None, "name"), r"has 'a\\nb' in column name: give classes and clients names"),
        ((None, "name"), r"has 'a\\nb' in column name"),
        ((None, "all"), "has one class, a, in column all: there must be two or more"),
        ((None, "four"), "has one class, 4, in column four: there must be two or more"),
    ):
        with pytest.raises(DataError, match=said):
            open_tables(path, Columns(*columns), 0.2, 0)


@pytest.mark.parametrize("name", ["label", "target"])
def test_labels_that_are_no_whole_numbers_are_named_at_once_with_what_they_must_be(tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=BYTES, **{name: LABELS / 2}, site=LABELS)
    said = f"column {name} of type double, and labels are whole numbers or texts: convert the column"
    with pytest.raises(DataError, match=said):
        open_tables(path, Columns(None, None, "site"), 0.2, 0)


def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    as_dataset(IMAGES, LABELS).to_parquet(path)
    table = pq.read_table(path)
    labels = pa.array([3 if row == 7 else int(value) for row, value in enumerate(LABELS)])
    pq.write_table(table.set_column(1, "label", labels), path)
    with pytest.raises(DataError, match=r"row 7 has label 3 in column label, and labels are 0 to 2"):
        open_tables(path, Columns(), 0.2, 0)


def test_a_saved_dataset_reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    folder = saved_to_disk(tmp_path / "saved")
    path = folder / "test/state.json"
    state = json.loads(path.read_text())
    for name in ("../train/data-00000-of-00002.arrow", "/etc/passwd", "..", "", 7):
        path.write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match=r"state\.json is damaged .*is not the name of a file beside it"):
            open_tables(folder, Columns(), 0.2, 0)
    path.write_text(json.dumps(state | {"_data_files": []}))
    with pytest.raises(DataError, match="lists no files"):
        open_tables(folder, Columns(), 0.2, 0)


def test_clients_are_whole_numbers_or_texts_and_go_with_their_rows(tmp_path: Path) -> None:
    who = [number * 100 // 7 for number in range(30)]
    for values in (who, [f"site {number}" for number in who]):
        path = write_parquet(tmp_path / "a.parquet", image=BYTES, label=LABELS, who=values)
        raw, _ = open_tables(path, Columns(client="who"), 0.2, 0)
        clients = {image: str(value) for image, value in zip(BYTES, values, strict=True)}
        for split in raw.values():
            assert list(split.clients) == [clients[bytes(image)] for image in split.images()]


def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    table = pa.table({"image": [draw.bytes(100_000) for _ in range(300)], "label": [0, 1] * 150})
    pq.write_table(table, tmp_path / "a.parquet", write_batch_size=10, use_dictionary=False)  # pages of ten images
    raw, _ = open_tables(tmp_path / "a.parquet", Columns(), None, 0)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in raw["train"].images()]
    assert len(held) == 300
    assert max(held) < 32 << 20, "memory for most of the row group"
