"""Run the app once, or over a sweep, on a private SuperLink of this machine, and tell the truth about how it ended.

    python -m tools.run                                        the default experiment
    python -m tools.run experiment=toy_regression seed=3       other settings, in Hydra's grammar
    python -m tools.run run_name=mine resume=true              go on with a run that broke off
    python -m tools.run deployment=local clients=3             over the SuperNodes of tools.federation
    python -m tools.run -m seed=0,1 train.lr=0.001,0.002       a sweep: every combination, each in its own folder

Exits 0 only when every run went to its end; 1 with one line that says what and how to mend it otherwise.
"""

import json
import os
import signal
import sys
import time
from concurrent.futures import BrokenExecutor
from dataclasses import replace
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
from flapp.results import SUMMARY, check_resumable, taken
from flapp.settings import Config, ConfigError
from tools import sweep
from tools.federation import FederationError, install_app, known_federation
from tools.processes import SIGNALS, SuperLinkError, available_cpus
from tools.superlink import CONNECTION, PrivateSuperLink, SuperLink
from tools.supervisor import root_certificates

APP = Path(__file__).resolve().parents[1]
LOOK_SECONDS, STATUS_SECONDS, END_SECONDS = 0.3, 15, 60


class RunError(RuntimeError):
    """A run that did not finish, said in one line."""


def run_once(config: Config) -> dict[str, Any]:
    """Run a federation to its end and return its metrics.json; raises RunError, SuperLinkError or ConfigError."""
    config, superlink = choose_superlink(config)
    path = config.runs_dir / config.run_name
    here, earlier = is_here(superlink), None
    if here and config.resume:
        check_resumable(config)
        earlier = read_json(path / "metrics.json")
        if earlier and earlier["status"] == "finished":
            return earlier
    elif here and path.exists():
        raise ConfigError(taken(config))
    with superlink:
        settings = superlink.folder / "run.toml"
        settings.write_text(f"config-json = {json.dumps(to_json(config), ensure_ascii=False)}\n")
        words = ["run", str(APP), CONNECTION, "-c", str(settings)]
        if config.deployment.kind == "simulation":
            words += ["--federation-config", simulation_words(config)]
        elif config.deployment.address is None:
            install_app(Path(str(config.deployment.federation)))
        run_id = str(superlink.flwr(*words)["run-id"])
        try:
            if here:
                return follow(superlink, run_id, path, config, earlier)
            return follow_log(superlink, run_id)
        except BaseException:
            superlink.stop_run(run_id)
            raise
        finally:
            if path.is_dir() and here:
                superlink.save_log(run_id, path / "log.txt")


def choose_superlink(config: Config) -> tuple[Config, SuperLink]:
    """Return the SuperLink that the run goes to, not entered yet, and the config with what that SuperLink settles."""
    settings = config.deployment
    if settings.kind == "simulation":
        return config, PrivateSuperLink(settings.port, settings.ray_address)
    if settings.address is not None:
        certificates = Path(settings.root_certificates) if settings.root_certificates else None
        return config, SuperLink(settings.address, certificates)
    folder = Path(str(settings.federation))
    federation = known_federation(folder)
    if len(federation.clients) < config.clients:
        raise ConfigError(
            f"clients={config.clients}, but the federation of {folder} has {len(federation.clients)}: "
            f"set clients={len(federation.clients)}"
        )
    config = replace(config, deployment=replace(settings, named_clients=settings.named_clients or federation.tls))
    return config, SuperLink(federation.address, root_certificates(folder, federation))


def is_here(superlink: SuperLink) -> bool:
    """Say whether the ServerApp runs on this machine, and so leaves its files where we can read them."""
    return superlink.address.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


def simulation_words(config: Config) -> str:
    """Return the size of a simulation in the words of --federation-config; raises ConfigError."""
    cpus, settings = config.deployment.total_cpus or available_cpus(), config.deployment
    if settings.client_cpus > cpus and not settings.ray_address:
        raise ConfigError(f"deployment.client_cpus={settings.client_cpus} is more than the {cpus} there are")
    words = (
        f"num-supernodes={config.clients} "
        f"client-resources-num-cpus={settings.client_cpus} client-resources-num-gpus={settings.client_gpus}"
    )
    return words if settings.ray_address else f"{words} init-args-num-cpus={cpus}"


def follow(
    superlink: SuperLink, run_id: str, path: Path, config: Config, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Show a run's progress until it ends; return its summary, or raise RunError with the reason it failed for.

    `earlier` is the summary of a start that failed, which lies there until the run is resumed.
    """
    asked = time.monotonic()
    with tqdm(total=config.num_rounds, unit="round", disable=None, desc="starting", file=sys.stderr) as bar:
        while (summary := read_json(path / "metrics.json")) is None or summary == earlier:
            superlink.check_alive()
            show(bar, path)
            if time.monotonic() - asked > STATUS_SECONDS:
                asked = time.monotonic()
                status, details = ask_status(superlink, run_id, config)
                if status.startswith("finished") and read_json(path / "metrics.json") in (None, earlier):
                    raise RunError(f"Flower says {status} and there is no metrics.json: {details}")
            time.sleep(LOOK_SECONDS)
        show(bar, path)
    if summary["status"] != "finished":
        raise RunError(summary["error"])
    wait_for_end(superlink, run_id)
    return summary


def follow_log(superlink: SuperLink, run_id: str) -> dict[str, Any]:
    """Show the log of a run on another machine until it ends; return the summary that the ServerApp logged at its end.

    Raises RunError when it failed.
    """
    summary: dict[str, Any] | None = None
    for line in superlink.read_log(run_id):
        print(line, file=sys.stderr)
        _, found, text = line.partition(SUMMARY)
        if found:
            summary = json.loads(text)
    if summary is None:
        status, details = superlink.status(run_id)
        raise RunError(f"Flower says {status} and the run has logged no summary: {details}")
    if summary["status"] != "finished":
        raise RunError(summary["error"])
    wait_for_end(superlink, run_id)
    return summary


def ask_status(superlink: SuperLink, run_id: str, config: Config) -> tuple[str, str]:
    """Return Flower's status of a run and its details; raises RunError when the SuperLink does not know it any more."""
    try:
        return superlink.status(run_id)
    except SuperLinkError as error:
        raise RunError(
            f"the SuperLink has lost the run, as one does that was restarted ({error}): go on with it by "
            f"run_name={config.run_name} resume=true"
        ) from error


def wait_for_end(superlink: SuperLink, run_id: str) -> None:
    """Wait until Flower, too, says that a run is completed; raises RunError."""
    end = time.monotonic() + END_SECONDS
    while not (status := superlink.status(run_id)[0]).startswith("finished"):
        if time.monotonic() > end:
            raise RunError(f"the run wrote its results but Flower still says {status} after {END_SECONDS} s")
        time.sleep(LOOK_SECONDS)
    if status != "finished:completed":
        raise RunError(f"the run wrote its results but Flower says {status}")


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
        except (ConfigError, RunError, FederationError, SuperLinkError, OmegaConfBaseException, OSError) as error:
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
        print(f"error: {str(error).partition('.')[0]}: go on with the sweep by resume=true", file=sys.stderr)
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
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # a second one does not wait for jobs to clean up
    sweep.interrupt_jobs()
    raise KeyboardInterrupt


if __name__ == "__main__":
    from tools import run  # so that other processes find job by name, and not by its code

    sys.exit(run.main())
