"""FEMNIST sources: what is read, how pixels become uint8, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flapp.data.artifact import DataError
from flapp.data.shards.leaf import open_source
from tests.support.leaf_files import as_leaf, draw_samples, write_arrays, write_leaf
from tests.support.poison import peak
from tests.support.refusals import refused


@pytest.mark.parametrize("scale", [255, 1])
def test_pixels_of_either_scale_become_the_same_grey_levels(tmp_path: Path, scale: int) -> None:
    samples = draw_samples(5, 3)
    source = open_source(write_leaf(tmp_path, as_leaf(samples, scale)))
    assert sorted(source.writers) == sorted(samples)
    for name, (images, labels) in samples.items():
        read_images, read_labels = source.images(name), source.labels(name)
        assert (read_images.dtype, read_labels.dtype) == (np.uint8, np.int64)
        assert np.array_equal(read_images.reshape(-1, 784), images)
        assert np.array_equal(read_labels, labels)
        assert len(np.unique(read_images)) > 100


@pytest.mark.parametrize(("pixels", "expected"), [([0.999, 0.5, 1.0], [255, 128, 255]), ([0, 1, 1], [0, 255, 255])])
def test_floats_are_rounded_and_0_and_1_are_black_and_white(
    tmp_path: Path, pixels: list[float], expected: list[int]
) -> None:
    data = {"x": [pixels + [1.0] * 781], "y": [3]}
    content = {"users": ["a"], "num_samples": [1], "user_data": {"a": data}}
    images = open_source(write_leaf(tmp_path, content)).images("a")
    assert images.ravel().tolist() == expected + [255] * 781


def test_the_scale_is_found_over_all_writers_not_by_the_first(tmp_path: Path) -> None:
    samples = {"a_black": (np.ones((2, 784), np.uint8), np.array([1, 2]))} | draw_samples(2, 2)
    images = open_source(write_leaf(tmp_path, as_leaf(samples, scale=1))).images("a_black")
    assert images.max() == 1


def test_layout_key_order_and_odd_names_do_not_matter(tmp_path: Path) -> None:
    samples = draw_samples(3, 2)
    renamed = {'quote" brace} ': samples["f0000_00"], "Zoë": samples["f0001_01"]}
    content = as_leaf(renamed) | {"hierarchies": [["a", {"b": None}], "]"], "version": 1.5}
    (tmp_path / "all_data_0.json").write_text(json.dumps(dict(reversed(content.items())), indent=2))
    source = open_source(tmp_path)
    assert sorted(source.writers) == sorted(renamed)
    assert np.array_equal(source.images("Zoë").reshape(-1, 784), samples["f0001_01"][0])


def first(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """Return a change of LEAF's object that changes what it has of its first user."""
    return lambda content: change(content["user_data"]["f0000_00"])


def set_pixel(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["user_data"]["f0001_01"]["x"][2].__setitem__(100, value)


def rename(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["user_data"].update({name: content["user_data"].pop("f0000_00")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_pixel(1.25), r"user f0001_01 has pixel 1\.25 in image 2"),
        (set_pixel(-0.5), r"user f0001_01 has pixel -0\.5"),
        (set_pixel(200), "user f0001_01 has pixel 200"),
        *((set_pixel(n), r"damaged .after user f0000_00: .*invalid char.*copy") for n in (float("nan"), float("inf"))),
        *((set_pixel(n), r"damaged .after user f0000_00: .*overflow.*copy it again") for n in (10**400, 2**64)),
        (rename("a\x1b[2J"), r"control characters in the name 'a\\x1b\[2J': rename it"),
        (lambda content: content["user_data"].pop("f0001_01"), "different writers \(f0001_01\)"),
        (lambda content: content.update(users=content["users"] * 2), "4 users, 2 num_samples and 2 writers"),
        (first(lambda user: user["x"].pop()), "3 images in x and 4 labels"),
        (first(lambda user: user["x"].append(user["x"][0])), "5 images in x and 4 labels"),
        (first(lambda user: user["y"].pop()), "4 images in x and 3 labels"),
        (first(lambda user: (user["x"].pop(), user["y"].pop())), "has 3 labels, num_samples says 4"),
        (first(lambda user: user["x"][1].pop()), r"x\.1: .* 784 items .*, not 783.*: correct it"),
        *(
            (
                first(lambda user, odd=odd: user["x"][1].__setitem__(5, odd)),
                rf"x\.1\.5: .* number, got {odd!r}: correct",
            )
            for odd in (None, True, "0.5")
        ),
        (first(lambda user: user["x"].__setitem__(1, [[0.0] * 28] * 28)), r"x\.1\.0: .* number, got a list"),
        *(
            (first(lambda user, y=y: user["y"].__setitem__(1, y)), rf"y\.1: .* got {y}: correct")
            for y in (62, -1, 3.0, True)
        ),
        (first(lambda user: user.pop("y")), "y: Field required"),
        (first(lambda user: user.__setitem__("y", 7)), "y: .* valid list, got 7"),
    ],
)
def test_leaf_that_does_not_add_up_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    content = as_leaf(draw_samples(4, 4))
    change(content)
    with refused(DataError, f"all_data_0.json.*{said}"):
        open_source(write_leaf(tmp_path, content))


@pytest.mark.parametrize("value", [256, -1, 12.5])
def test_a_whole_number_out_of_range_is_refused(tmp_path: Path, value: float) -> None:
    content = as_leaf(draw_samples(4, 4), scale=1)
    set_pixel(value)(content)
    with pytest.raises(DataError, match=f"all_data_0.json: user f0001_01 has pixel {value}"):
        open_source(write_leaf(tmp_path, content))


def test_nesting_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    for text in (deep, f'{{"a": ["]]]]]]", {deep}]}}', f'{{"user_data": {{"a\\"]": {deep}}}}}'):
        (tmp_path / "all_data_0.json").write_text(text)
        before = peak()
        with pytest.raises(DataError, match="more than 20 deep"):
            open_source(tmp_path)
        assert peak() - before < 100 << 20


def test_files_of_different_scales_or_with_the_same_user_are_refused(tmp_path: Path) -> None:
    write_leaf(tmp_path, as_leaf(draw_samples(3)), "all_data_0.json")
    write_leaf(tmp_path, as_leaf(draw_samples(3, seed=1, prefix="g"), scale=1), "all_data_1.json")
    with pytest.raises(DataError, match=r"all_data_1.json: user g0000_00 has pixel"):
        open_source(tmp_path)
    write_leaf(tmp_path, as_leaf(draw_samples(3)), "all_data_1.json")
    with pytest.raises(DataError, match=r"all_data_1.json: user f0000_00 is already in .*all_data_0.json"):
        open_source(tmp_path)
    user = json.dumps(as_leaf(draw_samples(3))["user_data"]["f0000_00"])
    text = f'{{"user_data": {{"a": {user}, "a": {user}}}, "users": ["a"], "num_samples": [3]}}'
    (tmp_path / "all_data_0.json").write_text(text)
    with pytest.raises(DataError, match="user a appears twice"):
        open_source(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_leaf(tmp_path, as_leaf(draw_samples(2, 2))) / "all_data_0.json"
    whole = path.read_bytes()
    for end in [0, 1, 5, *range(20, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"all_data_0\.json"):
            open_source(tmp_path)
    path.write_bytes(whole + b" {}")
    with pytest.raises(DataError, match=r"all_data_0\.json is damaged .*trailing garbage"):
        open_source(tmp_path)


def test_a_folder_that_is_no_source_is_refused_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold LEAF's all_data_\*\.json.*dataset\.source"):
        open_source(tmp_path / "nowhere")
    write_leaf(tmp_path / "train", as_leaf(draw_samples(3)), "a.json")
    with pytest.raises(DataError, match=r"no test/\*\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("images", np.zeros((8, 784), np.uint8), r"needs images.npy uint8 \(N, 28, 28\)"),
        ("images", np.zeros((8, 28, 28), np.float32), "needs images.npy uint8"),
        ("images", np.zeros((7, 28, 28), np.uint8), "needs images.npy"),
        ("labels", np.full(8, 62), "has label 62"),
        ("labels", np.zeros(8, np.int32), "labels.npy int64"),
        ("writers", np.array(["a", None] * 4, dtype=object), "writers.npy is damaged"),
        ("images", np.array([b"pickled"] * 8, dtype=object), "images.npy is damaged"),
        ("writers", np.zeros(8), "must hold whole numbers or text"),
    ],
)
def test_arrays_of_a_wrong_kind_are_refused(tmp_path: Path, name: str, array: np.ndarray, said: str) -> None:
    folder = write_arrays(tmp_path / "arrays", draw_samples(5, 3))
    path = folder / f"{name}.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(DataError, match=said):
        open_source(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{name}\.npy is damaged"):
        open_source(folder)
