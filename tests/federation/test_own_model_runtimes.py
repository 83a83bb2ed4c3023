"""A project of a user's own, edited: the same bytes in workers, after kill -9, by `flwr run`, and over SuperNodes."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import read_lines
from tests.support.commands import finish, start_tool, starting_runs
from tests.support.own_runs import run
from tests.support.projects import BERT, EDITED, add_to_task, new_project, settings_in
from tests.support.waiting import wait_for, wait_for_end
from tools.checkpoints import main as checkpoints
from tools.deployment.superlink import CONNECTION, PrivateSuperLink

pytestmark = pytest.mark.slow

EDITED_WORDS = "model.target=task:build_other model.kwargs={} train.loss=task:focal dataset.augment=false"
BERT_WORDS = (
    "model.target=bert:build_model model.kwargs={} lora=default strategy=fedlora lora.targets=[q_lin,v_lin] "
    "dataset=custom dataset.name=greetings dataset.shape=[12] dataset.classes=2 dataset.target=bert:make_data "
    "dataset.augment=false train.loss=null evaluate.metrics=null evaluate.scores=null"
)
SETTINGS = "clients=2 partition=iid num_rounds=2 train.epochs=1 train.steps=3 evaluate.every=2 lora.rank=2"


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


def run_here(home: Path, name: str, *words: str) -> str:
    """Run the project's settings in this process and return the digest of the model."""
    return str(run(settings_in(home / "mine", home, f"run_name={name}", *words))[0]["model_sha256"])


@pytest.fixture(scope="module")
def edited(home: Path) -> str:
    """Return the digest with which the edited project ends in this process."""
    return run_here(home, "edited-here", *EDITED_WORDS.split(), *SETTINGS.split())


def test_an_edited_project_ends_in_the_same_bytes_in_workers_and_over_supernodes(sites: Path, edited: str) -> None:
    words = f"{EDITED_WORDS} {SETTINGS}".split()
    assert run_in_project(sites, "edited-inline", "deployment.workers=2", *words) == edited
    assert run_in_project(sites, "edited-sites", "deployment=local", *words) == edited


def test_adapters_on_a_model_of_transformers_end_in_the_same_bytes_over_supernodes(sites: Path) -> None:
    words = f"{BERT_WORDS} {SETTINGS}".split()
    assert run_in_project(sites, "bert-sites", "deployment=local", *words) == run_here(sites, "bert-here", *words)


def test_an_edited_project_ends_in_the_same_bytes_by_flwr_run(home: Path, edited: str) -> None:
    with PrivateSuperLink() as superlink, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAPP_HOME", str(home))
        words = ["experiment=mine", f"home={home}", "run_name=edited-flwr", *EDITED_WORDS.split(), *SETTINGS.split()]
        overrides = f"overrides={json.dumps(' '.join(words))}"
        run_id = superlink.flwr("run", str(home / "mine"), CONNECTION, "-c", overrides)["run-id"]
        assert wait_for_end(superlink, run_id) == "finished:completed"
    assert digest_in(home, "edited-flwr") == edited


def test_a_project_killed_in_a_round_is_resumed_to_the_same_bytes_and_its_stores_verify(home: Path) -> None:
    words = f"{EDITED_WORDS} {SETTINGS} num_rounds=4 train.steps=100".split()
    path = home / "runs" / "killed"
    with starting_runs(home) as start:
        process = start("run_name=killed", "deployment.workers=0", *words, cwd=home / "mine")
        wait_for(lambda: (path / "metrics.jsonl").exists() and len(read_lines(path, "round")) >= 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (path / "metrics.json").exists()
    assert run_here(home, "killed", "resume=true", *words) == run_here(home, "killed-whole", *words)
    assert checkpoints(["verify", str(home / "checkpoints")]) == 0
