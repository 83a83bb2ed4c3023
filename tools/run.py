"""Run the app once, or over a sweep, on a private SuperLink of this machine, and tell the truth about how it ended.

    python -m tools.run                                        the default experiment
    python -m tools.run experiment=toy_regression seed=3       other settings, in Hydra's grammar
    python -m tools.run run_name=mine resume=true              go on with a run that broke off
    python -m tools.run -m seed=0,1 train.lr=0.001,0.002       a sweep: every combination, each in its own folder

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
from tqdm import tqdm

from flapp.config import CONF, explain, from_tree, to_json
from flapp.results import check_resumable, taken
from flapp.settings import Config, ConfigError
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
    """A run that did not finish, said in one line."""


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
            return follow(superlink, run_id, path, config.num_rounds, earlier)
        finally:
            if path.is_dir():
                superlink.save_log(run_id, path / "log.txt")


def follow(
    superlink: PrivateSuperLink, run_id: str, path: Path, num_rounds: int, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Show a run's progress until it ends; return its summary, or raise RunError with the reason it failed for.

    `earlier` is the summary of a start that failed, which lies there until the run is resumed.
    """
    asked = time.monotonic()
    with tqdm(total=num_rounds, unit="round", disable=None, desc="starting", file=sys.stderr) as bar:
        while (summary := read_json(path / "metrics.json")) is None or summary == earlier:
            superlink.check_alive()
            show(bar, path)
            if time.monotonic() - asked > STATUS_SECONDS:
                asked = time.monotonic()
                status, details = superlink.status(run_id)
                if status.startswith("finished") and read_json(path / "metrics.json") in (None, earlier):
                    raise RunError(f"Flower says {status} and there is no metrics.json: {details}")
            time.sleep(LOOK_SECONDS)
        show(bar, path)
    if summary["status"] != "finished":
        raise RunError(summary["error"])
    end = time.monotonic() + END_SECONDS
    while not (status := superlink.status(run_id)[0]).startswith("finished"):
        if time.monotonic() > end:
            raise RunError(f"the run wrote its results but Flower still says {status} after {END_SECONDS} s")
        time.sleep(LOOK_SECONDS)
    if status != "finished:completed":
        raise RunError(f"the run wrote its results but Flower says {status}")
    return summary


def show(bar: tqdm, path: Path) -> None:
    """Bring the bar up to date with progress.json and the last figures of metrics.jsonl."""
    if bar.disable or (now := read_json(path / "progress.json")) is None:
        return
    bar.n = now["round"] - 1 if now["replies"] < now["asked"] or now["phase"] == "train" else now["round"]
    bar.set_description(f"round {now['round']} {now['phase']} {now['replies']}/{now['asked']}", refresh=False)
    figures: dict[str, str] = {}
    written = (path / "metrics.jsonl").read_text().rpartition("\n")[0]  # the last line may be half there
    for line in written.splitlines():
        values = json.loads(line)
        if values["kind"] in ("train", "evaluate"):
            figures |= {key: f"{values[key]:.4f}" for key in ("loss", "accuracy") if values.get(key) is not None}
    bar.set_postfix(figures, refresh=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's content, or None while it is not there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def job(tree: DictConfig) -> float | None:
    """Run one job for Hydra and return its objective; failures are reported, not raised, and count as NaN."""
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    outcome: dict[str, Any] = {"overrides": " ".join(hydra_config.overrides.task)}
    try:
        config = from_tree(tree, Path.cwd())
        if sweep:
            folder = os.path.relpath(hydra_config.sweep.dir, config.runs_dir)
            config = replace(config, run_name=f"{folder}/{hydra_config.job.num}")
        summary = run_once(config)
        outcome |= {key: summary.get(key) for key in ("status", "run_dir", *COLUMNS)}
        print(final_line(summary))
    except (ConfigError, RunError, SuperLinkError, OmegaConfBaseException, OSError) as error:
        said = explain(error) if isinstance(error, OmegaConfBaseException) else error
        outcome |= {"status": "failed", "error": str(said)}
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
    return (
        f"finished {summary['rounds']} rounds in {summary['seconds']:.0f} s: {', '.join(figures)}\n"
        f"model {summary['model_sha256']}\nresults in {summary['run_dir']}"
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
    sweep = any(argument in ("-m", "--multirun") for argument in sys.argv[1:])
    handle, name = tempfile.mkstemp(prefix="flapp-sweep-")
    os.close(handle)
    log = Path(name)
    os.environ[SWEEP_LOG] = str(log)
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; everything that was started has been stopped", file=sys.stderr)
        return 130
    finally:
        outcomes = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink(missing_ok=True)
    if sweep and outcomes:
        print(sweep_table(outcomes))
    return int(any(outcome["status"] != "finished" for outcome in outcomes))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
