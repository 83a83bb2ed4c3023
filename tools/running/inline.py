"""Run the ServerApp in this process, and the ClientApp in worker processes of its own or, with workers=0, here too.

Logs of the apps and output of the workers go to log.txt in the run's folder.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import resource
import secrets
import tempfile
import traceback
from collections.abc import Iterator
from logging import ERROR, INFO
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.common.logger import FLOWER_LOGGER, ConsoleHandler, log

from flapp.config.load import to_json
from flapp.config.rules import count_messages
from flapp.config.schema import Config, ConfigError
from flapp.files import Stamp
from flapp.server.inline import CLIENT_APP, SERVER_NODE, InlineGrid, start_forkserver
from tools.cli import count
from tools.deployment.processes import SWEEP
from tools.deployment.submit import count_cpus, failure, warn_of_size
from tools.running.progress import read_json, watched

LONGEST_TMPDIR = 107 - len("/flapp-12345678/listener-12345678")  # bytes; a socket's path has at most 107 on Linux


def prepare(config: Config) -> None:
    """Start the process from which workers are forked, so that it imports PyTorch in the background."""
    if config.deployment.workers == 0:
        return
    temporary = tempfile.gettempdir()
    if len(os.fsencode(temporary)) > LONGEST_TMPDIR:
        raise ConfigError(
            f"the path of the temporary folder {temporary} is too long for the socket of worker processes: set TMPDIR "
            f"to a path of at most {LONGEST_TMPDIR} bytes, or set deployment.workers=0"
        )
    folder = os.environ.pop(SWEEP, None)
    resource_tracker.ensure_running()  # without SWEEP, so that no guard kills it before this process ends
    if folder is not None:
        os.environ[SWEEP] = folder
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    kept = settings.get("tempdir")
    settings["tempdir"] = folder  # for the fork server's socket: the guard removes that folder
    lazy = {"flapp.model.vit": config.model.name.startswith("vit"), "torch._dynamo": config.train.compile}
    start_forkserver(CLIENT_APP, *(name for name, is_needed in lazy.items() if is_needed))
    settings["tempdir"] = kept


def run_inline(config: Config, before: Stamp) -> dict[str, Any]:
    """Run a federation to its end and return its metrics.json; raises RunError, or the ServerApp's own error.

    before: see watched.
    """
    from flapp import server_app  # imported late because it imports PyTorch: report mistakes first
    from flapp.training import keep_freed_memory

    path = config.runs_dir / config.run_name
    earlier = read_json(path / "metrics.json")
    workers = count_workers(config)
    nodes = [{"partition-id": i, "num-partitions": max(1, workers)} for i in range(max(1, workers))]
    run_id = secrets.randbits(62) + 1
    run_config: dict[str, Any] = {"config-json": to_json(config)}
    warn_of_size(config)
    keep_freed_memory()
    with contextlib.suppress(OSError, ValueError):  # each large reply is an open file until the round ends
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with logged(path / "log.txt") as open_log, watched(config, before, plain=workers == 0):
        grid = InlineGrid(run_config, nodes, workers, run_id, path / "log.txt", find_devices(config, workers), open_log)
        with grid:
            try:
                server_app.app(grid, Context(run_id, SERVER_NODE, {}, RecordDict(), run_config))
            except Exception as error:
                log(ERROR, traceback.format_exc())
                summary = read_json(path / "metrics.json")
                if summary is None or summary == earlier:
                    raise
                raise failure(summary) from error
    return read_json(path / "metrics.json") or {}


def count_workers(config: Config) -> int:
    """Return how many worker processes a run has.

    Raises ConfigError if the GPUs have no room for them, or if one client needs more processors than there are.
    """
    settings = config.deployment
    most = min(count_cpus(config) // settings.client_cpus, count_messages(config))
    if settings.workers == 0 or not settings.client_gpus:
        return most if settings.workers is None else settings.workers
    import torch

    gpus = torch.cuda.device_count()
    fit = int(gpus / settings.client_gpus)
    if fit < (settings.workers or 1):
        fixes = f"set deployment.workers={fit}, or lower" if fit else "lower" if gpus else "set"
        raise ConfigError(
            f"each worker needs deployment.client_gpus={settings.client_gpus:g} of a GPU, and this machine has "
            f"{count(gpus, 'GPU')}: {fixes} deployment.client_gpus{'' if gpus else '=0'}"
        )
    return settings.workers or min(most, fit)


def find_devices(config: Config, workers: int) -> list[str] | None:
    """Return the GPUs that each worker sees, filling one after another; None if the settings give workers no GPUs."""
    share = config.deployment.client_gpus
    if not share or not workers:
        return None
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if share < 1:
        each = int(1 / share)
        return [names[i // each % len(names)] for i in range(workers)]
    whole = int(share)
    return [",".join(names[i * whole : (i + 1) * whole]) for i in range(workers)]


@contextlib.contextmanager
def logged(path: Path) -> Iterator[Any]:
    """Send the log of Flower and the apps to a file; give a function that opens it once the run's folder exists."""
    handler = ConsoleHandler(timestamps=True, colored=False, stream=io.StringIO())
    handler.setLevel(INFO)

    def open_log() -> None:
        if isinstance(handler.stream, io.StringIO) and path.parent.is_dir():
            held, file = handler.stream.getvalue(), path.open("a", encoding="utf-8")
            file.write(held)
            handler.setStream(file)

    loggers = (FLOWER_LOGGER, logging.getLogger("py.warnings"))
    before = [list(each.handlers) for each in loggers]
    logging.captureWarnings(True)
    for each in loggers:
        each.handlers = [handler]
        each.disabled = False  # hydra/job_logging=disabled has disabled it
    try:
        yield open_log
    finally:
        open_log()
        logging.captureWarnings(False)
        for each, handlers in zip(loggers, before, strict=True):
            each.handlers = handlers
        handler.stream.close()
