"""The front doors: what `python -m tools.run` and `flwr run` say, leave behind and exit with."""

import json
import re
import socket
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from tests.conftest import Federate
from tests.support.commands import left_running, run
from tools.deployment.processes import SuperLinkError
from tools.deployment.submit import APP
from tools.deployment.superlink import PrivateSuperLink
from tools.run import final_line

TOY = "experiment=toy_regression"


def test_the_app_bundle_holds_the_app_and_its_conf_but_no_tools() -> None:
    names = zipfile.ZipFile(BytesIO(build_fab_from_disk(APP))).namelist()
    assert {"flapp/server_app.py", "flapp/strategy/fedavg.py", "conf/config.yaml", "pyproject.toml"} <= set(names)
    assert {str(p.relative_to(APP)) for p in APP.glob("conf/**/*.yaml")} <= set(names)
    assert not [name for name in names if name.startswith(("tools", "tests"))]


def test_a_busy_port_is_reported_in_one_line() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        superlink = PrivateSuperLink(port)
        with pytest.raises(SuperLinkError, match=f"deployment.port={port} is in use on 127.0.0.1"):
            superlink.__enter__()
    assert not superlink.folder.exists()


def test_the_last_lines_say_what_was_reached_and_where_it_lies() -> None:
    summary = {"rounds": 3, "seconds": 12.3, "accuracy": 0.5, "personal_accuracy": None, "loss": 1.25}
    text = final_line(summary | {"model_sha256": "ab", "run_dir": "/r"})
    model = "model /r/model.safetensors (of the last round, sha256 ab)"
    report = "see the results with: python -m tools.report /r --out report.html"
    assert text == f"finished 3 rounds in 12 s: accuracy 0.5000, test loss 1.2500\n{model}\nresults in /r\n{report}"
    chosen = {"objective_metric": "val_accuracy", "val_accuracy": 0.75, "val_loss": 9.0, "selected_round": 2}
    text = final_line(summary | chosen | {"model_sha256": "ab", "run_dir": "/r"})
    assert "12 s: accuracy 0.5000, test loss 1.2500, validation accuracy 0.7500\n" in text
    assert "\nmodel /r/model.safetensors (of round 2, sha256 ab)\n" in text


def test_the_last_lines_tell_the_time_of_the_run_from_that_of_the_command() -> None:
    summary = {"rounds": 3, "seconds": 12.3, "personal_accuracy": 0.5, "model_sha256": "ab", "run_dir": "/r"}
    assert final_line(summary, 20.4).startswith("finished 3 rounds in 12 s (20 s with start-up): ")
    assert final_line(summary, 8.0).startswith("finished 3 rounds in 12 s (8.0 s in this start): ")  # it was resumed
    assert "personal accuracy 0.5000 (of each client's own model)\n" in final_line(summary)


@pytest.mark.slow
def test_a_run_by_command_gives_the_bytes_of_the_run_in_process(data_home: Path, federate: Federate) -> None:
    expected, _ = federate("model=linear", "num_rounds=2", "clients=4")
    done = run(data_home, "model=linear", "num_rounds=2", "clients=4", "run_name=one")
    assert done.returncode == 0, done.stderr
    path = data_home / "runs" / "one"
    assert f"results in {path}" in done.stdout.splitlines()
    summary = json.loads((path / "metrics.json").read_text())
    assert summary["model_sha256"] == expected["model_sha256"]
    log = (path / "log.txt").read_text()
    assert re.search(r"^INFO \d{4}-\d\d-\d\d [\d:,]+: +\[ROUND 2/2\]$", log, re.MULTILINE)
    assert "\x1b" not in log
    assert left_running(data_home) == []
