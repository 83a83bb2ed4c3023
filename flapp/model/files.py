"""Tensors on disk, as safetensors written whole or not at all, and tensors as numpy arrays for messages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.files import replacing, sha256_of_file
from flapp.untrusted import check_safetensors, parse_json, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMAT_VERSION = 1
NUMPYS = ("torch.float16", "torch.float32", "torch.float64")  # the floats that numpy has


def widen(tensor: "Tensor") -> "Tensor":
    """Return a tensor in float32 if it is of floats that numpy lacks, such as bfloat16; float32 holds them exactly.

    A model that loads it rounds it to its own dtype, and so gets the same numbers back.
    """
    return tensor.float() if tensor.is_floating_point() and str(tensor.dtype) not in NUMPYS else tensor


def to_numpy(tensor: "Tensor") -> "np.ndarray":
    """Return a tensor as it travels and is averaged: the same memory if it is on the CPU and not widened."""
    return widen(tensor.detach()).cpu().numpy()


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, **facts: Any) -> str:
    """Write tensors and a header of facts to `path` in one step and return the file's SHA-256.

    The header is a single JSON entry with sorted keys, because safetensors writes several in any order and the
    same model must always be the same bytes. Tensors that share memory, such as tied weights, are written separately.
    """
    from safetensors.torch import save_file

    own, end = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, 0
    for key, tensor in sorted(own.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            own[key] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    header = json.dumps({"format_version": FORMAT_VERSION, **facts}, sort_keys=True)
    with replacing(path) as partial:
        save_file(own, partial, metadata={"flapp": header})
    return sha256_of_file(path)


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read the tensors and facts of a file of save_tensors; raises ValueError when it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("flapp", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({printable(error)})") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has no flapp header of format {FORMAT_VERSION}: was it written by flapp?")
    return tensors, header


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read the same as load_tensors, but into PyTorch's own memory.

    load_tensors maps the file, where tensors start at any address; some kernels round differently there. PyTorch's
    memory is aligned, and no page of the file stays mapped.
    """
    mapped, facts = load_tensors(path)
    return {name: tensor.clone() for name, tensor in mapped.items()}, facts


def shapes_of(tensors: Mapping[str, "Tensor"]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by their names."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Say in one clause how names or shapes of `found` differ from those expected; empty when they do not."""
    both = [name for name in expected if name in found and expected[name] != found[name]]
    faults = {
        "missing": [name for name in expected if name not in found],
        "not the model's": [name for name in found if name not in expected],
        "misshapen": [f"{n} {found[n]} where the model has {expected[n]}" for n in both],
    }
    return "; ".join(f"{len(names)} {kind}, first {printable(names[0])}" for kind, names in faults.items() if names)
