"""CIFAR's files are read as torchvision reads them, and nothing in them is ever executed."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import cifar

from flapp.data.artifact import DataError
from flapp.data.sources import CIFAR, cifar_files, cifar_sha256, read_cifar
from tests.support.cifar_files import python2_pickle, write_cifar
from tests.support.refusals import refused


def rewrite(path: Path, **changes: Any) -> None:
    """Change some keys of a file that write_cifar made."""
    content = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
    content |= {key.encode(): value for key, value in changes.items()}
    path.write_bytes(python2_pickle({key: value for key, value in content.items() if value is not None}))


@pytest.mark.filterwarnings("ignore:dtype")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_images_and_labels_are_those_that_torchvision_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # that the files are the published ones
    write_cifar(tmp_path, name, images=7)
    for split in ("train", "test"):
        theirs = getattr(cifar, CIFAR[name].torchvision)(tmp_path, train=split == "train")
        images, labels, classes = read_cifar(name, tmp_path, split)
        assert classes == tuple(f"class_{i}" for i in range(100 if name == "cifar100" else 10))
        assert np.array_equal(images, theirs.data)
        assert labels.tolist() == theirs.targets


@pytest.mark.parametrize(("protocol", "order"), [(2, "C"), (3, "C"), (4, "C"), (2, "F")])
def test_files_of_python_3_and_arrays_in_fortran_order_are_read_too(tmp_path: Path, protocol: int, order: Any) -> None:
    folder = write_cifar(tmp_path, images=4)
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8).copy(order=order)
    content = {b"data": data, b"labels": [3, 2, 1, 0]}
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
    images, labels, _ = read_cifar("cifar10", tmp_path, "test")
    assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(4, 3072), data)
    assert labels.tolist() == [3, 2, 1, 0]


def test_the_sha256_is_that_of_sha256sum_over_sha256sum(tmp_path: Path) -> None:
    paths = cifar_files("cifar10", write_cifar(tmp_path, images=2), "test")  # in the folder, or the one it is in
    assert paths == cifar_files("cifar10", tmp_path, "test")
    listing = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)
    assert [path.name for path in paths] == ["test_batch", "batches.meta"]
    assert cifar_sha256(paths) == hashlib.sha256(listing.encode()).hexdigest()


class Malicious:
    """Calls `function` with `arguments` when it is unpickled by a trusting reader."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("protocol", "place", "function", "name"),
    [
        (0, "whole file", os.mkdir, "mkdir"),
        (2, "label", eval, "eval"),
        (4, "meta", np.fromfile, "fromfile"),
        (4, "label", os.mkdir, "mkdir"),
    ],
)
def test_a_malicious_file_is_refused_by_name_and_does_not_run(
    tmp_path: Path, protocol: int, place: str, function: Callable[..., Any], name: str
) -> None:
    folder, trace = write_cifar(tmp_path, images=2), tmp_path / "trace"
    argument = f"__import__('os').mkdir({str(trace)!r})" if function is eval else str(trace)
    attack, path = Malicious(function, argument), folder / ("batches.meta" if place == "meta" else "test_batch")
    content = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [attack]} if place == "label" else attack
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with refused(DataError, rf"^{path} wants .*{name}.*not executed"):
        read_cifar("cifar10", tmp_path, "test")
    assert not trace.exists()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer labels": ({"labels": [0, 1, 2]}, "4 images and 3 labels"),
    "a label too high": ({"labels": [0, 1, 2, 10]}, "label 10"),
    "a label below zero": ({"labels": [0, 1, 2, -1]}, "label -1"),
    "a label that is no number": ({"labels": [0, 1, 2, b"3"]}, "label b'3'"),
    "a label that is a truth value": ({"labels": [0, 1, 2, True]}, "label True"),
    "narrow rows": ({"data": np.zeros((4, 3071), np.uint8)}, r"\[4, 3071\]"),
    "no rows": ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, r"\[0, 3072\]"),
    "one axis": ({"data": np.zeros(3072, np.uint8)}, r"\[3072\]"),
    "floats": ({"data": np.zeros((4, 3072), np.float32)}, "'f4'"),
    "objects": ({"data": np.zeros((4, 3072), object)}, "'O8'"),
    "no data": ({"data": None}, "no array 'data'"),
    "data that is a list": ({"data": [1, 2, 3]}, "no array 'data'"),
    "the labels of another dataset": ({"labels": None, "fine_labels": [0, 1, 2, 3]}, "'labels'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_a_fault_is_refused_in_one_line_that_names_it(tmp_path: Path, fault: str) -> None:
    changes, reason = FAULTS[fault]
    path = write_cifar(tmp_path, images=4) / "test_batch"
    rewrite(path, **changes)
    with refused(DataError, f"^{path}.*{reason}"):
        read_cifar("cifar10", tmp_path, "test")


def cut(keep: int) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:keep]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        *(("data_batch_3", cut(keep), "cannot be read|is damaged") for keep in (0, 1, 40, 5000, -1)),
        # 4 rows become 5: the pickled shape is K\x04 M\x00\x0c.
        ("test_batch", lambda whole: whole.replace(b"K\x04M\x00\x0c", b"K\x05M\x00\x0c", 1), "cannot be read"),
        *(("test_batch", lambda _, it=it: python2_pickle(it), "holds a .*, not the dict") for it in ([1], b"x", None)),
        ("batches.meta", lambda _: python2_pickle({b"fine_label_names": [b"x"]}), "has no list 'label_names'"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, change: Callable[[bytes], bytes], reason: str) -> None:
    path = write_cifar(tmp_path, images=4) / name
    if name == "test_batch":
        rewrite(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"^{path} ({reason})"):
        read_cifar("cifar10", tmp_path, "train" if name.startswith("data") else "test")


def test_a_missing_file_is_named_with_both_ways_to_get_it(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, images=2)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match=f"^{folder / 'data_batch_4'} is missing: dataset.source=.*dataset.download"):
        cifar_files("cifar10", tmp_path, "train")
