"""The same federation as an ordinary Flower app: stock FedAvg, and clients that do the bare loop's work.

`flwr run` runs it in Flower's simulation, on a private SuperLink like flapp's own, with a node for each client.

    python -m tools.bench.stock WORK.json ENDS NODES
"""

import sys
import tempfile
import time
from pathlib import Path

from flapp.model import networks
from tools.bench import bare, write_stock_app
from tools.deployment.processes import available_cpus
from tools.deployment.superlink import CONNECTION, PrivateSuperLink

LOOK_SECONDS, STATUS_SECONDS = 1.0, 15  # the status as rarely as tools.run asks
APP = """
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from stock import bare
from stock.networks import LeafCNN, Linear

client = ClientApp()
server = ServerApp()

def build(work):
    shape, classes = work.model["shape"], work.model["classes"]
    return LeafCNN(shape[0], shape[2], classes) if work.model["name"] == "cnn" else Linear(shape, max(classes, 1))

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

@server.main()
def main(grid, context):
    def note_end(server_round, arrays):
        if server_round:
            with open(context.run_config["ends"], "a") as file:
                print("end", server_round, file=file)

    work, nodes = bare.read_work(Path(context.run_config["work"])), context.run_config["nodes"]
    drawn = len(work.drawn[0])
    strategy = FedAvg(
        fraction_train=drawn / nodes, fraction_evaluate=0.0, min_train_nodes=drawn, min_available_nodes=nodes
    )
    arrays = ArrayRecord(load_file(work.start))
    strategy.start(grid, arrays, num_rounds=len(work.drawn), evaluate_fn=note_end)
"""


def write_app(folder: Path, **settings: str | int) -> None:
    """Write the app, with copies of the bare loop and of the models' classes."""
    write_stock_app(folder, APP, *(str(module.__file__) for module in (bare, networks)), **settings)


def run(work: Path, ends: Path, nodes: int) -> str:
    """Run the app to its end; return an empty text, or what Flower says when it ended before its last round."""
    size = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={available_cpus()}"
    rounds = len(bare.read_work(work).drawn)
    with tempfile.TemporaryDirectory(prefix="flapp-stock-") as folder, PrivateSuperLink() as superlink:
        write_app(Path(folder), work=str(work), ends=str(ends), nodes=nodes)
        run_id = superlink.flwr("run", folder, CONNECTION, "--federation-config", size)["run-id"]
        asked = time.monotonic()
        while count_lines(ends) < rounds:
            time.sleep(LOOK_SECONDS)
            superlink.check_alive()
            if time.monotonic() - asked > STATUS_SECONDS:
                asked = time.monotonic()
                status = superlink.status(run_id)
                if status[0].startswith("finished") and count_lines(ends) < rounds:
                    return f"Flower says {': '.join(status)}"
    return ""


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])) or None)
