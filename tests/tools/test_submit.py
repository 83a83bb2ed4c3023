"""Submitting a run to a SuperLink on another machine: it is followed by its log; a lost run says how to continue."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from flapp.server.run_dir import SUMMARY
from tools.deployment import submit
from tools.deployment.processes import SuperLinkError
from tools.deployment.submit import RunError, follow_log, is_here, run_once, simulation_words
from tools.deployment.superlink import SuperLink
from tools.running import sweep

SIMULATION = ("deployment=simulation",)


def settings(home: Path, *words: str) -> Config:
    return compose([f"home={home}", "experiment=toy_regression", "run_name=far", *words])


class FarSuperLink(SuperLink):
    """A SuperLink elsewhere, that answers as told."""

    def __init__(self, *lines: str, status: str = "finished:completed") -> None:
        super().__init__("fl.example.org:8000")
        self.lines, self.state, self.stopped = lines, status, False

    def start(self) -> None:
        return

    def flwr(self, *arguments: str) -> dict[str, Any]:
        return {"run-id": "7"}

    def read_log(self, run_id: str) -> Iterator[str]:
        yield from self.lines
        if self.state == "lost":
            raise SuperLinkError("flwr log failed")

    def status(self, run_id: str) -> tuple[str, str]:
        return self.state, "in short"

    def stop_run(self, run_id: str) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("words", "here"),
    [
        ([], True),
        (["deployment=local"], True),
        (["deployment=local", "deployment.address=127.0.0.1:8000"], True),
        (["deployment=local", "deployment.address=fl.example.org:8000"], False),
    ],
)
def test_files_are_here_where_the_server_is(tmp_path: Path, words: list[str], here: bool) -> None:
    assert is_here(settings(tmp_path, *words)) is here


def test_a_run_elsewhere_is_followed_by_its_log_to_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    superlink = FarSuperLink("[ROUND 1/1]", f'INFO :      {SUMMARY}{{"status": "finished", "loss": 0.5}}')
    assert follow_log(superlink, "7") == {"status": "finished", "loss": 0.5}
    assert capsys.readouterr().err.startswith("[ROUND 1/1]\n")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([f'{SUMMARY}{{"status": "failed", "error": "no client"}}'], "no client"),
        (["it ends"], "Flower says finished:failed and the run has logged no summary: in short"),
    ],
)
def test_a_run_elsewhere_that_failed_says_why(lines: list[str], said: str) -> None:
    with pytest.raises(RunError, match=said):
        follow_log(FarSuperLink(*lines, status="finished:failed"), "7")


def test_a_lost_run_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = FarSuperLink(status="lost")
    config = settings(tmp_path, "deployment=local", "deployment.address=fl.example.org:8000")
    monkeypatch.setattr(submit, "choose_superlink", lambda config: (config, far))
    said = r"lost sight of the run \(flwr log failed\): once its SuperLink is back, .* run_name=far resume=true"
    with pytest.raises(RunError, match=said):
        run_once(config)
    assert not far.stopped
    assert not far.folder.exists()


def test_an_interrupted_run_on_another_server_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = FarSuperLink()
    config = settings(tmp_path, "deployment=local", "deployment.address=fl.example.org:8000")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "choose_superlink", lambda config: (config, far))
    monkeypatch.setattr(submit, "follow_log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_once(config)
    assert far.stopped


def test_a_ray_cluster_brings_its_own_processors(tmp_path: Path) -> None:
    alone = simulation_words(settings(tmp_path, *SIMULATION, "deployment.total_cpus=3"))
    assert alone.endswith(" init-args-num-cpus=3")
    cluster = ("deployment.ray_address=first:6379", "deployment.client_cpus=999")
    shared = simulation_words(settings(tmp_path, *SIMULATION, *cluster))
    assert "init-args" not in shared
    assert "client-resources-num-cpus=999" in shared
    with pytest.raises(ConfigError, match="is more than the"):
        simulation_words(settings(tmp_path, *SIMULATION, "deployment.client_cpus=999"))


def test_a_sweep_over_a_server_elsewhere_is_refused(tmp_path: Path) -> None:
    far = settings(tmp_path, "deployment=local", "deployment.address=fl.example.org:8000")
    with pytest.raises(ConfigError, match="start the sweep on its machine"):
        sweep.as_job(far, None)  # type: ignore[arg-type]
