"""Pretrained weights, against torchvision's own models."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from flapp.files import sha256_of_file
from flapp.model.build import build_model
from flapp.model.files import save_tensors
from flapp.model.names import from_torchvision
from flapp.model.pretrained import load_pretrained
from tests.support.refusals import refused


def torchvisions(size: int = 8, classes: int = 5) -> VisionTransformer:
    """Return torchvision's counterpart of vit_tiny with random weights, the head's and positions' too."""
    torch.manual_seed(1)
    vit = VisionTransformer(size, 4, 3, 4, 64, 128, num_classes=classes)
    nn.init.normal_(vit.heads.head.weight, std=0.1)
    return vit.eval()


def ours(size: int = 8, classes: int = 5, channels: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return build_model("vit_tiny", (size, size, channels), classes).eval()


def images(size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(3))


def names_of_2021(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the names of torchvision 0.12, those of the checkpoints it offers for download."""
    return {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t for k, t in state.items()}


FORMS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "a.pth": torch.save,
    "names of 2021.pth": lambda state, path: torch.save(names_of_2021(state), path),
    "wrapped.pth": lambda state, path: torch.save({"state_dict": state}, path),
    "ours.safetensors": lambda state, path: save_tensors(from_torchvision(state), path, model="vit_tiny"),
    "plain.safetensors": save_file,
}


@pytest.mark.parametrize("form", FORMS)
def test_torchvisions_weights_give_torchvisions_logits(form: str, tmp_path: Path) -> None:
    theirs, model, path = torchvisions(), ours(), tmp_path / form
    FORMS[form](theirs.state_dict(), path)
    found = load_pretrained(model, path)
    assert (found.sha256, found.head_loaded, found.interpolated) == (sha256_of_file(path), True, False)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), theirs(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["self_attention.out_proj", "mlp.linear_1", "block.self_attention.qkv"])
def test_own_tensors_with_names_like_torchvision_are_not_renamed(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model, place, last = nn.Module(), "", name.split(".")[-1]
        for part in name.split(".")[:-1]:
            model.get_submodule(place).add_module(part, nn.Module())
            place = f"{place}.{part}".lstrip(".")
        model.get_submodule(place).add_module(last, nn.Conv2d(2, 3, 1))  # a model without a head
        return model

    saved, model = build(), build()
    torch.save(saved.state_dict(), tmp_path / "own.pth")
    load_pretrained(model, tmp_path / "own.pth")
    assert all(torch.equal(tensor, saved.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_model_that_is_its_own_head_takes_weights_for_other_classes(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "own.pth")
    model = nn.Linear(4, 5)
    before = model.weight.detach().clone()
    assert not load_pretrained(model, tmp_path / "own.pth").head_loaded
    assert torch.equal(model.weight, before)


def test_positions_of_another_image_size_are_interpolated_bicubically(tmp_path: Path) -> None:
    theirs, model = torchvisions(size=8), ours(size=16)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert load_pretrained(model, tmp_path / "vit.pth").interpolated
    positions = theirs.encoder.pos_embedding.detach()
    grid = positions[:, 1:].reshape(1, 2, 2, 64).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=True)
    wanted = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 16, 64)], dim=1)
    torch.testing.assert_close(model.state_dict()["encoder.pos_embedding"], wanted, atol=1e-6, rtol=1e-6)


def test_positions_in_bfloat16_are_interpolated_in_float32(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in torchvisions(size=16).state_dict().items()}
    for name, path in (("wide", tmp_path / "wide.pth"), ("half", tmp_path / "half.pth")):
        torch.save({key: t.float() for key, t in state.items()} if name == "wide" else state, path)
    wide, half = ours(size=24), ours(size=24)
    load_pretrained(wide, tmp_path / "wide.pth")
    load_pretrained(half, tmp_path / "half.pth")
    assert torch.equal(*(model.state_dict()["encoder.pos_embedding"] for model in (wide, half)))


def test_what_a_file_alone_does_not_say_is_reported_as_assumed(tmp_path: Path) -> None:
    torch.save(torchvisions().state_dict(), tmp_path / "vit.pth")
    assert load_pretrained(ours(), tmp_path / "vit.pth").assumed == "4 heads, gelu, token"
    save_tensors(ours().state_dict(), tmp_path / "ours.safetensors", model="vit_tiny")
    assert load_pretrained(ours(), tmp_path / "ours.safetensors").assumed == ""


def test_a_pretrained_model_sees_grey_images_as_equal_channels(tmp_path: Path) -> None:
    torch.save(torchvisions().state_dict(), tmp_path / "vit.pth")
    model = build_model("vit_tiny", (8, 8, 1), 5, channels=3).eval()
    load_pretrained(model, tmp_path / "vit.pth")
    grey = images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(model(grey), torchvisions()(grey.repeat(1, 3, 1, 1)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="first conv_proj.weight .* where the model has .*; set model.channels=3"):
        load_pretrained(ours(channels=1), tmp_path / "vit.pth")
    save_tensors(ours(channels=1).state_dict(), tmp_path / "grey.safetensors", model="vit_tiny")
    with pytest.raises(ValueError, match="first conv_proj.weight .*; give weights for images of 3 channels"):
        load_pretrained(ours(), tmp_path / "grey.safetensors")
    for name, shape, channels in (("cnn", (8, 8, 1), 3), ("vit_tiny", (8, 8, 3), 1)):
        with pytest.raises(ValueError, match=f"model={name} cannot take {shape[2]} channels as {channels}"):
            build_model(name, shape, 5, channels=channels)


class Mischief:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in names}


SAME, LN = torchvisions().state_dict(), "encoder.ln.weight"
HEAD, BIAS, LAYER = "heads.head.weight", "heads.head.bias", "encoder.layers.encoder_layer_0"
QKV = f"{LAYER}.self_attention"
BAD_STATES: dict[str, tuple[Any, str]] = {
    "missing": (without(SAME, LN, f"{QKV}.in_proj_bias"), f"2 missing, first {QKV}.qkv.bias"),
    "extra": (SAME | {"ema": torch.zeros(1), "decay": torch.zeros(1)}, "2 not the model's, first ema"),
    "misshapen": (SAME | {LN: torch.zeros(65)}, rf"1 misshapen, first {LN} \(65,\) where the model has \(64,\)"),
    "headless": (without(SAME, "heads.head.weight", "heads.head.bias"), "2 missing, first heads.head.weight"),
    "half a head": (without(SAME, "heads.head.bias"), "1 missing, first heads.head.bias"),
    "wide head": (SAME | {"heads.head.weight": torch.zeros(5, 9)}, r"first heads.head.weight \(5, 9\) where"),
    "other head": (SAME | {HEAD: torch.zeros(7, 9), BIAS: torch.zeros(7)}, rf"first {HEAD} \(7, 9\) where"),
    "mixed head": (SAME | {HEAD: torch.zeros(7, 64)}, rf"1 misshapen, first {HEAD} \(7, 64\) where"),
    "positions": (SAME | {"encoder.pos_embedding": torch.zeros(1, 4, 64)}, "first encoder.pos_embedding"),
    "a checkpoint": ({"model": SAME, "epoch": 3}, r"but the entries model, epoch: save only file\['model'\]$"),
    "another wrapper": ({"ema": SAME}, r"holds no state dict, .* but the entries ema: save only file\['ema'\]$"),
    "numbers": ({3: torch.zeros(1), **SAME}, "has 3 as a tensor's name: name all tensors by strings"),
    "data parallel": ({f"module.{name}": t for name, t in SAME.items()}, "has module. in front of its names"),
    "compiled": ({f"_orig_mod.{name}": t for name, t in SAME.items()}, "has _orig_mod. in front of its names"),
    "backbone": ({f"backbone.{name}": t for name, t in SAME.items()}, "has backbone. in front of its names"),
    "not a number": (SAME | {LN: torch.full((64,), torch.nan)}, f"{LN} has NaN or infinity"),
    "infinite": (SAME | {LN: torch.full((64,), torch.inf)}, f"{LN} has NaN or infinity"),
    "two spellings": (SAME | {f"{LAYER}.mlp.linear_1.bias": torch.zeros(128)}, f"first {LAYER}.mlp.linear_1.bias"),
    "a tensor": (torch.zeros(3), "holds no state dict"),
    "nothing": ({}, "holds no state dict"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_file_that_does_not_fit_is_refused_whole(kind: str, tmp_path: Path) -> None:
    content, message = BAD_STATES[kind]
    torch.save(content, tmp_path / "vit.pth")
    model, before = ours(), ours()
    with refused(ValueError, message, tmp_path / "vit.pth"):
        load_pretrained(model, tmp_path / "vit.pth")
    assert all(torch.equal(t, before.state_dict()[k]) for k, t in model.state_dict().items())


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    path, mischief = tmp_path / "vit.pth", SAME | {"x": Mischief(tmp_path / "mischief")}
    torch.save(mischief, path)
    with pytest.raises(ValueError, match=r"holds more than tensors \(nothing in it was run\)$"):
        load_pretrained(ours(), path)
    torch.save(mischief, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="was saved by an old PyTorch, or in its form: load and save it again"):
        load_pretrained(ours(), path)
    assert not (tmp_path / "mischief").exists()


def test_one_flipped_bit_among_the_weights_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(SAME, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC-32|another CRC-32"):
        load_pretrained(ours(), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pointer_of_git_lfs_is_reported(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vit{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match="is a pointer of git-lfs, not the weights: get them with git lfs pull"):
        load_pretrained(ours(), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_cut_or_foreign_file_gives_a_one_line_error(suffix: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"vit{suffix}", tmp_path / "whole"
    (torch.save if suffix == ".pth" else save_file)(SAME, whole)
    with pytest.raises(ValueError, match=f"{path} cannot be read .*No such file"):
        load_pretrained(ours(), path)
    content = whole.read_bytes()
    for broken in (b"", b"\x80", b"hello world", content[:100], content[: len(content) // 2], content[:-10]):
        path.write_bytes(broken)
        with refused(ValueError, f"{path}"):
            load_pretrained(ours(), path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path} has neither model.safetensors nor pytorch_model.bin: give a file"):
        load_pretrained(ours(), path)
