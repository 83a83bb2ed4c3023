"""Models, the layouts that settings say of them, and their files."""

from pathlib import Path

import pytest
import torch

from flapp.architecture import adapt, build, plan
from flapp.config.load import compose
from flapp.config.schema import Config
from flapp.model.build import BUILDERS, build_model
from flapp.model.files import load_tensors, read_tensors, save_tensors
from flapp.model.layout import LAYOUTS, Layout
from flapp.model.lora import layout_of, mark_only_lora_as_trainable
from flapp.training import build_optimizer, loss_of

MODELS = {"vit_tiny": ((32, 32, 1), 10), "cnn": ((28, 28, 1), 62), "linear": ((10,), 0)}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_gets_a_gradient_in_the_first_step(name: str) -> None:
    shape, classes = MODELS[name]
    torch.manual_seed(0)
    model = build_model(name, shape, classes)
    inputs = torch.randn(4, *([shape[2], *shape[:2]] if len(shape) == 3 else shape))
    loss_of(model(inputs), torch.randint(0, classes, (4,)) if classes else torch.randn(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_the_cnn_is_leafs_and_the_toy_has_eleven_parameters() -> None:
    assert sum(p.numel() for p in build_model("cnn", (28, 28, 1), 62).parameters()) == 6_603_710
    assert sum(p.numel() for p in build_model("linear", (10,), 0).parameters()) == 11


def test_dropout_is_off_in_eval() -> None:
    for name in ("vit_tiny", "cnn"):
        model = build_model(name, (32, 32, 1), 10, dropout=0.5)
        images = torch.randn(2, 1, 32, 32)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vit_tiny", (30, 30, 1), "4-pixel patches, which do not divide 30"),
        ("cnn", (10,), "classifies images of shape"),
        ("resnet", (32, 32, 3), "model.name=resnet is not known: choose one of cnn, linear"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 10)


def test_a_saved_model_reads_back_bit_for_bit_and_has_one_digest(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(7),
        "c": torch.randn(5).bfloat16(),
        "d": torch.randn(4, 3).t(),
        "e": torch.empty(0, 2),
        "f": torch.tensor([True, False, True]),
    }
    digests = {save_tensors(state, tmp_path / f"{i}.safetensors", model="x", classes=3, shape=[1]) for i in range(5)}
    assert len(digests) == 1
    for read in (load_tensors, read_tensors):
        tensors, facts = read(tmp_path / "0.safetensors")
        assert facts["model"] == "x"
        assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in state.items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())  # those of read_tensors are aligned
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            load_tensors(tmp_path / f"{name}.safetensors")


def test_the_optimizer_holds_only_what_is_trained() -> None:
    model = build_model("cnn", (28, 28, 1), 5)
    model.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = build_optimizer(model, "adamw", 0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) - 1


LORA = ("strategy=fedlora", "lora=default", "lora.rank=3")


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
    config = compose(["home=/nowhere", *words])
    planned, real = plan(config.model, config.dataset, config.lora), built(config)
    assert planned == real
    for part in ("modules", "tensors", "adapters"):
        assert list(getattr(planned, part)) == list(getattr(real, part))


def test_every_model_that_can_be_built_has_a_layout() -> None:
    assert list(LAYOUTS) == list(BUILDERS)
