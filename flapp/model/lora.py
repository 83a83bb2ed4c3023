"""Put adapters on a model's layers, say what is trained then, and merge adapters; lora_layers.py has the layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flapp.model.files import shapes_of
from flapp.model.layout import ADAPTED, Layout, Variant
from flapp.model.lora_layers import LoRALayer, adapter_class, is_linear


def head_of(model: nn.Module) -> str | None:
    """Return the dotted name of a model's head, its last linear layer; None when it has no linear layer."""
    names = [name for name, module in model.named_modules() if is_linear(module)]
    return names[-1] if names else None


def head_tensors(model: nn.Module) -> tuple[str, ...]:
    """Return the keys of the head's parameters, which are trained in full.

    There are none if the head has an adapter, or if it shares a parameter with another layer, such as an embedding.
    """
    name = head_of(model)
    head = None if name is None else model.get_submodule(name)
    if head is None or isinstance(head, LoRALayer):
        return ()
    parameters, keys = dict(head.named_parameters(name or "", remove_duplicate=False)), _keys_of_parameters(model)
    if any(len(keys[parameter]) > 1 for parameter in parameters.values()):
        return ()
    return tuple(key for key, parameter in parameters.items() if parameter.is_floating_point())


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ("qkv", "proj"), dropout: float = 0.0
) -> list[str]:
    """Put a fresh adapter on every layer that `targets` name, in place, and return the layers' dotted names.

    Layout.matching says what a target is. A is drawn from torch's global generator, in the order of the model's layers.
    Raises ValueError as Layout.matching does, and for rank, alpha or dropout out of range; the model then stays as it
    is.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        found = f"lora.rank={rank}, lora.alpha={alpha:g}, lora.dropout={dropout:g}"
        raise ValueError(f"{found}: rank is at least 1, alpha is above 0, dropout is from 0 to below 1")
    names = layout_of(model).matching(targets, rank)
    for name in names:
        base = model.get_submodule(name)
        kind = adapter_class(base)
        assert kind is not None, name
        model.set_submodule(name, kind(base, rank, alpha, dropout))
    _leave_fast_paths(model)
    return names


def _leave_fast_paths(model: nn.Module) -> None:
    """Make PyTorch's transformer layers call their adapted layers.

    In eval mode without gradients, their fast path takes the weights of linear1 and linear2 and skips the adapters.
    """
    for module in model.modules():
        if any(isinstance(inner, LoRALayer) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # neither of them; only the fast path asks
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # only the fast path takes nested tensors


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers by dotted name; raises ValueError when there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters: call add_lora first (set lora=default)")
    return layers


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a model as it is, adapters included; `model` may be on the meta device."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    layers = {name: module for name, module in modules.items() if isinstance(module, LoRALayer)}
    state, parameters = model.state_dict(), {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Layout(
        type(model).__name__,
        {name: type(module).__name__ for name, module in modules.items()},
        shapes_of(state),
        head_of(model),
        tuple(lora_state_dict(model) if layers else state),
        head_tensors(model),
        tuple(key for key in state if key not in parameters),
        _unfit_layers(model, modules),
        {name: (layer.rank, layer.alpha) for name, layer in layers.items()},
        variant if isinstance(variant := getattr(model, "variant", None), Variant) else Variant(),
    )


def _unfit_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers that look as if they can take an adapter but cannot, each with the reason."""
    keys, unfit = _keys_of_parameters(model), {}
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, LoRALayer) or not (kind in ADAPTED or is_linear(module) or isinstance(module, nn.Conv2d)):
            continue
        weight, groups = module._parameters.get("weight"), getattr(module, "groups", 1)
        others = [key for key in keys.get(weight, ()) if key != f"{name}.weight"]
        if adapter_class(module) is None:
            unfit[name] = f"{kind}, a class of {type(module).__module__}"
        elif groups != 1:
            unfit[name] = f"{kind} with groups={groups}"
        elif others:
            unfit[name] = f"{kind} that shares its weight with {others[0]}"
        elif _has_more(module):
            unfit[name] = f"{kind} with hooks, tensors or a forward that an adapter would lose"
        elif weight is None or not weight.is_floating_point():
            unfit[name] = f"{kind} without a weight of floats"
    return unfit


def _has_more(layer: nn.Module) -> bool:
    """Say whether a layer has anything that its adapted form would not take over."""
    hooks = any(held for key, held in vars(layer).items() if key.endswith("_hooks"))
    others = layer._parameters.keys() - {"weight", "bias"} or layer._buffers or layer._modules
    return bool(hooks or others or "forward" in vars(layer))


def _keys_of_parameters(model: nn.Module) -> dict[nn.Parameter | None, list[str]]:
    """Return every name that each parameter has in the model."""
    keys: dict[nn.Parameter | None, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(parameter, []).append(key)
    return keys


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze all but adapters and head; the weight and bias of an adapted layer stay frozen, even in the head."""
    layers, in_full = adapted_layers(model), head_tensors(model)
    model.requires_grad_(False)
    for key in in_full:
        model.get_parameter(key).requires_grad_(True)
    for layer in layers.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what training may change and a message carries: every A and B, all other trained parameters, all buffers.

    A and B are in it even while one of them is frozen; tensors are the model's own, not copies.
    """
    adapters = {f"{name}.lora_{ab}" for name in adapted_layers(model) for ab in "AB"}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} - adapters
    return {key: tensor for key, tensor in model.state_dict().items() if key not in frozen}


def tail_norm(model: nn.Module, rank: int) -> Tensor:
    """Return sum ||B[:, rank:]||_F ||A[rank:]||_F over the adapted layers: the weight of the ranks after `rank`.

    A scalar with a gradient: the penalty of HetLoRA's self-pruning (Cho et al. 2024, arXiv:2401.06432, section 4).
    """
    norm = torch.linalg.vector_norm
    layers = adapted_layers(model).values()
    return torch.stack([norm(layer.lora_B[:, rank:]) * norm(layer.lora_A[rank:]) for layer in layers]).sum()


def truncate_state(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a state dict with its adapters cut to their first `rank` ranks; other tensors are not copied."""
    cut = dict(state)
    for key, tensor in state.items():
        if key.endswith(".lora_A"):
            cut[key] = tensor[:rank].contiguous()
        elif key.endswith(".lora_B"):
            cut[key] = tensor[:, :rank].contiguous()
    return cut


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the same model without adapters, each merged into its weight; leaves `model` alone."""
    layers = adapted_layers(model)
    adapters = {f"{name}.lora_{ab}" for name in layers for ab in "AB"}
    merged = {f"{name}.weight": layer.merged_weight() for name, layer in layers.items()}
    return {key: merged.get(key, tensor) for key, tensor in model.state_dict().items() if key not in adapters}
