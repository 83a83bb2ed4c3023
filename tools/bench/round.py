"""A round of ten simulated clients, against the bare local training loops of the same work."""

import itertools
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from flapp import client_app
from flapp.client.task import Task
from flapp.config.load import compose
from flapp.config.schema import Config, NodeConfig
from flapp.messages import Instructions
from flapp.training import scheduled_lr
from tools.bench import Row
from tools.deployment.processes import available_cpus
from tools.deployment.submit import run_once

TURNS, ROUNDS = 3, 6


def settings(home: str, name: str) -> Config:
    """Return the digits run, without its evaluations."""
    return compose(
        [f"home={home}", f"run_name={name}", f"num_rounds={ROUNDS}", f"evaluate.every={ROUNDS}"]
        + ["evaluate.personal_epochs=0"]
    )


def simulated_rounds(config: Config) -> list[float]:
    """Run a simulation and return the seconds from one round's result to the next."""
    path = Path(run_once(config)["run_dir"]) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    ends = [line["time"] for line in lines if line["kind"] == "train"]
    return [after - before for before, after in itertools.pairwise(ends)]


def fit_client(task: tuple[Config, int, str, int]) -> None:
    """Train one client in one round, as the ClientApp does, without any message."""
    config, server_round, client_id, threads = task
    torch.set_num_threads(threads)
    model = client_app.cached_model(config.model, config.dataset, config.train.device, config.train.compile)
    lr = scheduled_lr(config.train.lr, config.train.schedule, server_round, config.num_rounds)
    asked = Task(Instructions(client_id, server_round, "", ""), config, NodeConfig())
    client_app.fit(model, asked, lr, config.train.epochs, None, "train")


def bare_rounds(config: Config, workers: int) -> list[float]:
    """Train every client in as many processes as the simulation has, and return each round's seconds."""
    seconds = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for server_round in range(1, ROUNDS + 1):
            start = time.perf_counter()
            tasks = [(config, server_round, str(i), config.train.threads) for i in range(config.clients)]
            pool.map(fit_client, tasks, chunksize=1)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def rows() -> list[Row]:
    """Run simulation and bare loops in turn, and compare the medians of their rounds; the first is a warm-up."""
    workers = available_cpus()
    simulated: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="flapp-bench-") as home:
        for turn in range(TURNS):
            config = settings(home, f"turn-{turn}")
            simulated += simulated_rounds(config)
            bare += bare_rounds(config, workers)
    note = f"{config.clients} clients of {config.experiment}, {workers} at a time"
    ratio = median(simulated) / median(bare)
    return [Row("one round, simulated", "bare training loops", ratio, 1.15, higher_is_better=False, note=note)]
