"""The layout that settings describe is the layout of the model that they build."""

import pytest
import torch

from flapp.architecture import adapt, build, plan
from flapp.config.load import compose
from flapp.config.schema import Config
from flapp.model.build import BUILDERS
from flapp.model.layout import LAYOUTS, Layout
from flapp.model.lora import layout_of, mark_only_lora_as_trainable

LORA = ("strategy=fedlora", "lora=default", "lora.rank=3")


def config_of(*words: str) -> Config:
    return compose(["home=/nowhere", *words])


def built(config: Config) -> Layout:
    with torch.device("meta"):
        model = build(config.model, config.dataset)
        if config.lora.enabled:
            adapt(model, config.lora, config.lora.rank)
            mark_only_lora_as_trainable(model)
    return layout_of(model)


@pytest.mark.parametrize(
    "words",
    [
        ["model=vit_tiny"],
        ["model=vit_tiny", "model.channels=3", "dataset=cifar10"],
        ["model=vit_tiny", "model.channels=3", "model.image_size=20"],
        ["model=vit_s_16", "model.image_size=64"],
        ["model=vit_b_16"],
        ["model=cnn"],
        ["model=cnn", "dataset=cifar10", "model.image_size=30"],
        ["model=linear"],
        ["experiment=toy_regression"],
        [*LORA],
        [*LORA, "lora.targets=[mlp.0,head,qkv]"],
        [*LORA, "model=cnn", "lora.targets=[fc1]"],
        [*LORA, "model=cnn", "lora.targets=[conv?,all-linear]"],
        [*LORA, "model=vit_tiny", "lora.targets=[conv_proj,*.encoder_layer_?.*.proj]"],
    ],
    ids=" ".join,
)
def test_the_settings_describe_the_model_that_is_built(words: list[str]) -> None:
    config = config_of(*words)
    planned, real = plan(config.model, config.dataset, config.lora), built(config)
    assert planned == real
    assert [list(getattr(planned, part)) for part in ("modules", "tensors", "adapters")] == [
        list(getattr(real, part)) for part in ("modules", "tensors", "adapters")
    ]


def test_every_model_that_can_be_built_has_a_layout() -> None:
    assert list(LAYOUTS) == list(BUILDERS)
