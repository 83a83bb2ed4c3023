"""A project of a user's own, edited: the same bytes in workers, after kill -9, by `flwr run`, and over SuperNodes."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import read_lines
from tests.support.commands import finish, start_tool, starting_runs
from tests.support.projects import BERT, EDITED, add_to_task, new_project
from tests.support.waiting import wait_for
from tools.deployment.superlink import CONNECTION, PrivateSuperLink

pytestmark = pytest.mark.slow

CASES = {
    "edited": "model.target=task:build_other model.kwargs={} train.loss=task:focal dataset.augment=false",
    "bert": "model.target=bert:build_model model.kwargs={} lora=default strategy=fedlora lora.targets=[q_lin,v_lin] "
    "dataset=custom dataset.name=greetings dataset.shape=[12] dataset.classes=2 dataset.target=bert:make_data "
    "dataset.augment=false train.loss=null evaluate.metrics=null evaluate.scores=null",
}
SETTINGS = "clients=2 partition=iid num_rounds=4 train.epochs=1 train.steps=3 evaluate.every=2 lora.rank=2"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a project in it, `mine`, that its user has edited."""
    home = tmp_path_factory.mktemp("own")
    project = new_project(home / "mine", "vision")
    add_to_task(project, EDITED)
    (project / "bert.py").write_text(BERT)
    return home


@pytest.fixture(scope="module")
def sites(home: Path) -> Iterator[Path]:
    """Start two SuperNodes that allow the project's code."""
    status, _, error = finish(start_tool(home, "federation", "up", "--clients", "2", "--allow-code", "mine"))
    assert status == 0, error
    yield home
    assert finish(start_tool(home, "federation", "down"))[0] == 0


def digest_in(home: Path, name: str) -> str:
    return str(json.loads((home / "runs" / name / "metrics.json").read_text())["model_sha256"])


def run_in_project(home: Path, name: str, *words: str) -> str:
    """Run tools.run in the project's folder and return the digest of the model."""
    status, said, error = finish(start_tool(home, "run", f"run_name={name}", *words, cwd=home / "mine"))
    assert status == 0, error
    found = re.search(r"sha256 ([0-9a-f]{64})\)", said)
    assert found
    return found[1]


@pytest.mark.parametrize("case", CASES)
def test_an_edited_project_ends_in_the_same_bytes_in_every_runtime(sites: Path, case: str) -> None:
    home, words = sites, f"{CASES[case]} {SETTINGS}".split()
    whole = run_in_project(home, f"{case}-inline", "deployment.workers=2", *words)
    assert run_in_project(home, f"{case}-sites", "deployment=local", *words) == whole
    with PrivateSuperLink() as superlink, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAPP_HOME", str(home))
        overrides = " ".join(["experiment=mine", f"home={home}", f"run_name={case}-flwr", *words])
        run_id = superlink.flwr("run", str(home / "mine"), CONNECTION, "-c", f"overrides={json.dumps(overrides)}")[
            "run-id"
        ]
        wait_for(lambda: superlink.status(run_id)[0].startswith("finished"))
        assert superlink.status(run_id)[0] == "finished:completed"
    assert digest_in(home, f"{case}-flwr") == whole


def test_a_project_killed_in_a_round_is_resumed_to_the_same_bytes_and_its_stores_verify(home: Path) -> None:
    words = f"{CASES['edited']} {SETTINGS} train.steps=200".split()
    whole = run_in_project(home, "killed-whole", *words)
    path = home / "runs" / "killed"
    with starting_runs(home) as start:
        process = start("run_name=killed", *words, cwd=home / "mine")
        wait_for(lambda: (path / "metrics.jsonl").exists() and len(read_lines(path, "round")) >= 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_in_project(home, "killed", "resume=true", *words) == whole
    assert finish(start_tool(home, "checkpoints", "verify", str(home / "checkpoints")))[0] == 0
