"""A ViT as torchvision, transformers and timm load it, with the same logits for the same normalized images."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flapp.data.images import NORMALIZATIONS
from flapp.files import write_json
from flapp.model.files import save_tensors
from flapp.model.layout import PLAIN, SIZES, input_of
from flapp.model.names import to_timm, to_torchvision, to_transformers
from tools.running.finished import FinishedRun

BILINEAR = 2  # PIL's number, which transformers writes


def input_size(run: FinishedRun) -> tuple[int, int]:
    """Return the side in pixels and the channels of the images that the ViT of a run takes; raises ValueError."""
    model, data = run.config.model, run.config.dataset
    if model.name not in SIZES:
        raise ValueError(f"{run.path} trained model={model.name}, which is not a ViT: use --to onnx")
    return input_of(model.name, data.shape, data.classes, model.image_size, model.channels)


def write_torchvision(run: FinishedRun, folder: Path) -> str:
    """Write model.pth, a state dict of torchvision's VisionTransformer.

    Raises ValueError for a model that torchvision cannot represent. torchvision takes RGB only. The kernel of a grey
    model is shared out among three equal channels.
    """
    (size, channels), variant = input_size(run), run.config.model.variant.filled()
    if channels not in (1, 3):
        raise ValueError(f"torchvision's ViT takes images of 3 channels, the model takes {channels}: use --to timm")
    for setting, other in (("activation", "transformers"), ("pooling", "timm")):
        value, only = vars(variant)[setting], vars(PLAIN)[setting]
        if value != only:
            found = f"has {setting}={only} only, the model has {setting}={value}"
            raise ValueError(f"torchvision's ViT {found}: use --to {other}")
    state = to_torchvision(run.model().state_dict())
    if channels == 1:
        state["conv_proj.weight"] = state["conv_proj.weight"].expand(-1, 3, -1, -1).contiguous() / 3
    torch.save(state, folder / "model.pth")
    patch, layers, heads, width, mlp = SIZES[run.config.model.name]
    sizes = f"{size}, {patch}, {layers}, {heads}, {width}, {mlp}, num_classes={len(run.classes)}"
    norm = f", norm_layer=partial(nn.LayerNorm, eps={variant.layer_norm_eps:g})"
    grey = "\n# it takes a grey image as three equal channels: x.expand(-1, 3, -1, -1)" if channels == 1 else ""
    return (
        "from functools import partial\nimport torch\nimport torchvision\nfrom torch import nn\n"
        f"model = torchvision.models.VisionTransformer({sizes}{norm})\n"
        f"model.load_state_dict(torch.load('{{out}}/model.pth')){grey}"
    )


def write_transformers(run: FinishedRun, folder: Path) -> str:
    """Write what ViTForImageClassification.from_pretrained and AutoImageProcessor load; raises ValueError."""
    write_transformers_folder(run, to_transformers(run.model().state_dict()), folder)
    return "import transformers\nmodel = transformers.ViTForImageClassification.from_pretrained('{out}')"


def write_transformers_folder(run: FinishedRun, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write config.json, preprocessor_config.json and the tensors of a ViTForImageClassification.

    Raises ValueError for a model that transformers lacks: one whose head sees the mean of the tokens.
    """
    (size, channels), model = input_size(run), run.config.model
    if model.pooling == "mean":
        raise ValueError(
            "transformers' ViTForImageClassification has pooling=token only, the model has pooling=mean: use --to timm "
            "or onnx"
        )
    patch, layers, heads, width, mlp = SIZES[model.name]
    variant = model.variant.filled()
    names = dict(enumerate(run.classes))
    config = {
        **{"architectures": ["ViTForImageClassification"], "model_type": "vit", "torch_dtype": "float32"},
        **{"image_size": size, "patch_size": patch, "num_channels": channels, "qkv_bias": True},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width, "intermediate_size": mlp},
        **{"hidden_act": variant.activation, "layer_norm_eps": variant.layer_norm_eps},
        **{"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": 0.0},
        **{"id2label": names, "label2id": {name: number for number, name in names.items()}},
    }
    mean, std = statistics(run, channels)
    preprocessor = {
        **{"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size}},
        **{"resample": BILINEAR, "do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": mean, "image_std": std},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor)
    save_tensors(state, folder / "model.safetensors", format="pt")


def write_timm(run: FinishedRun, folder: Path) -> str:
    """Write what timm.create_model('local-dir:...', pretrained=True) loads; raises ValueError."""
    (size, channels), variant = input_size(run), run.config.model.variant.filled()
    if (variant.layer_norm_eps, variant.activation) != (PLAIN.layer_norm_eps, PLAIN.activation):
        found = f"layer_norm_eps={variant.layer_norm_eps:g} and activation={variant.activation}"
        raise ValueError(f"timm's ViTs are loaded with epsilon 1e-6 and gelu, the model has {found}: use --to onnx")
    patch, layers, heads, width, mlp = SIZES[run.config.model.name]
    mean, std = statistics(run, channels)
    pool, count = ("avg" if variant.pooling == "mean" else "token"), len(run.classes)
    arguments = {
        **{"img_size": size, "patch_size": patch, "in_chans": channels, "num_classes": count, "global_pool": pool},
        **{"embed_dim": width, "depth": layers, "num_heads": heads, "mlp_ratio": mlp / width},
    }
    preprocessing = {
        **{"input_size": [channels, size, size], "fixed_input_size": True, "interpolation": "bilinear"},
        **{"crop_pct": 1.0, "crop_mode": "center", "mean": mean, "std": std, "num_classes": count},
        **{"first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None},
    }
    names = {"num_classes": count, "num_features": width, "global_pool": pool, "label_names": list(run.classes)}
    architecture = {"architecture": "vit_small_patch16_224", **names, "model_args": arguments}
    write_json(folder / "config.json", architecture | {"pretrained_cfg": preprocessing})
    save_tensors(to_timm(run.model().state_dict(), str(variant.pooling)), folder / "model.safetensors")
    return "import timm\nmodel = timm.create_model('local-dir:{out}', pretrained=True)"


def statistics(run: FinishedRun, channels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of pixels in [0, 1], one number a channel."""
    means, stds = (list(values) for values in NORMALIZATIONS[run.config.dataset.normalization])
    return (means * channels)[:channels], (stds * channels)[:channels]
