"""Run the app once, or over a sweep, on a private SuperLink of this machine, and tell the truth about how it ended.

    python -m tools.run                                        the default experiment
    python -m tools.run experiment=toy_regression seed=3       other settings, in Hydra's grammar
    python -m tools.run run_name=mine resume=true              go on with a run that broke off
    python -m tools.run -m seed=0,1 train.lr=0.001,0.002       a sweep: every combination, each in its own folder
    python -m tools.run --format json                          JSON lines on stdout instead (see tools/progress.py)

Exits 0 only when every run went to its end; 1 with one line that says what and how to mend it otherwise.
"""

import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flapp.config import CONF, explain, from_tree, to_json
from flapp.results import check_resumable, taken
from flapp.settings import Config, ConfigError
from tools.progress import Progress, announce, is_json, read_json, take_format
from tools.superlink import PrivateSuperLink, SuperLinkError, available_cpus

APP = Path(__file__).resolve().parents[1]
SWEEP_LOG = "FLAPP_SWEEP_LOG"  # where the jobs of a sweep report, also from a launcher's other processes
COLUMNS = {  # of the table of a sweep
    "objective": ("objective", "{:.4f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "personal_accuracy": ("personal", "{:.4f}"),
    "bytes_up": ("bytes up", "{:,}"),
    "bytes_down": ("bytes down", "{:,}"),
    "aggregation_error": ("aggregation error", "{:.1e}"),
}
LOOK_SECONDS, STATUS_SECONDS, END_SECONDS = 0.3, 15, 60


class RunError(RuntimeError):
    """A run that did not finish, said in one line; `summary` is its metrics.json if it wrote one."""

    def __init__(self, text: str, summary: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.summary = summary


def run_once(config: Config) -> dict[str, Any]:
    """Run a federation to its end and return its metrics.json; raises RunError, SuperLinkError or ConfigError."""
    path = config.runs_dir / config.run_name
    earlier = None
    if config.resume:
        check_resumable(config)
        earlier = read_json(path / "metrics.json")
        if earlier and earlier["status"] == "finished":
            return earlier
    elif path.exists():
        raise ConfigError(taken(config))
    cpus = config.deployment.total_cpus or available_cpus()
    if config.deployment.client_cpus > cpus:
        raise ConfigError(f"deployment.client_cpus={config.deployment.client_cpus} is more than the {cpus} there are")
    with PrivateSuperLink(config.deployment.port) as superlink:
        settings = superlink.folder / "run.toml"
        settings.write_text(f"config-json = {json.dumps(to_json(config), ensure_ascii=False)}\n")
        federation = (
            f"num-supernodes={config.clients} init-args-num-cpus={cpus} "
            f"client-resources-num-cpus={config.deployment.client_cpus} "
            f"client-resources-num-gpus={config.deployment.client_gpus}"
        )
        run_id = superlink.flwr("run", str(APP), "private", "-c", str(settings), "--federation-config", federation)[
            "run-id"
        ]
        try:
            return follow(superlink, run_id, path, config, earlier)
        finally:
            if path.is_dir():
                superlink.save_log(run_id, path / "log.txt")


def follow(
    superlink: PrivateSuperLink, run_id: str, path: Path, config: Config, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Show a run's progress until it ends; return its summary, or raise RunError with the reason it failed for.

    `earlier` is the summary of a start that failed, which lies there until the run is resumed.
    """
    asked = time.monotonic()
    with Progress(config, path) as progress:
        while (summary := read_json(path / "metrics.json")) is None or summary == earlier:
            superlink.check_alive()
            progress.look()
            if time.monotonic() - asked > STATUS_SECONDS:
                asked = time.monotonic()
                status, details = superlink.status(run_id)
                if status.startswith("finished") and read_json(path / "metrics.json") in (None, earlier):
                    raise RunError(f"Flower says {status} and there is no metrics.json: {details}")
            time.sleep(LOOK_SECONDS)
        progress.look()
    if summary["status"] != "finished":
        raise RunError(summary["error"], summary)
    end = time.monotonic() + END_SECONDS
    while not (status := superlink.status(run_id)[0]).startswith("finished"):
        if time.monotonic() > end:
            raise RunError(f"the run wrote its results but Flower still says {status} after {END_SECONDS} s")
        time.sleep(LOOK_SECONDS)
    if status != "finished:completed":
        raise RunError(f"the run wrote its results but Flower says {status}")
    return summary


def job(tree: DictConfig) -> float | None:
    """Run one job for Hydra and return its objective; failures are reported, not raised, and count as NaN."""
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    outcome: dict[str, Any] = {"overrides": " ".join(hydra_config.overrides.task)}
    run_name = None
    try:
        config = from_tree(tree, Path.cwd())
        if sweep:
            folder = os.path.relpath(hydra_config.sweep.dir, config.runs_dir)
            config = replace(config, run_name=f"{folder}/{hydra_config.job.num}")
        run_name = config.run_name
        announce("started", config.run_name, rounds=config.num_rounds)
        summary = run_once(config)
        outcome |= {key: summary.get(key) for key in ("status", "run_dir", *COLUMNS)}
        announce("finished", config.run_name, summary=summary)
        if not is_json():
            print(final_line(summary))
    except (ConfigError, RunError, SuperLinkError, OmegaConfBaseException, OSError) as error:
        said = explain(error) if isinstance(error, OmegaConfBaseException) else error
        outcome |= {"status": "failed", "error": str(said)}
        announce("failed", run_name, error=str(said), summary=getattr(error, "summary", None))
        print(f"error: {said}", file=sys.stderr)
    with open(os.environ[SWEEP_LOG], "a") as log:
        log.write(json.dumps(outcome) + "\n")
    if outcome.get("objective") is None:
        return math.nan if sweep else None
    return float(outcome["objective"])


def final_line(summary: dict[str, Any]) -> str:
    """Say how a run ended, in one paragraph."""
    figures = [
        f"{key.replace('_', ' ')} {summary[key]:.4f}"
        for key in ("accuracy", "personal_accuracy", "loss")
        if summary.get(key) is not None
    ]
    early = " (stopped early)" if summary.get("stopped_early") else ""
    selected = summary.get("selected_round", summary["rounds"])
    chosen = f" of round {selected}" if selected != summary["rounds"] else ""
    return (
        f"finished {summary['rounds']} rounds{early} in {summary['seconds']:.0f} s: {', '.join(figures)}\n"
        f"model {summary['model_sha256']}{chosen}\nresults in {summary['run_dir']}"
    )


def sweep_table(outcomes: list[dict[str, Any]]) -> str:
    """Return the table of a sweep: a line a job with its settings, its figures, and its folder or its error."""
    shown = [key for key in COLUMNS if any(outcome.get(key) is not None for outcome in outcomes)]
    rows = [["job", "overrides", *(COLUMNS[key][0] for key in shown), "run"]]
    for number, outcome in enumerate(outcomes):
        figures = ["" if outcome.get(key) is None else COLUMNS[key][1].format(outcome[key]) for key in shown]
        rows.append([str(number), outcome["overrides"], *figures, outcome.get("error") or outcome["run_dir"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1] + [0]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def main() -> int:
    """Let Hydra compose the command line into jobs, run them, and return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, who say them in one line
    try:
        take_format(sys.argv)
    except ConfigError as error:
        return fail(str(error), 1)
    sweep = any(argument in ("-m", "--multirun") for argument in sys.argv[1:])
    handle, name = tempfile.mkstemp(prefix="flapp-sweep-")
    os.close(handle)
    log = Path(name)
    os.environ[SWEEP_LOG] = str(log)
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        return fail(str(explain(error)), 1)
    except KeyboardInterrupt:
        return fail("interrupted; everything that was started has been stopped", 130)
    finally:
        outcomes = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink(missing_ok=True)
    if sweep and outcomes and not is_json():
        print(sweep_table(outcomes))
    return int(any(outcome["status"] != "finished" for outcome in outcomes))


def fail(error: str, status: int) -> int:
    """Say why nothing more is run, and return the exit status."""
    announce("failed", None, error=error, summary=None)
    print(f"error: {error}", file=sys.stderr)
    return status


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
