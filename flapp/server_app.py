"""The ServerApp: config, run directory, roster, strategy, and what is left when the rounds are over."""

from collections.abc import Callable
from functools import partial
from logging import INFO

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from flapp.config import derive_seed, load
from flapp.data import ClientLoader, OfflineDataset, check_claim, ensure_artifacts, load_manifest
from flapp.grid import PolledGrid
from flapp.messages import Claim, view
from flapp.model import build_model
from flapp.results import RunDirectory
from flapp.roster import Roster
from flapp.settings import Config, ConfigError
from flapp.strategy import FedAvg
from flapp.training import evaluate

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from the config in run_config; raises when it fails, after metrics.json has said why."""
    config, _ = load(context.run_config, {})
    run = RunDirectory.reopen(config) if config.resume else RunDirectory.create(config)
    try:
        run_rounds(grid, run.config, run)
    except Exception as error:
        run.fail(error)
        raise


def run_rounds(grid: Grid, config: Config, run: RunDirectory) -> None:
    """Gather the clients, run every round and leave the final model and summary in the run directory."""
    torch.set_num_threads(config.train.threads)
    model = initial_model(config)
    polled = PolledGrid(grid)
    roster = build_roster(config, polled)
    strategy = build_strategy(config, roster, run)
    if done := run.last_round():
        strategy.go_on_after(done, run.load_round(done, model))
        log(INFO, "%s goes on after round %d of %d", config.run_name, done, config.num_rounds)
    arrays = ArrayRecord(model.state_dict())
    if done < config.num_rounds:
        roster.wait(config.strategy.wait_for_clients, config.strategy.min_clients)
        run.append("roster", done, clients=len(roster.members), refused=roster.refused, warnings=roster.warnings)
        polled.on_reply = lambda done, asked: run.show_progress(
            strategy.exchange.server_round, strategy.exchange.kind, done, asked
        )
        arrays = strategy.start(
            polled,
            arrays,
            num_rounds=config.num_rounds - done,
            timeout=config.strategy.timeout,
            evaluate_fn=partial(end_round, config, run, strategy, model),
        ).arrays
    run.finish(run.save_model(arrays.to_torch_state_dict()))


def initial_model(config: Config) -> torch.nn.Module:
    """Build the model with weights drawn from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "model"))
        shape, classes = config.dataset.shape, config.dataset.classes
        return build_model(config.model.name, shape, classes, config.model.image_size, config.model.dropout)


def build_roster(config: Config, grid: Grid) -> Roster:
    """Return the roster of the clients "0" to clients - 1 or, with shards, of those that the manifest lists."""
    if not config.distributed_data.enabled:
        return Roster(grid, [str(i) for i in range(config.clients)], config.run_name, config.dataset.classes)
    manifest = load_manifest(config.manifest_path)
    manifest.verify()
    if len(manifest) != config.clients:
        raise ConfigError(f"{manifest.path} lists {len(manifest)} clients: set clients={len(manifest)}")
    if (strategy := manifest.facts["strategy"]) != config.partition.kind:
        raise ConfigError(f"{manifest.path} is of shards cut by partition={strategy}: set partition={strategy}")

    def check(claim: Claim) -> str | None:
        record, digest = manifest.get(claim.client_id), claim.shard_digest
        return check_claim(record, claim.client_id, claim.train, claim.val, claim.test, claim.label_hist, digest)

    strict = config.distributed_data.strict_check
    return Roster(grid, list(manifest), config.run_name, config.dataset.classes, check, strict)


def build_strategy(config: Config, roster: Roster, run: RunDirectory) -> FedAvg:
    """Build the strategy that the config names."""
    strategies: dict[str, Callable[..., FedAvg]] = {"fedavg": FedAvg}
    return strategies[config.strategy.name](
        roster,
        run,
        seed=config.seed,
        num_rounds=config.num_rounds,
        fraction_train=config.strategy.fraction_train,
        fraction_evaluate=config.strategy.fraction_evaluate,
        weighting=config.strategy.weighting,
        min_replies=config.strategy.min_replies,
        evaluate_every=config.evaluate.every,
    )


def end_round(
    config: Config, run: RunDirectory, strategy: FedAvg, model: torch.nn.Module, flower_round: int, arrays: ArrayRecord
) -> MetricRecord | None:
    """Evaluate on the server if the config says so, then complete the round; Flower calls this before round 1 too."""
    server_round = strategy.done + flower_round
    if flower_round == 0 and strategy.done:
        return None  # that round is complete
    evaluated = server_round == 0 or strategy.is_evaluated(server_round)
    found = (
        evaluate_centrally(config, run, model, server_round, arrays) if config.evaluate.central and evaluated else None
    )
    if server_round:
        run.save_round(server_round, {key: view(array) for key, array in arrays.items()}, strategy.facts())
    return found


def evaluate_centrally(
    config: Config, run: RunDirectory, model: torch.nn.Module, server_round: int, arrays: ArrayRecord
) -> MetricRecord:
    """Evaluate the global model on the whole test artifact."""
    folder = ensure_artifacts(config.data_dir, config.dataset.name) / "test"
    dataset = OfflineDataset(folder, normalization=config.dataset.normalization)
    model.load_state_dict(arrays.to_torch_state_dict())
    batches = ClientLoader(
        dataset, np.arange(len(dataset)), config.evaluate.batch_size, image_size=config.model.image_size
    )
    found = evaluate(model, batches)
    values = {"loss": found.loss_sum / found.count}
    if config.dataset.classes:
        values["accuracy"] = found.correct / found.count
    run.append("central", server_round, **values)
    return MetricRecord(dict(values))
