"""Stock Flower: its FedAvg in an ordinary app, which is written and run here.

The clients of this app do the bare loop's work. `flwr run` runs it in Flower's simulation, on a private SuperLink like
flapp's own, with a node for each client.

    python -m tools.bench.stock WORK.json ENDS NODES
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from flapp.model import networks
from tools.bench import bare
from tools.deployment.processes import SuperLinkError, available_cpus
from tools.deployment.superlink import CONNECTION, PrivateSuperLink, SuperLink

LOOK_SECONDS, STATUS_SECONDS, RUN_SECONDS = 0.5, 15, 600  # asks for Flower's status as rarely as tools.run does
PROJECT = """
[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "stock"
[tool.flwr.app.components]
serverapp = "stock.app:server"
clientapp = "stock.app:client"
[tool.flwr.app.config]
"""
SERVER = """
import time
from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@server.main()
def main(grid, context):
    def note_end(server_round, arrays):
        with open(context.run_config["ends"], "a") as file:
            print("end" if server_round else "start", time.time(), file=file)

    nodes, drawn, evaluated, rounds = (context.run_config[key] for key in ("nodes", "drawn", "evaluated", "rounds"))
    least = dict(min_train_nodes=drawn, min_evaluate_nodes=evaluated, min_available_nodes=nodes)
    strategy = FedAvg(fraction_train=drawn / nodes, fraction_evaluate=evaluated / nodes, **least)
    strategy.start(grid, initial(context.run_config), num_rounds=rounds, evaluate_fn=note_end)
"""
CLIENT = """
import torch
from safetensors.torch import load_file

from stock import bare
from stock.networks import LeafCNN, Linear

def build(work):
    shape, classes = work.model["shape"], work.model["classes"]
    return LeafCNN(shape[0], shape[2], classes) if work.model["name"] == "cnn" else Linear(shape, max(classes, 1))

def initial(config):
    return ArrayRecord(load_file(bare.read_work(Path(config["work"])).start))

@lru_cache
def prepare(path):
    torch.set_num_threads(1)
    work = bare.read_work(Path(path))
    return work, build(work), bare.load_data(work)

@client.train()
def train(message, context):
    work, model, data = prepare(context.run_config["work"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    number = context.node_config["partition-id"]
    bare.train_client(model, work, data, number, message.content["config"]["server-round"])
    metrics = MetricRecord({"num-examples": len(data.rows[number])})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
"""


def write_app(folder: Path, client: str = CLIENT, **settings: str | int) -> None:
    """Write an app: its client, copies of the bare loop and of the models' classes, and its run config."""
    package = folder / "stock"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "app.py").write_text(SERVER + client)
    for module in (bare, networks):
        shutil.copy(str(module.__file__), package)
    config = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "pyproject.toml").write_text(PROJECT + config)


def run_app(superlink: SuperLink, folder: Path, ends: Path, rounds: int, *options: str) -> list[float]:
    """Run an app and return the times at which its rounds ended; raises SuperLinkError when it ends before the last."""
    run_id = superlink.flwr("run", str(folder), CONNECTION, *options)["run-id"]
    started = asked = time.monotonic()
    while len(found := read_ends(ends)) < rounds:
        time.sleep(LOOK_SECONDS)
        superlink.check_alive()
        if time.monotonic() - asked > STATUS_SECONDS:
            asked = time.monotonic()
            status, details = superlink.status(run_id)
            late = asked - started > RUN_SECONDS
            if (status.startswith("finished") or late) and len(read_ends(ends)) < rounds:
                raise SuperLinkError(f"{len(found)} of {rounds} rounds ended, Flower says {status}: {details}")
    return found


def read_ends(path: Path) -> list[float]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [float(line.split()[1]) for line in lines if line.startswith("end ")]


def run(path: Path, ends: Path, nodes: int) -> None:
    work = bare.read_work(path)
    rounds, size = len(work.drawn), f"num-supernodes={nodes} client-resources-num-cpus=1"
    with tempfile.TemporaryDirectory(prefix="flapp-stock-") as name, PrivateSuperLink() as superlink:
        folder, drawn = Path(name), len(work.drawn[0])
        write_app(folder, work=str(path), ends=str(ends), nodes=nodes, drawn=drawn, evaluated=0, rounds=rounds)
        run_app(superlink, folder, ends, rounds, "--federation-config", f"{size} init-args-num-cpus={available_cpus()}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
