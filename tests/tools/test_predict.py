"""tools.predict: the probabilities are those of the final model for images as the run reads them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from tests.conftest import Federate
from tests.tools.conftest import Refusal
from tools import predict
from tools.running.finished import open_run

SHORT = ("clients=2", "num_rounds=1", "train.steps=2", "evaluate.personal_epochs=0")


@pytest.fixture(scope="module")
def run(federate: Federate) -> Path:
    """Return a run whose model resizes the digits of 32 pixels to 48."""
    return federate(*SHORT, "model.image_size=48")[1]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Write a colour image that is wider than high, and return its path."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def predicted(run: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Return a function that classifies the photo with these options and returns the lines that are printed."""

    def call(*words: str) -> list[str]:
        assert predict.main([str(run), str(photo), *words]) == 0
        return capsys.readouterr().out.splitlines()

    return call


def test_probabilities_are_those_of_torchvisions_eval_transform(run: Path, photo: Path, predicted: Any) -> None:
    (line,) = predicted("--json")
    steps = (transforms.Grayscale(), transforms.Resize(32), transforms.CenterCrop(32), transforms.Resize(48))
    inputs = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])(Image.open(photo))
    with torch.no_grad():
        expected = open_run(run).model()(inputs[None]).softmax(1)[0]
    found = json.loads(line)["classes"]
    assert [found[str(digit)] for digit in range(10)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert list(found) == [str(digit) for digit in expected.argsort(descending=True).tolist()]


def test_the_most_probable_classes_come_first_under_their_names(run: Path, photo: Path, predicted: Any) -> None:
    (run / "classes.json").write_text(json.dumps([f"digit {n}" for n in range(10)]))
    (line,) = predicted("--top", "2")
    path, _, shown = line.partition(": ")
    (first, more), (second, less) = (part.rsplit(" ", 1) for part in shown.split(", "))
    assert path == str(photo)
    assert all(name.startswith("digit ") for name in (first, second))
    assert first != second
    assert float(more) >= float(less)


def test_images_that_cannot_be_read_are_named_and_the_others_classified(run: Path, photo: Path, capsys: Any) -> None:
    text, pipe, cut = (photo.with_name(name) for name in ("text.png", "pipe.png", "cut.png"))
    text.write_text("no image")
    cut.write_bytes(photo.read_bytes()[:400])
    os.mkfifo(pipe)
    bad = [text, pipe, cut, photo.with_name("missing.png"), photo.parent]
    assert predict.main([str(run), *map(str, bad), str(photo)]) == 1
    (shown,), errors = map(str.splitlines, capsys.readouterr())
    assert shown.startswith(f"{photo}: ")
    assert all(str(path) in error for path, error in zip(bad, errors, strict=True))


def test_a_run_without_classes_of_images_is_refused(federate: Federate, photo: Path, refusal: Refusal) -> None:
    run = federate("experiment=toy_regression", "num_rounds=1")[1]
    assert "images with classes" in refusal(predict.main, run, photo)


def test_classes_are_numbers_where_the_run_did_not_know_their_names(run: Path, predicted: Any) -> None:
    (run / "classes.json").unlink(missing_ok=True)
    (line,) = predicted("--json")
    assert set(json.loads(line)["classes"]) == set("0123456789")


def test_options_may_stand_between_images(photo: Path, predicted: Any) -> None:
    assert len(predicted("--json", str(photo))) == 2
