"""Adapters on a model in half precision with tied weights, an integer parameter and a number, by every rule."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flapp.model import build as builders
from flapp.model import layout as layouts
from flapp.model.lora import layout_of
from flapp.strategy.lora_rules import RULES
from tests.conftest import break_off, read_lines
from tests.strategy.test_lora_own_models import FEDSA, SETTINGS
from tests.support.replies import Federate


class Half(nn.Module):
    """Layers of each kind in bfloat16 or float16; the output layer's weight is an embedding's, and stays frozen."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 6, 3, padding=1, bias=False).bfloat16(), nn.BatchNorm2d(6)
        self.turned, self.dense = Conv1D(6, 6).bfloat16(), nn.Linear(6, 6).half()
        self.count = nn.Parameter(torch.tensor(5), requires_grad=False)
        self.scale, self.embed = nn.Parameter(torch.tensor(1.0)), nn.Embedding(classes, 6)
        self.out = nn.Linear(6, classes, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x.bfloat16()).float()).relu().mean((2, 3))
        return self.out(self.dense(self.turned(x.bfloat16()).half()).float()) * self.scale


@pytest.mark.parametrize("rule", RULES)
def test_a_model_in_half_precision_trains_and_is_resumed_to_the_same_bytes(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setitem(builders.BUILDERS, "mixed", lambda _name, _size, *given: Half(*given[:2]))
    monkeypatch.setitem(layouts.LAYOUTS, "mixed", lambda _name, _size, *given: layout_of(Half(*given)))
    own = {"fedsa": FEDSA, "hetlora": ("lora.rank_by_client=[2,3,4]",)}.get(rule, ())
    settings = (*SETTINGS, f"strategy.aggregation={rule}", *own, "num_rounds=3")
    whole, path = federate(*settings)
    lines = read_lines(path, "train")
    assert not any(line["failures"] for line in lines)
    break_off(federate, 3, "aggregate_train", *settings, f"run_name=half-{rule}")
    resumed, _ = federate(*settings, f"run_name=half-{rule}", "resume=true")
    assert resumed["model_sha256"] == whole["model_sha256"]
    final, start = load_file(path / "model.safetensors"), Half().state_dict()
    assert {key: tensor.dtype for key, tensor in final.items()} == {key: t.dtype for key, t in start.items()}
    assert torch.equal(final["out.weight"], final["embed.weight"])
    for line in lines:  # what is folded into a float16 weight is rounded there
        error = line["aggregation_error"]
        assert error is None if rule == "fedsa" else (error < 2e-3) == (rule in ("ffa", "rolora", "flora", "fedex"))
