"""Settings of differential privacy: what goes together, what older runs say, and where noise is secure."""

import sys
from dataclasses import asdict

import pytest

from flapp import central
from flapp.config.load import compose, differences, from_dict
from flapp.config.schema import ConfigError
from tests.conftest import refusal_of

TOY = ("experiment=toy_regression", "num_rounds=3", "privacy=central")


def test_without_its_package_the_server_refuses_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    central._least_multiplier.cache_clear()
    with pytest.raises(ConfigError, match=r"privacy=central needs the package dp-accounting on the server .*set"):
        central.describe_central(compose([*TOY, "privacy.epsilon=2.5"]))


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["strategy.aggregation=flora"], "strategy.aggregation=flora does more than average: use fedit, ffa, rolora"),
        (
            ["strategy.aggregation=fedsa", "evaluate.objective=personal_accuracy"],
            "strategy.aggregation=fedsa does more than average: use fedit, ffa, rolora",
        ),
        (["strategy.weighting=num-examples"], "num-examples does not: set strategy.weighting=uniform"),
        (["strategy.norm_limit=5"], "leave some out by the data of others: set strategy.norm_limit=null"),
        (["strategy.min_replies=2"], "could end the run by it: set strategy.min_replies=1"),
        (["strategy.target=mine:Mine"], "strategy.target=mine:Mine averages in a way of its own: leave it out"),
        (["evaluate.select=best"], "chooses by evaluations, which privacy=central does not protect: set evaluate"),
        (["stopping.metric=loss", "stopping.patience=1", "evaluate.every=1"], "not protect: set stopping.metric=null"),
        (["privacy.delta=0.1"], "lets the whole update of one in 10 clients leak"),
        (["privacy.count_noise=1"], "privacy.count_noise=1.0 has no effect: set privacy.clipping=adaptive"),
        (["privacy=none", "privacy.noise=secure"], "privacy.noise=secure has no effect with privacy=none: set privacy"),
        (
            ["privacy=local", "strategy.aggregation=fedit", "privacy.noise_multiplier=1"],
            "has no effect with privacy=lo",
        ),
        (
            ["privacy.enabled=true"],
            "privacy.enabled is now a choice: set privacy=local in place of privacy.enabled=true",
        ),
        (["privacy=full"], "privacy=full is not known: choose one of central, local, none"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(words: list[str], refusal: str) -> None:
    adapters = ["strategy=fedlora", "lora=default"] if any("aggregation" in word for word in words) else []
    chosen = [] if any(word.startswith("privacy=") for word in words) else ["privacy=central"]
    assert refusal in refusal_of([*adapters, *chosen, *words])


def test_settings_of_older_runs_are_read() -> None:
    values = asdict(compose(["privacy=local"]))
    old = {key: values["privacy"][key] for key in ("clipping_norm", "epsilon", "delta")}
    for enabled, kind in ((True, "local"), (False, "none")):
        assert from_dict(values | {"privacy": {"enabled": enabled, **old}}).privacy.kind == kind


def test_noise_is_secure_in_a_deployment_and_seeded_otherwise() -> None:
    found = {
        kind: central.is_secure(compose([*TOY, f"deployment={kind}"])) for kind in ("inline", "simulation", "local")
    }
    assert found == {"inline": False, "simulation": False, "local": True}
    assert central.is_secure(compose([*TOY, "privacy.noise=secure"]))


def test_a_run_cannot_be_resumed_with_noise_from_elsewhere() -> None:
    """A deployed run that is resumed on one machine must not go on with noise that every client knows."""
    begun, resumed = (compose([*TOY, f"deployment={kind}"]) for kind in ("local", "inline"))
    assert (begun.privacy.noise, resumed.privacy.noise) == ("secure", "seeded")
    assert any("privacy.noise" in change for change in differences(asdict(begun), resumed))
    assert not differences(asdict(begun), compose([*TOY, "privacy.noise=secure"]))
