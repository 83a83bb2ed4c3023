"""What the weights of a ViT say of their model: whose they are, its size, and what its tensors do not show.

    torchvision   the tensors; nothing else is written
    transformers  the tensors, config.json and preprocessor_config.json
    timm          the tensors and, in a folder of save_for_hf, config.json
    flapp         the tensors and the header of the file

Tensors are looked at by name and shape only. Weights that no ViT of flapp's can take, of other networks or of ViTs with
more or fewer parts, are recognized by their names and refused with the reason.
"""

import math
import re
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapp.model.layout import ACTIVATIONS, SIZES, Layout, Shape, Variant
from flapp.model.names import LAYER, POSITIONS, QKV, TIMM, TRANSFORMERS, from_any
from flapp.model.weight_files import WEIGHTS, find_weights, read_header, read_shapes
from flapp.untrusted import printable, read_json

NETWORKS = {  # the network that has names like these; the first match is reported
    r"(^|\.)(dist_token|distillation_token)$": "DeiT with a distillation token",
    r"^beit\.|^blocks\.\d+\.attn\.(relative_position_bias_table|q_bias)$": "BEiT or EVA",
    r"relative_position_bias_table$": "Swin",
    r"encoder\.layer\.\d+\.layer_scale1\.lambda1$|^dinov2": "DINOv2",
    r"(^|\.)layer\.\d+\.layer_scale1\.lambda1$": "DINOv3",
    r"(^|\.)self_attn\.k_proj\.|^visual\.|(^|\.)resblocks\.\d+\.": "CLIP or SigLIP",
    r"^stages\.\d+\.blocks\.\d+\.conv_dw\.|\.dwconv\.weight$|^features\.\d+\.\d+\.layer_scale$": "ConvNeXt",
    r"^layer1\.0\.conv1\.weight$|^resnet\.": "ResNet",
    r"^conv_stem\.|^features\.0\.0\.weight$|^efficientnet\.|^mobilenet": "EfficientNet or MobileNet",
    r"^features\.0\.weight$": "VGG or AlexNet",
    r"^features\.denseblock1\.": "DenseNet",
    r"mlp_tokens\.": "MLP-Mixer",
    r"(^|\.)word_embeddings\.weight$|(^|\.)(wte|embed_tokens)\.weight$": "a language model",
    r"^conv_proj\.conv_bn_relu_": "a ViT with convolutions in front (conv stem)",
    r"^timm_model\.": "timm's model inside transformers",
}
PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of DistributedDataParallel, torch.compile and Lightning
PARTS = {  # what flapp's ViTs do not have, by a pattern of its tensors' names
    r"^head_dist\.|(^|\.)(dist_token|distillation_token)$": "a distillation token",
    r"(^|\.)(reg_token|register_tokens)$": "register tokens",
    r"\.[qk]_norm\.": "norms of queries and keys (qk_norm)",
    r"\.ls[12]\.gamma$|layer_scale|\.gamma_[12]$|\.lambda_[12]$": "layer scale, as DINOv2 and DeiT III have it",
    r"(^|\.)norm_pre\.": "a norm before the first layer (norm_pre), as CLIP has it",
    r"(^|\.)pre_logits\.": "a layer before the head (pre_logits)",
    r"(^|\.)attn_pool\.": "attention pooling",
    r"rel_pos|relative_position": "relative positions",
    r"(^|\.)mask_token$|^decoder\.": "a mask token or decoder, for masked images",
    r"\.attn\.norm\.|\.mlp\.norm\.|^patch_embed\.norm\.": "more norms",
}
Size = tuple[int, int, int, int]  # patch, layers, width, mlp width
POOLER = "vit.pooler."
NORMALIZATIONS = {  # of dataset.normalization, by mean and deviation of each channel
    ((0.0,), (1.0,)): "none",
    ((0.5,), (0.5,)): "half",
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)): "imagenet",
}
TIMMS_VITS = re.compile(r"(vit|deit)_(tiny|small|base)_patch16_\d+(_in21k|_dino|_sam)?(\.\w+)?")
# Arguments of timm's that shapes show, are checked one by one, or do not change what a trained model computes.
HARMLESS = {
    *("img_size", "num_classes", "in_chans", "global_pool"),
    *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"),
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "fc_norm"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
}
USUAL = {"class_token": True, "qkv_bias": True, "proj_bias": True, "final_norm": True, "pos_embed": "learn"}


@dataclass(frozen=True)
class ViTWeights:
    """What a file of weights says of its ViT.

    path: the file; library: whose names it has; left_out: its tensors that flapp has no use for; size: one of SIZES;
    image_size: None where the position embeddings are not those of a square grid of patches; variant: its values are
    None where not said; normalization: None where not said; is_alone: there is no config.json and no header, so heads,
    activation and pooling are assumed.
    """

    path: Path
    library: str
    left_out: tuple[str, ...]
    size: str
    image_size: int | None
    channels: int
    variant: Variant
    normalization: str | None = None
    is_alone: bool = False


def describe(path: Path) -> ViTWeights:
    """Read what a file or folder of weights says; raises ValueError for one that no ViT of flapp's can take."""
    file = find_weights(path)
    return describe_shapes(file, read_shapes(file))


def describe_shapes(file: Path, shapes: Mapping[str, Shape]) -> ViTWeights:
    """Return what a file says; shapes: those of its tensors, by its own names. Raises as describe."""
    library, found = from_any(shapes)
    config = _config_beside(file, library)
    kind = config.get("model_type")
    if kind not in (None, "vit"):
        said = f"model_type {kind}, architectures {config.get('architectures')}"
        raise ValueError(f"{file} is of another network: config.json beside it says {_said(said)}; {_fix()}")
    prefix = next((each for each in PREFIXES if any(name.startswith(each) for name in shapes)), None)
    if library is None and prefix:
        raise ValueError(f"{file} has {prefix} in front of its names: save the tensors under their names without it")
    network = next((what for pattern, what in NETWORKS.items() if _any(pattern, shapes)), None)
    if network or library is None:
        seen = f"looks like {network}" if network else f"has tensors of another network, first {_said(min(shapes))}"
        raise ValueError(f"{file} {seen}, which is no ViT that flapp has; {_fix()}")
    positions = found.get(POSITIONS, ())
    if oddity := _oddity_of(library, found, shapes, positions[1] if len(positions) == 3 else 2):
        raise ValueError(f"{file} is a ViT that {oddity}, unlike flapp's; {_fix()}")
    size = size_of(found)
    name = name_of(size)
    if name is None:
        raise ValueError(f"{file} looks like {in_words(size)}, which flapp does not have; {_fix()}")
    side = math.isqrt(max(positions[1] - 1, 0)) if len(positions) == 3 else 0
    image_size = side * size[0] if side and side**2 + 1 == positions[1] else None
    left_out = tuple(each for each in found if library == TRANSFORMERS and each.startswith(POOLER))
    about = (file, library, left_out, name, image_size, found["conv_proj.weight"][1])
    has_head = "heads.head.weight" in found
    if library == TRANSFORMERS:
        variant, normalization = _from_transformers(file, config, SIZES[name][2], has_head)
        _check_image_size(file, config.get("image_size"), image_size, size[0])
        return ViTWeights(*about, variant, normalization)
    if library == TIMM:
        is_mean = "norm.weight" not in shapes
        variant, normalization = _from_timm(file, config, SIZES[name][2], has_head, is_mean)
        _check_image_size(file, _image_size_of_timm(config), image_size, size[0])
        return ViTWeights(*about, variant, normalization, is_alone=not config)
    header = read_header(file)
    given = {key: header.get(key) for key in vars(Variant())}
    try:
        variant = Variant(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} has a damaged header ({_said(error)}): copy it again") from error
    if has_head and variant.pooling is None:
        variant = Variant(variant.layer_norm_eps, variant.activation, "token")
    return ViTWeights(*about, variant, is_alone=not header)


def is_vit(tensors: Mapping[str, Any]) -> bool:
    """Say whether a model with these tensors is one of flapp's ViTs."""
    return f"{LAYER}0.{QKV}.weight" in tensors and {"class_token", POSITIONS, "conv_proj.weight"} <= tensors.keys()


def size_of(tensors: Mapping[str, Shape]) -> Size:
    """Return the size of a ViT from the shapes of its tensors, under our names."""
    patches, mlp = tensors["conv_proj.weight"], tensors.get(f"{LAYER}0.mlp.0.weight", ())
    layers = len({name.removeprefix(LAYER).partition(".")[0] for name in tensors if name.startswith(LAYER)})
    width, patch = (patches[0], patches[2]) if len(patches) == 4 else (0, 0)
    return patch, layers, width, mlp[0] if mlp else 0


def name_of(size: Size) -> str | None:
    """Return the name of a size, None if flapp does not have it."""
    patch, layers, width, mlp = size
    found = (name for name, (p, n, _, w, m) in SIZES.items() if (p, n, w, m) == (patch, layers, width, mlp))
    return next(found, None)


def in_words(size: Size) -> str:
    """Return a size in words."""
    patch, layers, width, mlp = size
    return f"a ViT of patch {patch}, {layers} layers, width {width} and mlp width {mlp}"


def check_variant_of(layout: Layout, weights: ViTWeights, head_loaded: bool) -> None:
    """Raise ValueError where a model differs from what its weights say, with the setting that fixes it.

    The model may have another pooling if model.pooling is set and the head does not come from the file.
    """
    has = vars(layout.variant.filled())
    for key, value in weights.variant.given().items():
        is_chosen = key == "pooling" and layout.variant.pooling is not None and not head_loaded
        if has[key] != value and not is_chosen:
            fix = f"set model.{key}={value}"
            raise ValueError(f"{weights.path} is of a ViT with {key}={value}, this one has {has[key]}: {fix}")


def check_normalization_of(weights: ViTWeights, given: str, channels: int) -> None:
    """Raise ValueError for images scaled in a different way from those that the weights were made with.

    given: dataset.normalization; channels: those of the images. "imagenet" is made for three channels, so weights that
    ask for it pass with any value if the images are grey.
    """
    said = weights.normalization
    if said in (None, given) or (said == "imagenet" and channels != 3):
        return
    fix = f"set dataset.normalization={said}"
    raise ValueError(f"{weights.path} was made with dataset.normalization={said}, got {given}: {fix}")


def _oddity_of(library: str, found: Container[str], names: Collection[str], positions: int) -> str | None:
    """Return what sets a ViT of a library apart from flapp's, in words that follow "a ViT that", or None.

    found: the names of its tensors, in ours; names: in the library's; positions: how many position embeddings it has.
    """
    if part := next((what for pattern, what in PARTS.items() if _any(pattern, names)), None):
        return f"has {part}"
    if not _any(r"(qkv|query|q_proj|in_proj)[._]bias$", names):
        return "has no biases of queries, keys and values (qkv_bias=False)"
    if "class_token" not in found:
        return "has no class token"
    if library == TIMM and round(positions**0.5) ** 2 == positions and POSITIONS in found:
        return "has no position embedding for the class token (no_embed_class=True)"
    return None


def _any(pattern: str, names: Collection[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _fix() -> str:
    said = (f"{name} (patch {patch}, {n} layers, width {width})" for name, (patch, n, _, width, _) in SIZES.items())
    return f"give weights of one of {', '.join(said)}, or build that network with model=custom"


def _said(value: object) -> str:
    return printable(value, 120)


def _config_beside(file: Path, library: str | None) -> Mapping[str, Any]:
    """Return config.json if it belongs to the weights beside it, else nothing.

    Raises ValueError if it is needed but missing, or is not JSON.
    """
    path = file.with_name("config.json")
    belongs = library == TRANSFORMERS or (library in (TIMM, None) and file.name in WEIGHTS)
    if not belongs or not path.exists():
        if library == TRANSFORMERS:
            raise ValueError(
                f"{file} has transformers' names, but no config.json beside it to say how many heads the ViT has and "
                "which epsilon its norms have: give the whole folder of save_pretrained"
            )
        return {}
    return _read_object(path)


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({_said(error)}): give the folder as the library wrote it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not settings: give the folder as the library wrote it")
    return values


def _from_transformers(file: Path, config: Mapping[str, Any], heads: int, has_head: bool) -> tuple[Variant, str | None]:
    """Return the variant and the normalization that a folder of save_pretrained says; raises ValueError."""
    path = file.with_name("config.json")
    if config.get("model_type") != "vit":
        raise ValueError(f"{path} does not say model_type vit: give the folder as save_pretrained wrote it")
    _check_heads(path, config.get("num_attention_heads", 12), heads)
    eps, activation = config.get("layer_norm_eps", 1e-12), config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{path} says hidden_act={_said(activation)}: flapp's ViTs have {' or '.join(ACTIVATIONS)}")
    try:
        variant = Variant(float(eps) if type(eps) is int else eps, activation, "token" if has_head else None)
    except ValueError as error:
        raise ValueError(f"{path} says {_said(error)}") from error
    prepares = file.with_name("preprocessor_config.json")
    if not prepares.exists():
        return variant, None
    values = _read_object(prepares)
    if values.get("do_rescale", True) is not True or values.get("rescale_factor", 1 / 255) != 1 / 255:
        raise ValueError(f"{prepares} does not scale pixels by 1/255, as flapp does: give other weights")
    if values.get("do_normalize", True) is not True:
        return variant, "none"
    mean, std = values.get("image_mean"), values.get("image_std")
    return variant, None if mean is None and std is None else _normalization(prepares, mean, std)


def _from_timm(
    file: Path, config: Mapping[str, Any], heads: int, has_head: bool, is_mean: bool
) -> tuple[Variant, str | None]:
    """Return the variant and the normalization that timm's tensors and config.json say; raises ValueError.

    is_mean: whether the last norm is named fc_norm, not norm: then the head sees the mean of the tokens.
    """
    path, pooling = file.with_name("config.json"), "mean" if is_mean else "token" if has_head else None
    if not config:
        return Variant(pooling=pooling), None
    name, arguments = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(name, str) or not TIMMS_VITS.fullmatch(name) or not isinstance(arguments, dict):
        raise ValueError(f"{path} says architecture={_said(name)}, which is no ViT that flapp has; {_fix()}")
    _check_heads(path, arguments.get("num_heads", heads), heads)
    for key, value in arguments.items():
        if key not in HARMLESS and value not in (None, USUAL.get(key, False)):
            odd = _said(f"{key}={value}")
            raise ValueError(f"{path} says {odd}, which flapp's ViTs cannot be: give other weights")
    pools = arguments.get("global_pool") or config.get("global_pool") or pooling or "token"
    if pools not in (("avg", "token") if is_mean else ("token",)):
        can = "the class token, or the mean of the others before the last norm (fc_norm)"
        raise ValueError(f"{path} says global_pool={_said(pools)}: flapp's heads see {can}")
    pooling = "token" if pools == "token" and pooling else pooling
    cfg = config.get("pretrained_cfg") or config
    if not isinstance(cfg, dict):
        raise ValueError(f"{path} has a damaged pretrained_cfg: give the folder as save_for_hf wrote it")
    said = _normalization(path, cfg.get("mean"), cfg.get("std")) if cfg.get("mean") is not None else None
    return Variant(pooling=pooling), said


def _image_size_of_timm(config: Mapping[str, Any]) -> Any:
    """Return the side or the sides of the images that timm's config.json says; None if it does not say any."""
    size, cfg = (config.get("model_args") or {}).get("img_size"), config.get("pretrained_cfg") or config
    channels_and_sides = cfg.get("input_size")
    return size or (channels_and_sides[1:] if isinstance(channels_and_sides, list) else None)


def _check_image_size(file: Path, said: Any, found: int | None, patch: int) -> None:
    """Raise ValueError where config.json says images that are not square, or not those that the positions are for.

    A grid of 2 x 8 patches has as many positions as one of 4 x 4, so the shapes alone do not tell them apart.
    """
    if said is None:
        return
    path, sides = file.with_name("config.json"), said if isinstance(said, list) else [said]
    if any(side != sides[0] for side in sides):
        raise ValueError(f"{path} says images of {_said(said)} pixels: flapp's ViTs take square images only")
    if not sides or type(sides[0]) is not int or found is None or sides[0] // patch * patch != found:
        fault = f"{path} says images of {_said(said)} pixels, and the position embeddings are for {found}"
        raise ValueError(f"{fault}: give the folder as the library wrote it")


def _check_heads(path: Path, found: Any, heads: int) -> None:
    if found != heads:
        raise ValueError(f"{path} says that the ViT has {_said(found)} heads: flapp's of this width have {heads}")


def _normalization(path: Path, mean: Any, std: Any) -> str:
    """Return the dataset.normalization that has this mean and deviation."""
    try:
        found = tuple(tuple(round(float(x), 6) for x in values) for values in (mean, std))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} has a damaged mean or deviation of pixels ({_said(error)})") from error
    plain = tuple(values[:1] if len(set(values)) == 1 else values for values in found)
    if plain not in NORMALIZATIONS:
        raise ValueError(
            f"{path} says that images have the mean {_said(mean)} and the deviation {_said(std)}: flapp scales them by "
            f"{', '.join(NORMALIZATIONS.values())} only; give other weights, or take the two out of the file"
        )
    return NORMALIZATIONS[plain]
