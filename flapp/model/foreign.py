"""Tell what weights are that flapp's ViTs cannot take: networks of other kinds, and ViTs with more or fewer parts."""

import re
from collections.abc import Collection, Container

from flapp.model.layout import SIZES
from flapp.model.names import POSITIONS, QKV, TIMM

NETWORKS = {  # what names like these are of; the first that fits is said
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
PARTS = {  # of ViTs, and what has names like these
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


def network_of(names: Collection[str]) -> str | None:
    """Return what network weights with these names are of, as far as that is known."""
    return next((what for pattern, what in NETWORKS.items() if _any(pattern, names)), None)


def prefix_of(names: Collection[str]) -> str | None:
    """Return what a wrapper of training code has put in front of names."""
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)), None)


def oddity_of(library: str, found: Container[str], names: Collection[str], positions: int) -> str | None:
    """Return what sets a ViT of a library apart from flapp's, in words that follow "a ViT that", or None.

    found: the names of its tensors, in ours; names: in the library's; positions: how many position embeddings it has.
    """
    if part := next((what for pattern, what in PARTS.items() if _any(pattern, names)), None):
        return f"has {part}"
    if not any(name.endswith(f"{QKV}.bias") for name in names) and not _any(
        r"(qkv|query|q_proj|in_proj)[._]bias$", names
    ):
        return "has no biases of queries, keys and values (qkv_bias=False)"
    if "class_token" not in found:
        return "has no class token"
    if library == TIMM and round(positions**0.5) ** 2 == positions and POSITIONS in found:
        return "has no position embedding for the class token (no_embed_class=True)"
    return None


def choices() -> str:
    """Say which ViTs flapp has."""
    said = (f"{name} (patch {patch}, {n} layers, width {width})" for name, (patch, n, _, width, _) in SIZES.items())
    return ", ".join(said)


def _any(pattern: str, names: Collection[str]) -> bool:
    return any(re.search(pattern, name) for name in names)
