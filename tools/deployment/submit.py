"""Run a federation once, inline or through a SuperLink: check the settings, follow the run, report how it ended."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flapp.architecture import find_oversize
from flapp.config.load import to_json
from flapp.config.rules import count_messages
from flapp.config.schema import Config, ConfigError
from flapp.files import Stamp, stamp
from flapp.listing import WITHHELD, by_reason
from flapp.server.journals import Origin
from flapp.server.preflight import check_run
from flapp.server.run_dir import SUMMARY, check_resumable, check_source
from flapp.server.run_names import check_new, find_holder, restarts
from flapp.server.summary import sound_summary
from tools.deployment.processes import HOST, Processes, SuperLinkError, available_cpus
from tools.deployment.superlink import APP as APP
from tools.deployment.superlink import CONNECTION, PrivateSuperLink, SuperLink, app_folder
from tools.deployment.supervisor import KEYS, describe_down, install_app, read_federation, superlink_of
from tools.running.progress import CONFIG, LOOK_SECONDS, read_json, watched

STATUS_SECONDS, END_SECONDS, LEAVE_SECONDS = 15, 60, 60
REPLACED = "run {} ended before its first round was complete, so it starts again (its log.txt is kept)"


class RunError(RuntimeError):
    """A run did not finish; the message is one line. `summary` is its metrics.json if it wrote one."""

    def __init__(self, text: str, summary: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.summary = summary


def run_once(config: Config, on_start: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Run a federation to its end and return its metrics.json; raises RunError, SuperLinkError or ConfigError.

    on_start is called when the settings have been checked, before the first SuperLink or worker starts.
    """
    path, here, kind = config.runs_dir / config.run_name, is_here(config), config.deployment.kind
    starts_again = here and restarts(config)
    if here and not starts_again:
        (check_resumable if config.resume else check_new)(config)
    earlier = read_json(path / "metrics.json") if here else None
    is_again = config.resume_from is not None or starts_again
    if earlier and earlier.get("status") == "finished" and not is_again:
        return check_summary(earlier, path / "metrics.json")
    size = ["--federation-config", simulation_words(config)] if kind == "simulation" else []
    if kind == "inline":
        count_cpus(config)
    if here:
        check_start(config, starts_again)
    before = stamp(path, CONFIG)
    if kind == "inline":
        from tools.running import inline  # imports Flower, which an early error should not wait for

        inline.prepare(config)
        on_start()
        return inline.run_inline(config, before)
    config, superlink = choose_superlink(config)
    on_start()
    with superlink, app_folder() as app:
        run_id = submit(config, superlink, app, size)
        try:
            summary = follow(superlink, run_id, config, earlier, before) if here else follow_log(superlink, run_id)
            if summary["status"] != "finished":
                raise failure(summary)
            wait_for_end(superlink, run_id)
            return summary
        except SuperLinkError as error:
            back = "" if kind == "simulation" else "once its SuperLink is back, "
            fix = f"{back}resume it with run_name={config.run_name} resume=true"
            raise RunError(f"lost sight of the run ({error}): {fix}") from error
        except BaseException:
            if kind != "simulation":  # whose run ends with its SuperLink
                superlink.stop_run(run_id)
                if here:
                    wait_until_left(path)  # otherwise resuming at once would be refused
            raise
        finally:
            if path.is_dir() and here:
                superlink.save_log(run_id, path / "log.txt")


def wait_until_left(path: Path) -> bool:
    """Wait until no process holds the run in a folder; return False if one still does after LEAVE_SECONDS."""
    end = time.monotonic() + LEAVE_SECONDS
    while is_held := find_holder(path) is not None:
        if time.monotonic() > end:
            break
        time.sleep(LOOK_SECONDS)
    return not is_held


def check_start(config: Config, starts_again: bool) -> None:
    """Check a run whose files are here before it starts; raises ConfigError, or ValueError for its data or model."""
    if config.resume and not starts_again:
        check_source(config)
        if doubt := Origin(config.runs_dir / config.run_name, config).doubt(config.resume_from):
            print(f"warning: {doubt}", file=sys.stderr)
    check_run(config, clients_here=is_home_shared(config), quick=True)
    if starts_again:
        print(f"note: {REPLACED.format(config.run_name)}", file=sys.stderr)


def submit(config: Config, superlink: SuperLink, app: Path, size: list[str]) -> str:
    """Hand the app and the settings to a SuperLink and return the run's id; size: options of a simulation."""
    settings = superlink.folder / "run.toml"
    settings.write_text(f"config-json = {json.dumps(to_json(config), ensure_ascii=False)}\n")
    if config.deployment.kind == "superlink" and config.deployment.address is None:
        install_app(Path(str(config.deployment.federation)))
    return str(superlink.flwr("run", str(app), CONNECTION, "-c", str(settings), *size)["run-id"])


def choose_superlink(config: Config) -> tuple[Config, SuperLink]:
    """Return the SuperLink for the run, not entered yet, and the config with the settings that depend on it.

    Raises SuperLinkError when the run's federation on this machine is down, and ConfigError for too many clients.
    """
    settings = config.deployment
    if settings.kind == "simulation":
        return config, PrivateSuperLink(settings.port, settings.ray_address)
    if settings.address is not None:
        certificates = Path(settings.root_certificates) if settings.root_certificates else None
        return config, SuperLink(settings.address, certificates)
    folder = Path(str(settings.federation))
    federation = read_federation(folder)
    if len(federation.clients) < config.clients:
        raise ConfigError(
            f"clients={config.clients}, but the federation of {folder} has {len(federation.clients)}: "
            f"set clients={len(federation.clients)}"
        )
    if not Processes(federation.token).running():
        raise SuperLinkError(describe_down(folder, federation, None))
    if federation.tls and settings.client_keys is None:
        config = replace(config, deployment=replace(settings, client_keys=str(folder / KEYS)))
    return config, superlink_of(folder, federation)


def is_here(config: Config) -> bool:
    """Return whether the ServerApp runs on this machine and writes its files here."""
    address = config.deployment.address
    host = address.rpartition(":")[0].strip("[]") if config.deployment.kind == "superlink" and address else HOST
    return host in (HOST, "localhost", "::1")


def is_home_shared(config: Config) -> bool:
    """Return whether the clients run on this machine and read their data from the run's home."""
    settings = config.deployment
    if settings.kind != "superlink":
        return settings.ray_address is None
    if settings.address is not None:
        return False
    federation = read_federation(Path(str(settings.federation)))
    return not federation.homes and federation.shards is None


def simulation_words(config: Config) -> str:
    """Return the size of a simulation in the words of --federation-config; raises ConfigError."""
    settings = config.deployment
    words = f"num-supernodes={count_messages(config)} client-resources-num-cpus={settings.client_cpus}"
    words += f" client-resources-num-gpus={settings.client_gpus}"
    return words if settings.ray_address else f"{words} init-args-num-cpus={count_cpus(config)}"


def count_cpus(config: Config) -> int:
    """Return the processors for the clients; raises ConfigError if one client needs more."""
    settings = config.deployment
    if settings.client_cpus > (cpus := settings.total_cpus or available_cpus()):
        fix = "lower it, or raise deployment.total_cpus" if settings.total_cpus else "lower it"
        raise ConfigError(
            f"deployment.client_cpus={settings.client_cpus} is more than the {cpus} processors of this run: {fix}"
        )
    return cpus


def follow(
    superlink: SuperLink, run_id: str, config: Config, earlier: dict[str, Any] | None, before: Stamp
) -> dict[str, Any]:
    """Show a run's progress until it ends, and return its summary.

    Raises RunError when Flower says that the run ended but metrics.json is missing. earlier: the summary of an earlier
    start, which stays in the folder until the run is resumed; before: see watched.
    """
    warn_of_size(config)
    path = config.runs_dir / config.run_name / "metrics.json"
    asked = time.monotonic()
    with watched(config, before):
        while (summary := read_json(path)) is None or summary == earlier:
            superlink.check_alive()
            if time.monotonic() - asked > STATUS_SECONDS:
                asked = time.monotonic()
                status, details = superlink.status(run_id)
                if status.startswith("finished") and read_json(path) in (None, earlier):
                    raise RunError(f"Flower says {status} and there is no metrics.json: {details}")
            time.sleep(LOOK_SECONDS)
    return summary


def warn_of_size(config: Config) -> None:
    """Print a warning about a model too large for the data, where the data are here; the ServerApp logs it too."""
    if config.model.name != "cnn":
        return
    from tools.running.overview import count_samples  # imports Flower

    samples = count_samples(config)
    if samples and (warning := find_oversize(config.model, config.dataset, samples["train"])):
        print(f"warning: {warning}", file=sys.stderr)


def check_summary(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the summary of a finished run; raises ConfigError when something is missing in it."""
    needed = ("rounds", "seconds", "model_sha256", "run_dir")
    odd = sound_summary(summary)[1] + [key for key in needed if summary.get(key) is None]
    if odd:
        raise ConfigError(f"{path} has no usable {odd[0]}: restore it from a copy, or remove it and resume the run")
    return summary


def follow_log(superlink: SuperLink, run_id: str) -> dict[str, Any]:
    """Show the log of a run on another machine until it ends; return the summary that the ServerApp logged.

    Raises RunError when there is none.
    """
    summary: dict[str, Any] | None = None
    for line in superlink.read_log(run_id):
        sys.stderr.write(line)
        _, found, text = line.partition(SUMMARY)
        if found:
            summary = json.loads(text)
    if summary is None:
        status, details = superlink.status(run_id)
        raise RunError(f"Flower says {status} and the run has logged no summary: {details}")
    return summary


def failure(summary: dict[str, Any]) -> RunError:
    """Return the error of a failed run: its reason, and who was refused unless the reason names them."""
    error, refused = str(summary["error"]), refusals(summary)
    is_said = all(reason in error for reason in (summary.get("refused") or {}).values())
    return RunError(error if is_said else f"{error} ({refused})", summary)


def refusals(summary: dict[str, Any]) -> str:
    """Return one line about the clients that a run refused; empty if there are none."""
    if not (refused := summary.get("refused")):
        count = summary.get("refused_count")
        return f"clients or nodes refused: {count} ({WITHHELD.format('who and why')})" if count else ""
    more = summary["refused_count"] - len(refused)
    return f"refused: {by_reason(refused)}" + (f"; and {more} more" if more else "")


def wait_for_end(superlink: SuperLink, run_id: str) -> None:
    """Wait until Flower, too, says that a run is completed; raises RunError."""
    end = time.monotonic() + END_SECONDS
    while not (status := superlink.status(run_id)[0]).startswith("finished"):
        if time.monotonic() > end:
            raise RunError(f"the run wrote its results but Flower still says {status} after {END_SECONDS} s")
        time.sleep(LOOK_SECONDS)
    if status != "finished:completed":
        raise RunError(f"the run wrote its results but Flower says {status}")
