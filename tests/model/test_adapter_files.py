"""Adapter folders, against PEFT, and merged models, against torchvision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from flapp.files import sha256_of_file
from flapp.model.adapter_files import export_adapter, export_merged, import_adapter
from flapp.model.build import build_model
from flapp.model.lora import adapted_layers, add_lora, layout_of, lora_state_dict, mark_only_lora_as_trainable
from flapp.model.pretrained import load_pretrained
from tests.support.adapters import CASES, MODELS, adapted, base, frozen_of, in_peft, logits


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_peft_loads_our_adapter_and_gives_the_same_logits(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    from peft import PeftModel

    model, again = adapted(name, targets, 3), adapted(name, targets)
    export_adapter(model, tmp_path / "adapter", "sha256:abc")
    theirs = PeftModel.from_pretrained(base(name), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs, name), logits(model, name), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(base(name), name), logits(model, name), atol=1e-3)
    config, layers = theirs.peft_config["default"], adapted_layers(model)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 6.0, "sha256:abc")
    full = [module for module in MODELS[name].trained if module not in layers]
    assert config.modules_to_save == (full or None)
    count = sum(part.endswith("lora_A.default") for part, _ in theirs.named_modules())
    assert count == len(layers)  # and PEFT has put none on any other layer
    import_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, name), logits(model, name))


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_an_adapter_of_pefts_is_where_training_starts(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    theirs = in_peft(name, targets, 3)
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    model = adapted(name, targets)
    frozen = frozen_of(model)
    import_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, name), logits(theirs, name), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(base(name), name), logits(model, name), atol=1e-3)
    full = MODELS[name].trained  # in full, by PEFT: BatchNorm too
    assert all(torch.equal(t, frozen[key]) for key, t in frozen_of(model).items() if not key.startswith(full))


def test_an_adapter_without_the_buffers_of_batchnorm_leaves_them_as_they_are(tmp_path: Path) -> None:
    in_peft("normed", n=3, trained=("fc",)).save_pretrained(str(tmp_path))  # type: ignore[operator]
    model = adapted("normed")
    import_adapter(model, tmp_path)
    buffers = base("normed").state_dict()
    assert all(torch.equal(model.state_dict()[key], buffers[key]) for key in layout_of(model).buffers)


def test_an_exported_adapter_comes_back_bit_for_bit_and_is_always_the_same_bytes(tmp_path: Path) -> None:
    model, again = adapted(n=2, dropout=0.1), adapted()
    for folder in ("a", "b"):
        export_adapter(model, tmp_path / folder, "base")
    import_adapter(again, tmp_path / "a")
    assert all(torch.equal(tensor, lora_state_dict(model)[key]) for key, tensor in lora_state_dict(again).items())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_adapter_is_never_written_over_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    export_adapter(adapted(), folder, "base")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"{folder} cannot take the adapter .*: name a new folder"):
        export_adapter(adapted(n=1), folder, "base")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_pefts_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    mixed, buffers, bare, inner = adapted(targets=("qkv",)), adapted(), adapted(), adapted("normed")
    add_lora(mixed, 4, 6.0, ("proj",))
    mark_only_lora_as_trainable(mixed)
    buffers.register_buffer("seen", torch.zeros(1))
    bare.class_token.requires_grad_(True)  # type: ignore[union-attr, operator]
    inner.get_submodule("block").register_buffer("seen", torch.zeros(1))
    dilated, reflected = (
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, **odd)) for odd in ({"dilation": 2}, {"padding_mode": "reflect"})
    )
    for model in (dilated, reflected):  # PEFT would leave both out
        add_lora(model, 4, 2.0, ["0"])
        mark_only_lora_as_trainable(model)
    outside = "the format has no place for parameters or buffers of the model itself"
    padding = "the format has neither dilation nor padding other than zeros"
    for model, fault in (
        *((mixed, "this ViT: the format has one rank, alpha and dropout"), (buffers, f"this ViT: {outside}")),
        *((bare, f"this ViT: {outside}"), (inner, "of a module that holds modules, such as block")),
        *((dilated, f"{padding}, and 0 has one"), (reflected, f"{padding}, and 0 has one")),
    ):
        with pytest.raises(ValueError, match=f"PEFT's format cannot hold .*{fault}"):
            export_adapter(model, tmp_path / "adapter", "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("inner", "taken"), [("2", "1.2"), ("12", "1.12")])
def test_a_head_is_not_exported_if_its_name_ends_the_name_of_an_adapted_layer(
    inner: str, taken: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({inner: nn.Linear(4, 4)}), nn.Linear(4, 2))
    add_lora(model, 2, 2.0, [taken])
    mark_only_lora_as_trainable(model)
    with pytest.raises(ValueError, match=f"PEFT takes {taken} for 2, because it compares the ends of names"):
        export_adapter(model, tmp_path / "adapter", "base")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "adapter_config.json is not plain LoRA: it sets use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"qkv": 4}}, "rank_pattern={'qkv': 4}"),
        ({"alpha_pattern": {"qkv": 4}, "lora_bias": True}, "alpha_pattern={'qkv': 4}, lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"something_of_2031": {"a": 1}}, "something_of_2031={'a': 1}"),
        ({"peft_type": "LOHA"}, "it sets peft_type=LOHA"),
        ({"r": "2"}, "is not plain LoRA: it sets peft_type=LORA, r=2"),
        ({"r": 4}, r"r=4 and lora_alpha=6.0, the model's encoder.* has rank 2 and alpha 6: set lora.rank and lora.a"),
        ({"lora_alpha": 2}, "r=2 and lora_alpha=2, the model's"),
        ({"lora_alpha": None}, "adapter_config.json is missing or no configuration"),
    ],
)
def test_an_adapter_that_is_something_else_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_adapter(adapted(n=1), tmp_path / "adapter", "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    model, before = adapted(), adapted()
    with pytest.raises(ValueError, match=message):
        import_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(tensor, before.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_an_adapter_for_other_layers_or_shapes_is_refused(tmp_path: Path) -> None:
    export_adapter(adapted(), tmp_path / "adapter", "base")
    with pytest.raises(ValueError, match="does not fit this ViT with its lora.targets: 6 not the model's"):
        import_adapter(adapted(targets=("qkv",)), tmp_path / "adapter")
    with pytest.raises(ValueError, match="6 missing, first .*mlp.0.lora_A"):
        import_adapter(adapted(targets=("qkv", "proj", "mlp.0")), tmp_path / "adapter")
    torch.manual_seed(0)
    wide = build_model("vit_tiny", (8, 8, 3), 7)
    add_lora(wide, 2, 6.0)
    mark_only_lora_as_trainable(wide)
    with pytest.raises(ValueError, match=r"heads.head.weight \(5, 64\) where the model has \(7, 64\)"):
        import_adapter(wide, tmp_path / "adapter")
    with pytest.raises(ValueError, match="ViT has no adapters"):
        import_adapter(base(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="elsewhere/adapter_config.json is missing"):
        import_adapter(adapted(), tmp_path / "elsewhere")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        import_adapter(adapted(), tmp_path / "adapter")
    export_adapter(adapted("normed", n=1), tmp_path / "kernel", "base")
    long = base("normed")
    long.conv1 = nn.Conv2d(3, 6, (1, 9), bias=False)  # as many numbers, in another shape
    add_lora(long, 2, 6.0, MODELS["normed"].targets[0])
    mark_only_lora_as_trainable(long)
    with pytest.raises(ValueError, match=r"conv1.lora_A \(2, 3, 3, 3\) where the model has \(2, 3, 1, 9\)"):
        import_adapter(long, tmp_path / "kernel")


def test_torchvision_loads_a_merged_model_and_gives_the_same_logits(tmp_path: Path) -> None:
    model, path = adapted(targets=("qkv", "proj", "mlp.3", "head"), n=3), tmp_path / "merged.safetensors"
    assert export_merged(model, path, model="vit_tiny") == sha256_of_file(path)
    theirs = VisionTransformer(8, 4, 3, 4, 64, 128, num_classes=5)
    theirs.load_state_dict(load_file(path))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    ours = build_model("vit_tiny", (8, 8, 3), 5)
    assert load_pretrained(ours, path).head_loaded
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-4, rtol=1e-4)
    cnn = adapted("cnn", n=3)
    export_merged(cnn, path)
    plain = base("cnn")
    plain.load_state_dict(load_file(path))
    torch.testing.assert_close(logits(plain, "cnn"), logits(cnn, "cnn"), atol=1e-4, rtol=1e-4)
