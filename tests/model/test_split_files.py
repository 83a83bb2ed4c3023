"""The files of split models: whole or not at all, and never taken for what they are not."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flapp.files import sha256_of_file
from flapp.model.split.factory import ModelFactory
from flapp.model.split.files import COMPONENTS, StorageManager, read_metadata
from tests.support.faults import largest_file
from tests.support.leaf_files import content_of, flip
from tests.support.refusals import refused
from tests.support.split_models import write_vit

FIELDS = {
    *("model_class", "component", "start_layer", "end_layer", "num_layers", "num_parameters", "memory_mb", "config"),
    *("saved_at", "dtype", "sha256", "format_version", "model_type", "name", "split_points", "tied", "model_sha256"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the files of three ViTs."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        write_vit(folder / f"seed{seed}.safetensors", seed=seed)
    return sorted(folder.iterdir())


def store(base: Path, model: Path, name: str = "x", overwrite: bool = True) -> str:
    """Store a model split at 1 and 2, and return the digest that names it."""
    options = {"name": name, "storage_path": base, "auto_save": True, "overwrite": overwrite}
    return ModelFactory.create_split_models("vit", model, 1, 2, **options)[0].part.model_sha256


@pytest.fixture(scope="module")
def stored(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one split model, which no test may change."""
    base = tmp_path_factory.mktemp("stored") / "split"
    store(base, models[0])
    return base


@pytest.fixture
def base(stored: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder."""
    return shutil.copytree(stored, tmp_path / "split")


def pair(base: Path, component: str = "trunk") -> tuple[Path, Path]:
    weights = StorageManager.get_split_model_path(base, "x", 1, 2, component)
    return weights, StorageManager.get_model_metadata_path(weights)


def check_refused(base: Path, message: str) -> None:
    with refused(ValueError, message):
        ModelFactory.load_split_models(base)


def test_files_and_fields_are_as_documented_and_true(base: Path, models: list[Path]) -> None:
    ends = (".safetensors", "_metadata.json")
    assert set(content_of(base)) == {f"{c}/x_1-2_{c}{end}" for c in COMPONENTS for end in ends}
    assert StorageManager.find_splits(base) == [("x", 1, 2)]
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert not [field for field in FIELDS if f"`{field}`" not in page.partition("## Split files")[2]]
    whole = load_file(models[0])
    total, start = 0, 0
    for component, name in zip(COMPONENTS, ("ViTBottom", "ViTTrunk", "ViTTop"), strict=True):
        weights, where = pair(base, component)
        found, tensors = json.loads(where.read_text()), load_file(weights)
        assert set(found) == FIELDS
        assert (found["model_class"], found["component"], found["model_type"]) == (name, component, "vit")
        assert (found["start_layer"], found["end_layer"], found["num_layers"]) == (start, start + 1, 3)
        assert {key.split(".")[2] for key in tensors if ".layers." in key} == {f"encoder_layer_{start}"}
        assert all(torch.equal(tensor, whole[key]) for key, tensor in tensors.items())
        assert found["num_parameters"] == sum(t.numel() for t in tensors.values())
        assert found["memory_mb"] == sum(t.nbytes for t in tensors.values()) / 2**20
        assert (found["dtype"], found["tied"], found["split_points"]) == ("float32", {}, [1, 2])
        assert found["sha256"] == sha256_of_file(weights)
        assert found["model_sha256"] == sha256_of_file(models[0])
        assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(found["saved_at"]) < timedelta(minutes=30)
        assert found["saved_at"].endswith("+00:00")
        assert (found["config"]["image_size"], found["config"]["heads"]) == (32, 4)
        total, start = total + found["num_parameters"], start + 1
    assert total == sum(t.numel() for t in whole.values())


def weights_in(base: Path) -> dict[str, bytes]:
    return {name: content for name, content in content_of(base).items() if name.endswith(".safetensors")}


def test_files_are_replaced_only_if_asked_and_the_same_model_is_the_same_bytes(base: Path, models: list[Path]) -> None:
    before, weights = content_of(base), weights_in(base)
    with refused(ValueError, r"x_1-2_bottom.safetensors exists already: set overwrite"):
        store(base, models[1], overwrite=False)
    (bottom,) = ModelFactory.load_split_models(base, components=["bottom"])
    with pytest.raises(ValueError, match="exists already"):
        bottom.save_split_model(pair(base, "bottom")[0])
    assert content_of(base) == before
    assert store(base, models[1]) == sha256_of_file(models[1])
    assert weights_in(base) != weights
    store(base, models[0])
    assert weights_in(base) == weights


def test_a_component_is_saved_alone_where_one_likes(base: Path, tmp_path: Path) -> None:
    (top,) = ModelFactory.load_split_models(base, components=["top"])
    saved = top.save_split_model(tmp_path / "elsewhere" / "mine.safetensors")
    again = ModelFactory.load_component(tmp_path / "elsewhere" / "mine.safetensors")
    assert saved.facts() == read_metadata(pair(base, "top")[0]).facts()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in top.state_dict().items())
    with pytest.raises(ValueError, match="its name must end in .safetensors"):
        top.save_split_model(tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="cannot be checked without its metadata"):
        top.save_split_model(tmp_path / "mine.safetensors", save_metadata=False)


def flip_trunk(at: int, base: Path) -> None:
    flip(pair(base)[0], at)


def foreign(base: Path) -> None:
    """Let another program have written the weights."""
    weights, where = pair(base)
    save_file(load_file(weights), weights)
    where.write_text(re.sub(r'"sha256": "\w+"', f'"sha256": "{sha256_of_file(weights)}"', where.read_text()))


def rename_top(base: Path) -> None:
    for top, trunk in zip(pair(base, "top"), pair(base, "trunk"), strict=True):
        os.replace(top, trunk)


def write_metadata(text: str) -> Callable[[Path], object]:
    return lambda base: pair(base)[1].write_text(text)


def change_metadata(**values: object) -> Callable[[Path], object]:
    return lambda base: pair(base)[1].write_text(json.dumps(json.loads(pair(base)[1].read_text()) | values))


OTHER_SHA256 = r"x_1-2_trunk.safetensors has SHA-256 \w{12}, x_1-2_trunk_metadata.json says \w{12}: one of"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((partial(flip_trunk, at), OTHER_SHA256) for at in (10, 2000, -1)),
        (write_metadata(""), "is damaged"),
        (write_metadata("[]"), "is damaged"),
        (write_metadata('{"name": "x"}'), "is damaged .format_version: Field required"),
        (lambda base: pair(base)[1].unlink(), "weights need their metadata"),
        (change_metadata(num_layers="3"), "num_layers: Input should be a valid integer"),
        (change_metadata(more=1), "more: Unexpected keyword argument"),
        (lambda base: pair(base)[0].unlink(), "trunk/x_1-2_trunk.safetensors cannot be read .*: this component is mis"),
        (rename_top, "x_1-2_trunk.safetensors holds the top of x split at 1-2"),
        (foreign, "has no flapp header of format 1"),
    ],
)
def test_damaged_or_foreign_files_are_refused(base: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(base)
    check_refused(base, message)


def other(value: object) -> object:
    """Return another value of the same type."""
    if isinstance(value, dict):
        return {**value, "dropout": "0.25"}
    if isinstance(value, list):
        return [*value[:-1], value[-1] + 1]
    return f"{value}x" if isinstance(value, str) else value + 1  # type: ignore[operator]


@pytest.mark.parametrize("field", sorted(FIELDS - {"saved_at"}))
def test_a_changed_field_of_the_metadata_is_refused(base: Path, field: str) -> None:
    _, where = pair(base)
    found = json.loads(where.read_text())
    where.write_text(json.dumps(found | {field: other(found[field])}))
    message = {
        "sha256": r"trunk.safetensors has SHA-256 \w{12}, x_1-2_trunk_metadata.json says \w{12}",
        "format_version": r"damaged \(format_version: Input should be 1, got 2\)",
    }
    check_refused(base, message.get(field, f"x_1-2_trunk_metadata.json says {field}=.*, its weights were saved with"))


def test_components_of_different_models_are_not_mixed(base: Path, models: list[Path]) -> None:
    others = base.parent / "others"
    store(others, models[1])
    for mine, theirs in zip(pair(base), pair(others), strict=True):
        mine.write_bytes(theirs.read_bytes())
    check_refused(base, "bottom and trunk of x are of different models")
    ModelFactory.load_split_models(base, components=["trunk"])


def test_an_unknown_component_and_a_name_that_no_file_can_have_are_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="component=middle is not known: choose one of bottom, trunk, top"):
        ModelFactory.load_split_models(base, components=["middle"])
    with pytest.raises(ValueError, match="component=middle is not known"):
        StorageManager.get_split_model_path(base, "x", 1, 2, "middle")
    for name in ("", "../x", "a/b", ".x"):
        with pytest.raises(ValueError, match="cannot name a file"):
            StorageManager.get_split_model_path(base, name, 1, 2, "top")


def test_a_name_or_points_are_needed_if_there_are_several_splits(base: Path, models: list[Path]) -> None:
    store(base, models[1], name="y")
    check_refused(base, r"has several splits \(x 1-2, y 1-2\): give the name and the points of one")
    assert ModelFactory.load_split_models(base, "y")[0].part.name == "y"
    with pytest.raises(ValueError, match=r"has x 1-2, y 1-2, but not name=z"):
        ModelFactory.load_split_models(base, "z")
    check_refused(base.parent / "nowhere", "has no split model")


class PowerCut(BaseException):
    """What nothing catches."""


def cut_power_at(rename: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the power fail before the rename with this number."""
    left, replace = iter(range(rename)), os.replace

    def cut(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise PowerCut
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)


STAGED = 6  # renames and pairs of fsyncs before the first file of the split is replaced: of weights and metadata


@pytest.mark.parametrize("rename", range(STAGED + 7))
def test_a_crash_at_any_rename_leaves_the_old_split_the_new_one_or_one_that_is_refused(
    base: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    old, new = sha256_of_file(models[0]), sha256_of_file(models[1])
    with monkeypatch.context() as patch:
        cut_power_at(rename, patch)
        with pytest.raises(PowerCut) if rename < STAGED + 6 else nullcontext():
            store(base, models[1])
    if STAGED < rename < STAGED + 6:
        check_refused(base, r"x_1-2_\w+.safetensors has SHA-256 \w{12}, x_1-2_\w+_metadata.json says \w{12}: one of")
    else:
        found = {model.part.model_sha256 for model in ModelFactory.load_split_models(base)}
        assert found == {old if rename <= STAGED else new}
    again = store(base, models[2])
    assert ModelFactory.load_split_models(base)[0].part.model_sha256 == again
    assert not [name for name in content_of(base) if ".tmp" in name]


def test_a_crashed_first_save_is_refused_until_the_next(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_power_at(STAGED + 3, patch)
        with pytest.raises(PowerCut):
            store(tmp_path, models[1])
    check_refused(tmp_path, "x_1-2_bottom_metadata.json cannot be read .*: weights need their metadata")
    store(tmp_path, models[1])
    ModelFactory.load_split_models(tmp_path)


@contextmanager
def failing_sync(number: int) -> Iterator[None]:
    """Let the disk be full at the fsync with this number."""
    left, fsync = iter(range(number)), os.fsync

    def fail(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


FULL = [*(partial(largest_file, n) for n in (300, 100_000, 150_000)), *(partial(failing_sync, n) for n in range(12))]


@pytest.mark.parametrize("full_disk", FULL)
def test_a_full_disk_leaves_all_old_files_as_they_were(
    base: Path, models: list[Path], full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    before = content_of(base)
    with full_disk(), refused(ValueError, "cannot be written .*free space"):
        store(base, models[1])
    assert content_of(base) == before
    store(base, models[1])
    ModelFactory.load_split_models(base)


def test_a_folder_that_cannot_be_used_is_refused(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "split").mkdir()
    (tmp_path / "split/trunk").write_text("in the way")
    with pytest.raises(ValueError, match="split/trunk is not a folder: name another storage folder"):
        store(tmp_path / "split", models[0])
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with refused(ValueError, "is not writable: change its permissions"):
        store(tmp_path / "other", models[0])


def test_components_of_different_splits_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flapp.model.layout import SIZES

    monkeypatch.setitem(SIZES, "vit_six", (4, 6, 4, 32, 48))
    write_vit(tmp_path / "six.safetensors", "vit_six")
    for points in ((1, 2), (1, 4)):
        options = {"storage_path": tmp_path, "auto_save": True}
        ModelFactory.create_split_models("vit", tmp_path / "six.safetensors", *points, **options)
    for end in (".safetensors", "_metadata.json"):
        os.replace(tmp_path / f"bottom/six_1-4_bottom{end}", tmp_path / f"bottom/six_1-2_bottom{end}")
    with pytest.raises(ValueError, match=r"six_1-2_bottom.safetensors holds the bottom of six split at 1-4"):
        ModelFactory.load_split_models(tmp_path, "six", 1, 2)
