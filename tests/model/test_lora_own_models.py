"""Adapters on models of any kind, against PEFT and by hand."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flapp.model.adapter_files import export_adapter, import_adapter
from flapp.model.lora import (
    adapted_layers,
    add_lora,
    head_of,
    layout_of,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merged_state_dict,
)
from tests.support.own_models import OWN, in_peft, inputs_of, mlp, outputs, plain, tied, walk, with_adapters

TO_SAVE = {
    "cnn": ["bn1", "block.1", "fc"],
    "conv1d": ["head"],
    "distilbert": ["bert.classifier"],
    "mlp": ["2.2", "3"],
    "mixed": ["bn", "head"],
}


def in_float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


@pytest.mark.parametrize("name", OWN)
def test_peft_loads_what_is_exported_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_adapters(name, 3)
    export_adapter(model, tmp_path / "adapter", "base")
    theirs = PeftModel.from_pretrained(plain(name), str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(theirs, name), outputs(model, name), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(plain(name), name), outputs(model, name), atol=1e-2)
    count = sum(part.endswith("lora_A.default") for part, _ in theirs.named_modules())
    assert count == len(adapted_layers(model))  # and PEFT has put none on any other layer
    again = with_adapters(name)
    import_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, name), outputs(model, name))


@pytest.mark.parametrize("name", OWN)
def test_an_adapter_that_peft_trained_gives_the_same_logits_here(name: str, tmp_path: Path) -> None:
    theirs = in_peft(name, TO_SAVE[name], 3)
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    model = with_adapters(name)
    import_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model, name), outputs(theirs, name), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(plain(name), name), outputs(model, name), atol=1e-2)


@pytest.mark.parametrize("name", OWN)
def test_the_layout_with_adapters_is_that_of_the_model_with_adapters(name: str) -> None:
    with torch.device("meta"):
        model = OWN[name][0]()
    targets = OWN[name][2]
    planned = layout_of(model).with_lora(targets, 2, 6.0)
    add_lora(model, 2, 6.0, targets)
    mark_only_lora_as_trainable(model)
    real = layout_of(model)
    assert planned == real
    assert [list(getattr(planned, part)) for part in ("modules", "tensors", "adapters")] == [
        list(getattr(real, part)) for part in ("modules", "tensors", "adapters")
    ]
    assert real.trained == tuple(lora_state_dict(model))


@pytest.mark.parametrize("name", OWN)
def test_a_merged_model_gives_the_same_outputs_and_a_fresh_adapter_changes_none(name: str) -> None:
    fresh, model, again = with_adapters(name), with_adapters(name, 3), plain(name)
    torch.testing.assert_close(outputs(fresh, name), outputs(again, name), atol=1e-6, rtol=1e-6)
    again.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(outputs(again, name), outputs(model, name), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(fresh, name), outputs(model, name), atol=1e-2)


@pytest.mark.parametrize("name", OWN)
def test_a_weight_is_merged_in_its_own_shape(name: str) -> None:
    model = with_adapters(name, 3)
    merged = merged_state_dict(model)
    for layer, module in adapted_layers(model).items():
        w, a, b = (in_float64(tensor) for tensor in (module.weight, module.lora_A, module.lora_B))
        if module.weight.ndim == 4:
            wanted = w + 3 * np.einsum("or,rchw->ochw", b, a.reshape(2, *w.shape[1:]))
        else:
            wanted = w + 3 * (np.einsum("or,ri->io", b, a) if module.is_transposed else b @ a)
        np.testing.assert_allclose(in_float64(merged[f"{layer}.weight"]), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1, "dilation": 2},
        {"padding": "same", "dilation": (1, 2), "bias": False},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "circular"},
        {"stride": (1, 3), "padding": "valid"},
    ],
    ids=str,
)
def test_an_adapted_convolution_computes_what_its_merged_one_does(settings: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, (3, 2), **settings))
    fresh, x = copy.deepcopy(model), torch.randn(4, 3, 9, 8)
    add_lora(model, 4, 2.0, ["0"])
    nn.init.normal_(model[0].lora_B)
    fresh.load_state_dict(merged_state_dict(model))
    for each in (x, x[0]):  # a layer takes samples without a batch, too
        torch.testing.assert_close(model(each), fresh(each), atol=1e-5, rtol=1e-5)
    fault = "padding_mode" in settings or "dilation" in settings
    mark_only_lora_as_trainable(model)
    if fault:  # PEFT would leave both out
        with pytest.raises(ValueError, match="it has no dilation and no padding but zeros, which 0 has"):
            export_adapter(model, Path("/nowhere/adapter"), "base")


@pytest.mark.parametrize("name", OWN)
def test_dropout_is_before_a_in_training_only(name: str) -> None:
    model = with_adapters(name, 3, dropout=0.5)
    first, second = model.train()(inputs_of(name)), model(inputs_of(name))
    assert not torch.equal(first, second)
    assert torch.equal(outputs(model, name), outputs(model, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["cnn", "conv1d", "mlp", "mixed"])
def test_other_dtypes_survive_adapters_and_a_weight_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    model = plain(name).to(dtype)
    model.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    before = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    add_lora(model, 2, 6.0, OWN[name][2])
    mark_only_lora_as_trainable(model)
    wide = torch.promote_types(dtype, torch.float32)
    for layer in adapted_layers(model).values():
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (wide, wide)
        nn.init.normal_(layer.lora_B, std=0.1)
    x = inputs_of(name)
    y = model.train()(x.to(dtype) if x.is_floating_point() else x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert all(layer.lora_A.grad is not None for layer in adapted_layers(model).values())
    merged = merged_state_dict(model)
    assert {key: tensor.dtype for key, tensor in merged.items()} == before
    for layer, module in adapted_layers(model).items():
        w, a, b = (in_float64(tensor) for tensor in (module.weight, module.lora_A, module.lora_B))
        product = (b @ a).T if module.is_transposed else (b @ a).reshape(w.shape)
        rounded = torch.from_numpy(w + 3 * product).to(wide).to(dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(merged[f"{layer}.weight"], rounded, atol=1e-14, rtol=1e-12)
            continue
        torch.testing.assert_close(merged[f"{layer}.weight"], rounded, atol=0, rtol=torch.finfo(dtype).eps)
        assert (merged[f"{layer}.weight"] == rounded).float().mean() > 0.95  # float32 decides a tie in few others


def test_a_bfloat16_model_with_adapters_computes_as_pefts_does() -> None:
    from peft import LoraConfig, get_peft_model

    model, x = mlp().eval().to(torch.bfloat16), inputs_of("mlp").to(torch.bfloat16)
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=6.0, target_modules=r"0|2\.1"))
    add_lora(model, 2, 6.0, ["[0]", "2.1"])
    state = dict(theirs.named_parameters())
    for name, layer in adapted_layers(model).items():
        nn.init.normal_(layer.lora_B)
        for part in ("lora_A", "lora_B"):
            copied = state[f"base_model.model.{name}.{part}.default.weight"]
            assert copied.dtype == getattr(layer, part).dtype
            copied.data.copy_(getattr(layer, part).data)
    torch.testing.assert_close(model(x), theirs.eval()(x), atol=0.02, rtol=0.02)


def test_a_layer_that_is_called_twice_has_one_adapter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(self.fc(x).relu()))

    model, fresh, x = Twice(), Twice(), torch.randn(3, 4)
    add_lora(model, 2, 2.0, ["fc"])
    nn.init.normal_(adapted_layers(model)["fc"].lora_B)
    fresh.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(model(x), fresh(x), atol=1e-6, rtol=1e-5)


def test_a_head_that_shares_its_weight_stays_frozen_and_so_do_models_without_a_head() -> None:
    model, convolutions = tied(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    add_lora(model, 2, 2.0, ["fc"])
    add_lora(convolutions, 2, 2.0, ["?"])
    assert (head_of(model), head_of(convolutions)) == ("out", None)
    for each in (model, convolutions):
        mark_only_lora_as_trainable(each)
        assert all("lora_" in key for key, parameter in each.named_parameters() if parameter.requires_grad)
        assert layout_of(each).trained == tuple(lora_state_dict(each))
    assert [key for key in lora_state_dict(convolutions) if "lora_" not in key] == list(layout_of(convolutions).buffers)


def test_a_head_that_is_a_target_trains_its_adapter_only() -> None:
    model = with_adapters("mixed", targets=("conv", "head"))
    assert {key for key in lora_state_dict(model) if key.startswith("head")} == {"head.lora_A", "head.lora_B"}
    planned = layout_of(plain("mixed")).with_lora(("conv", "head"), 2, 6.0)
    assert planned == layout_of(model)
    assert planned.trained == tuple(lora_state_dict(model))


def test_pytorchs_fast_path_for_transformers_does_not_skip_adapters() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))
    fresh, x = copy.deepcopy(model).eval(), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    add_lora(model, 2, 4.0, ["linear1", "linear2"])
    for adapted in adapted_layers(model).values():
        nn.init.normal_(adapted.lora_B)
    with torch.no_grad():
        before = fresh(x)
        fresh.load_state_dict(merged_state_dict(model))
        torch.testing.assert_close(model.eval()(x), fresh(x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before, fresh(x), atol=0.1)
        ours, theirs = (each[0](x, src_key_padding_mask=padding)[~padding] for each in (model, fresh))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="self_attn.out_proj, which is NonDynamicallyQuantizableLinear"):
        add_lora(fresh, 2, 2.0, ["out_proj"])


def test_transformers_is_not_imported_to_look_for_its_layers() -> None:
    code = (
        "import sys; from torch import nn; from flapp.model.lora import add_lora, layout_of\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)); add_lora(model, 2, 2.0, ['*']); layout_of(model)\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_without_the_buffers_of_batchnorm_leaves_them_as_they_are(tmp_path: Path) -> None:
    theirs = in_peft("cnn", ["fc"], 3)
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    model = with_adapters("cnn")
    import_adapter(model, tmp_path)
    buffers = plain("cnn").state_dict()
    assert all(torch.equal(model.state_dict()[key], buffers[key]) for key in layout_of(model).buffers)


def test_a_kernel_of_another_size_is_refused(tmp_path: Path) -> None:
    export_adapter(with_adapters("cnn", 1), tmp_path / "adapter", "base")
    wide = plain("cnn")
    wide.conv1 = nn.Conv2d(3, 6, (1, 9), bias=False)  # as many numbers, in another shape
    add_lora(wide, 2, 6.0, OWN["cnn"][2])
    mark_only_lora_as_trainable(wide)
    with pytest.raises(ValueError, match=r"conv1.lora_A \(2, 3, 3, 3\) where the model has \(2, 3, 1, 9\)"):
        import_adapter(wide, tmp_path / "adapter")


def test_a_layer_whose_name_is_the_end_of_anothers_is_exported_alone(tmp_path: Path) -> None:
    export_adapter(with_adapters("mlp"), tmp_path / "adapter", "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == r"0|2\.1"
    assert config["modules_to_save"] == ["2.2", "3"]


def test_a_buffer_beside_layers_cannot_be_exported(tmp_path: Path) -> None:
    model = with_adapters("cnn")
    model.get_submodule("block").register_buffer("seen", torch.zeros(1))
    with pytest.raises(ValueError, match="of a module with other modules in it, such as block"):
        export_adapter(model, tmp_path / "adapter", "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("inner", "taken"), [("2", "1.2"), ("12", "1.12")])
def test_a_head_whose_name_is_the_end_of_an_adapted_layers_cannot_be_exported(
    inner: str, taken: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({inner: nn.Linear(4, 4)}), nn.Linear(4, 2))
    add_lora(model, 2, 2.0, [taken])
    mark_only_lora_as_trainable(model)
    with pytest.raises(ValueError, match=f"it takes {taken} for 2, because it compares the ends of names"):
        export_adapter(model, tmp_path / "adapter", "base")


@pytest.mark.parametrize("name", OWN)
def test_adapters_of_every_kind_are_copied_whole_and_train_after_it(name: str) -> None:
    model = with_adapters(name, 2)
    again = copy.deepcopy(model)
    assert torch.equal(outputs(again, name), outputs(model, name))
    walk(again, name, 1)
    assert not torch.equal(outputs(again, name), outputs(model, name))


@pytest.mark.parametrize("name", ["cnn", "conv1d", "mlp", "mixed"])
def test_adapters_of_every_kind_train_under_autocast(name: str) -> None:
    model = with_adapters(name, 2)
    exact = outputs(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model, name)
        loss = model.train()(inputs_of(name)).float().square().sum()
    loss.backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)
    for layer in adapted_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            assert factor.grad is not None
            assert factor.grad.abs().sum() > 0
            assert factor.grad.dtype == torch.float32
