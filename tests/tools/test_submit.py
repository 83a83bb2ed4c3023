"""Submitting a run to a SuperLink on another machine: it is followed by its log; a lost run says how to continue."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from flapp.server.run_dir import SUMMARY
from tools.deployment import submit
from tools.deployment.processes import SuperLinkError
from tools.deployment.submit import RunError, is_here, run_once, simulation_words
from tools.deployment.superlink import SuperLink
from tools.deployment.supervisor import Federation
from tools.running import sweep

SIMULATION = ("deployment=simulation",)
FAR = ("deployment=local", "deployment.address=fl.example.org:8000")


def settings(home: Path, *words: str) -> Config:
    return compose([f"home={home}", "experiment=toy_regression", "run_name=far", *words])


class FarSuperLink(SuperLink):
    """A SuperLink elsewhere: the log of its run has these lines, and the status is this one."""

    def __init__(self, *lines: str | BaseException, status: str = "finished:completed") -> None:
        super().__init__("fl.example.org:8000")
        self.lines, self.state, self.stopped = lines, status, False

    def flwr(self, *arguments: str) -> dict[str, Any]:
        return {"run-id": "7"}

    def read_log(self, run_id: str, how: str = "") -> Iterator[str]:
        for line in self.lines:
            if isinstance(line, BaseException):
                raise line
            yield f"{line}\n"

    def status(self, run_id: str) -> tuple[str, str]:
        return self.state, "in short"

    def stop_run(self, run_id: str) -> None:
        self.stopped = True


@pytest.fixture
def run_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[FarSuperLink], dict[str, Any]]:
    """Return a function that runs a federation at a SuperLink elsewhere."""

    def run(superlink: FarSuperLink) -> dict[str, Any]:
        monkeypatch.setattr(submit, "choose_superlink", lambda config: (config, superlink))
        return run_once(settings(tmp_path, *FAR))

    return run


def test_a_run_on_a_federation_that_is_down_is_refused_with_the_command_that_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"address": "127.0.0.1:1", "clients": ("0", "1", "2"), "token": "f" * 32}
    down = Federation(**facts, tls=False, shards=None, homes=False, threads=1)
    monkeypatch.setattr(submit, "read_federation", lambda _: down)
    with pytest.raises(SuperLinkError, match=r"^the federation of \S+ is down: .*python -m tools.federation up"):
        run_once(settings(tmp_path, "deployment=local"), lambda: pytest.fail("the run was started"))


@pytest.mark.parametrize(
    ("words", "here"),
    [
        ([], True),
        (["deployment=local"], True),
        (["deployment=local", "deployment.address=127.0.0.1:8000"], True),
        (FAR, False),
    ],
)
def test_files_are_here_where_the_server_is(tmp_path: Path, words: list[str], here: bool) -> None:
    assert is_here(settings(tmp_path, *words)) is here


def test_a_run_elsewhere_is_followed_by_its_log_to_its_summary(run_at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    superlink = FarSuperLink("[ROUND 1/1]", f'INFO :      {SUMMARY}{{"status": "finished", "loss": 0.5}}')
    assert run_at(superlink) == {"status": "finished", "loss": 0.5}
    assert capsys.readouterr().err.startswith("[ROUND 1/1]\n")
    assert not superlink.folder.exists()


LOST = r"lost sight of the run \(flwr log failed\): once its SuperLink is back, .* run_name=far resume=true"


@pytest.mark.parametrize(
    ("line", "error", "said", "stopped"),
    [
        (f'{SUMMARY}{{"status": "failed", "error": "no client"}}', RunError, "no client", True),
        ("it ends", RunError, "Flower says finished:failed and the run has logged no summary: in short", True),
        (SuperLinkError("flwr log failed"), RunError, LOST, False),
        (KeyboardInterrupt(), KeyboardInterrupt, None, True),
    ],
    ids=["failed", "ended", "lost", "interrupted"],
)
def test_a_run_elsewhere_that_does_not_finish_says_why_and_is_stopped_unless_it_is_lost(
    run_at: Any, line: Any, error: type[BaseException], said: str | None, stopped: bool
) -> None:
    far = FarSuperLink(line, status="finished:failed")
    with pytest.raises(error, match=said):
        run_at(far)
    assert far.stopped == stopped
    assert not far.folder.exists()


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
    far = settings(tmp_path, *FAR)
    with pytest.raises(ConfigError, match="start the sweep on its machine"):
        sweep.as_job(far, None)  # type: ignore[arg-type]
