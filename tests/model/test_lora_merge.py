"""Merging adapters into their layers and back, and copies of models that have them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from flapp.model.lora import LoRALinear, lora_state_dict, merge_lora, merged_state_dict, unmerge_lora
from tests.support.adapters import CASES, adapted, base, bytes_of, logits, steps


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_merging_changes_no_output_and_unmerging_no_byte(name: str, targets: tuple[str, ...]) -> None:
    model = steps(adapted(name, targets), name, 3)
    separate, state = logits(model, name), bytes_of(model.state_dict())
    merge_lora(model)
    assert not torch.equal(logits(model, name), logits(base(name), name))
    torch.testing.assert_close(logits(model, name), separate, atol=1e-5, rtol=1e-5)
    assert bytes_of(model.state_dict()) == state
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.data.zero_()  # while merged, the adapter is skipped
    torch.testing.assert_close(logits(model, name), separate, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    weights = bytes_of(model.state_dict())
    assert all(weights[key] == state[key] for key in state if not key.endswith("lora_B"))


def test_training_and_loading_end_a_merge() -> None:
    model, trained = adapted(), steps(adapted(), n=2)
    merge_lora(model)
    model.load_state_dict(trained.state_dict())
    assert torch.equal(logits(model), logits(trained))
    merge_lora(model)
    assert bytes_of(steps(model, n=2).state_dict()) == bytes_of(steps(trained, n=2).state_dict())


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_the_merged_state_is_a_plain_models(name: str, targets: tuple[str, ...]) -> None:
    model = steps(adapted(name, targets), name, 3)
    before, plain = bytes_of(model.state_dict()), base(name)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logits(plain, name), logits(model, name), atol=1e-5, rtol=1e-5)
    assert bytes_of(model.state_dict()) == before


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_and_pickles_are_whole(remake: Callable[[nn.Module], nn.Module]) -> None:
    model = steps(adapted(dropout=0.1), n=2)
    for merge in (False, True):
        if merge:
            merge_lora(model)
        again = remake(model)
        assert torch.equal(logits(again), logits(model))
        assert bytes_of(lora_state_dict(again)) == bytes_of(lora_state_dict(model))
    assert bytes_of(steps(again).state_dict()) != bytes_of(model.state_dict())
