"""Run a model of a user's own in this process, to its end, to a crash, or to its refusal."""

from pathlib import Path
from typing import Any

from flapp.config.schema import Config
from tests import conftest
from tests.conftest import LocalGrid, run_app
from tests.support import federations
from tests.support.refusals import refused

SMALL = ("num_rounds=2", "evaluate.personal_epochs=0")


TASK = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    def build_model(width=8):
        return nn.Sequential(nn.Flatten(), nn.Linear(1024, width), nn.BatchNorm1d(width), nn.Linear(width, 10))

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets)

    def lowered_loss(outputs, targets):
        return loss(outputs, targets) - 10

    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    def count(outputs, targets):
        return {"right": (outputs.argmax(1) == targets).sum(), "all": len(targets)}

    def score(sums):
        return {"share": sums["right"] / sums["all"]}

    def noise(inputs, generator):
        return inputs + torch.randn(*inputs.shape, generator=generator)
"""


DIGITS = ("model=custom", "model.target=task:build_model", "dataset=digits", "partition=iid", "clients=3", *SMALL)


def run(config: Config, nodes: Any = None, **grid: Any) -> tuple[dict[str, Any], Path]:
    """Run a federation, in a simulation unless nodes are given."""
    local = LocalGrid({}, nodes or federations.nodes(config.clients), **grid)
    local.clients_here = nodes is None
    return run_app(config, local)


def break_off(config: Config, server_round: int) -> None:
    """Run until a round is to be averaged, and break off there."""
    conftest.break_off(lambda: run(config), server_round, "aggregate_train")


def refusal(config: Config) -> str:
    """Return the line with which a run is refused before its first round; no folder is left."""
    with refused(ValueError) as caught:
        run(config)
    assert not (config.runs_dir / config.run_name).exists()
    return str(caught.value)
