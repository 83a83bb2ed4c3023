"""tools.export: each library loads what was written and gives the logits of the run's final model."""

import functools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from flapp.architecture import build
from flapp.config.load import compose
from flapp.server.run import initial_model
from tests.conftest import Federate
from tests.support.own_runs import run as run_own
from tests.support.projects import add_to_task, new_project, settings_in
from tests.support.vits import transformerses
from tests.tools.conftest import Refusal
from tools import export
from tools.exporting import vits
from tools.exporting.onnx_file import take_samples
from tools.running.finished import open_run

SHORT = ("clients=2", "num_rounds=1", "train.steps=1", "evaluate.personal_epochs=0")
LORA = ("strategy=fedlora", "lora=default", "lora.rank=2", "lora.targets=[qkv,proj,mlp.0,mlp.3,conv_proj]")
RGB = "model.channels=3"
QUICK = ("model.activation=quick_gelu", "model.layer_norm_eps=0.001")
FEDSA = ("strategy.aggregation=fedsa", "evaluate.objective=personal_accuracy")
Trained = Callable[..., Path]  # what the fixture `trained` gives


@pytest.fixture(scope="module")
def trained(federate: Federate) -> Trained:
    """Return a function that returns a run with these settings, trained once for all tests."""
    return functools.cache(lambda *words: federate(*SHORT, *words)[1])


@pytest.fixture(scope="module")
def grey(trained: Trained) -> Path:
    return trained()


@pytest.fixture(scope="module")
def adapted(trained: Trained) -> Path:
    return trained(*LORA, RGB)


def written(run: Path, library: str, folder: Path) -> Path:
    """Export a run and return the folder."""
    out = folder / library
    assert export.main([str(run), "--to", library, "--out", str(out)]) == 0
    return out


@pytest.fixture
def refused(refusal: Refusal) -> Refusal:
    """Return a function that exports a run, which must fail with one line of error, and returns that line."""
    return lambda run, library, out: refusal(export.main, run, "--to", library, "--out", out)


def draw_images(channels: int) -> Tensor:
    return torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(run: Path, theirs: Any, channels: int, expand: int = 0) -> None:
    images = draw_images(channels)
    found = theirs.eval()(images.expand(-1, expand, -1, -1) if expand else images)
    found = getattr(found, "logits", found)
    torch.testing.assert_close(found, open_run(run).model()(images), rtol=0, atol=1e-5)


def open_torchvision(out: Path) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = torchvision.models.VisionTransformer(32, 4, 3, 4, 64, 128, num_classes=10, norm_layer=norm)
    model.load_state_dict(torch.load(out / "model.pth", weights_only=True))
    return model


def test_torchvision_loads_a_vit_with_adapters_merged(adapted: Path, tmp_path: Path) -> None:
    assert_same_logits(adapted, open_torchvision(written(adapted, "torchvision", tmp_path)), 3)


@pytest.fixture(params=[("grey", 1), ("adapted", 3)], ids=["grey", "adapted"])
def vit(request: pytest.FixtureRequest) -> tuple[Path, int]:
    """Return a run with a ViT, and the channels of its images."""
    return request.getfixturevalue(request.param[0]), request.param[1]


def test_transformers_loads_a_vit_with_its_classes_and_normalization(vit: tuple[Path, int], tmp_path: Path) -> None:
    run, channels = vit
    out = written(run, "transformers", tmp_path)
    model, facts = transformers.ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(facts.values())
    assert_same_logits(run, model, channels)
    assert model.config.id2label == dict(enumerate("0123456789"))
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * channels


def test_timm_loads_a_vit_with_its_normalization(vit: tuple[Path, int], tmp_path: Path) -> None:
    run, channels = vit
    model = timm.create_model(f"local-dir:{written(run, 'timm', tmp_path)}", pretrained=True)
    assert_same_logits(run, model, channels)
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    assert config["mean"] == config["std"] == (0.5,) * channels
    assert config["input_size"] == (channels, 32, 32)


def test_peft_puts_the_adapter_on_the_base_in_transformers(adapted: Path, tmp_path: Path) -> None:
    out = written(adapted, "peft", tmp_path)
    base = transformers.ViTForImageClassification.from_pretrained(out / "base")
    model = peft.PeftModel.from_pretrained(base, out)
    assert_same_logits(adapted, model, 3)
    with model.disable_adapter(), torch.no_grad():
        without = model(draw_images(3)).logits
    assert not torch.allclose(without, open_run(adapted).model()(draw_images(3)), atol=1e-5)


@pytest.mark.slow
def test_onnxruntime_gives_the_logits_of_a_batch_of_any_size(adapted: Path, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(written(adapted, "onnx", tmp_path) / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    for count in (1, 7):
        images = draw_images(3)[:1].repeat(count, 1, 1, 1)
        with torch.no_grad():
            expected = open_run(adapted).model()(images).numpy()
        np.testing.assert_allclose(session.run(None, {"samples": images.numpy()})[0], expected, rtol=0, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list("0123456789")
    assert json.loads(facts["mean"]) == [0.5]


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that makes a project and trains it; it returns the project's folder and the run."""

    def train(template: str, *words: str) -> tuple[Path, Path]:
        folder = new_project(tmp_path / "mine", template)
        return folder, run_own(settings_in(folder, tmp_path / "home", "clients=2", *SHORT, *words))[1]

    return train


@pytest.mark.slow
def test_a_network_whose_number_of_samples_onnx_fixes_takes_one_at_a_time(own: Any, tmp_path: Path) -> None:
    run = own("text")[1]  # over token ids, with a GRU
    session = onnxruntime.InferenceSession(written(run, "onnx", tmp_path) / "model.onnx")
    opened = open_run(run)
    tokens = take_samples(opened, 3)
    assert not tokens.is_floating_point()
    found = np.concatenate([session.run(None, {"samples": each.numpy()})[0] for each in tokens.split(1)])
    with torch.no_grad():
        np.testing.assert_allclose(found, opened.model()(tokens).numpy(), rtol=0, atol=1e-5)


def test_peft_puts_an_adapter_on_a_network_of_ones_own(own: Any, tmp_path: Path) -> None:
    run = own("vision", "strategy=fedlora", "lora=default", "lora.rank=2", "lora.targets=[conv1,conv2]")[1]
    out = written(run, "peft", tmp_path)
    opened = open_run(run)
    base = build(opened.config.model, opened.config.dataset)
    base.load_state_dict(load_file(out / "base" / "model.safetensors"))
    model, samples = peft.PeftModel.from_pretrained(base, out).eval(), take_samples(opened, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(samples), opened.model()(samples), rtol=0, atol=1e-5)


def test_a_run_whose_own_code_has_changed_is_refused_with_the_file(own: Any, tmp_path: Path, refused: Refusal) -> None:
    folder, run = own("vision")
    add_to_task(folder, "x = 1")
    assert "task.py" in refused(run, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "library", "named"),
    [
        (("model=linear",), "timm", "model=linear"),
        ((), "peft", "no adapters"),
        ((*LORA, RGB, "strategy.aggregation=flora"), "peft", "strategy.aggregation=flora"),
        ((*LORA, RGB, *FEDSA), "timm", "fedsa"),
        (("model.pooling=mean",), "transformers", "pooling=mean"),
        (("model.pooling=mean",), "torchvision", "pooling=mean"),
        (QUICK, "timm", "quick_gelu"),
        (QUICK, "torchvision", "quick_gelu"),
    ],
)
def test_what_a_library_cannot_hold_is_refused_by_name(
    settings: tuple[str, ...], library: str, named: str, trained: Trained, tmp_path: Path, refused: Refusal
) -> None:
    assert named in refused(trained(*settings), library, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_settings_of_a_vit_travel(trained: Trained, tmp_path: Path) -> None:
    mean = trained("model.pooling=mean")
    assert_same_logits(mean, timm.create_model(f"local-dir:{written(mean, 'timm', tmp_path)}", pretrained=True), 1)
    quick = trained(*QUICK)
    out = written(quick, "transformers", tmp_path)
    assert_same_logits(quick, transformers.ViTForImageClassification.from_pretrained(out), 1)


def test_a_folder_with_files_stays_as_it_is(grey: Path, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert str(tmp_path) in refused(grey, "timm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_out_that_cannot_become_a_new_folder_is_named_and_stays(
    grey: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nothing")
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "link", tmp_path / "dangling", Path("."), Path(".."), tmp_path / "file" / "sub"):
        error = refused(grey, "timm", out)
        assert error.startswith(f"error: --out {out} ")
        assert error.endswith("name a new folder with --out")
    refused(grey, "peft", tmp_path / "a" / "b")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_second_of_two_exports_into_one_folder_fails(
    grey: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", vits.write_timm

    def write_late(run: Any, folder: Path) -> str:
        out.mkdir()
        (out / "first").touch()
        return write(run, folder)

    monkeypatch.setattr(vits, "write_timm", write_late)
    assert "name a new folder" in refused(grey, "timm", out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]


def test_the_printed_lines_load_the_model_whatever_its_path_is(grey: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "it's {odd}\" \\x"
    assert export.main([str(grey), "--to", "torchvision", "--out", str(out)]) == 0
    names: dict[str, Any] = {}
    exec(capsys.readouterr().out.partition("\n")[2], names)
    assert_same_logits(grey, names["model"], 1, expand=3)


def test_a_base_that_is_gone_is_named(federate: Federate, tmp_path: Path, refused: Refusal) -> None:
    run = federate(*SHORT, *LORA, RGB, "seed=77")[1]
    digest = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    shutil.rmtree(open_run(run).config.models_dir / digest)
    assert "frozen weights" in refused(run, "peft", tmp_path / "out")


@pytest.mark.parametrize("names", ["[1, 2]", '["one"]', "{", '{"a": 1}'])
def test_a_damaged_list_of_classes_is_named_with_the_fix(
    names: str, grey: Path, tmp_path: Path, refused: Refusal
) -> None:
    copy = Path(shutil.copytree(grey, tmp_path / "copy"))
    (copy / "classes.json").write_text(names)
    assert "remove it" in refused(copy, "timm", tmp_path / "out")


@pytest.mark.slow
def test_weights_of_a_library_are_trained_for_a_round_and_taken_back(data_home: Path, tmp_path: Path) -> None:
    theirs = transformerses(tmp_path / "weights", classes=10)
    words = ("model=pretrained", "model.pretrained=weights", f"home={data_home}", "run_name=from-transformers")
    images = draw_images(3)
    config = compose([*words, *SHORT, "train.lr=0.001"], tmp_path)
    start = initial_model(config).eval()
    with torch.no_grad():
        torch.testing.assert_close(start(images), theirs(images), rtol=0, atol=1e-5)
    run = run_own(config)[1]
    trained = transformers.ViTForImageClassification.from_pretrained(written(run, "transformers", tmp_path))
    assert_same_logits(run, trained, 3)
    with torch.no_grad():
        assert not torch.allclose(open_run(run).model()(images), start(images), atol=1e-3)
