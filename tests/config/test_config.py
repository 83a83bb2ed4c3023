"""Settings: every choice composes, and whatever is wrong is said in one line."""

import itertools
import json
import sys
import typing
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from flapp import central
from flapp.architecture import build
from flapp.config.load import (
    CONF,
    compose,
    derive_seed,
    differences,
    expand_words,
    from_dict,
    load,
    read_node_config,
    to_json,
)
from flapp.config.plain import setting_types
from flapp.config.schema import ConfigError
from flapp.custom import enable
from flapp.model.build import build_model
from flapp.model.files import save_tensors
from tests.support.refusals import refused

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


@pytest.mark.slow
@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_in_conf_composes_and_builds_its_model(group: str, choice: str, tmp_path: Path) -> None:
    if choice == "pretrained":
        save_tensors(build_model("vit_tiny", (8, 8, 3), 5).state_dict(), tmp_path / "model.safetensors")
    words = [word.replace("{folder}", str(tmp_path)) for word in NEEDS.get((group, choice), [])]
    composed = compose([f"{group}={choice}", *words], tmp_path)
    enable(composed)
    with torch.device("meta"):
        model = build(composed.model, composed.dataset)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert from_dict(json.loads(to_json(composed))) == composed


def test_a_tilde_and_a_relative_home_become_whole_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a b"))
    config = compose(["home=~/flapp", "dataset.source=~", "model.pretrained=~/.flapp/runs/mine-1/model.safetensors"])
    assert config.home == f"{tmp_path}/a b/flapp"
    assert config.dataset.source == f"{tmp_path}/a b"
    assert config.model.pretrained == f"{tmp_path}/a b/.flapp/runs/mine-1/model.safetensors"
    others = ["run_name=a~b", "run_name='x=~/y'", "~model", "lora.targets=[~/x]", "home=~a/b", "--config-dir=~/x"]
    assert expand_words(others) == others
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
    with refused(ConfigError, said):
        from_dict(values)


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


def test_fedlora_over_cifar_never_starts_from_random_weights(tmp_path: Path) -> None:
    for name in ("cifar10_fedlora", "cifar100_fedlora"):
        config = compose([f"experiment={name}", f"home={tmp_path}"])
        assert config.model.pretrained == str(tmp_path / "vit_b_16.pth")  # refused by preflight where it is missing


PRIVATE = ("experiment=toy_regression", "num_rounds=3", "privacy=central")


def test_without_its_package_the_server_refuses_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    central._least_multiplier.cache_clear()
    with pytest.raises(ConfigError, match=r"privacy=central needs the package dp-accounting on the server .*set"):
        central.describe_central(compose([*PRIVATE, "privacy.epsilon=2.5"]))


def test_settings_of_older_runs_are_read() -> None:
    values = asdict(compose(["privacy=local"]))
    old = {key: values["privacy"][key] for key in ("clipping_norm", "epsilon", "delta")}
    for enabled, kind in ((True, "local"), (False, "none")):
        assert from_dict(values | {"privacy": {"enabled": enabled, **old}}).privacy.kind == kind


def test_noise_is_secure_in_a_deployment_seeded_otherwise_and_stays_so_when_the_run_is_resumed() -> None:
    inline, simulated, deployed = (
        compose([*PRIVATE, f"deployment={kind}"]) for kind in ("inline", "simulation", "local")
    )
    chosen = compose([*PRIVATE, "privacy.noise=secure"])
    assert [central.is_secure(each) for each in (inline, simulated, deployed, chosen)] == [False, False, True, True]
    # A deployed run that is resumed on one machine must not go on with noise that every client knows.
    assert differences(asdict(deployed), inline) == ["privacy.noise was secure, is seeded"]
    assert not differences(asdict(deployed), chosen)
