"""Manage the runs of a home.

    python -m tools.runs stop NAME         stop a run that is still running, also after its command was killed

A run that was started over a private SuperLink is stopped by SIGTERM to its command. If the command is gone, the
processes that it left behind are stopped. A job of a sweep is stopped together with the sweep. A run of a federation is
stopped by its SuperLink, which keeps running.
"""

import argparse
import os
import sys
from pathlib import Path

from flapp.settings import ConfigError
from tools.federation import FederationError
from tools.processes import SuperLinkError
from tools.stop import StopError, stop_run


def stop(given: argparse.Namespace) -> int:
    """Stop a run, and say how to continue it."""
    stopped = stop_run(given.home / "runs", given.run_name)
    if stopped is None:
        print(f"{given.run_name} is not running")
    else:
        print(f"stopped {given.run_name} (pids {', '.join(map(str, stopped))})")
        print(f"continue it with its settings and run_name={given.run_name} resume=true")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit status."""
    home = Path(os.environ.get("FLAPP_HOME") or Path.home() / ".flapp")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    stopping = commands.add_parser("stop", help="stop a run that is still running")
    stopping.add_argument("run_name")
    stopping.add_argument("--home", type=Path, default=home, help="default: %(default)s")
    stopping.set_defaults(command=stop)
    given = parser.parse_args(arguments)
    try:
        return int(given.command(given))
    except (StopError, FederationError, SuperLinkError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
