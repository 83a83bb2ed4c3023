"""Run the app once, or over a sweep, on a SuperLink, and tell the truth about how it ended.

    python -m tools.run                                        the default experiment
    python -m tools.run experiment=toy_regression seed=3       other settings, in Hydra's grammar
    python -m tools.run run_name=mine resume=true              go on with a run that broke off
    python -m tools.run run_name=mine resume=true resume_from=7    ... from an earlier round that it still holds
    python -m tools.run deployment=local clients=3             over the SuperNodes of tools.federation
    python -m tools.run -m seed=0,1 train.lr=0.001,0.002       a sweep: every combination, each in its own folder
    python -m tools.run --format json                          JSON lines on stdout instead (see tools/progress.py)

Exits 0 only when every run went to its end; 1 with one line that says what and how to mend it otherwise.
"""

import os
import signal
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flapp.config import CONF, explain, from_tree
from flapp.privacy import describe_plan
from flapp.settings import ConfigError
from flapp.summary import in_words
from tools import sweep
from tools.federation import FederationError
from tools.processes import SIGNALS, SuperLinkError
from tools.progress import announce, is_json, take_format
from tools.submit import RunError, refusals, run_once


def job(tree: DictConfig) -> float | None:
    """Run one job for Hydra, report how it ended, and return its objective; a failure is reported, not raised."""
    hydra_config = HydraConfig.get()
    run_name = None
    with sweep.reported(hydra_config) as outcome:
        try:
            config = from_tree(tree, Path.cwd())
            config = sweep.as_job(config, hydra_config) if sweep.is_sweep(hydra_config) else config
            run_name = config.run_name
            announce("started", run_name, rounds=config.num_rounds)
            if config.privacy.enabled:
                print(describe_plan(config.privacy, config.num_rounds), file=sys.stderr)
            summary = run_once(config)
            outcome |= {key: summary.get(key) for key in ("status", *sweep.COLUMNS, "run_dir")}
            announce("finished", run_name, summary=summary)
            if not is_json():
                print(final_line(summary))
        except (RunError, FederationError, SuperLinkError, OmegaConfBaseException, OSError, ValueError) as error:
            outcome["error"] = str(explain(error) if isinstance(error, OmegaConfBaseException) else error)
            fail(outcome["error"], 1, run_name, getattr(error, "summary", None))
    return sweep.objective_of(outcome)


def final_line(summary: dict[str, Any]) -> str:
    """Say how a run ended, in one paragraph."""
    shown = dict.fromkeys(("accuracy", "personal_accuracy", "loss", summary.get("objective_metric", "loss")))
    figures = [f"{in_words(key)} {summary[key]:.4f}" for key in shown if summary.get(key) is not None]
    early = " (stopped early)" if summary.get("stopped_early") else ""
    selected = summary.get("selected_round", summary["rounds"])
    chosen = f" of round {selected}" if selected != summary["rounds"] else ""
    refused = [said] if (said := refusals(summary)) else []
    anyway = [
        f"resumed anyway after round {note['round']}: {some(note['changed'])}"
        for note in summary.get("resumed_anyway", [])
    ]
    spent = "epsilon {epsilon:.4g} (delta {delta:g}) for the client that released the most updates"
    private = [spent.format(**summary)] if "epsilon" in summary else []
    lines = [
        f"finished {summary['rounds']} rounds{early} in {summary['seconds']:.0f} s: {', '.join(figures)}",
        *anyway,
        *private,
        f"model {summary['model_sha256']}{chosen}",
        f"results in {summary['run_dir']}",
    ]
    return "\n".join(lines + refused)


def some(texts: list[str], most: int = 3) -> str:
    """Return the first few texts in one line, and the number of the others."""
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def main() -> int:
    """Let Hydra compose the command line into jobs, run them, and return the exit status."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, who say them in one line
    outcomes: list[sweep.Outcome] = []
    try:
        take_format(sys.argv)
        with sweep.gathered(outcomes):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except ConfigError as error:
        return fail(str(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        return fail(str(explain(error)), 1)
    except BrokenExecutor as error:
        return fail(f"{str(error).partition('.')[0]}: go on with the sweep by resume=true", 1)
    except KeyboardInterrupt:
        return fail("interrupted; everything that was started has been stopped", 130)
    except ValueError:
        if len(outcomes) < 2 or any(outcome["status"] == "finished" for outcome in outcomes):
            raise
        return 1  # Optuna's sweeper looks for the best of trials that have all failed
    finally:
        table = sweep.conclude(outcomes)
        if not is_json():
            print(table, end="")
    return int(any(outcome["status"] != "finished" for outcome in outcomes))


def fail(error: str, status: int, run_name: str | None = None, summary: dict[str, Any] | None = None) -> int:
    """Say why a run, or nothing at all, came to its end, and return the exit status."""
    announce("failed", run_name, error=error, summary=summary)
    print(f"error: {error}", file=sys.stderr)
    return status


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # a second one does not wait for jobs to clean up
    sweep.interrupt_jobs()
    raise KeyboardInterrupt


if __name__ == "__main__":
    from tools import run  # so that other processes find job by name, and not by its code

    sys.exit(run.main())
