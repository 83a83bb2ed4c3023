"""What a client imports before it can begin to work: in a deployment every message is a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flapp import config
from tests.leaf_files import as_leaf, draw_samples, write_leaf

HEAVY = "PIL hydra matplotlib omegaconf pandas peft ray scipy sklearn torchvision transformers"
CLIENT = """
import json, sys
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from flapp import client_app
from flapp.architecture import build
from flapp.config import load
from flapp.messages import TRAIN, Order, pack_order, source_digest

run_config, site = json.loads(sys.argv[1]), json.loads(sys.argv[2])
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
settings, _ = load(run_config, site)
arrays = ArrayRecord(build(settings.model, settings.dataset).state_dict())
message = pack_order(1, TRAIN, Order("0", 1, "imports", source_digest()), arrays)
message.metadata.__dict__["_message_id"] = "1"
reply = client_app.app(message, Context(1, 1, site, RecordDict(), run_config))
assert not reply.has_error(), reply.error
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imports_of_training(home: Path, site: dict[str, str], *overrides: str) -> set[str]:
    """Train one message in a new process and return what is imported by then, by the names of the packages."""
    settings = config.compose([f"home={home}", "run_name=imports", *overrides])
    words = [json.dumps({"config-json": config.to_json(settings)}), json.dumps(site | {"checkpoint-dir": str(home)})]
    command = [sys.executable, "-c", CLIENT, *words]
    root = Path(config.CONF).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_linear_client_imports_nothing_heavy_but_pytorch(tmp_path: Path) -> None:
    from flapp.data import ensure_artifacts

    ensure_artifacts(tmp_path / "data", "regression")
    found = imports_of_training(tmp_path, {"client-id": "0"}, "experiment=toy_regression", "train.steps=1")
    assert "torch" in found
    assert not found & set(HEAVY.split())


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_cnn_over_a_shard_imports_nothing_heavy_but_pytorch(tmp_path: Path, streaming: str) -> None:
    from flapp.data import write_shards

    shards = tmp_path / "shards"
    write_shards(write_leaf(tmp_path / "raw", as_leaf(draw_samples(20, 20, 20))), shards, "natural", 3)
    site = {"client-id": "0", "shard-path": str(shards / "client_0")}
    overrides = ["experiment=femnist_fedavg", "clients=3", "train.steps=1", f"distributed_data.streaming={streaming}"]
    assert not imports_of_training(tmp_path, site, *overrides) & set(HEAVY.split())
