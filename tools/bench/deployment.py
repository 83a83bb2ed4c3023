"""An idle round over a SuperLink and three SuperNodes: flapp on its own SuperNodes, against a stock app on stock ones.

Both are asked to train and to evaluate by all clients in every round, with next to no work in either. The stock app
is what Flower's documentation starts with: its FedAvg, and a client in NumPy, which imports no PyTorch.
"""

import contextlib
import itertools
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from flapp.config.load import compose, to_json
from tools import supernode
from tools.bench import STOCK_PROJECT, Row
from tools.deployment.processes import HOST, Processes, SuperLinkError, answers, environment, free_port, program
from tools.deployment.superlink import CONNECTION, SuperLink

TURNS, ROUNDS, NODES = 2, 5, 3
START_SECONDS, RUN_SECONDS = 60, 300
APP = Path(__file__).resolve().parents[2]
STOCK_APP = """
import time
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 100})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

@client.evaluate()
def evaluate(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 30, "loss": 0.0})}), reply_to=message)

@server.main()
def main(grid, context):
    def note_end(server_round, arrays):
        with open(context.run_config["ends"], "a") as file:
            print(time.time(), file=file)

    arrays = ArrayRecord([np.zeros((1, 10), np.float32), np.zeros(1, np.float32)])
    strategy = FedAvg(min_train_nodes=NODES, min_evaluate_nodes=NODES, min_available_nodes=NODES)
    strategy.start(grid, arrays, num_rounds=context.run_config["rounds"], evaluate_fn=note_end)
"""
STOCK_SETTINGS = """rounds = 0
ends = ""
"""


@contextlib.contextmanager
def deployment(folder: Path, node_command: list[str]) -> Iterator[SuperLink]:
    """Run a SuperLink and NODES SuperNodes, each below `folder`, and yield the SuperLink to submit runs to."""
    processes = Processes(secrets.token_hex(16))
    address = f"{HOST}:{free_port()}"

    def start(name: str, command: list[str]) -> None:
        home = folder / name
        home.mkdir(parents=True)
        with (home / "log.txt").open("wb") as log:
            subprocess.Popen(
                [*command, "--insecure", "--isolation", "subprocess", "--host", HOST],
                env=environment(home, processes.token),
                cwd=home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(ports: list[int]) -> None:
        end = time.monotonic() + START_SECONDS
        while not all(answers(port) for port in ports):
            if time.monotonic() > end:
                raise SuperLinkError(f"not all of the deployment in {folder} answers after {START_SECONDS} s")
            time.sleep(0.1)

    try:
        port = int(address.rpartition(":")[2])
        no_install = "--disable-runtime-dependency-installation"
        start("superlink", [program("flower-superlink"), "--port", str(port), no_install])
        wait([port])
        ports = [free_port() for _ in range(NODES)]
        for number, own in enumerate(ports):
            options = ["--superlink", address, "--port", str(own), "--node-config", f'client-id="{number}"']
            start(f"client_{number}", [*node_command, *options])
        wait(ports)
        with SuperLink(address) as superlink:
            yield superlink
    finally:
        processes.stop()


def run_rounds(superlink: SuperLink, app: Path, settings: str, read_ends: Callable[[], list[float]]) -> list[float]:
    """Run an app and return the seconds from each of its rounds' end to the next; those of the first are unknown."""
    run_id = superlink.flwr("run", str(app), CONNECTION, "-c", settings)["run-id"]
    end = time.monotonic() + RUN_SECONDS
    while len(ends := read_ends()) < ROUNDS:
        if time.monotonic() > end:
            raise SuperLinkError(f"{app.name} had {len(ends)} rounds in {RUN_SECONDS} s: {superlink.status(run_id)}")
        time.sleep(0.2)
    return [after - before for before, after in itertools.pairwise(ends)]


def stock_rounds(superlink: SuperLink, folder: Path, turn: int) -> list[float]:
    """Run the stock app, written to `folder`, and return its rounds' seconds."""
    (folder / "stock").mkdir(exist_ok=True)
    (folder / "stock" / "__init__.py").touch()
    (folder / "stock" / "app.py").write_text(STOCK_APP.replace("NODES", str(NODES)))
    (folder / "pyproject.toml").write_text(STOCK_PROJECT + STOCK_SETTINGS)
    ends = folder / f"ends-{turn}"
    ends.touch()
    # it notes the start of its first round as well
    return run_rounds(
        superlink,
        folder,
        f'rounds={ROUNDS} ends="{ends}"',
        lambda: [float(line) for line in whole_lines(ends)[1:]],
    )


def flapp_rounds(superlink: SuperLink, folder: Path, turn: int) -> list[float]:
    """Run flapp's toy regression, one step a client and round, and return its rounds' seconds."""
    words = ["experiment=toy_regression", f"home={folder}", f"run_name=turn-{turn}", f"clients={NODES}"]
    words += [f"num_rounds={ROUNDS}", "train.steps=1", "evaluate.every=1", "evaluate.personal_epochs=0"]
    config = compose(words)
    settings = folder / "run.toml"
    settings.write_text(f"config-json = {json.dumps(to_json(config))}\n")
    lines = config.runs_dir / config.run_name / "metrics.jsonl"

    def read_ends() -> list[float]:
        found = [json.loads(line) for line in whole_lines(lines)]
        return [line["time"] for line in found if line["kind"] == "evaluate"]

    return run_rounds(superlink, APP, str(settings), read_ends)


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that is being written, or none while it is not there."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def rows() -> list[Row]:
    """Run both apps in turn, each over a deployment of its own that idles meanwhile, and compare their medians."""
    stock: list[float] = []
    ours: list[float] = []
    with tempfile.TemporaryDirectory(prefix="flapp-") as root, contextlib.ExitStack() as stack:
        folders = [Path(root) / name for name in ("stock", "flapp")]
        commands = [[program("flower-supernode")], [sys.executable, supernode.__file__]]
        links = [stack.enter_context(deployment(*pair)) for pair in zip(folders, commands, strict=True)]
        for turn in range(TURNS):
            stock += stock_rounds(links[0], folders[0], turn)
            ours += flapp_rounds(links[1], folders[1], turn)
    note = f"{NODES} SuperNodes, train and evaluate: {median(stock):.1f} s stock, in NumPy; {median(ours):.1f} s ours"
    ratio = median(ours) / median(stock)
    return [Row("idle round, deployed", "stock Flower", ratio, 0.5, higher_is_better=False, note=note)]
