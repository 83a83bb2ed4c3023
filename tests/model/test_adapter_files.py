"""Adapter folders, against PEFT, and merged models, against torchvision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models.vision_transformer import VisionTransformer

from flapp.files import sha256_of_file
from flapp.model.adapter_files import export_adapter, export_merged, import_adapter
from flapp.model.build import build_model
from flapp.model.lora import add_lora, head_of, lora_state_dict, mark_only_lora_as_trainable
from flapp.model.pretrained import load_pretrained
from tests.support.adapters import CASES, adapted, base, frozen_of, in_peft, logits, steps


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_peft_loads_an_exported_adapter_and_gives_the_same_logits(
    name: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = steps(adapted(name, targets), name, 3)
    export_adapter(model, tmp_path / "adapter", "sha256:abc")
    theirs = PeftModel.from_pretrained(base(name), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs, name), logits(model, name), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(base(name), name), logits(model, name), atol=1e-3)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 6.0, "sha256:abc")
    assert config.modules_to_save == (None if head_of(model).endswith(targets) else [head_of(model)])


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_an_adapter_of_pefts_is_where_training_starts(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    theirs = steps(in_peft(name, targets), name, 3)
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    model = adapted(name, targets)
    frozen = frozen_of(model)
    import_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, name), logits(theirs, name), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, frozen[key]) for key, tensor in frozen_of(model).items())


def test_an_exported_adapter_comes_back_bit_for_bit_and_is_always_the_same_bytes(tmp_path: Path) -> None:
    model, again = steps(adapted(dropout=0.1), n=2), adapted()
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
        export_adapter(steps(adapted(), n=1), folder, "base")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_pefts_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    mixed, buffers, bare = adapted(targets=("qkv",)), adapted(), adapted()
    add_lora(mixed, 4, 6.0, ("proj",))
    mark_only_lora_as_trainable(mixed)
    buffers.register_buffer("seen", torch.zeros(1))
    bare.class_token.requires_grad_(True)  # type: ignore[union-attr, operator]
    outside = "it has no parameters or buffers outside modules"
    for model, fault in ((mixed, "it has one rank, alpha and dropout"), (buffers, outside), (bare, outside)):
        with pytest.raises(ValueError, match=f"PEFT's format cannot hold this ViT: {fault}"):
            export_adapter(model, tmp_path / "adapter", "base")
    assert not list(tmp_path.iterdir())


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
        (
            {"r": 4},
            r"r=4 and lora_alpha=6.0, the model's encoder.* has rank 2 and alpha 6: set lora.rank and lora.alpha",
        ),
        ({"lora_alpha": 2}, "r=2 and lora_alpha=2, the model's"),
        ({"lora_alpha": None}, "adapter_config.json is missing or no configuration"),
    ],
)
def test_an_adapter_that_is_something_else_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    export_adapter(steps(adapted()), tmp_path / "adapter", "base")
    edit(tmp_path / "adapter", **settings)
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


def test_torchvision_loads_a_merged_model_and_gives_the_same_logits(tmp_path: Path) -> None:
    model, path = steps(adapted(targets=("qkv", "proj", "mlp.3", "head")), n=3), tmp_path / "merged.safetensors"
    assert export_merged(model, path, model="vit_tiny") == sha256_of_file(path)
    theirs = VisionTransformer(8, 4, 3, 4, 64, 128, num_classes=5)
    theirs.load_state_dict(load_file(path))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    ours = build_model("vit_tiny", (8, 8, 3), 5)
    assert load_pretrained(ours, path).head_loaded
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-4, rtol=1e-4)
    cnn = steps(adapted("cnn", ("fc1",)), "cnn", 3)
    export_merged(cnn, path)
    plain = base("cnn")
    plain.load_state_dict(load_file(path))
    torch.testing.assert_close(logits(plain, "cnn"), logits(cnn, "cnn"), atol=1e-4, rtol=1e-4)
