"""The adapter of a FedLoRA run as PEFT loads it, over a ViT of transformers or a model of the user's own."""

import shutil
from pathlib import Path

from torch import Tensor, nn

from flapp.architecture import adapt, build
from flapp.base import BaseError, load_base
from flapp.files import write_json
from flapp.model.adapter_files import CONFIG, PREFIX, WEIGHTS, import_adapter
from flapp.model.files import save_tensors
from flapp.model.layout import SIZES
from flapp.model.lora import adapted_layers, mark_only_lora_as_trainable
from flapp.model.lora_layers import LoRALayer
from flapp.model.names import modules_in_transformers, to_transformers
from flapp.untrusted import read_json
from tools.exporting.vits import write_transformers_folder
from tools.running.finished import FinishedRun


def write_peft(run: FinishedRun, folder: Path) -> str:
    """Write the adapter, and in base/ the model that it belongs on; raises ValueError when the run has none."""
    adapter = run.path / "adapter"
    if not run.config.lora.enabled:
        raise ValueError(f"{run.path} trained no adapters: choose another library with --to")
    if not (adapter / CONFIG).exists():
        rule = run.config.strategy.aggregation
        raise ValueError(
            f"{adapter} is missing: PEFT's format cannot hold the adapter of this model with "
            f"strategy.aggregation={rule}; export the whole model, with --to transformers, timm, torchvision or onnx"
        )
    digest = str(read_json(adapter / CONFIG).get("base_model_name_or_path"))
    try:
        base = run.model().state_dict() | load_base(run.config.models_dir, digest)
    except BaseError as error:
        raise ValueError(f"{run.config.models_dir} no longer has the frozen weights of {run.path} ({error})") from error
    (folder / "base").mkdir()
    if run.config.model.name in SIZES:
        write_transformers_folder(run, to_transformers(base), folder / "base")
        _write_for_transformers(run, folder)
        made = "import transformers\nbase = transformers.ViTForImageClassification.from_pretrained('{out}/base')"
    else:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter / name, folder / name)
        save_tensors(base, folder / "base" / "model.safetensors")
        made = (
            "import safetensors.torch\nbase = ...  # your own network\n"
            "base.load_state_dict(safetensors.torch.load_file('{out}/base/model.safetensors'))"
        )
    return f"import peft\n{made}\nmodel = peft.PeftModel.from_pretrained(base, '{{out}}')"


def _write_for_transformers(run: FinishedRun, folder: Path) -> None:
    """Write the adapter of a ViT under the names that transformers 5 gives its modules."""
    model = build(run.config.model, run.config.dataset)
    adapt(model, run.config.lora, run.config.lora.rank)
    mark_only_lora_as_trainable(model)
    import_adapter(model, run.path / "adapter")
    tensors: dict[str, Tensor] = {}
    layers = adapted_layers(model)
    for name, layer in layers.items():
        modules = modules_in_transformers(name)  # one of our layers may be three there, each with its rows of B
        for module, part in zip(modules, layer.lora_B.chunk(len(modules)), strict=True):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = _as_weight(layer, layer.lora_A, is_a=True)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = _as_weight(layer, part, is_a=False)
    given = read_json(run.path / "adapter" / CONFIG)
    if "heads.head" not in layers:
        head = model.get_submodule("heads.head")
        tensors |= {f"{PREFIX}classifier.{key}": tensor for key, tensor in head.state_dict().items()}
    targets = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors if ".lora_" in key})
    config = given | {"target_modules": targets, "base_model_name_or_path": "base"}
    config["modules_to_save"] = None if "heads.head" in layers else ["classifier"]
    save_tensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, dict(sorted(config.items())))


def _as_weight(layer: LoRALayer, factor: Tensor, is_a: bool) -> Tensor:
    """Return A or B as PEFT's layer holds it: a matrix, or the kernel of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return factor.detach().contiguous()
    shape = (layer.rank, *layer.weight.shape[1:]) if is_a else (*factor.shape, 1, 1)
    return factor.detach().reshape(shape)
