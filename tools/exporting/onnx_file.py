"""A model as ONNX, compared with PyTorch by onnxruntime."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from flapp.data.images import NORMALIZATIONS
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from tools.running.finished import FinishedRun

TOLERANCE = 1e-4  # relative to the largest output: onnxruntime's kernels round differently
SAMPLES = 2, 5  # the batch with which the model is traced, and the one with which it is compared


def write_onnx(run: FinishedRun, folder: Path) -> str:
    """Write model.onnx, which takes normalised samples (N, ...) and gives what the model gives.

    Class names and normalization are in its metadata. Raises ValueError when packages are missing, and when onnxruntime
    gives other outputs than PyTorch.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install -e '.[onnx]'") from error

    model, path = run.model(), folder / "model.onnx"
    traced, compared = (take_samples(run, count) for count in SAMPLES)
    with _quiet():
        program = torch.onnx.export(
            model,
            (traced,),
            dynamo=True,
            input_names=["samples"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    file = onnx.load(path)
    dataset = run.config.dataset
    mean, std = NORMALIZATIONS[dataset.normalization]
    facts = {"classes": run.classes, "shape": dataset.shape, "mean": mean, "std": std, "model": run.config.model.name}
    onnx.helper.set_model_props(file, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(file, path)
    with torch.no_grad():
        expected = model(compared).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"samples": compared.numpy()})
    if (worst := float(np.abs(found - expected).max())) > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"onnxruntime gives outputs that differ from PyTorch's by up to {worst:g}: use another one with --to"
        )
    return "session = onnxruntime.InferenceSession('{out}/model.onnx')"


def take_samples(run: FinishedRun, count: int) -> torch.Tensor:
    """Return samples as the model takes them: of the prepared data, or else random images."""
    config, image_size = run.config, run.config.model.image_size
    folder = config.data_dir / config.dataset.name / "test"
    if (folder / "meta.json").exists():
        dataset = OfflineDataset(folder, normalization=config.dataset.normalization)
        rows = np.arange(count) % len(dataset)
        return next(iter(ClientLoader(dataset, rows, count, image_size=image_size, prefetch=0)))[0]
    if len(config.dataset.shape) != 3:
        raise ValueError(f"{folder} is missing, so the dtype of the samples is unknown: prepare the dataset there")
    height, width, channels = config.dataset.shape
    sides = (image_size, image_size) if image_size else (height, width)
    return torch.rand(count, channels, *sides, generator=torch.Generator().manual_seed(0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch.onnx says of its own workings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
