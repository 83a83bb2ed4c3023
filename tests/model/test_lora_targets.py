"""lora.targets names layers, and a layer that an adapter would break is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from flapp.config.load import compose
from flapp.model.lora import add_lora
from tests.support.adapters import base, tied


def shared() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4))
    return nn.ModuleDict({"one": block, "two": block, "head": nn.Linear(4, 2)})


def hooked() -> nn.Module:
    model = before_linear(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return model


def of_integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return before_linear(layer)


def before_linear(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Linear(4, 2))


class Linear(nn.Linear):
    """A user's layer of the same name, which does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("build", "target", "message"),
    [
        (tied, "out", "out, which is Linear that shares its weight with embed.weight: choose among fc$"),
        (shared, "one.0", "one.0, which is Linear that shares its weight with two.0.weight: choose among head$"),
        (shared, "two.0", "two.0, which is Linear that shares its weight with one.0.weight"),
        (lambda: before_linear(nn.Conv2d(4, 4, 1, groups=2)), "0", "Conv2d with groups=2: choose among 1"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0", "choose among other models, this one has no layer"),
        (hooked, "0", "0, which is Linear with hooks, tensors or a forward .*: choose among 1$"),
        (lambda: before_linear(weight_norm(nn.Linear(4, 4))), "0", "0, which is Linear with hooks, tensors"),
        (lambda: before_linear(parametrizations.weight_norm(nn.Linear(4, 4))), "0", "ParametrizedLinear, a class of "),
        (lambda: before_linear(Linear(4, 4)), "0", "0, which is Linear, a class of tests.model."),
        (lambda: before_linear(Linear(4, 4)), "*", "0, which is Linear, a class of tests.model."),
        (of_integers, "0", "0, which is Linear without a weight of floats"),
        (lambda: before_linear(nn.Conv1d(4, 4, 1)), "0", "0, which is Conv1d: choose among 1$"),
        (lambda: before_linear(nn.ReLU()), "?.fc", r"=\?.fc matches no layer of the model"),
        (lambda: before_linear(nn.ReLU()), "all-linear", "all-linear matches no layer of the model"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_layer_that_an_adapter_would_break_is_refused(
    build: Callable[[], nn.Module], target: str, message: str
) -> None:
    model = build()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(model, 2, 2.0, [target])
    assert list(model.state_dict()) == before


def test_the_choices_in_an_error_are_the_closest_names_if_there_are_many() -> None:
    model = nn.ModuleDict({f"layer{i}": nn.Linear(4, 4) for i in range(30)} | {"query": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="choose among .*query") as caught:
        add_lora(model, 2, 2.0, ["qery"])
    assert str(caught.value).count("layer") == 12  # "no layer of the model", and eleven names


@pytest.mark.parametrize(
    ("name", "target", "found"),
    [
        ("distilbert", "all-linear", ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]),
        ("distilbert", "*.attention.[qv]_lin", ["q_lin", "v_lin"]),
        ("distilbert", "layer.?.attention.q_lin", ["q_lin"]),
        ("conv1d", "all-linear", ["c_attn", "c_proj"]),
        ("conv1d", "c_*", ["c_attn", "c_proj"]),
        ("normed", "*", ["conv1", "block.0", "fc"]),
        ("normed", "block.*", ["block.0"]),
        ("mixed", "all-linear", ["turned", "dense"]),
    ],
)
def test_a_target_is_a_name_a_shell_pattern_or_all_linear(name: str, target: str, found: list[str]) -> None:
    names = add_lora(base(name), 2, 2.0, [target])
    layers = [f"bert.distilbert.transformer.layer.{i}" for i in range(2)]
    if name == "distilbert":
        found = [f"{layer}.{'ffn' if end[3].isdigit() else 'attention'}.{end}" for layer in layers for end in found]
        found += ["bert.pre_classifier"] if target == "all-linear" else []
    assert names == found


def test_patterns_are_settings_of_a_command_line() -> None:
    words = ["home=/nowhere", "strategy=fedlora", "lora=default", 'lora.targets=[*.att?.*_lin,"[qv]_lin",all-linear]']
    assert tuple(compose(words).lora.targets) == ("*.att?.*_lin", "[qv]_lin", "all-linear")
