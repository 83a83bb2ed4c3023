"""Split models: the components are the whole model bit for bit, and load without it."""

import ctypes
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flapp.model.layout import SIZES
from flapp.model.split.component import ModelType, SplitModel, Whole
from flapp.model.split.factory import ModelFactory
from flapp.model.split.files import COMPONENTS, StorageManager, parse_points, read_metadata
from tests.support.refusals import refused
from tests.support.split_models import compose, draw_ids, draw_images, write_gpt2, write_vit

PAIRS = list(itertools.combinations(range(1, 5), 2))  # of 5 layers


def create(kind: str, source: Path, p1: int = 1, p2: int = 2, **options: Any) -> tuple[SplitModel, ...]:
    return ModelFactory.create_split_models(kind, source, p1, p2, **options)


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_a_model_is_its_components_at_every_legal_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(SIZES, "vit_five", (4, 5, 4, 32, 48))
    source = tmp_path / ("five.safetensors" if kind == "vit" else "five")
    inputs = draw_images() if kind == "vit" else draw_ids()
    expected = write_vit(source, "vit_five")(inputs) if kind == "vit" else write_gpt2(source, 5)(inputs).logits
    for p1, p2 in PAIRS:
        assert torch.equal(compose(create(kind, source, p1, p2), inputs), expected), (p1, p2)
    for p1, p2 in ((1, 2), (2, 3), (3, 4)):
        create(kind, source, p1, p2, storage_path=tmp_path, auto_save=True)
        loaded = ModelFactory.load_split_models(tmp_path, "five", p1, p2)
        assert torch.equal(compose(loaded, inputs), expected), (p1, p2)


def growth_of_memory(call: Callable[[], object]) -> int:
    """Return by how many bytes the memory of this process grows at most during a call."""

    def resident(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is free inside the process does not hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def test_a_vit_of_twelve_layers_is_its_components_and_each_takes_little_memory(tmp_path: Path) -> None:
    whole = write_vit(tmp_path / "vit_ti_16.safetensors", "vit_ti_16")
    expected = whole(draw_images())
    made = create("vit", tmp_path / "vit_ti_16.safetensors", 2, 10, storage_path=tmp_path, auto_save=True)
    for models in (made, ModelFactory.load_split_models(tmp_path)):
        assert torch.equal(compose(models, draw_images()), expected)
    bottom, trunk, top = made
    expected.square().sum().backward()
    top(trunk(bottom(draw_images()))).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for model in made:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradients[name]), name
    found = growth_of_memory(lambda: ModelFactory.load_split_models(tmp_path, components=["bottom"]))
    least, size = (sum(p.nbytes for p in model.parameters()) for model in (bottom, whole))
    assert least < found < size / 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gpt2_of_twelve_layers_is_its_components_with_masks_and_positions_too(tmp_path: Path, attention: str) -> None:
    write_gpt2(tmp_path / "twelve", 12, scale_attn_by_inverse_layer_idx=attention == "eager")
    from transformers import GPT2LMHeadModel

    whole = GPT2LMHeadModel.from_pretrained(tmp_path / "twelve", attn_implementation=attention)
    options = {"attn_implementation": attention, "storage_path": tmp_path, "auto_save": True}
    create("gpt2", tmp_path / "twelve", 2, 10, **options)
    models, ids = ModelFactory.load_split_models(tmp_path), draw_ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, 15:] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for also in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": places}):
        for cache in (True, False):
            with torch.no_grad():
                assert torch.equal(compose(models, ids, **also), whole(ids, **also, use_cache=cache).logits)


def test_a_vit_keeps_the_dropout_it_was_trained_with(tmp_path: Path) -> None:
    write_vit(tmp_path / "x.safetensors", dropout=0.5)
    create("vit", tmp_path / "x.safetensors", dropout=0.5, storage_path=tmp_path, auto_save=True)
    models = ModelFactory.load_split_models(tmp_path)
    assert not any(model.training for model in models)
    for model in models:
        model.train()
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return a GPT-2 and the folder in which it is stored split at 2 and 4, which no test may change."""
    folder = tmp_path_factory.mktemp("gpt2")
    whole = write_gpt2(folder / "g")
    create("gpt2", folder / "g", 2, 4, storage_path=folder / "split", auto_save=True)
    return whole, folder / "split"


def places_of(folder: Path) -> list[Path]:
    return [StorageManager.get_split_model_path(folder, "g", 2, 4, component) for component in COMPONENTS]


def test_the_tied_embedding_is_counted_once_and_named_once(gpt2: tuple[nn.Module, Path]) -> None:
    whole, folder = gpt2
    metadata = [read_metadata(file) for file in places_of(folder)]
    tied = {key: source for found in metadata for key, source in found.tied.items()}
    assert tied == {"lm_head.weight": "bottom:transformer.wte.weight"}
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(found.num_parameters for found in metadata) == count
    bottom, trunk, top = map(load_file, places_of(folder))
    assert torch.equal(top.pop("lm_head.weight"), bottom["transformer.wte.weight"])
    assert sum(t.numel() for part in (bottom, trunk, top) for t in part.values()) == count


def test_an_untied_head_is_stored_as_its_own_and_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    whole = write_gpt2(tmp_path / "g", dtype=torch.bfloat16, tie_word_embeddings=False)
    create("gpt2", tmp_path / "g", 2, 4, storage_path=tmp_path, auto_save=True)
    models = ModelFactory.load_split_models(tmp_path)
    assert not any(model.tied for model in models)
    assert sum(p.numel() for m in models for p in m.parameters()) == sum(p.numel() for p in whole.parameters())
    assert {p.dtype for m in models for p in m.parameters()} == {torch.bfloat16}
    assert torch.equal(compose(models, draw_ids()), whole(draw_ids()).logits)
    found = read_metadata(places_of(tmp_path)[1])
    assert found.dtype == "bfloat16"
    assert found.memory_mb == found.num_parameters * 2 / 2**20


def test_tied_parameters_are_one_where_bottom_and_top_meet(gpt2: tuple[nn.Module, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2[1], tmp_path / "split")
    made = create("gpt2", gpt2[1].parent / "g", 2, 4)
    for bottom, _, top in (made, ModelFactory.load_split_models(folder)):
        assert top.get_parameter("lm_head.weight") is bottom.get_parameter("transformer.wte.weight")
    (top,) = ModelFactory.load_split_models(folder, components=["top"])
    with torch.no_grad():
        top.get_parameter("lm_head.weight").add_(1)
    top.save_split_model(places_of(folder)[2], overwrite=True)
    with pytest.raises(ValueError, match=r"lm_head.weight of top differs from bottom:transformer.wte.weight"):
        ModelFactory.load_split_models(folder)


def test_each_component_loads_alone(gpt2: tuple[nn.Module, Path], tmp_path: Path) -> None:
    hidden = draw_ids()
    for path in places_of(gpt2[1]):
        alone = tmp_path / path.parent.name
        alone.mkdir()
        for file in (path, StorageManager.get_model_metadata_path(path)):
            shutil.copy(file, alone)
        with torch.no_grad():
            hidden = ModelFactory.load_component(alone / path.name)(hidden)
    assert torch.equal(hidden, gpt2[0](draw_ids()).logits)


@pytest.mark.parametrize("points", [(0, 1), (1, 1), (2, 1), (1, 3), (2, 3), (-1, 2), (1, 30), (True, 2), (1.0, 2)])
def test_points_that_leave_a_component_without_a_layer_are_refused(tmp_path: Path, points: tuple[int, int]) -> None:
    write_vit(tmp_path / "x.safetensors")
    with refused(ValueError, "split points .* (are not possible: 0 < p1 < p2 < layers|whole numbers)"):
        create("vit", tmp_path / "x.safetensors", *points, storage_path=tmp_path / "s", auto_save=True)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("text", ["", "2", "2-", "2:10", "a-b", "-1-2", "1-2-3", "2 - 10"])
def test_badly_written_points_are_refused(text: str) -> None:
    assert parse_points("2-10") == (2, 10)
    with pytest.raises(ValueError, match="are not two numbers with a dash between, such as 2-10"):
        parse_points(text)


def test_what_cannot_be_split_is_refused_in_one_line(tmp_path: Path) -> None:
    write_vit(tmp_path / "vit.safetensors")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "cnn.safetensors")
    save_file({**load_file(tmp_path / "vit.safetensors"), "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    part = {key: t for key, t in load_file(tmp_path / "vit.safetensors").items() if key != "encoder.ln.bias"}
    save_file(part, tmp_path / "part.safetensors")
    write_gpt2(tmp_path / "gpt2")
    incomplete = {k: t for k, t in load_file(tmp_path / "gpt2/model.safetensors").items() if "h.3.ln_1" not in k}
    (tmp_path / "torn").mkdir()
    save_file(incomplete, tmp_path / "torn/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "torn/config.json").write_text((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    for kind, source, message in (
        ("t5", "vit.safetensors", "model_type=t5 is not known: choose one of gpt2, vit"),
        ("vit", "none.safetensors", "none.safetensors is missing: give a file of a ViT's weights"),
        ("vit", "cnn.safetensors", "has tensors of another network, first fc.weight"),
        ("vit", "more.safetensors", "1 tensors that belong to no component, first more"),
        ("vit", "part.safetensors", "does not fit ViTTop: 1 missing, first encoder.ln.bias"),
        ("gpt2", "torn", "lacks 2 of the model's tensors, first transformer.h.3.ln_1.bias"),
        ("gpt2", "bert", "is a bert: only GPT-2"),
        ("gpt2", "empty", "cannot be read as a GPT-2"),
    ):
        with refused(ValueError, message):
            create(kind, tmp_path / source)
    with pytest.raises(ValueError, match="auto_save=True needs storage_path"):
        create("vit", tmp_path / "vit.safetensors", auto_save=True)


def test_without_transformers_gpt2_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "flapp.model.split.gpt2", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="model_type=gpt2 needs transformers: pip install 'flapp\\[split\\]'"):
        create("gpt2", tmp_path)


class Layers(SplitModel):
    """Layers of a model of nothing but linear layers."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(config["width"], config["width"]) for i in range(start, end)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


def test_another_type_of_model_is_split_once_it_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelFactory, "types", dict(ModelFactory.types))
    state = {f"layers.{i}.{key}": t for i in range(4) for key, t in nn.Linear(3, 3).state_dict().items()}
    kind = ModelType(lambda source: Whole(source, {"width": 3}, 4, state, "0" * 64), dict.fromkeys(COMPONENTS, Layers))
    ModelFactory.register("mlp", lambda: kind)
    ModelFactory.create_split_models("mlp", "mine", 1, 3, storage_path=tmp_path, auto_save=True)
    whole = Layers({"width": 3}, 0, 4)
    whole.load_state_dict(state)
    x = torch.randn(2, 3)
    assert torch.equal(compose(ModelFactory.load_split_models(tmp_path), x), whole(x))
