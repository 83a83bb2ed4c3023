"""Write a model as ONNX; its outputs in onnxruntime are compared with PyTorch's."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flapp.data.images import NORMALIZATIONS
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.model.layout import SIZES
from flapp.training import outputs_of
from tools.exporting.vits import input_size
from tools.running.finished import FinishedRun

TOLERANCE = 1e-4  # relative to the largest output: onnxruntime's kernels round differently
COMPARED = 5  # samples


def write_onnx(run: FinishedRun, folder: Path) -> str:
    """Write model.onnx, which takes normalized samples (N, ...) and gives what the model gives.

    Class names and normalization are in its metadata. Raises ValueError when packages are missing, and when onnxruntime
    gives other outputs than PyTorch.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install -e '.[onnx]'") from error

    model, samples, path = run.model(), take_samples(run, COMPARED), folder / "model.onnx"
    if run.config.model.name in SIZES:
        # A ViT repeats a grey image's channel; the ONNX file does not, so it is done here.
        samples = samples.expand(-1, input_size(run)[1], -1, -1).contiguous()
    _trace(model, samples[:2], path)
    file = onnx.load(path)
    is_fixed = bool(file.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
    if is_fixed:  # torch.onnx fixes the number of samples of some networks, such as a GRU
        _trace(model, samples[:1], path)
        file = onnx.load(path)
    dataset = run.config.dataset
    mean, std = NORMALIZATIONS[dataset.normalization]
    facts = {"classes": run.classes, "shape": dataset.shape, "mean": mean, "std": std, "model": run.config.model.name}
    onnx.helper.set_model_props(file, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(file, path)
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = samples.split(1 if is_fixed else COMPARED)
    found = np.concatenate([session.run(None, {"samples": batch.numpy()})[0] for batch in batches])
    with torch.no_grad():
        expected = outputs_of(model, samples).numpy()
    if (worst := float(np.abs(found - expected).max())) > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(f"onnxruntime's outputs differ from PyTorch's by up to {worst:g}: use another --to")
    note = "  # it takes one sample at a time" if is_fixed else ""
    return f"import onnxruntime\nsession = onnxruntime.InferenceSession('{{out}}/model.onnx'){note}"


def _trace(model: nn.Module, samples: torch.Tensor, path: Path) -> None:
    """Write a network as ONNX: for one sample if there is one in `samples`, otherwise for any number."""
    shapes = ({0: torch.export.Dim("n", min=1)},) if len(samples) > 1 else None
    names: Any = {"input_names": ["samples"], "output_names": ["outputs"]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says much about its own workings
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(model, (samples,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert program is not None
    program.save(str(path))


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
