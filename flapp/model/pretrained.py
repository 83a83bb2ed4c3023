"""Pretrained weights from a file or folder: of flapp, torchvision, transformers or timm, whose names are told apart.

Weights that do not fit the model are refused whole. check_pretrained finds out from names and shapes alone, and needs
PyTorch only for a file of torch.save; so PyTorch is imported where it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.files import sha256_of_file
from flapp.model.files import mismatch, shapes_of
from flapp.model.layout import SIZES, Layout, Shape
from flapp.model.names import POSITIONS, TIMM, TRANSFORMERS, from_any, from_torchvision
from flapp.model.vit_weights import ViTWeights, check_variant_of, describe_shapes, in_words, is_vit, name_of, size_of
from flapp.model.weight_files import find_weights, read_shapes, read_state
from flapp.untrusted import printable

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Pretrained:
    """What load_pretrained did: the file's SHA-256, and what it took.

    head_loaded: whether the head came from the file; interpolated: whether positions were resized; left_out: unused
    tensors, such as the pooler of transformers' ViTModel; assumed: what a file alone does not say, in words.
    """

    sha256: str
    head_loaded: bool
    interpolated: bool
    left_out: tuple[str, ...] = ()
    assumed: str = ""


def load_pretrained(model: "nn.Module", path: Path) -> Pretrained:
    """Load every weight of `model`, which has no adapters yet, from the file or folder at `path`.

    The model keeps its own head if the file's head is for another number of classes, or if a file of timm or
    transformers has no head. Position embeddings for another image size are interpolated as in torchvision (bicubic).
    Raises ValueError for weights that are unsafe or do not fit.
    """
    from flapp.model.lora import head_of, layout_of

    file, layout, own = find_weights(path), layout_of(model), model.state_dict()
    state = read_state(file)
    shapes = shapes_of(state)
    head_loaded, interpolated, weights = _fit(layout, shapes, file)
    left_out = weights.left_out if weights else ()
    state = from_any(state)[1] if is_vit(own) else from_torchvision(state, own)
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    if interpolated:
        from torchvision.models.vision_transformer import interpolate_embeddings

        positions: Any = {POSITIONS: state[POSITIONS].float()}  # bfloat16 is too coarse to interpolate in
        state |= interpolate_embeddings(model.image_size, model.patch_size, positions)
    if not head_loaded:
        head = head_of(model)
        state |= {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] == head}
    if odd := next((name for name, tensor in state.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{file}: tensor {printable(odd, 80)} has NaN or infinity in it: save the weights again")
    model.load_state_dict(state)
    assumed = ""
    if weights and weights.is_alone:
        variant = layout.variant.filled()
        assumed = f"{SIZES[weights.size][2]} heads, {variant.activation}, {variant.pooling}"
    return Pretrained(sha256_of_file(file), head_loaded, interpolated, left_out, assumed)


def check_pretrained(layout: Layout, path: Path) -> ViTWeights | None:
    """Raise ValueError where load_pretrained would, from names and shapes alone; return what the weights of a ViT say.

    A .pth of at most CHECKED_BYTES is also read for damage.
    """
    file = find_weights(path)
    return _fit(layout, read_shapes(file), file)[2]


def _fit(layout: Layout, found: Mapping[str, Shape], file: Path) -> tuple[bool, bool, ViTWeights | None]:
    """Return whether the head is taken from the file, whether positions must be resized, and what a ViT's weights say.

    Raises ValueError when they do not fit.
    """
    own, weights = layout.tensors, describe_shapes(file, found) if is_vit(layout.tensors) else None
    state = from_torchvision(found, own) if weights is None else from_any(found)[1]
    left_out = weights.left_out if weights else ()
    state = {name: shape for name, shape in state.items() if name not in left_out}
    resized = _can_be_resized(own.get(POSITIONS), state.get(POSITIONS))
    state |= {POSITIONS: own[POSITIONS]} if resized else {}
    head = {name: shape for name, shape in own.items() if name.rpartition(".")[0] == layout.head}
    head_loaded = not head or not all(_differs_in_rows(state.get(name, shape), shape) for name, shape in head.items())
    if weights is not None and weights.library in (TIMM, TRANSFORMERS) and not head.keys() & state.keys():
        head_loaded = False
    state |= {} if head_loaded else head
    if weights is not None:
        size = size_of(own)
        if (name := name_of(size)) != weights.size:
            has = name or in_words(size)
            raise ValueError(f"{file} has the weights of {weights.size}, the model is {has}: set model={weights.size}")
    if fault := mismatch(own, state):
        hint = "give weights of this very model"
        if "first conv_proj.weight (" in fault:
            takes, wants = own["conv_proj.weight"][1], state["conv_proj.weight"][1]
            hint = f"give weights for images of {takes} channels"
            if (takes, wants) == (1, 3):
                hint = "set model.channels=3, so that the ViT takes grey images as RGB"
        raise ValueError(f"{file} does not fit this {layout.kind}: {fault}; {hint}")
    if weights is not None:
        check_variant_of(layout, weights, head_loaded)
    return head_loaded, resized, weights


def _differs_in_rows(found: Shape, own: Shape) -> bool:
    return len(found) == len(own) and found[1:] == own[1:] and found[:1] != own[:1]


def _can_be_resized(own: Shape | None, found: Shape | None) -> bool:
    """Say whether `found` can be resized to `own`: it must be a class token and another square number of patches."""
    if own is None or found is None or own[2:] != found[2:] or own == found:
        return False
    side = round((found[1] - 1) ** 0.5) if found[1] > 1 else 0
    return side >= 1 and found[0] == 1 and side * side == found[1] - 1
