"""What a client and a command import before they can begin to work: in a deployment every message is a new process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import CONF, compose, to_json
from flapp.data.shards.build import write_shards
from flapp.data.sources import ensure_artifacts
from flapp.model.adapter_files import export_adapter
from flapp.model.build import build_model
from flapp.model.files import save_tensors
from flapp.model.lora import add_lora, mark_only_lora_as_trainable
from tests.support.leaf_files import as_leaf, draw_samples, write_leaf

HEAVY = "PIL torch._dynamo sympy hydra matplotlib omegaconf pandas peft ray scipy sklearn torchvision transformers"
CLIENT = """
import json, sys
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from flapp import client_app
from flapp.architecture import build
from flapp.config.load import load
from flapp.messages import TRAIN, Instructions, pack_instructions, source_digest
from flapp.model.lora import add_lora, layout_of

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
for run_config, site in json.loads(sys.argv[1]):
    settings, _ = load(run_config, site)
    arrays = ArrayRecord(build(settings.model, settings.dataset).state_dict())
    message = pack_instructions(1, TRAIN, Instructions("0", 1, source_digest()), arrays)
    message.metadata.__dict__["_message_id"] = "1"
    reply = client_app.app(message, Context(1, 1, site, RecordDict(), run_config))
    assert not reply.has_error(), reply.error
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
add_lora(model, 2, 2.0, ["*"])  # which looks for transformers' layers
layout_of(model)
print(json.dumps(sorted(sys.modules)))
"""


def in_a_new_process(code: str, facts: Any) -> Any:
    """Run code with these facts as its argument, and return what its last line says."""
    command = [sys.executable, "-c", code, json.dumps(facts)]
    root = Path(CONF).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_clients_over_artifacts_and_shards_import_nothing_heavy_but_pytorch(tmp_path: Path) -> None:
    for dataset in ("regression", "digits"):
        ensure_artifacts(tmp_path / "data", dataset)
    shards = tmp_path / "shards"
    write_shards(write_leaf(tmp_path / "raw", as_leaf(draw_samples(20, 20, 20))), shards, "natural", 3)
    site = {"client-id": "0", "shard-path": str(shards / "client_0"), "checkpoint-dir": str(tmp_path)}
    cnn = ["experiment=femnist_fedavg", "clients=3"]
    runs = [
        ["experiment=toy_regression"],
        ["experiment=toy_regression"],
        ["experiment=digits_fedavg"],
        *([*cnn, f"distributed_data.streaming={each}"] for each in ("true", "false")),
    ]
    settings = [compose([f"home={tmp_path}", "run_name=imports", "train.steps=1", *words]) for words in runs]
    found = set(in_a_new_process(CLIENT, [({"config-json": to_json(each)}, site) for each in settings]))
    assert "torch" in found
    assert not found & set(HEAVY.split())


COMMAND = """
import contextlib, io, json, sys
from tools import run

outcomes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["run", *words]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as said:
        status = run.main()
    assert shown.getvalue() == ""
    outcomes.append([status, said.getvalue(), sorted({"flwr", "torch", "torchvision"} & set(sys.modules))])
print(json.dumps(outcomes))
"""
START = """
import json, sys
from pathlib import Path
from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import compose
from flapp.data import DistributedShardLoader
from flapp.data.shards.build import write_shards
from flapp.server.preflight import check_run
from tools.running.overview import overview

runs, rounds, source, shards = json.loads(sys.argv[1])
for words in runs:
    settings = compose(words)
    check_run(settings, clients_here=True, quick=True)
    overview(settings)
with ChunkManager(Path(rounds), create=False) as store:
    assert store.rounds()[0].metrics == {"loss": 1.5}
    assert store.verify().problems == ()
DistributedShardLoader(write_shards(Path(source), Path(shards), "natural").shard_path("0"))
print(json.dumps(sorted({"sklearn", "torch", "torchvision"} & set(sys.modules))))
"""
LORA = "strategy=fedlora lora=default"
MISTAKES = (  # words, and what is said; only the last needs PyTorch
    ("num_round=3", "num_round is not a setting: did you mean num_rounds?"),
    ("deployment.client_cpus=9999", "deployment.client_cpus=9999 is more than the"),
    ("model.image_size=30", "set model.image_size to a multiple of 4"),
    ("split=auto split.split_config=1-9", "split.split_config=1-9 does not go with model=vit_tiny"),
    (f"{LORA} lora.targets=[nope]", "lora.targets=nope matches no layer of the model: choose among"),
    (f"{LORA} lora.rank=65", "lower lora.rank or leave it out"),
    ("model.pretrained={home}/shapes.safetensors", "1 misshapen, first encoder.ln.weight"),
    ("model.pretrained={home}/names.safetensors", "has tensors of another network, first net.class_token"),
    (LORA + " lora.adapter={home}/rank", "set lora.rank and lora.alpha to the adapter's"),
    (LORA + " lora.adapter={home}/classes", "2 misshapen, first heads.head.weight"),
    ("clients=100 partition.alpha=0.1", "raise partition.alpha, lower partition.min_size"),
    ("model.pretrained={home}/shapes.pth", "1 misshapen, first encoder.ln.weight"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with prepared digits, and weights and adapters that do not fit their model."""
    home = tmp_path_factory.mktemp("imports")
    ensure_artifacts(home / "data", "digits")
    state = build_model("vit_tiny", (32, 32, 1), 10).state_dict()
    shapes = state | {"encoder.ln.weight": torch.zeros(65)}
    save_tensors(shapes, home / "shapes.safetensors")
    torch.save(shapes, home / "shapes.pth")
    save_tensors({f"net.{key}": tensor for key, tensor in state.items()}, home / "names.safetensors")
    for name, rank, classes in (("rank", 4, 10), ("classes", 8, 7)):
        model = build_model("vit_tiny", (32, 32, 1), classes)
        add_lora(model, rank, 16.0)
        mark_only_lora_as_trainable(model)
        export_adapter(model, home / name, "base")
    return home


@pytest.mark.slow
def test_a_mistake_is_said_before_anything_slow_is_imported(home: Path) -> None:
    common = [f"home={home}", "run_name=no"]
    asked = [[*common, *words.format(home=home).split()] for words, _ in MISTAKES]
    for (words, line), (status, said, found) in zip(MISTAKES, in_a_new_process(COMMAND, asked), strict=True):
        assert status == 1, words
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert line in said
        assert found == (["torch"] if words.endswith(".pth") else []), words
    assert not (home / "runs").exists()


@pytest.mark.slow
def test_runs_are_checked_stores_read_and_shards_prepared_without_pytorch(
    home: Path, source: Path, tmp_path: Path
) -> None:
    runs = [[f"home={home}", "run_name=no", *words.split()] for words in (LORA, "model=cnn")]
    with ChunkManager(tmp_path / "chunks.db") as store:
        store.save_model_chunks({"w": torch.ones(3)}, 0, {"loss": 1.5})
    paths = [str(path) for path in (tmp_path / "chunks.db", source, tmp_path / "shards")]
    assert in_a_new_process(START, [runs, *paths]) == []
