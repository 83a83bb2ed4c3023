"""Settings: every choice composes, and whatever is wrong is said in one line."""

import itertools
import json
import re
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from flapp.architecture import build
from flapp.config.load import CONF, compose, derive_seed, expand_words, from_dict, load, read_node_config, to_json
from flapp.config.plain import setting_types
from flapp.config.schema import ConfigError
from flapp.custom import enable
from flapp.model.build import build_model
from flapp.model.files import save_tensors
from tests.conftest import refusal_of

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDS = {
    ("dataset", "regression"): ["model=linear", "partition=iid", "evaluate.objective=loss"],
    ("lora", "default"): ["strategy=fedlora"],
    ("lora", "heterogeneous"): ["strategy=fedlora", "strategy.aggregation=hetlora"],
    ("strategy", "fedlora"): ["lora=default"],
    ("experiment", "cifar10_fedlora"): ["model.pretrained=/models/vit_b_16.pth"],
    ("experiment", "cifar100_fedlora"): ["model.pretrained=/models/vit_b_16.pth"],
    ("split", "auto"): ["split.split_config=1-2"],
    ("model", "pretrained"): ["model.pretrained={folder}/model.safetensors"],
    ("model", "custom"): ["model.target=torchvision.models:resnet18", "model.kwargs={num_classes:10}"],
    ("dataset", "custom"): ["dataset.name=mine", "dataset.shape=[32,32,3]", "dataset.classes=4"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_in_conf_composes_and_builds_its_model(group: str, choice: str, tmp_path: Path) -> None:
    save_tensors(build_model("vit_tiny", (8, 8, 3), 5).state_dict(), tmp_path / "model.safetensors")
    words = [word.replace("{folder}", str(tmp_path)) for word in NEEDS.get((group, choice), [])]
    composed = compose([f"{group}={choice}", *words], tmp_path)
    enable(composed)
    model = build(composed.model, composed.dataset)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert from_dict(json.loads(to_json(composed))) == composed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr=0.1"], "lr is not a setting: did you mean train.lr?"),
        (["num_round=3"], "num_round is not a setting: did you mean num_rounds?"),
        (["train.learning_rate=3"], "train.learning_rate is not a setting"),
        (["+extra=1"], "extra is not a setting"),
        (
            ["model=vit_huge"],
            "model=vit_huge is not known: choose one of cnn, custom, linear, pretrained, vit_b_16, vit_s_16, "
            "vit_ti_16, vit_tiny",
        ),
        (["dataset=custom"], "dataset.name must be given: add dataset.name=VALUE"),
        (["num_rounds=0"], "num_rounds=0 is out of range: it must be at least 1"),
        (["train.lr=0"], "train.lr=0 is out of range: it must be more than 0"),
        (["train.lr=inf"], "train.lr=inf must be a finite number"),
        (["strategy.norm_limit=1"], "strategy.norm_limit=1 is out of range: it must be more than 1"),
        (["strategy.fraction_train=1.5"], "strategy.fraction_train=1.5 is out of range: it must be at most 1"),
        (["seed=1.5"], "seed=1.5 must be a whole number, got float"),
        (["evaluate.central=yes"], "evaluate.central=yes must be true or false, got str"),
        (["evaluate.central=1"], "evaluate.central=1 must be true or false, got int"),
        (["train.optimizer=adam"], "train.optimizer=adam is not known: choose one of adamw, sgd"),
        (["train=3"], "train must be a group of settings, got 3"),
        (["dataset=regression"], "model=vit_tiny classifies images, dataset=regression has none: set model=linear"),
        (["dataset=regression", "model=linear"], "partition=dirichlet needs classes, dataset=regression has none"),
        (["partition.alpha=null"], "partition=dirichlet needs partition.alpha"),
        (["evaluate.personal_epochs=0", "evaluate.objective=personal_accuracy"], "needs fine-tuning"),
        (["evaluate.personal_epochs=0", "stopping.metric=personal_accuracy"], "personal_accuracy needs fine-tuning"),
        (
            ["experiment=toy_regression", "stopping.metric=accuracy"],
            "needs classes, dataset=regression has none: set st",
        ),
        (["stopping.metric=loss"], "stopping.patience=3 evaluations, one in evaluate.every=5 rounds, are never over"),
        (
            ["num_rounds=5", "evaluate.select=best"],
            "select=best has only the last round to choose from: lower evaluate",
        ),
        (["stopping.patience=0"], "stopping.patience=0 is out of range: it must be at least 1"),
        (["stopping.metric=auc"], "stopping.metric=auc is not known: choose one of accuracy, personal_accuracy, loss"),
        (["dataset.normalization=imagenet"], "needs images of 3 channels, got shape [32, 32, 1]"),
        (["train.momentum=0.9"], "has no meaning for adamw"),
        (["strategy.min_replies=11"], "strategy.min_replies=11 can never be met with 10 clients in a round"),
        (["strategy.min_clients=11"], "strategy.min_clients=11 is more than clients=10"),
        (["deployment.client_keys=/keys"], "simulated nodes have none: leave it out, or set deployment=local"),
        (["deployment=local", "deployment.client_keys=keys"], "client_keys=keys is relative"),
        (["home=some/where"], "home=some/where is relative, and the apps run in another folder"),
        (["split=auto"], "split_config=2-10 does not go with model=vit_tiny: split points 2 and 10 of a model of 3"),
        (["split=auto", "split.split_config=1:2"], "split_config=1:2 does not go with model=vit_tiny: split points"),
        (["split=auto", "model=cnn"], "splits ViTs only, got model=cnn: set split=none"),
        (["split.auto_save_split_models=true"], "needs a folder: set split.model_storage_dir"),
        (["split.model_storage_dir=here"], "split.model_storage_dir=here is relative"),
        (["a b"], "settings are written key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    assert message in refusal_of(overrides)


def test_a_home_folder_is_written_as_a_tilde_in_any_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a b"))
    config = compose(["home=~/flapp", "dataset.source=~", "model.pretrained=~/.flapp/runs/mine-1/model.safetensors"])
    assert config.home == f"{tmp_path}/a b/flapp"
    assert config.dataset.source == f"{tmp_path}/a b"
    assert config.model.pretrained == f"{tmp_path}/a b/.flapp/runs/mine-1/model.safetensors"
    others = ["run_name=a~b", "run_name='x=~/y'", "~model", "lora.targets=[~/x]", "home=~a/b", "--config-dir=~/x"]
    assert expand_words(others) == others


def test_front_doors_take_a_relative_home_from_where_they_stand(tmp_path: Path) -> None:
    assert compose(["home=here"], base=tmp_path).home == str(tmp_path / "here")


def test_config_json_wins_over_overrides() -> None:
    text = to_json(compose(["seed=5"]))
    loaded, _ = load({"config-json": text, "overrides": "seed=7"}, {})
    assert loaded.seed == 5
    assert load({"config-json": "", "overrides": "seed=7 'model.dropout=0.5'"}, {})[0].seed == 7


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}'])
def test_a_broken_config_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        load({"config-json": text}, {})


def test_node_config_is_read_and_a_misspelt_key_refused() -> None:
    site = read_node_config({"client-id": 3})
    assert site.client_id == "3"
    assert read_node_config({"partition-id": 1, "num-partitions": 4}).num_partitions == 4
    with pytest.raises(ConfigError, match="node-config has cleint-id, which is not a setting: did you mean client-id"):
        read_node_config({"cleint-id": "3"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "leaves home/runs") for name in ("../x", "/etc/x", "a/../../x", ".")),
        ("a\nb", r"run_name='a\\nb' has characters that cannot be printed"),
        ("a\x1b[31m", "has characters that cannot be printed"),
        ("a\u2028b", "has characters that cannot be printed"),
        ("n" * 256, "has more than the 255 bytes of a file name: give a shorter name"),
        ("sweep/" + "é" * 128, "has more than the 255 bytes of a file name"),
    ],
)
def test_a_run_name_that_no_folder_can_have_is_refused_in_one_line(name: str, said: str) -> None:
    values = json.loads(to_json(compose([]))) | {"run_name": name}
    with pytest.raises(ConfigError, match=said) as caught:
        from_dict(values)
    assert len(str(caught.value).splitlines()) == 1


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    parts = list(itertools.product((0, 1), ("1", "11"), (1, 11)))
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert derive_seed(0, "1", 1) == derive_seed(0, "1", 1) < 2**63


def settings_in(path: Path) -> dict[str, Any]:
    """Return the settings of a file in conf/ by their dotted names."""
    tree = OmegaConf.load(path)
    flat: dict[str, Any] = {}
    for key, value in typing.cast(dict[str, Any], OmegaConf.to_container(tree)).items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if key.partition(".")[0] not in ("defaults", "hydra")}


def test_every_setting_and_its_default_is_written_once() -> None:
    known = {name for name, kind in setting_types().items() if not is_dataclass(kind)}
    defaults = settings_in(CONF / "config.yaml")
    assert set(defaults) == known
    switches = {"checkpoint.enabled", "lora.enabled", "split.auto_save_split_models"}  # choices name them either way
    for group in set(GROUPS) - {"experiment"}:
        for path in (CONF / group).glob("*.yaml"):
            start = "" if "@package _global_" in path.read_text() else f"{group}."
            chosen = {f"{start}{key}": value for key, value in settings_in(path).items()}
            repeated = {key for key, value in chosen.items() if value == defaults[key] and value != "???"}
            assert repeated <= switches, path


@pytest.mark.parametrize("name", ["cifar10_fedlora", "cifar100_fedlora"])
def test_fedlora_over_cifar_never_starts_from_random_weights(name: str, tmp_path: Path) -> None:
    config = compose([f"experiment={name}", f"home={tmp_path}"])
    assert config.model.pretrained == str(tmp_path / "vit_b_16.pth")  # refused by preflight where it is missing


def test_a_run_is_named_after_its_experiment_and_the_time() -> None:
    assert re.fullmatch(r"toy_regression-\d{8}-\d{6}", compose(["experiment=toy_regression"]).run_name)


@pytest.mark.parametrize("word", ["seed=0,1", "model=linear,cnn", "seed=range(3)"])
def test_several_values_without_a_sweep_say_how_to_sweep(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is several values: add -m for a sweep, a run with each of them .*\)$"):
        compose([word])


def test_a_list_is_advised_only_for_a_setting_that_takes_one() -> None:
    with pytest.raises(ConfigError, match=r"-m lora.targets=qkv,proj\), or write a list as lora.targets=\[qkv,proj\]"):
        compose(["lora.targets=qkv,proj"])
