"""Adapters on models of every kind, against PEFT and by hand."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from flapp.model.lora import (
    adapted_layers,
    add_lora,
    head_of,
    layout_of,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merged_state_dict,
)
from flapp.model.lora_layers import LoRALayer, LoRALinear
from tests.support import adapters
from tests.support.adapters import CASES, MODELS, adapted, base, batch, bytes_of, frozen_of, in_peft, logits, steps


@pytest.mark.parametrize(
    ("name", "targets"), [case for case in CASES if case[0] in ("vit_tiny", "cnn", "linear", "conv1d")]
)
def test_adapters_give_pefts_logits_and_take_pefts_steps(name: str, targets: tuple[str, ...]) -> None:
    ours, theirs = adapted(name, targets), in_peft(name, targets)
    for layer in adapted_layers(ours).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    adapters.copy_adapters(ours, theirs)
    torch.testing.assert_close(logits(ours, name), logits(theirs, name), atol=1e-5, rtol=1e-5)
    steps(ours, name)
    steps(theirs, name)
    trained = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if ".lora_" in key:
            reference = trained[f"base_model.model.{key}.default.weight"]
            torch.testing.assert_close(parameter, reference.view(parameter.shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours, name), logits(theirs, name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_training_changes_all_tensors_that_travel_and_each_adapter_counts(name: str, targets: tuple[str, ...]) -> None:
    """In the first step B is zero, so the gradient of A is zero. This test looks at the second step."""
    model = adapted(name, targets)
    before = bytes_of(frozen_of(model)), bytes_of(lora_state_dict(model))
    steps(model, name, 2)
    parameters = dict(model.named_parameters())
    for key in parameters.keys() & lora_state_dict(model).keys():
        gradient = parameters[key].grad
        assert gradient is not None, key
        assert gradient.abs().sum() > 0, key
    after = bytes_of(frozen_of(model)), bytes_of(lora_state_dict(model))
    assert after[0] == before[0]
    assert not [key for key in after[1] if after[1][key] == before[1][key]]
    assert {*after[0], *after[1]} == set(model.state_dict())
    assert all(p.grad is None for key, p in parameters.items() if key not in after[1])
    trained, plain = logits(model, name), base(name)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logits(plain, name), trained, atol=1e-5, rtol=1e-5)
    for layer in adapted_layers(model).values():
        b = layer.lora_B.detach().clone()
        nn.init.zeros_(layer.lora_B)
        assert not torch.allclose(logits(model, name), trained, atol=1e-7, rtol=0)
        layer.lora_B.data.copy_(b)
    assert torch.equal(logits(model, name), trained)  # merging did not change the model


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_keeps_names_values_and_outputs(name: str) -> None:
    plain, model = base(name), adapted(name)
    before, after = plain.state_dict(), model.state_dict()
    assert {key for key in after if key not in before} == {k for k in lora_state_dict(model) if ".lora_" in k}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    torch.testing.assert_close(logits(model, name), logits(plain, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "targets"), [*CASES, ("mixed", ("conv", "head"))])
def test_the_layout_with_adapters_is_that_of_the_model_with_adapters(name: str, targets: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = MODELS[name].build()
    planned = layout_of(model).with_lora(targets, 2, 6.0)
    add_lora(model, 2, 6.0, targets)
    mark_only_lora_as_trainable(model)
    real = layout_of(model)
    assert planned == real
    for part in ("modules", "tensors", "adapters"):
        assert list(getattr(planned, part)) == list(getattr(real, part))
    assert real.trained == tuple(lora_state_dict(model))


def test_adapters_are_drawn_from_the_callers_generator_and_only_from_it() -> None:
    states = []
    for seed in (1, 1, 2):
        model = base()
        torch.manual_seed(seed)
        add_lora(model, 4, 8.0)
        states.append(bytes_of({k: v for k, v in model.state_dict().items() if k.endswith("lora_A")}))
    assert states[0] == states[1]
    assert all(states[0][key] != states[2][key] for key in states[0])
    bound = 64**-0.5  # Kaiming-uniform with a = sqrt(5) over 64 inputs
    a = model.get_submodule("encoder.layers.encoder_layer_0.self_attention.qkv").lora_A
    assert 0.9 * bound < a.abs().max() <= bound  # type: ignore[operator, union-attr]


@pytest.mark.slow
def test_compiled_adapters_give_the_same_outputs_and_gradients() -> None:
    model, inputs = adapted("linear", n=2), batch("linear")[0]
    compiled = torch.compile(model, backend="aot_eager")
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(compiled(inputs), model(inputs), atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(m(inputs).sum(), model.fc.lora_A)[0] for m in (compiled, model)]  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_train_under_autocast_and_merge_without_its_rounding(name: str) -> None:
    model, inputs = adapted(name, n=3), batch(name)[0]
    exact, folded = logits(model, name), merged_state_dict(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = logits(model, name)
        rounded = merged_state_dict(model)
        loss = model.train()(inputs).float().square().sum()
    loss.backward()
    assert outputs.dtype == torch.bfloat16
    assert bytes_of(folded) == bytes_of(rounded)
    torch.testing.assert_close(outputs.float(), exact, atol=0.1, rtol=0.1)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    assert all(layer.lora_A.grad.abs().sum() > 0 for layer in adapted_layers(model).values())


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_drawn_in_training_only(name: str) -> None:
    model, inputs = adapted(name, n=3, dropout=0.5), batch(name)[0]
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(logits(model, name), logits(model, name))


def test_the_output_is_that_of_the_formula_with_dropout_before_a_in_training_only() -> None:
    model = adapted("linear", n=2, dropout=0.5)
    x, fc = batch("linear")[0], model.fc
    assert isinstance(fc, LoRALinear)

    def formula(dropped: Tensor) -> Tensor:
        return nn.functional.linear(x, fc.weight, fc.bias) + 3.0 * dropped @ fc.lora_A.T @ fc.lora_B.T

    model.train()
    torch.manual_seed(0)
    found = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, formula(nn.functional.dropout(x, 0.5)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, "linear"), formula(x), atol=1e-6, rtol=1e-6)
    assert fc(x[0]).shape == (3,)  # a layer takes samples without a batch, too


def test_no_gradient_is_computed_below_the_first_adapter() -> None:
    model = adapted(targets=("encoder_layer_2.self_attention.proj",))
    reached: dict[str, bool] = {}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: reached.update({name: output.requires_grad})

    for name, block in model.get_submodule("encoder.layers").named_children():
        block.register_forward_hook(note(name))
    steps(model)
    assert reached == {"encoder_layer_0": False, "encoder_layer_1": False, "encoder_layer_2": True}


def test_the_head_travels_beside_the_adapters_and_so_does_a_frozen_a() -> None:
    model = adapted()
    keys = set(lora_state_dict(model)), set(frozen_of(model))
    assert {key for key in keys[0] if ".lora_" not in key} == {"heads.head.weight", "heads.head.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith("lora_A"))
    assert (set(lora_state_dict(model)), set(frozen_of(model))) == keys


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("vit_tiny", {"targets": ["query"]}, "=query matches no layer of the model: choose among conv_proj, heads."),
        ("vit_tiny", {"targets": ["qkv", "oj"]}, "lora.targets=oj matches no layer"),
        ("cnn", {"targets": ["dropout"]}, "dropout, which is Dropout: choose among conv1, conv2, fc1, fc2"),
        ("vit_tiny", {"targets": ["mlp"]}, "encoder.layers.encoder_layer_0.mlp, which is MLPBlock"),
        ("vit_tiny", {"rank": 0}, "rank is at least 1"),
        ("vit_tiny", {"alpha": 0}, "alpha is above 0"),
        ("vit_tiny", {"dropout": 1.0}, "below 1"),
        ("vit_tiny", {"rank": 6, "targets": ["qkv", "head"]}, r"lora.rank=6 is more than heads.head \(64 -> 5\)"),
    ],
)
def test_impossible_adapters_are_refused_with_the_reason_and_leave_the_model_alone(
    name: str, lora: dict, message: str
) -> None:
    model = base(name)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 2, "alpha": 4.0} | lora)
    assert not any(isinstance(m, LoRALayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_takes_one_adapter_and_a_model_without_any_says_so() -> None:
    with pytest.raises(ValueError, match="qkv, which is LoRALinear: choose among"):
        add_lora(adapted(), 2, 2.0)
    with pytest.raises(ValueError, match="out_proj, which is NonDynamicallyQuantizableLinear"):
        add_lora(VisionTransformer(8, 4, 1, 2, 16, 32), 2, 2.0, ["out_proj"])  # it would bypass an adapter
    for verb in (mark_only_lora_as_trainable, lora_state_dict, merged_state_dict):
        with pytest.raises(ValueError, match="ViT has no adapters: call add_lora first"):
            verb(base())  # type: ignore[operator]
    assert [head_of(base(name)) for name in MODELS] == [kind.trained[-1] for kind in MODELS.values()]
    assert head_of(nn.ReLU()) is None


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_whole_and_train_on(name: str) -> None:
    model = adapted(name, n=2, dropout=0.1)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(logits(again, name), logits(model, name))
        assert bytes_of(lora_state_dict(again)) == bytes_of(lora_state_dict(model))
        assert bytes_of(steps(again, name).state_dict()) != bytes_of(model.state_dict())


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


def in_float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["normed", "conv1d", "mlp", "mixed"])
def test_other_dtypes_survive_adapters_and_a_weight_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    model, x = base(name).to(dtype), batch(name)[0]
    model.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    before = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    add_lora(model, 2, 6.0, MODELS[name].targets[0])
    mark_only_lora_as_trainable(model)
    wide = torch.promote_types(dtype, torch.float32)
    for layer in adapted_layers(model).values():
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (wide, wide)
        nn.init.normal_(layer.lora_B, std=0.1)
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

    model, x = (each.to(torch.bfloat16) for each in (base("mlp").eval(), batch("mlp")[0]))
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
    model, convolutions = (
        adapters.tied(),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )
    add_lora(model, 2, 2.0, ["fc"])
    add_lora(convolutions, 2, 2.0, ["?"])
    assert (head_of(model), head_of(convolutions)) == ("out", None)
    for each in (model, convolutions):
        mark_only_lora_as_trainable(each)
        assert all("lora_" in key for key, parameter in each.named_parameters() if parameter.requires_grad)
        assert layout_of(each).trained == tuple(lora_state_dict(each))
    assert [key for key in lora_state_dict(convolutions) if "lora_" not in key] == list(layout_of(convolutions).buffers)


def test_pytorchs_fast_path_for_transformers_does_not_skip_adapters() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))
    fresh, x = copy.deepcopy(model).eval(), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    add_lora(model, 2, 4.0, ["linear1", "linear2"])
    for each in adapted_layers(model).values():
        nn.init.normal_(each.lora_B)
    with torch.no_grad():
        before = fresh(x)
        fresh.load_state_dict(merged_state_dict(model))
        torch.testing.assert_close(model.eval()(x), fresh(x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before, fresh(x), atol=0.1)
        ours, theirs = (each[0](x, src_key_padding_mask=padding)[~padding] for each in (model, fresh))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
