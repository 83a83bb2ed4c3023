"""Run the app once or over a sweep, and report how it ended. HELP describes the command."""

import os
import signal
import sys
import textwrap
import time
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import psutil
import yaml
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flapp.central import describe_central
from flapp.config.load import CONF, expand_words, explain, from_tree, name_override, own_choices, project_words
from flapp.config.schema import Config, ConfigError
from flapp.privacy import describe_plan
from flapp.server.summary import in_short, in_words
from tools.cli import as_called, count, some
from tools.deployment.processes import SIGNALS, SuperLinkError
from tools.deployment.submit import RunError, is_here, refusals, run_once
from tools.running import sweep
from tools.running.progress import announce, is_json, take_format
from tools.running.run_entries import advice, complete_rounds, resume_command

HELP = """\
Train one model with many clients: a federated run, or a sweep of runs, on this machine or on real SuperNodes.

  python -m tools.run                                        the default: a small ViT on ten clients with digits
  python -m tools.run experiment=toy_regression seed=3       another experiment and another setting
  python -m tools.run model=cnn clients=20 train.lr=0.001    your own combination
  python -m tools.run -m seed=0,1 train.lr=0.001,0.002       a sweep: every combination, each in its own folder
  python -m tools.run run_name=mine resume=true              resume a run that was interrupted or failed

Settings are written key=value, in Hydra's grammar. These choose a whole group of settings (* is the default):

{groups}

  --cfg job            print every setting with its value, and run nothing (the files are in {conf})
  -m, --multirun       a sweep over values separated by commas; hydra/launcher=joblib runs jobs side by side
  --format json        print events as JSON lines on stdout instead of text
  --hydra-help         Hydra's own options

Results go to ~/.flapp/runs/<run_name>; home=DIR or FLAPP_HOME replaces ~/.flapp. Without run_name, the name is made of
the experiment, the dataset, model and strategy that you choose, and the time. If you choose a dataset but no
experiment, the default experiment is left out.
Clients run in worker processes of this command (deployment=inline); deployment.workers=0 runs them in this process
itself, for breakpoint(). deployment=simulation runs them in Ray. deployment=local runs them on SuperNodes, Flower's
client processes: on this machine (`python -m tools.federation up`), or at deployment.address.
run_name=mine resume=true resume_from=7 goes back to round 7, if the server still keeps it (checkpoint=all keeps every
round). A finished run cannot be given more rounds.
Accuracy and loss are measured on the test samples of all clients. Personal accuracy is that of each client's own model:
the global model after fine-tuning on the client's samples (evaluate.personal_epochs), or, with
strategy.aggregation=fedsa, with the adapter parts that the client keeps to itself.
Two times are printed. The time of the run begins when its folder is opened, before the model is built, and ends when
the model is saved. The other is that of the whole command.
Exit status: 0 if every run finished, 1 if one failed or was refused (one line says why), 130 if interrupted.
"""
NOTES = {"personal_accuracy": " (of each client's own model)"}
STOPPED = "interrupted: everything that was started has been stopped"


def job(tree: DictConfig) -> float | None:
    """Run one job for Hydra, report how it ended, and return its objective; a failure is reported, not raised."""
    hydra_config = HydraConfig.get()
    run_name = None
    began = time.time() if sweep.is_sweep(hydra_config) else psutil.Process().create_time()
    with sweep.reported(hydra_config) as outcome:
        try:
            config = from_tree(tree, Path.cwd())
            config = sweep.as_job(config, hydra_config) if sweep.is_sweep(hydra_config) else config
            run_name = config.run_name
            summary = run_once(config, partial(start, config, hydra_config, outcome))
            outcome |= {key: summary.get(key) for key in ("status", "objective_metric", *sweep.COLUMNS, "run_dir")}
            announce("finished", run_name, summary=summary)
            if not is_json():
                hint = not sweep.is_sweep(hydra_config)
                print(sweep.mark_of(hydra_config) + final_line(summary, time.time() - began, hint))
        except (RunError, SuperLinkError, OmegaConfBaseException, OSError, ValueError) as error:
            outcome["error"] = as_called(str(explain(error) if isinstance(error, OmegaConfBaseException) else error))
            if "resume=true" in outcome["error"]:
                outcome["resumable"] = None  # the error itself says how to continue
            fail(outcome["error"], 1, run_name, getattr(error, "summary", None))
    return sweep.objective_of(outcome)


def start(config: Config, hydra_config: HydraConf, outcome: sweep.Outcome) -> None:
    """Print what a run is about to do, and note that it can be resumed from now on."""
    from tools.running.overview import job_line, overview, start_lines  # imports Flower

    facts = overview(config, is_here(config))
    announce("started", config.run_name, **facts)
    lines = start_lines(config.run_name, facts)
    plan = [describe_plan(config.privacy, config.num_rounds)] if config.privacy.kind == "local" else []
    plan += [describe_central(config)] if config.privacy.kind == "central" else []
    end = ["starting the server and the clients"]
    if sweep.is_sweep(hydra_config):
        lines, end = [sweep.mark_of(hydra_config) + job_line(list(hydra_config.overrides.task), facts)], []
    if is_here(config):
        if config.resume and (done := config.resume_from or complete_rounds(Path(facts["run_dir"]))):
            lines.append(f"resuming after round {done} of {config.num_rounds}")
        outcome["resumable"] = (config.run_name, facts["run_dir"])
    for line in plan if is_json() else [*lines, *plan, *end]:
        print(line, file=sys.stderr)


def final_line(summary: dict[str, Any], took: float | None = None, hint: bool = True) -> str:
    """Return the last lines about a finished run.

    took: seconds since the command, or its job of a sweep, began; hint: end with the command that makes a report.
    """
    rounds, folder = summary["rounds"], summary["run_dir"]
    shown = dict.fromkeys(("accuracy", "personal_accuracy", "loss", summary.get("objective_metric", "loss")))
    figures = [
        f"{'test ' * (key == 'loss')}{in_words(key)} {summary[key]:.4f}{NOTES.get(key, '')}"
        for key in shown
        if summary.get(key) is not None
    ]
    figures += [f"{name} {value}" for name, value in in_short(summary.get("scores") or {}).items()]
    early = " (stopped early)" if summary.get("stopped_early") else ""
    selected = summary.get("selected_round", rounds)
    chosen = f"round {selected}" if selected != rounds else "the last round"
    lines = [f"finished {count(rounds, 'round')}{early} in {seconds(summary['seconds'], took)}: {', '.join(figures)}"]
    for note in summary.get("resumed_anyway", []):
        lines.append(f"resumed anyway after round {note['round']}: {some(note['changed'])}")
    if "epsilon" in summary:
        whose = " for the client that released the most updates" if summary.get("privacy") != "central" else ""
        whose += ", with seeded noise, for experiments only" if summary.get("privacy_noise") == "seeded" else ""
        lines.append("epsilon {epsilon:.4g} (delta {delta:g})".format(**summary) + whose)
    lines.append(f"model {Path(folder) / 'model.safetensors'} (of {chosen}, sha256 {summary['model_sha256']})")
    lines.append(f"results in {folder}")
    if hint:
        lines.append(report_hint(folder))
    if refused := refusals(summary):
        lines.append(refused)
    return "\n".join(lines)


def report_hint(folder: str) -> str:
    """Return the line that says how to see the results of a run or sweep."""
    return as_called(f"see the results with: python -m tools.report {folder} --out report.html")


def seconds(run: float, command: float | None) -> str:
    """Return the seconds of a run over all its starts, with those of this command in parentheses."""
    whole, last = (f"{each:.0f} s" if each >= 10 else f"{each:.1f} s" for each in (run, command or 0.0))
    if command is None:
        return whole
    return f"{whole} ({last} {'with start-up' if command >= run else 'in this start'})"


def main() -> int:
    """Let Hydra compose the command line into jobs, run them, and return the exit status."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(help_text(), end="")
        return 0
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on to us, and we print them in one line
    outcomes: list[sweep.Outcome] = []
    try:
        return run_jobs(outcomes)
    finally:
        hints = how_to_go_on(outcomes, words)
        folders = [each["folder"] for each in outcomes if each["folder"] and each["status"] == "finished"]
        table = sweep.conclude(outcomes)
        if not is_json():
            print(table, end="")
            hints = [report_hint(folder) for folder in folders[:1]] + hints
        for hint in hints:
            print(hint, file=sys.stderr)


def run_jobs(outcomes: list[sweep.Outcome]) -> int:
    """Run what the command line asks for, fill in the outcome of every job, and return the exit status."""
    try:
        take_format(sys.argv)
        flags = [word for word in sys.argv[1:] if word.startswith("-") or ("=" not in word and word[0] not in "~+")]
        given = [word for word in sys.argv[1:] if word not in flags]
        here = next((Path(word[5:].strip("'")) for word in given if word.startswith("code=")), Path.cwd())
        words = expand_words([*project_words(here, given), *given])
        sys.argv[1:] = [*flags, *own_choices([here]), *words, *name_override(words)]
        with sweep.gathered(outcomes):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except ConfigError as error:
        return fail(str(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        return fail(str(explain(error)), 1)
    except BrokenExecutor as error:
        return fail(f"{str(error).partition('.')[0]}: resume the sweep with resume=true", 1)
    except KeyboardInterrupt:
        announce("failed", None, error=STOPPED, summary=None)
        print(STOPPED, file=sys.stderr)
        return 130
    except ValueError:
        if len(outcomes) < 2 or any(outcome["status"] == "finished" for outcome in outcomes):
            raise
        return 1  # Optuna's sweeper raises this when all trials have failed
    return int(any(outcome["status"] != "finished" for outcome in outcomes))


def how_to_go_on(outcomes: list[sweep.Outcome], words: list[str]) -> list[str]:
    """Return the hint how to resume a run or sweep; none if it finished or never started."""
    left = [outcome for outcome in outcomes if outcome["status"] != "finished" and outcome["resumable"]]
    if not left:
        return []
    run_name, path = left[0]["resumable"]
    is_interrupted = any(outcome["error"] == sweep.INTERRUPTED for outcome in left)
    if not left[0]["folder"]:
        return [advice(words, run_name, complete_rounds(Path(path)), is_interrupted)]
    if is_interrupted or any(complete_rounds(Path(outcome["resumable"][1])) for outcome in left):
        return [f"resume the sweep with: {resume_command(words, str(Path(run_name).parent))}"]
    return []  # every job that failed would fail again


def help_text() -> str:
    """Return HELP with the groups of settings in conf/, and with commands as the user called flapp."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    default = {(key, str(value)) for each in listed if isinstance(each, dict) for key, value in each.items()}
    choices: dict[str, str] = {}
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        names = [path.stem for path in sorted(folder.glob("*.yaml"))]
        choices[folder.name] = ", ".join(f"{name}{'*' * ((folder.name, name) in default)}" for name in names)
    width = max(map(len, choices)) + 1
    lines = [
        textwrap.fill(text, 118, initial_indent=f"  {name + '=':<{width}} ", subsequent_indent=" " * (width + 3))
        for name, text in choices.items()
    ]
    return as_called(HELP.format(groups="\n".join(lines), conf=CONF))


def fail(error: str, status: int, run_name: str | None = None, summary: dict[str, Any] | None = None) -> int:
    """Report why a command failed, and return the exit status."""
    error = as_called(error)
    announce("failed", run_name, error=error, summary=summary)
    print(f"error: {error}", file=sys.stderr)
    return status


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # a second signal does not wait for jobs to clean up
    sweep.interrupt_jobs()
    raise KeyboardInterrupt


if __name__ == "__main__":
    from tools import run  # so that other processes import `job` by its name

    sys.exit(run.main())
