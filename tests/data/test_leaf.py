"""FEMNIST sources: what is read, how pixels become uint8, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from flapp.data.artifact import DataError
from flapp.data.shards.leaf import open_source
from tests.support.leaf_files import as_leaf, draw_samples, write_arrays, write_leaf
from tests.support.poison import peak


@pytest.mark.parametrize("scale", [255, 1])
def test_pixels_of_either_scale_become_the_same_grey_levels(tmp_path: Path, scale: int) -> None:
    samples = draw_samples(5, 3)
    source = open_source(write_leaf(tmp_path, as_leaf(samples, scale)))
    assert sorted(source.writers) == sorted(samples)
    for name, (images, labels) in samples.items():
        read_images, read_labels = source.read(name)
        assert (read_images.dtype, read_labels.dtype) == (np.uint8, np.int64)
        assert np.array_equal(read_images.reshape(-1, 784), images)
        assert np.array_equal(read_labels, labels)
        assert len(np.unique(read_images)) > 100


@pytest.mark.parametrize(("pixels", "expected"), [([0.999, 0.5, 1.0], [255, 128, 255]), ([0, 1, 1], [0, 255, 255])])
def test_floats_are_rounded_and_only_zeros_and_ones_are_black_and_white(
    tmp_path: Path, pixels: list[float], expected: list[int]
) -> None:
    data = {"x": [pixels + [1.0] * 781], "y": [3]}
    content = {"users": ["a"], "num_samples": [1], "user_data": {"a": data}}
    images, _ = open_source(write_leaf(tmp_path, content)).read("a")
    assert images.ravel().tolist() == expected + [255] * 781


def test_the_scale_is_found_over_all_writers_not_by_the_first(tmp_path: Path) -> None:
    samples = draw_samples(2, 2)
    samples["a_black"] = (np.ones((2, 784), np.uint8), np.array([1, 2]))
    whole = as_leaf({"a_black": samples["a_black"]} | samples, scale=1)
    images, _ = open_source(write_leaf(tmp_path, whole)).read("a_black")
    assert images.max() == 1


@pytest.mark.parametrize(
    ("scale", "value", "shown"),
    [(255, 1.25, "1.25"), (255, -0.5, "-0.5"), (255, 200, "200"), (1, 256, "256"), (1, -1, "-1"), (1, 12.5, "12.5")],
)
def test_a_pixel_out_of_range_is_refused_by_file_user_and_value(
    tmp_path: Path, scale: int, value: float, shown: str
) -> None:
    samples = draw_samples(4, 4)
    content = as_leaf(samples, scale)
    user = list(samples)[1]
    content["user_data"][user]["x"][2][100] = value
    with pytest.raises(DataError, match=f"all_data_0.json: user {user} has.*{re.escape(shown)}") as refusal:
        open_source(write_leaf(tmp_path, content))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "invalid char"), (float("inf"), "invalid char"), (10**400, "overflow"), (2**64, "overflow")],
)
def test_a_number_that_json_or_64_bits_do_not_have_is_refused(tmp_path: Path, value: float, reason: str) -> None:
    content = as_leaf(draw_samples(4, 4))
    content["user_data"]["f0001_01"]["x"][2][100] = value
    with pytest.raises(
        DataError, match=rf"all_data_0\.json is damaged .after user f0000_00: .*{reason}.*copy it again"
    ):
        open_source(write_leaf(tmp_path, content))


def test_nesting_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    for text in (deep, f'{{"a": ["]]]]]]", {deep}]}}', f'{{"user_data": {{"a\\"]": {deep}}}}}'):
        (tmp_path / "all_data_0.json").write_text(text)
        before = peak()
        with pytest.raises(DataError, match="more than 20 deep"):
            open_source(tmp_path)
        assert peak() - before < 100 << 20


def test_a_name_with_control_characters_is_refused(tmp_path: Path) -> None:
    samples = {"a\x1b[2J": draw_samples(3)["f0000_00"]}
    with pytest.raises(DataError, match=r"control characters in the name 'a\\x1b\[2J': rename it"):
        open_source(write_leaf(tmp_path, as_leaf(samples)))


def test_files_of_different_scales_are_refused(tmp_path: Path) -> None:
    write_leaf(tmp_path, as_leaf(draw_samples(3)), "all_data_0.json")
    write_leaf(tmp_path, as_leaf(draw_samples(3, seed=1, prefix="g"), scale=1), "all_data_1.json")
    with pytest.raises(DataError, match=r"all_data_1.json: user g0000_00 has pixel"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda user: user["x"].pop(), "2 images in x and 3 labels"),
        (lambda user: user["x"].append(user["x"][0]), "4 images in x and 3 labels"),
        (lambda user: user["y"].pop(), "3 images in x and 2 labels"),
        (lambda user: (user["x"].pop(), user["y"].pop()), "has 2 labels, num_samples says 3"),
        (lambda user: user["x"][1].pop(), "783 pixels"),
        (lambda user: user["x"].__setitem__(1, [[0.0] * 28] * 28), "something else than a row"),
        (lambda user: user["x"][1].__setitem__(5, None), "something else than a row"),
        (lambda user: user["x"][1].__setitem__(5, True), "something else than a row"),
        (lambda user: user["x"][1].__setitem__(5, "0.5"), "something else than a row"),
        (lambda user: user["y"].__setitem__(1, 62), "label 62"),
        (lambda user: user["y"].__setitem__(1, -1), "label -1"),
        (lambda user: user["y"].__setitem__(1, 3.0), r"label 3\.0"),
        (lambda user: user["y"].__setitem__(1, True), "label True"),
        (lambda user: user.pop("y"), "no x or no y"),
        (lambda user: user.__setitem__("y", 7), "instead of a list in x or y"),
    ],
)
def test_a_user_that_does_not_add_up_is_refused(tmp_path: Path, change, said: str) -> None:
    content = as_leaf(draw_samples(3))
    change(content["user_data"]["f0000_00"])
    with pytest.raises(DataError, match=said):
        open_source(write_leaf(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole["user_data"].pop("f0001_01"), "different writers: f0001_01"),
        (lambda whole: whole.update(users=["f0000_00", "f0001_01"] * 2), "4 users, 2 num_samples and 2 writers"),
    ],
)
def test_users_that_user_data_does_not_have_once_are_refused(tmp_path: Path, change, said: str) -> None:
    content = as_leaf(draw_samples(3, 3))
    change(content)
    with pytest.raises(DataError, match=said):
        open_source(write_leaf(tmp_path, content))


def test_a_user_twice_is_refused_within_a_file_and_across_files(tmp_path: Path) -> None:
    content = as_leaf(draw_samples(3))
    write_leaf(tmp_path / "two", content, "all_data_0.json")
    write_leaf(tmp_path / "two", content, "all_data_1.json")
    with pytest.raises(DataError, match=r"all_data_1.json: user f0000_00 is already in .*all_data_0.json"):
        open_source(tmp_path / "two")
    user = json.dumps(content["user_data"]["f0000_00"])
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


def test_layout_key_order_and_odd_names_do_not_matter(tmp_path: Path) -> None:
    samples = draw_samples(3, 2)
    renamed = {'quote" brace} ': samples["f0000_00"], "Zoë": samples["f0001_01"]}
    content = as_leaf(renamed) | {"hierarchies": [["a", {"b": None}], "]"], "version": 1.5}
    (tmp_path / "all_data_0.json").write_text(json.dumps(dict(reversed(content.items())), indent=2))
    source = open_source(tmp_path)
    assert sorted(source.writers) == sorted(renamed)
    assert np.array_equal(source.read("Zoë")[0].reshape(-1, 784), samples["f0001_01"][0])


def test_train_and_test_folders_are_read_as_one_writer_with_samples_held_out(tmp_path: Path) -> None:
    train, test = draw_samples(6, 4), draw_samples(2, 1, seed=9)
    write_leaf(tmp_path / "train", as_leaf(train), "all_data_0_niid_0_keep_0_train_9.json")
    write_leaf(tmp_path / "test", as_leaf(test), "all_data_0_niid_0_keep_0_test_9.json")
    source = open_source(tmp_path)
    assert source.has_test
    assert (source.writers["f0000_00"].count, source.writers["f0000_00"].held_out) == (8, 2)
    assert np.array_equal(source.read("f0000_00")[0][-2:].reshape(-1, 784), test["f0000_00"][0])


def test_a_folder_that_is_no_source_is_refused_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold LEAF's all_data_\*\.json.*dataset\.source"):
        open_source(tmp_path / "nowhere")
    write_leaf(tmp_path / "train", as_leaf(draw_samples(3)), "a.json")
    with pytest.raises(DataError, match=r"no test/\*\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("writers", [None, [7, 12]])
def test_arrays_give_each_writer_the_same_samples_as_leaf(tmp_path: Path, writers: list[int] | None) -> None:
    samples = draw_samples(9, 5)
    source = open_source(write_arrays(tmp_path / "arrays", samples, writers))
    names = [str(name) for name in writers or samples]
    assert sorted(source.writers) == sorted(names)
    for name, (images, labels) in zip(names, samples.values(), strict=True):
        read_images, read_labels = source.read(name)
        expected = sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))
        found = sorted((int(label), image.tobytes()) for image, label in zip(read_images, read_labels, strict=True))
        assert found == expected


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
    np.save(folder / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=said):
        open_source(folder)
    path = folder / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{name}\.npy is damaged"):
        open_source(folder)
