"""A CNN whose dense layer outgrows the training data is warned of, with its size and the fix."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flapp.architecture import find_oversize
from flapp.config.load import compose
from flapp.config.schema import Config
from flapp.data.artifact import write_artifact
from tools.deployment.submit import warn_of_size

Federate = Callable[..., tuple[dict[str, Any], Path]]
SAID = "model=cnn on images of 64 pixels has 33.6 million parameters, 99.8% of them in its dense layer, for 1,000"


def custom(size: int, *words: str) -> Config:
    shape = f"dataset.shape=[{size},{size},3]"
    return compose(["dataset=custom", "dataset.name=pets", shape, "dataset.classes=2", "clients=2", *words])


def warning_for(config: Config, samples: int) -> str | None:
    return find_oversize(config.model, config.dataset, samples)


def test_a_cnn_on_large_images_and_few_samples_is_warned_of_with_its_size_and_the_fix() -> None:
    warning = warning_for(custom(64, "model=cnn"), 1000)
    assert warning is not None
    assert warning.startswith(SAID)
    assert warning.endswith("set model=vit_tiny or model.image_size=28")


@pytest.mark.parametrize("words", [["model=vit_tiny"], ["model=cnn", "model.image_size=28"]])
def test_the_advised_fix_silences_the_warning(words: list[str]) -> None:
    assert warning_for(custom(64, *words), 10) is None


def test_leafs_own_experiment_small_images_and_enough_samples_are_not_warned_of() -> None:
    assert warning_for(compose(["experiment=femnist_fedavg"]), 100) is None
    assert warning_for(compose(["dataset=cifar10", "model=cnn"]), 50) is None
    assert warning_for(custom(64, "model=cnn"), 400_000) is None


def test_the_server_logs_the_warning_and_tools_run_prints_it(
    federate: Federate, data_home: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        images = draw.integers(0, 256, (40, 36, 36, 3), dtype=np.uint8)
        write_artifact(data_home / "data" / "pets" / split, images, np.arange(40) % 2, classes=["cat", "dog"])
    words = ["dataset=custom", "dataset.name=pets", "dataset.shape=[36,36,3]", "dataset.classes=2", "clients=2"]
    words += [
        "model=cnn",
        "num_rounds=1",
        "train.steps=1",
        "train.batch_size=2",
        "partition=iid",
        "checkpoint=off",
        "evaluate.personal_epochs=0",
    ]
    with caplog.at_level(logging.WARNING):
        federate(*words)
    said = "model=cnn on images of 36 pixels has 10.7 million parameters, 99.5% of them in its dense layer, for 40"
    assert said in caplog.text
    warn_of_size(compose([f"home={data_home}", *words]))
    assert f"warning: {said}" in capsys.readouterr().err


def test_tools_run_says_nothing_of_data_that_it_cannot_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_size(custom(64, "model=cnn", f"home={tmp_path}"))
    assert capsys.readouterr().err == ""
