"""What pretrained weights say becomes settings when a command is given, and the server refuses what contradicts it."""

from pathlib import Path

import pytest
import torch

from flapp.architecture import build
from flapp.config.load import compose, load
from flapp.config.schema import Config, ConfigError
from flapp.model.build import build_model
from flapp.model.files import load_tensors, save_tensors
from flapp.model.layout import Variant
from flapp.model.pretrained import load_pretrained
from flapp.model.split.factory import ModelFactory
from flapp.model.split.vit import ViTTop
from flapp.model.vit_weights import describe
from flapp.server.preflight import check_model, check_run
from tests.conftest import Federate
from tests.support.split_models import compose as in_turn
from tests.support.vits import images, timms, torchvisions, transformerses, vit_model

RGB = ("dataset=cifar10", "dataset.classes=5", "dataset.normalization=half")


def settings(folder: Path, *words: str) -> Config:
    return compose([f"home={folder}/home", "run_name=checked", *words], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the weights of each library."""
    path = tmp_path_factory.mktemp("weights")
    transformerses(path / "tf")
    timms(path / "mean", global_pool="avg")
    timms(path / "deit", name="deit_tiny_patch16_224")
    torchvisions(path / "vision.pth")
    vit_model(path / "backbone")
    return path


@pytest.mark.parametrize(
    ("weights", "variant"),
    [
        ("tf", Variant(1e-12)),
        ("tf/model.safetensors", Variant(1e-12)),
        ("mean", Variant(pooling="mean")),
        ("vision.pth", Variant()),
        ("backbone", Variant(1e-12)),
    ],
)
def test_a_model_is_what_its_pretrained_weights_say(folder: Path, weights: str, variant: Variant) -> None:
    for model in ("pretrained", "vit_ti_16"):
        words = [] if model == "pretrained" else ["model.image_size=32"]
        config = settings(folder, *RGB, f"model={model}", f"model.pretrained={weights}", *words)
        assert (config.model.name, config.model.image_size) == ("vit_ti_16", 32)
        assert config.model.variant == variant
        check_model(config)
    found = load_pretrained(build(config.model, config.dataset), folder / weights)
    assert found.head_loaded == (weights != "backbone")


def test_given_settings_win_over_what_the_weights_say_and_grey_images_are_taken_as_rgb(folder: Path) -> None:
    config = settings(folder, "model=pretrained", "model.pretrained=tf", "model.image_size=64", "dataset=digits")
    assert (config.model.image_size, config.model.channels) == (64, 3)
    assert build(config.model, config.dataset)(torch.zeros(1, 1, 64, 64)).shape == (1, 10)
    given = settings(folder, *RGB, "model=pretrained", "model.pretrained=tf", "model.layer_norm_eps=1e-5")
    assert given.model.layer_norm_eps == 1e-5
    with pytest.raises(ValueError, match="layer_norm_eps=1e-12, this one has 1e-05: set model.layer_norm_eps=1e-12"):
        check_model(given)


def test_an_app_does_not_read_weights_and_the_server_names_the_setting_it_lacks(folder: Path) -> None:
    """Server and clients that compose the settings by themselves would otherwise build different models."""
    words = f"home={folder}/home model=vit_ti_16 model.image_size=32 model.pretrained={folder}"
    for weights, fix in (("tf", "set model.layer_norm_eps=1e-12"), ("mean", "set model.pooling=mean")):
        config, _ = load({"overrides": f"{words}/{weights} run_name=x {' '.join(RGB)}"}, {})
        assert config.model.variant == Variant()
        with pytest.raises(ValueError, match=fix):
            check_model(config)
    with pytest.raises(ConfigError, match="model=pretrained is for commands, which read the weights: name the model"):
        load({"overrides": f"model=pretrained model.pretrained={folder}/tf"}, {})


def test_weights_that_cannot_be_used_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    save_tensors({"fc.weight": torch.zeros(2, 2)}, tmp_path / "linear.safetensors")
    save_tensors(build_model("vit_tiny", (8, 8, 1), 5).state_dict(), tmp_path / "grey.safetensors")
    (tmp_path / "empty").mkdir()
    for weights, line in (
        (
            "linear.safetensors",
            "model=pretrained takes its size from .* has tensors of another network, first fc.weight",
        ),
        ("none.pth", "model=pretrained takes its size from .*none.pth"),
        ("empty", "has neither model.safetensors nor pytorch_model.bin"),
        ("grey.safetensors", "cannot take 3 channels as 1"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            check_model(settings(tmp_path, *RGB, "model=pretrained", f"model.pretrained={weights}"))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="takes its size from a file of weights: set model.pretrained=PATH"):
        settings(tmp_path, "model=pretrained")
    with pytest.raises(ConfigError, match=r"model.pooling=mean is for a ViT, got model=cnn: leave it out"):
        settings(tmp_path, "model=cnn", "model.pooling=mean")
    with pytest.raises(ConfigError, match=r"model.layer_norm_eps=1 is out of range: it must be less than 1"):
        settings(tmp_path, "model.layer_norm_eps=1")
    # With a model that is named, unfit weights are left to the checks before the run.
    config = settings(tmp_path, *RGB, "model=vit_ti_16", "model.image_size=32", "model.pretrained=linear.safetensors")
    with pytest.raises(ValueError, match="has tensors of another network"):
        check_model(config)


def test_images_that_are_scaled_in_another_way_than_the_weights_say_are_refused(folder: Path) -> None:
    for weights, said, other in (("tf", "half", "imagenet"), ("deit", "imagenet", "half")):
        words = (*RGB[:2], "model=pretrained", f"model.pretrained={weights}")
        check_model(settings(folder, *words, f"dataset.normalization={said}"))
        fix = f"dataset.normalization={said}, got {other}: set dataset.normalization={said}"
        with pytest.raises(ValueError, match=fix):
            check_model(settings(folder, *words, f"dataset.normalization={other}"))
    # ImageNet's means are of three colours, so there is nothing better for grey images.
    check_model(settings(folder, "model=pretrained", "model.pretrained=deit", "dataset=digits"))


def test_a_folder_of_a_run_is_weights_to_start_from(data_home: Path, federate: Federate) -> None:
    words = ("model.pooling=mean", "model.layer_norm_eps=1e-12", "model.activation=quick_gelu")
    _, path = federate(*words, "num_rounds=1", "clients=2", "train.steps=1", "evaluate.personal_epochs=0")
    assert describe(path).variant == Variant(1e-12, "quick_gelu", "mean")
    assert load_tensors(path / "model.safetensors")[1]["pooling"] == "mean"
    config = compose([f"home={data_home}", "run_name=next", f"model.pretrained={path}"], data_home)
    assert config.model.variant == describe(path).variant
    check_run(config, clients_here=True)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"has no model.safetensors: run {path.name} has not written it; finish"):
        check_run(compose([f"home={data_home}", "run_name=next", f"model.pretrained={path}"]), clients_here=True)


def test_vits_of_other_libraries_can_be_split(folder: Path, tmp_path: Path) -> None:
    theirs = transformerses(tmp_path / "quick", hidden_act="quick_gelu", layer_norm_eps=1e-3)
    for source, logits in ((tmp_path / "quick", theirs), (folder / "mean", None)):
        said = describe(source).variant
        model = build_model("vit_ti_16", (32, 32, 3), 5, variant=said).eval()
        load_pretrained(model, source)
        made = ModelFactory.create_split_models(
            "vit", source, 2, 10, storage_path=tmp_path / "split", auto_save=True, name=source.name
        )
        stored = ModelFactory.load_split_models(tmp_path / "split", source.name)
        for models in (made, stored):
            assert torch.equal(in_turn(models, images()), model(images()))
        if logits is not None:
            torch.testing.assert_close(in_turn(stored, images()), logits(images()), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be split: it has no head"):
        ModelFactory.create_split_models("vit", folder / "backbone", 2, 10)


def test_a_split_with_a_variant_that_does_not_exist_is_refused() -> None:
    sizes = {"image_size": 32, "patch": 16, "heads": 3, "width": 192, "mlp": 768}
    with pytest.raises(ValueError, match="pooling='max' is not known: choose one of token, mean"):
        ViTTop({**sizes, "channels": 3, "classes": 5, "dropout": 0.0, "pooling": "max"}, 10, 12)
