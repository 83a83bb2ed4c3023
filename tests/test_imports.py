"""What a client and a command import before they can begin to work: in a deployment every message is a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flapp.config.load import CONF, compose, to_json
from flapp.model.adapter_files import export_adapter
from flapp.model.build import build_model
from flapp.model.files import save_tensors
from flapp.model.lora import add_lora, mark_only_lora_as_trainable
from tests.support.leaf_files import as_leaf, draw_samples, write_leaf

HEAVY = "PIL hydra matplotlib omegaconf pandas peft ray scipy sklearn torchvision transformers"
CLIENT = """
import json, sys
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from flapp import client_app
from flapp.architecture import build
from flapp.config.load import load
from flapp.messages import TRAIN, Instructions, pack_instructions, source_digest

run_config, site = json.loads(sys.argv[1]), json.loads(sys.argv[2])
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
settings, _ = load(run_config, site)
arrays = ArrayRecord(build(settings.model, settings.dataset).state_dict())
message = pack_instructions(1, TRAIN, Instructions("0", 1, "imports", source_digest()), arrays)
message.metadata.__dict__["_message_id"] = "1"
reply = client_app.app(message, Context(1, 1, site, RecordDict(), run_config))
assert not reply.has_error(), reply.error
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imports_of_training(home: Path, site: dict[str, str], *overrides: str) -> set[str]:
    """Train one message in a new process and return what is imported by then, by the names of the packages."""
    settings = compose([f"home={home}", "run_name=imports", *overrides])
    words = [json.dumps({"config-json": to_json(settings)}), json.dumps(site | {"checkpoint-dir": str(home)})]
    command = [sys.executable, "-c", CLIENT, *words]
    root = Path(CONF).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_linear_client_imports_nothing_heavy_but_pytorch(tmp_path: Path) -> None:
    from flapp.data.sources import ensure_artifacts

    ensure_artifacts(tmp_path / "data", "regression")
    found = imports_of_training(tmp_path, {"client-id": "0"}, "experiment=toy_regression", "train.steps=1")
    assert "torch" in found
    assert not found & set(HEAVY.split())


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_cnn_over_a_shard_imports_nothing_heavy_but_pytorch(tmp_path: Path, streaming: str) -> None:
    from flapp.data.shards.build import write_shards

    shards = tmp_path / "shards"
    write_shards(write_leaf(tmp_path / "raw", as_leaf(draw_samples(20, 20, 20))), shards, "natural", 3)
    site = {"client-id": "0", "shard-path": str(shards / "client_0")}
    overrides = ["experiment=femnist_fedavg", "clients=3", "train.steps=1", f"distributed_data.streaming={streaming}"]
    assert not imports_of_training(tmp_path, site, *overrides) & set(HEAVY.split())


COMMAND = """
import json, sys
from tools import run

sys.argv[0] = "run"
status = run.main()
print(json.dumps([status, sorted({"flwr", "torch", "torchvision"} & set(sys.modules))]))
"""
START = """
import json, sys
from pathlib import Path
from flapp.config.load import compose
from flapp.server.preflight import check_run
from tools.running.overview import overview

settings = compose(sys.argv[1:])
check_run(settings, clients_here=True, quick=True)
overview(settings)
print(json.dumps([0, sorted({"sklearn", "torch", "torchvision"} & set(sys.modules))]))
"""
LORA = ["strategy=fedlora", "lora=default"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with prepared digits, and weights and adapters that do not fit their model."""
    from flapp.data.sources import ensure_artifacts

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


def outcome(home: Path, code: str, *words: str) -> tuple[int, list[str], str]:
    """Run code in a new process with settings; return the exit status, the packages imported, and stderr."""
    command = [sys.executable, "-c", code, f"home={home}", "run_name=no", *words]
    root = Path(CONF).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    status, found = json.loads(done.stdout.splitlines()[-1])
    return status, found, done.stderr


@pytest.mark.parametrize(
    ("words", "line", "allowed"),
    [
        (["model.image_size=30"], "set model.image_size to a multiple of 4", []),
        (["split=auto", "split.split_config=1-9"], "split.split_config=1-9 does not go with model=vit_tiny", []),
        ([*LORA, "lora.targets=[nope]"], "lora.targets=nope matches no layer of the model: choose among", []),
        ([*LORA, "lora.rank=65"], "lower lora.rank or leave it out", []),
        (["model.pretrained={home}/shapes.safetensors"], "1 misshapen, first encoder.ln.weight", []),
        (["model.pretrained={home}/names.safetensors"], "44 missing, first class_token", []),
        ([*LORA, "lora.adapter={home}/rank"], "set lora.rank and lora.alpha to the adapter's", []),
        ([*LORA, "lora.adapter={home}/classes"], "2 misshapen, first heads.head.weight", []),
        (["clients=100", "partition.alpha=0.1"], "raise partition.alpha, lower partition.min_size", []),
        (["model.pretrained={home}/shapes.pth"], "1 misshapen, first encoder.ln.weight", ["torch"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_said_before_anything_slow_is_imported(
    home: Path, words: list[str], line: str, allowed: list[str]
) -> None:
    status, found, said = outcome(home, COMMAND, *[word.format(home=home) for word in words])
    assert status == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said
    assert found == allowed
    assert not (home / "runs").exists()


@pytest.mark.parametrize("words", [LORA, ["model=cnn"]], ids=" ".join)
def test_a_command_checks_and_describes_its_run_without_pytorch(home: Path, words: list[str]) -> None:
    assert outcome(home, START, *words)[1] == []
