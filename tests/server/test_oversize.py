"""A CNN whose dense layer outgrows the training data is warned of, with its size and the fix."""

import logging
from pathlib import Path

import numpy as np
import pytest

from flapp.architecture import find_oversize
from flapp.config.load import compose
from flapp.data.artifact import write_artifact
from tests.conftest import Federate
from tools.deployment.submit import warn_of_size

SAID = "model=cnn on images of 64 pixels has 33.6 million parameters, 99.8% of them in its dense layer, for 1,000"
PETS = ("dataset=custom", "dataset.name=pets", "dataset.classes=2", "clients=2", "model=cnn")


def warning_for(samples: int, *words: str) -> str | None:
    config = compose(list(words))
    return find_oversize(config.model, config.dataset, samples)


def test_a_cnn_on_large_images_and_few_samples_is_warned_of_with_its_size_and_the_fix() -> None:
    large = (*PETS, "dataset.shape=[64,64,3]")
    warning = warning_for(1000, *large)
    assert warning is not None
    assert warning.startswith(SAID)
    assert warning.endswith("set model=vit_tiny or model.image_size=28")
    for fixed in ("model=vit_tiny", "model.image_size=28"):
        assert warning_for(10, *large, fixed) is None
    assert warning_for(400_000, *large) is None
    assert warning_for(100, "experiment=femnist_fedavg") is None
    assert warning_for(50, "dataset=cifar10", "model=cnn") is None


def test_the_server_logs_the_warning_and_tools_run_prints_it(
    federate: Federate, data_home: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        images = draw.integers(0, 256, (40, 36, 36, 3), dtype=np.uint8)
        write_artifact(data_home / "data" / "pets" / split, images, np.arange(40) % 2, classes=["cat", "dog"])
    words = [*PETS, "dataset.shape=[36,36,3]", "num_rounds=1", "train.steps=1", "train.batch_size=2", "partition=iid"]
    words += ["clients=1", "checkpoint=off", "evaluate.personal_epochs=0"]
    with caplog.at_level(logging.WARNING):
        federate(*words)
    said = "model=cnn on images of 36 pixels has 10.7 million parameters, 99.5% of them in its dense layer, for 40"
    assert said in caplog.text
    warn_of_size(compose([f"home={data_home}", *words]))
    assert f"warning: {said}" in capsys.readouterr().err


def test_tools_run_says_nothing_of_data_that_it_cannot_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_size(compose([*PETS, "dataset.shape=[64,64,3]", f"home={tmp_path}"]))
    assert capsys.readouterr().err == ""
