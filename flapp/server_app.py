"""The ServerApp: reads the config, opens the run directory, runs the rounds (server/run.py) and logs the summary."""

import json
import os
from dataclasses import replace
from logging import INFO, WARNING

from flwr.app import Context
from flwr.common import log
from flwr.common.logger import update_console_handler
from flwr.serverapp import Grid, ServerApp

from flapp.config.load import load
from flapp.server.grid import is_simulated
from flapp.server.inline import InlineGrid
from flapp.server.preflight import check_run
from flapp.server.run import Run, strategy_class
from flapp.server.run_dir import SUMMARY, RunDirectory

app = ServerApp()
update_console_handler(timestamps=True)  # in the process that runs the app


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation by the config in run_config.

    An error is first written to metrics.json, if the run's folder is open, and then raised.
    """
    config, _ = load(context.run_config, {})
    if isinstance(grid, InlineGrid):
        clients_here = grid.clients_here
    else:
        clients_here = is_simulated(grid) and config.deployment.ray_address is None
        if config.deployment.kind == "inline":  # the default, but Flower runs the app
            config = replace(config, deployment=replace(config.deployment, kind="simulation", workers=None))
    warn_of_open_ray(grid)
    try:
        check_run(config, clients_here)
        strategy_class(config)
        open_directory = RunDirectory.reopen if config.resume else RunDirectory.create
        directory = open_directory(config, context.run_id)
    except ValueError as error:
        log(INFO, "%s%s", SUMMARY, json.dumps({"status": "failed", "error": str(error)}))
        raise
    try:
        summary = Run(grid, directory).run()
    except Exception as error:
        log(INFO, "%s%s", SUMMARY, json.dumps(directory.fail(error)))
        raise
    except KeyboardInterrupt:
        directory.close()  # the run can be resumed
        raise
    log(INFO, "%s%s", SUMMARY, json.dumps(summary))


def warn_of_open_ray(grid: Grid) -> None:
    """Log a warning if this is a simulation whose Ray asks for no token."""
    if is_simulated(grid) and os.environ.get("RAY_AUTH_MODE") != "token":
        log(
            WARNING,
            "the Ray of this simulation runs code from anybody who reaches its ports: "
            "use python -m tools.run, or start Flower's SuperLink with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN",
        )
