"""Run the app once, or over a sweep, on a private SuperLink of this machine, and tell the truth about how it ended.

    python -m tools.run                                        the default experiment
    python -m tools.run experiment=toy_regression seed=3       other settings, in Hydra's grammar
    python -m tools.run run_name=mine resume=true              go on with a run that broke off
    python -m tools.run -m seed=0,1 train.lr=0.001,0.002       a sweep: every combination, each in its own folder

Exits 0 only when every run went to its end; 1 with one line that says what and how to mend it otherwise.
"""

import json
import os
import signal
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from flapp.config import CONF, explain, from_tree, to_json
from flapp.results import check_resumable, taken
from flapp.settings import Config, ConfigError
from tools import sweep
from tools.superlink import SIGNALS, PrivateSuperLink, SuperLinkError, available_cpus

APP = Path(__file__).resolve().parents[1]
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
    """Run one job for Hydra, report how it ended, and return its objective; a failure is reported, not raised."""
    hydra_config = HydraConfig.get()
    with sweep.reported(hydra_config) as outcome:
        try:
            config = from_tree(tree, Path.cwd())
            summary = run_once(sweep.as_job(config, hydra_config) if sweep.is_sweep(hydra_config) else config)
            outcome |= {key: summary.get(key) for key in ("status", *sweep.COLUMNS, "run_dir")}
            print(final_line(summary))
        except (ConfigError, RunError, SuperLinkError, OmegaConfBaseException, OSError) as error:
            outcome["error"] = str(explain(error) if isinstance(error, OmegaConfBaseException) else error)
            print(f"error: {outcome['error']}", file=sys.stderr)
    return sweep.objective_of(outcome)


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


def main() -> int:
    """Let Hydra compose the command line into jobs, run them, and return the exit status."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, who say them in one line
    outcomes: list[sweep.Outcome] = []
    try:
        with sweep.gathered(outcomes):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except BrokenExecutor as error:
        print(f"error: the sweep broke off: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; everything that was started has been stopped", file=sys.stderr)
        return 130
    except ValueError:
        if not outcomes or any(outcome["status"] == "finished" for outcome in outcomes):
            raise
        return 1  # Optuna's sweeper looks for the best of trials that have all failed
    finally:
        print(sweep.conclude(outcomes), end="")
    return int(any(outcome["status"] != "finished" for outcome in outcomes))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    sweep.interrupt_jobs()
    raise KeyboardInterrupt


if __name__ == "__main__":
    from tools import run  # so that other processes find job by name, and not by its code

    sys.exit(run.main())
