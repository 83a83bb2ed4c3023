"""The names of a ViT's tensors in flapp, torchvision, timm and transformers, in both directions.

flapp, in encoder.layers.encoder_layer_0    torchvision, there            timm, in blocks.0     transformers, see below
ln_1, ln_2                                  the same                      norm1, norm2          layernorm_before, _after
self_attention.qkv                          self_attention.in_proj_*      attn.qkv              query, key and value
self_attention.proj                         self_attention.out_proj       attn.proj             attention.output.dense
mlp.0                                       the same, or mlp.linear_1     mlp.fc1               intermediate.dense
mlp.3                                       the same, or mlp.linear_2     mlp.fc2               output.dense

torchvision's files from before 2022 have mlp.linear_1. transformers writes
vit.encoder.layer.0.attention.attention.query; since its version 5 this is vit.layers.0.attention.q_proj in memory.
Both are read, and the first is written. A ViTModel's names lack the `vit.`. timm has fc_norm in place of norm where the
head sees the mean of the tokens.

A state maps names to tensors or, so that a file can be checked without PyTorch, to their shapes. If a file has one
tensor under two spellings, only one of them is renamed. The other keeps its spelling, and a later comparison with the
model's names reports it as an extra tensor.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
FLAPP, TORCHVISION, TIMM, TRANSFORMERS = "flapp", "torchvision", "timm", "transformers"
POSITIONS = "encoder.pos_embedding"
LAYER = "encoder.layers.encoder_layer_"
QKV = "self_attention.qkv"
OURS = {
    "self_attention.in_proj_": "self_attention.qkv.",
    "self_attention.out_proj.": "self_attention.proj.",
    "mlp.linear_1.": "mlp.0.",
    "mlp.linear_2.": "mlp.3.",
}
TORCHVISIONS = {ours: theirs for theirs, ours in OURS.items() if theirs.startswith("self_attention")}
TIMMS = {
    **{"class_token": "cls_token", POSITIONS: "pos_embed", "conv_proj": "patch_embed.proj"},
    **{"ln_1": "norm1", QKV: "attn.qkv", "self_attention.proj": "attn.proj"},
    **{"ln_2": "norm2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"},
    **{"encoder.ln": "norm", "heads.head": "head"},
}
TRANSFORMERSES = {
    **{"class_token": "vit.embeddings.cls_token", POSITIONS: "vit.embeddings.position_embeddings"},
    **{"conv_proj": "vit.embeddings.patch_embeddings.projection"},
    **{"ln_1": "layernorm_before", "self_attention.proj": "attention.output.dense"},
    **{"ln_2": "layernorm_after", "mlp.0": "intermediate.dense", "mlp.3": "output.dense"},
    **{"encoder.ln": "vit.layernorm", "heads.head": "classifier"},
}
PARTS = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))  # of QKV, in transformers
IN_MEMORY = {  # transformers 5 -> what it writes
    **{f"attention.{letter}_proj": part for letter, part in zip("qkv", PARTS, strict=True)},
    **{"attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
}
OUR_BLOCK = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)")
TIMMS_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
TRANSFORMERS_BLOCK = re.compile(r"vit\.(?:encoder\.layer|layers)\.(\d+)\.(.+)")
TELLING = {  # how to recognise a library's ViT: it has at least one name of each tuple
    FLAPP: (("class_token",), ("conv_proj.weight",), (f"{LAYER}0.{QKV}.weight",)),
    TORCHVISION: (("class_token",), ("conv_proj.weight",), (f"{LAYER}0.self_attention.in_proj_weight",)),
    TIMM: (("patch_embed.proj.weight",), ("blocks.0.attn.qkv.weight",), ("blocks.0.norm1.weight",)),
    TRANSFORMERS: (
        ("vit.embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.projection.weight"),
        tuple(
            f"{vit}{layer}.{query}.weight"
            for vit in ("vit.", "")
            for layer, query in (("encoder.layer.0", PARTS[0]), ("layers.0", "attention.q_proj"))
        ),
    ),
}


def library_of(names: Container[str]) -> str | None:
    """Return the library in whose names a ViT's tensors are, or None if they are not those of a ViT."""
    for library, telling in TELLING.items():
        if all(any(name in names for name in choices) for choices in telling):
            return library
    return None


def from_any(state: Mapping[str, T]) -> tuple[str | None, dict[str, T]]:
    """Return the library in whose names a ViT's state is, and the state under our names.

    Names that we do not know stay as they are. The library is None, and the state is unchanged, if it is not one of a
    ViT.
    """
    library = library_of(state)
    if library in (FLAPP, TORCHVISION):
        return library, from_torchvision(state)
    if library == TIMM:
        theirs = {there: here for here, there in TIMMS.items()}
        theirs |= {} if "norm.weight" in state else {"fc_norm": "encoder.ln"}
        return library, _under(state, lambda name: _renamed(name, TIMMS_BLOCK, LAYER, theirs))
    if library == TRANSFORMERS:
        return library, _from_transformers(state)
    return library, dict(state)


def from_torchvision(state: Mapping[str, T], known: Container[str] = ()) -> dict[str, T]:
    """Return `state` under our names; names that are ours already, and those in `known`, stay."""
    return _replaced(state, OURS, known)


def to_torchvision(state: Mapping[str, T]) -> dict[str, T]:
    """Return `state`, in our names and without adapters, under torchvision's."""
    return _replaced(state, TORCHVISIONS)


def to_timm(state: Mapping[str, T], pooling: str = "token") -> dict[str, T]:
    """Return the state of a ViT, in our names and without adapters, under timm's.

    pooling: that of the model. With `mean`, timm's VisionTransformer must be made with global_pool="avg".
    """
    names = TIMMS | ({"encoder.ln": "fc_norm"} if pooling == "mean" else {})
    return {_renamed(name, OUR_BLOCK, "blocks.", names): tensor for name, tensor in state.items()}


def to_transformers(state: Mapping[str, T]) -> dict[str, T]:
    """Return the state of a ViT, in our names and without adapters, as transformers writes ViTForImageClassification.

    ViTForImageClassification has no mean pooling: its head sees the class token.
    """
    found: dict[str, T] = {}
    for name, tensor in state.items():
        renamed = _renamed(name, OUR_BLOCK, "vit.encoder.layer.", TRANSFORMERSES)
        if QKV in renamed:
            parts = (renamed.replace(QKV, part) for part in PARTS)
            found |= zip(parts, _cut(tensor), strict=True)
        else:
            found[renamed] = tensor
    return found


def modules_in_transformers(layer: str) -> list[str]:
    """Return the names that transformers 5 has for one of our layers; qkv has three, for queries, keys and values."""
    names = {written: here for here, written in IN_MEMORY.items()}
    written = to_transformers({f"{layer}.weight": (3, 1)})
    return [_renamed(name, TRANSFORMERS_BLOCK, "vit.layers.", names).removesuffix(".weight") for name in written]


def _from_transformers(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state of ViTForImageClassification or ViTModel under our names, whose q, k and v are one tensor."""
    state = _under(state, lambda name: name if name.startswith(("vit.", "classifier.")) else f"vit.{name}")
    state = _under(state, lambda name: _renamed(name, TRANSFORMERS_BLOCK, "vit.encoder.layer.", IN_MEMORY))
    theirs = {there: here for here, there in TRANSFORMERSES.items()}
    joined: dict[str, T] = {}
    for name, tensor in state.items():
        part = next((part for part in PARTS if f".{part}." in name), "")
        parts = [state.get(name.replace(part, each)) for each in PARTS] if part else []
        if not _can_be_joined(parts):
            joined[name] = tensor
        elif part == PARTS[0]:
            joined[name.replace(part, QKV)] = _join(parts)
    return _under(joined, lambda name: _renamed(name, TRANSFORMERS_BLOCK, LAYER, theirs))


def _renamed(name: str, block: re.Pattern[str], to_block: str, names: Mapping[str, str]) -> str:
    """Return a tensor's other name; block: the pattern of names in a layer; to_block: how their new names begin."""
    if match := block.fullmatch(name):
        stem, _, leaf = match[2].rpartition(".")
        return f"{to_block}{match[1]}.{names.get(stem, stem)}.{leaf}"
    stem, _, leaf = name.rpartition(".")
    return names[name] if name in names else f"{names[stem]}.{leaf}" if stem in names else name


def _replaced(state: Mapping[str, T], names: Mapping[str, str], known: Container[str] = ()) -> dict[str, T]:
    def replaced(name: str) -> str:
        for old, new in names.items():
            name = name if name in known else name.replace(old, new)
        return name

    return _under(state, replaced)


def _under(state: Mapping[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """Return a state under other names; a tensor whose other name is taken keeps its own."""
    found: dict[str, T] = {}
    for name, tensor in state.items():
        other = rename(name)
        is_taken = other in found or (other != name and other in state)
        found[name if is_taken else other] = tensor
    return found


def _can_be_joined(parts: Iterable[Any]) -> bool:
    shapes = {None if part is None else tuple(getattr(part, "shape", part)) for part in parts}
    return len(shapes) == 1 and not shapes & {None, ()}


def _join(parts: list[Any]) -> Any:
    """Join q, k and v, which have the same shape. Given three shapes, return the shape of the joined tensor."""
    if isinstance(parts[0], tuple):
        return (3 * parts[0][0], *parts[0][1:])
    import torch

    return torch.cat(parts)


def _cut(value: Any) -> tuple[Any, ...]:
    """Cut a joined tensor into q, k and v. Given its shape, return the three shapes."""
    return ((value[0] // 3, *value[1:]),) * 3 if isinstance(value, tuple) else value.chunk(3)
