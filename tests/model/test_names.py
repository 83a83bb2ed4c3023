"""The names of a ViT's tensors, against those that torchvision, timm and transformers give them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from flapp.model.build import build_model
from flapp.model.files import shapes_of
from flapp.model.names import from_any, modules_in_transformers, to_timm, to_torchvision, to_transformers
from tests.support.vits import draw


def torchvisions() -> nn.Module:
    return VisionTransformer(8, 4, 3, 4, 64, 128, num_classes=5)


def timms(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "depth": 3, "num_heads": 4, "embed_dim": 64, "mlp_ratio": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes, **kwargs)


def config() -> ViTConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5, layer_norm_eps=1e-6)


def transformerses() -> nn.Module:
    return ViTForImageClassification(config())


def ours() -> nn.Module:
    torch.manual_seed(2)
    return draw(build_model("vit_tiny", (8, 8, 3), 5))


BOTH: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Any]]]] = {
    "torchvision": (torchvisions, to_torchvision),
    "timm": (timms, to_timm),
    "transformers": (transformerses, to_transformers),
}


@pytest.mark.parametrize("library", BOTH)
def test_a_library_takes_our_weights_gives_our_logits_and_our_names_come_back(library: str, tmp_path: Path) -> None:
    build, there = BOTH[library]
    model, theirs = ours(), build().eval()
    state = there(model.state_dict())
    if library == "transformers":
        theirs.save_pretrained(tmp_path)  # type: ignore[operator]
        assert list(load_file(tmp_path / "model.safetensors")) == sorted(state)  # as save_pretrained writes them
        theirs = ViTForImageClassification.from_pretrained(None, config=config(), state_dict=state).eval()
    else:
        theirs.load_state_dict(state)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = theirs(images)
        torch.testing.assert_close(getattr(found, "logits", found), model(images), atol=1e-5, rtol=1e-5)
    own = model.state_dict()
    found, back = from_any(there(own))
    assert (found, list(back)) == (library, list(own))
    assert all(torch.equal(back[name], tensor) for name, tensor in own.items())
    assert from_any(there(shapes_of(own))) == (library, shapes_of(own))


def test_names_in_memory_of_transformers_5_and_those_of_a_vit_model_are_read(tmp_path: Path) -> None:
    model = transformerses()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    written, memory = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert written.keys() != memory.keys()
    expected, found = from_any(written)[1], from_any(memory)[1]
    assert found.keys() == ours().state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    backbone = ViTModel(config())
    backbone.save_pretrained(tmp_path)
    names = {name for name in found if not name.startswith("heads.")}
    names |= {"vit.pooler.dense.weight", "vit.pooler.dense.bias"}
    for state in (load_file(tmp_path / "model.safetensors"), backbone.state_dict()):
        library, found = from_any(state)
        assert library == "transformers"
        assert found.keys() == names


def test_our_layers_are_all_modules_of_transformers() -> None:
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    layers, theirs = (
        [name for name, module in model.named_modules() if isinstance(module, kinds)]
        for model in (ours(), transformerses())
    )
    assert sorted(name for layer in layers for name in modules_in_transformers(layer)) == sorted(theirs)


def test_q_k_and_v_that_are_not_alike_are_not_joined() -> None:
    state = to_transformers(shapes_of(ours().state_dict()))
    key = "vit.encoder.layer.1.attention.attention.key.weight"
    for odd in ((63, 64), ()):
        found = from_any(state | {key: odd})[1]
        assert "encoder.layers.encoder_layer_1.self_attention.qkv.weight" not in found
        assert odd in found.values()
    del state[key]
    assert "encoder.layers.encoder_layer_1.self_attention.qkv.weight" not in from_any(state)[1]


def test_what_is_no_vit_keeps_its_names() -> None:
    state = build_model("cnn", (8, 8, 1), 5).state_dict()
    assert from_any(state) == (None, state)
    assert from_any({}) == (None, {})


def test_a_tensor_under_two_spellings_is_one_too_many() -> None:
    own = shapes_of(ours().state_dict())
    layer, written = "encoder.layers.encoder_layer_0", to_transformers(own)
    for state, name in (
        (to_torchvision(own), f"{layer}.mlp.linear_1.weight"),
        (written, "vit.layers.0.layernorm_before.weight"),
        (written, "vit.layers.0.attention.q_proj.weight"),
        (written, "layernorm.weight"),
        (to_timm(own), "encoder.ln.weight"),
    ):
        for both in ({**state, name: (3,)}, {name: (3,)} | state):
            found = from_any(both)[1]
            assert len(found) == len(own) + 1
            assert own.keys() < found.keys()
