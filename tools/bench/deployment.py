"""An idle round over a SuperLink and three SuperNodes: flapp on its own SuperNodes, against a stock app on stock ones.

In both apps, all clients train and evaluate in every round, with next to no work to do. The stock app is what Flower's
documentation starts with: its FedAvg, and a client in NumPy, which does not import PyTorch.
"""

import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from flapp.config.load import compose
from tools import federation
from tools.bench import Row
from tools.bench.stock import run_app, write_app
from tools.deployment.processes import SuperLinkError
from tools.deployment.submit import run_once
from tools.deployment.superlink import SuperLink

TURNS, ROUNDS, NODES = 2, 5, 3
CLIENT = """
import numpy as np

def initial(config):
    return ArrayRecord([np.zeros((1, 10), np.float32), np.zeros(1, np.float32)])

@client.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 100})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

@client.evaluate()
def evaluate(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 30, "loss": 0.0})}), reply_to=message)
"""


@contextlib.contextmanager
def deployed(home: Path, *options: str) -> Iterator[SuperLink]:
    """Bring up a federation of NODES sites below `home`, and give its SuperLink."""
    folder = home / "federation"
    with contextlib.redirect_stdout(sys.stderr):
        if federation.main(["up", "--folder", str(folder), "--clients", str(NODES), *options]):
            raise SuperLinkError(f"the federation in {folder} did not start")
    try:
        with SuperLink(federation.read_federation(folder).address) as superlink:
            yield superlink
    finally:
        federation.take_down(folder)


def stock_rounds(superlink: SuperLink, home: Path, turn: int) -> list[float]:
    """Run the stock app and return the seconds of its rounds."""
    app, ends = home / f"app-{turn}", home / f"ends-{turn}"
    write_app(app, CLIENT, ends=str(ends), nodes=NODES, drawn=NODES, evaluated=NODES, rounds=ROUNDS)
    return steps(run_app(superlink, app, ends, ROUNDS))


def flapp_rounds(home: Path, turn: int) -> list[float]:
    """Run flapp's toy regression, one step per client and round, and return the seconds of its rounds."""
    words = ["experiment=toy_regression", "deployment=local", f"home={home}", f"run_name=turn-{turn}"]
    words += [f"clients={NODES}", f"num_rounds={ROUNDS}", "train.steps=1", "evaluate.every=1"]
    summary = run_once(compose([*words, "evaluate.personal_epochs=0"]))
    lines = map(json.loads, (Path(summary["run_dir"]) / "metrics.jsonl").read_text().splitlines())
    return steps([line["time"] for line in lines if line["kind"] == "evaluate"])


def steps(ends: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ends)]


def rows() -> list[Row]:
    """Run both apps in turn and compare their medians. Each has its own deployment, idle while the other app runs."""
    stock, ours = list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="flapp-") as root, contextlib.ExitStack() as stack:
        theirs, home = Path(root) / "stock", Path(root) / "flapp"
        superlink = stack.enter_context(deployed(theirs, "--plain"))
        stack.enter_context(deployed(home))
        for turn in range(TURNS):
            stock += stock_rounds(superlink, theirs, turn)
            ours += flapp_rounds(home, turn)
    note = f"{NODES} SuperNodes, train and evaluate: {median(stock):.1f} s stock, in NumPy; {median(ours):.1f} s ours"
    return [Row("idle round, deployed", "stock Flower", median(ours) / median(stock), 0.5, False, note=note)]
