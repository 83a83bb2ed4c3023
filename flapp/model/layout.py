"""Describe a model without PyTorch: its layers, the shapes of its tensors, and where adapters go.

PyTorch and torchvision take seconds to import; a command that only checks or describes a model does not need them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

Shape = tuple[int, ...]

# patch, layers, heads, width, mlp width. vit_ti_16 and vit_s_16 are DeiT's "tiny" and "small", vit_b_16 is
# torchvision's.
SIZES = {
    "vit_tiny": (4, 3, 4, 64, 128),
    "vit_ti_16": (16, 12, 3, 192, 768),
    "vit_s_16": (16, 12, 6, 384, 1536),
    "vit_b_16": (16, 12, 12, 768, 3072),
}


# The layers that can take an adapter, by class: PyTorch's Linear and Conv2d, transformers' Conv1D.
ADAPTED = {"Linear": "LoRALinear", "Conv2d": "LoRAConv2d", "Conv1D": "LoRAConv1D"}
LINEAR = ("Linear", "Conv1D")
ALL_LINEAR = "all-linear"
MOST_CHOICES = 12  # in an error


def matrix_shape(weight: Shape, is_transposed: bool) -> tuple[int, int]:
    """Return (out, in), the shape of a layer's weight as the matrix to which its adapter adds B A."""
    return (weight[1], weight[0]) if is_transposed else (weight[0], math.prod(weight[1:]))


ACTIVATIONS = {"gelu": "GELU", "quick_gelu": "QuickGELU"}  # of a ViT, and the classes of their modules
POOLINGS = ("token", "mean")


@dataclass(frozen=True)
class Variant:
    """How ViTs of one size may differ though their tensors look alike; None is torchvision's value, see PLAIN.

    layer_norm_eps: the epsilon of all layer norms; activation: gelu or quick_gelu; pooling: what the head sees, `token`
    (the class token behind the last norm) or `mean` (the last norm of the mean of all other tokens).
    """

    layer_norm_eps: float | None = None
    activation: str | None = None
    pooling: str | None = None

    def __post_init__(self) -> None:
        eps = self.layer_norm_eps
        if eps is not None and not (isinstance(eps, float) and 0 < eps < 1):
            raise ValueError(f"layer_norm_eps={eps!r} is no epsilon: it must be a number between 0 and 1")
        for name, value, known in (("activation", self.activation, ACTIVATIONS), ("pooling", self.pooling, POOLINGS)):
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(known)}")

    def given(self) -> dict[str, Any]:
        """Return the values that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def filled(self) -> "Variant":
        """Return the variant with torchvision's values in place of None."""
        return replace(PLAIN, **self.given())


EPSILON = 1e-6
PLAIN = Variant(EPSILON, "gelu", "token")


@dataclass(frozen=True)
class Layout:
    """The layers and tensors of a model.

    kind: its class; modules: the class of every module in it, by dotted name and in order; tensors: the shapes of its
    state dict, in order; head: its last linear layer, if it has one; trained: the tensors that training may change;
    head_tensors: those of the head that are trained in full beside adapters; buffers: tensors that are not parameters,
    such as the statistics of BatchNorm; unfit: for each layer that looks like those of ADAPTED but cannot take an
    adapter, what it is; adapters: rank and alpha of every adapted layer; variant: that of a ViT.
    """

    kind: str
    modules: Mapping[str, str]
    tensors: Mapping[str, Shape]
    head: str | None
    trained: tuple[str, ...]
    head_tensors: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    variant: Variant = Variant()

    def matching(self, targets: Sequence[str], rank: int) -> list[str]:
        """Return the layers that `targets` name, in the model's order.

        A target is the last part or parts of a dotted name (`proj`, `mlp.0`), a shell pattern for them (`layer.?.q`,
        `attention.*_lin`; `*` matches dots, too), or all-linear: every linear layer that can take an adapter,
        except the head. A pattern is compared only with layers of ADAPTED, layers that have an adapter, and those in
        unfit. Raises ValueError when a target matches nothing or what cannot take an adapter, or when a layer is too
        small for the rank.
        """
        wanted = {name for target in targets for name in self._named_by(target)}
        names = [name for name in self.modules if name in wanted]
        for name in names:
            out_features, in_features = self._matrix(name)
            if rank > min(out_features, in_features):
                found = f"lora.rank={rank} is more than {name} ({in_features} -> {out_features}) can have"
                raise ValueError(f"{found}: lower lora.rank or leave it out")
        return names

    def _named_by(self, target: str) -> list[str]:
        """Return the layers that one target names, which can all take an adapter."""
        fit = [name for name, kind in self.modules.items() if kind in ADAPTED and name not in self.unfit]
        if target == ALL_LINEAR:
            found = [name for name in fit if self.modules[name] in LINEAR and name != self.head]
        elif set(target) & set("*?["):
            known = {*ADAPTED, *ADAPTED.values()}
            layers = [name for name, kind in self.modules.items() if kind in known or name in self.unfit]
            found = [name for name in layers if fnmatchcase(f".{name}", f"*.{target}")]
        else:
            found = [name for name in self.modules if f".{name}".endswith(f".{target}")]
        odd = sorted({*found} - {*fit}, key=found.index)
        if odd or not found:
            kind = self.unfit.get(odd[0], self.modules[odd[0]]) if odd else ""
            choices = sorted({".".join(name.split(".")[-2:]) for name in fit})
            closest = ", ".join(sorted(get_close_matches(target, choices, MOST_CHOICES, 0)))
            raise ValueError(
                f"lora.targets={target} matches {f'{odd[0]}, which is {kind}' if odd else 'no layer of the model'}: "
                f"choose among {closest or 'other models, this one has no layer that can take an adapter'}"
            )
        return found

    def _matrix(self, layer: str) -> tuple[int, int]:
        return matrix_shape(self.tensors[f"{layer}.weight"], self.modules[layer] == "Conv1D")

    def with_lora(self, targets: Sequence[str], rank: int, alpha: float) -> "Layout":
        """Return the layout with adapters: they, head and buffers are trained. Raises ValueError as `matching` does."""
        names = set(self.matching(targets, rank))
        adapters = {**self.adapters, **dict.fromkeys(names, (rank, alpha))}
        tensors: dict[str, Shape] = {}
        for key, shape in self.tensors.items():
            tensors[key] = shape
            layer, _, part = key.rpartition(".")
            if layer in names and (part == "bias" or f"{layer}.bias" not in self.tensors):  # its last tensor
                out_features, in_features = self._matrix(layer)
                tensors |= {f"{layer}.lora_A": (rank, in_features), f"{layer}.lora_B": (out_features, rank)}
        in_full = () if self.head in names else self.head_tensors
        trained = {*in_full, *self.buffers, *(f"{name}.lora_{ab}" for name in adapters for ab in "AB")}
        return replace(
            self,
            modules={name: ADAPTED[kind] if name in names else kind for name, kind in self.modules.items()},
            tensors=tensors,
            trained=tuple(key for key in tensors if key in trained),
            head_tensors=in_full,
            adapters={name: adapters[name] for name in self.modules if name in adapters},
        )


def lay_out(
    name: str,
    shape: Sequence[int],
    classes: int,
    image_size: int | None = None,
    channels: int | None = None,
    variant: Variant = Variant(),
) -> Layout:
    """Return the layout of what build_model builds from the same arguments; raises ValueError where it does."""
    if fault := variant_fault(name, variant):
        raise ValueError(fault)
    if name == "linear":
        return _layout("Linear", [_linear("fc", math.prod(shape), max(classes, 1))])
    size, channels = input_of(name, shape, classes, image_size, channels)
    layout = LAYOUTS[name](name, size, channels, classes)
    kinds = {"GELU": ACTIVATIONS[variant.activation]} if variant.activation else {}
    modules = {module: kinds.get(kind, kind) for module, kind in layout.modules.items()}
    return replace(layout, modules=modules, variant=variant)


def variant_fault(name: str, variant: Variant) -> str | None:
    """Return why a model cannot take a variant, or None; only the ViTs of SIZES take one."""
    if name in SIZES or not (given := variant.given()):
        return None
    key, value = next(iter(given.items()))
    return f"model.{key}={value} is for a ViT, got model={name}: leave it out"


def input_of(
    name: str, shape: Sequence[int], classes: int, image_size: int | None, channels: int | None
) -> tuple[int, int]:
    """Return the side in pixels and the channels of the images that a model takes; raises ValueError, naming the fix.

    The arguments are those of build_model, for any model but `linear`.
    """
    if name not in LAYOUTS:
        known = ", ".join(sorted([*LAYOUTS, "linear"]))
        raise ValueError(f"model.name={name} is not known: choose one of {known}")
    if len(shape) != 3 or classes < 1:
        raise ValueError(
            f"model={name} classifies images of shape (H, W, C), got samples of shape {tuple(shape)} "
            f"with {classes} classes: choose model=linear or an image dataset"
        )
    if image_size is None and shape[0] != shape[1]:
        raise ValueError(f"model={name} takes square images, got {shape[0]}x{shape[1]}: set model.image_size")
    if channels not in (None, shape[2]) and (shape[2] != 1 or name not in SIZES):
        found = f"model={name} cannot take {shape[2]} channels as {channels}"
        raise ValueError(f"{found}: only a ViT can, and only if the images are grey")
    size = image_size or shape[0]
    patch = SIZES[name][0] if name in SIZES else 1
    if size % patch:
        found = f"model={name} cuts images into {patch}-pixel patches, which do not divide {size}"
        raise ValueError(f"{found}: set model.image_size to a multiple of {patch}")
    return size, channels or shape[2]


Row = tuple[str, str, dict[str, Shape]]  # a module: its dotted name, its class, and its own tensors


def _layout(kind: str, rows: list[Row], own: Mapping[str, Shape] | None = None) -> Layout:
    """Make a layout from the modules of a model in order, the head last; own: tensors of the model itself."""
    tensors = {f"{name}.{key}": shape for name, _, held in rows for key, shape in held.items()}
    tensors = {**(own or {}), **tensors}
    head, _, held = rows[-1]
    in_full = tuple(f"{head}.{key}" for key in held)
    return Layout(kind, {name: module for name, module, _ in rows}, tensors, head, tuple(tensors), in_full)


def _linear(name: str, in_features: int, out_features: int) -> Row:
    return name, "Linear", {"weight": (out_features, in_features), "bias": (out_features,)}


def _norm(name: str, width: int) -> Row:
    return name, "LayerNorm", {"weight": (width,), "bias": (width,)}


def _conv(name: str, channels: int, maps: int, side: int) -> Row:
    return name, "Conv2d", {"weight": (maps, channels, side, side), "bias": (maps,)}


def _vit(name: str, image_size: int, channels: int, classes: int) -> Layout:
    patch, layers, _, width, mlp = SIZES[name]
    rows: list[Row] = [
        _conv("conv_proj", channels, width, patch),
        ("encoder", "Encoder", {"pos_embedding": (1, (image_size // patch) ** 2 + 1, width)}),
        ("encoder.dropout", "Dropout", {}),
        ("encoder.layers", "Sequential", {}),
    ]
    for layer in (f"encoder.layers.encoder_layer_{i}" for i in range(layers)):
        rows += [
            (layer, "EncoderBlock", {}),
            _norm(f"{layer}.ln_1", width),
            (f"{layer}.self_attention", "SelfAttention", {}),
            _linear(f"{layer}.self_attention.qkv", width, 3 * width),
            _linear(f"{layer}.self_attention.proj", width, width),
            (f"{layer}.dropout", "Dropout", {}),
            _norm(f"{layer}.ln_2", width),
            (f"{layer}.mlp", "MLPBlock", {}),
            _linear(f"{layer}.mlp.0", width, mlp),
            (f"{layer}.mlp.1", "GELU", {}),
            (f"{layer}.mlp.2", "Dropout", {}),
            _linear(f"{layer}.mlp.3", mlp, width),
            (f"{layer}.mlp.4", "Dropout", {}),
        ]
    rows += [_norm("encoder.ln", width), ("heads", "Sequential", {}), _linear("heads.head", width, classes)]
    return _layout("ViT", rows, {"class_token": (1, 1, width)})


def _cnn(name: str, image_size: int, channels: int, classes: int) -> Layout:
    rows: list[Row] = [
        _conv("conv1", channels, 32, 5),
        _conv("conv2", 32, 64, 5),
        _linear("fc1", 64 * (image_size // 4) ** 2, 2048),
        ("dropout", "Dropout", {}),
        _linear("fc2", 2048, classes),
    ]
    return _layout("LeafCNN", rows)


LAYOUTS: dict[str, Callable[[str, int, int, int], Layout]] = {**dict.fromkeys(SIZES, _vit), "cnn": _cnn}
