"""Settings that are left to files: the prepared data say their shape, classes and normalization."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from flapp.config.load import compose, differences, load, to_json
from flapp.config.schema import ConfigError
from flapp.data.artifact import DataError, check_samples, open_artifact, write_artifact, write_rows
from tests.conftest import refusal_of

WORDS = ["dataset=custom", "dataset.name=mine"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home with a dataset of 8x6 pixels in three classes, to be normalized as ImageNet is."""
    for split, images in (("train", np.zeros((9, 8, 6, 3), np.uint8)), ("test", np.zeros((3, 8, 6, 3), np.uint8))):
        folder, labels = tmp_path / "data" / "mine" / split, np.arange(len(images)) % 3
        given = (images.shape, labels, ["a", "b", "c"], "source")
        write_rows(folder, lambda start, stop, rows=images: rows[start:stop], *given, normalization="imagenet")
    return tmp_path


def test_the_prepared_data_say_shape_classes_and_normalization(home: Path) -> None:
    found = compose([f"home={home}", *WORDS]).dataset
    assert (found.shape, found.classes, found.normalization) == ((8, 6, 3), 3, "imagenet")


def test_data_written_as_arrays_are_normalized_as_by_default(home: Path) -> None:
    write_artifact(home / "data/mine/train", np.zeros((4, 5), np.float32), np.zeros(4, np.float32), [])
    words = [f"home={home}", *WORDS, "model=linear", "partition=iid", "evaluate.objective=loss"]
    found = compose(words).dataset
    assert (found.shape, found.classes, found.normalization) == ((5,), 0, "half")


def test_settings_that_are_given_stay_and_those_that_the_data_contradict_are_refused_with_both(home: Path) -> None:
    train = open_artifact(home / "data/mine/train")
    for word, said in {
        "dataset.classes=4": "samples of shape [8, 6, 3] in 3 classes, the settings say [8, 6, 3] in 4: set dataset.sh",
        "dataset.normalization=half": "was prepared with dataset.normalization=imagenet, the settings say half: leave",
    }.items():
        given = compose([f"home={home}", *WORDS, word]).dataset
        with pytest.raises(DataError) as caught:
            check_samples(train, given.shape, given.classes, given.normalization)
        assert said in str(caught.value)


def test_data_that_are_not_here_need_their_shape_and_classes(tmp_path: Path) -> None:
    said = refusal_of([f"home={tmp_path}", *WORDS])
    assert f"dataset mine is not prepared in {tmp_path}/data/mine: prepare it with python -m tools.prepare_data" in said
    assert "or set dataset.shape and dataset.classes" in said
    found = compose([f"home={tmp_path}", *WORDS, "dataset.shape=[8,8,1]", "dataset.classes=2"]).dataset
    assert (found.shape, found.classes, found.normalization) == ((8, 8, 1), 2, "half")


def test_data_that_a_function_makes_need_their_shape_and_classes(home: Path) -> None:
    said = refusal_of([f"home={home}", *WORDS, "dataset.target=task:make_data"])
    assert said == "dataset.target=task:make_data makes the data on first use: set dataset.shape and dataset.classes"
    given = ["dataset.target=task:make_data", "dataset.shape=[8,6,3]", "dataset.classes=3"]
    assert compose([f"home={home}", *WORDS, *given]).dataset.normalization == "half"


def test_damaged_data_are_an_error_in_one_line(home: Path) -> None:
    (home / "data/mine/train/meta.json").write_text("{")
    assert "meta.json is damaged" in refusal_of([f"home={home}", *WORDS])


def test_shape_and_classes_are_not_read_while_preparing(home: Path) -> None:
    found = compose([f"home={home}", *WORDS], preparing=True).dataset
    assert (found.shape, found.classes, found.normalization) == ((), 0, "half")
    found = compose([f"home={home}", *WORDS, "dataset.shape=[9,9,3]"], preparing=True).dataset
    assert (found.shape, found.classes) == ((9, 9, 3), 0)
    with pytest.raises(ConfigError, match="model=vit_tiny needs images"):  # other datasets are checked as always
        compose(["dataset=regression"], preparing=True)


def test_each_node_reads_shape_and_classes_from_its_own_home(home: Path) -> None:
    elsewhere = home / "elsewhere"
    run_config = {"overrides": f"home={elsewhere} {' '.join(WORDS)}"}
    config, _ = load(run_config, {"home": str(home)})
    assert (config.dataset.shape, config.home) == ((8, 6, 3), str(home))
    with pytest.raises(ConfigError, match=f"not prepared in {elsewhere}"):
        load(run_config, {})
    whole = to_json(compose([f"home={home}", *WORDS]))
    assert load({"config-json": whole}, {})[0].dataset.shape == (8, 6, 3)


def test_a_run_is_not_resumed_over_data_of_another_shape(home: Path) -> None:
    before = asdict(compose([f"home={home}", *WORDS]))
    assert differences(before, compose([f"home={home}", *WORDS])) == []
    path = home / "data/mine/train/meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"classes": ["a", "b", "c", "d"]}))
    assert differences(before, compose([f"home={home}", *WORDS])) == ["dataset.classes was 3, is 4"]
