"""The ServerApp: config, run directory, roster, strategy, and what is left when the rounds are over."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.common import log
from flwr.common.logger import update_console_handler
from flwr.serverapp import Grid, ServerApp
from torch import nn

from flapp.architecture import adapt, build, choose_device, find_oversize, split_place
from flapp.base import Base, keep_base
from flapp.config.load import derive_seed, load
from flapp.config.schema import Config
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.shards.manifest import check_claim, open_manifest
from flapp.data.sources import ensure_artifacts, is_prepared
from flapp.messages import Claim, pack, views
from flapp.model.adapter_files import export_adapter, import_adapter
from flapp.model.lora import adapted_layers, draw_lora_A, layout_of, mark_only_lora_as_trainable, merged_state_dict
from flapp.model.pretrained import load_pretrained
from flapp.model.split.factory import ModelFactory
from flapp.model.split.files import StorageManager
from flapp.partitions import open_partition
from flapp.privacy import UNPROTECTED, check_floating, describe_plan
from flapp.server.client_keys import ClientKeys
from flapp.server.grid import PolledGrid
from flapp.server.inline import InlineGrid
from flapp.server.ledger import ClientLedger
from flapp.server.preflight import check_run
from flapp.server.releases import ReleaseLedger
from flapp.server.roster import FederationError, Roster
from flapp.server.run_dir import SUMMARY, RunDirectory
from flapp.server.summary import StoppedEarly
from flapp.strategy.fedavg import FedAvg
from flapp.strategy.fedlora import FedLoRA, global_keys
from flapp.strategy.lora_rules import RULES
from flapp.strategy.server_optimizer import ServerOptimizer
from flapp.training import evaluate

app = ServerApp()
update_console_handler(timestamps=True)  # in the process that runs the app


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from the config in run_config; raises when it fails, after metrics.json has said why."""
    config = settings_on(grid, context)
    warn_of_open_ray(grid)
    try:
        check_run(config, clients_here=are_clients_here(grid, config))
        run_id = context.run_id
        run = RunDirectory.reopen(config, run_id) if config.resume else RunDirectory.create(config, run_id)
    except ValueError as error:
        log(INFO, "%s%s", SUMMARY, json.dumps({"status": "failed", "error": str(error)}))
        raise
    try:
        summary = run_rounds(grid, run.config, run)
    except Exception as error:
        log(INFO, "%s%s", SUMMARY, json.dumps(run.fail(error)))
        raise
    except KeyboardInterrupt:
        run.close()  # the run can be resumed
        raise
    log(INFO, "%s%s", SUMMARY, json.dumps(summary))


def settings_on(grid: Grid, context: Context) -> Config:
    """Return the config of a run; deployment=inline, the default, becomes simulation where Flower runs the app."""
    config, _ = load(context.run_config, {})
    if config.deployment.kind == "inline" and not isinstance(grid, InlineGrid):
        return replace(config, deployment=replace(config.deployment, kind="simulation", workers=None))
    return config


def are_clients_here(grid: Grid, config: Config) -> bool:
    """Say whether the clients run on this machine and read their data from the run's home."""
    if isinstance(grid, InlineGrid):
        return grid.clients_here
    return is_simulated(grid) and config.deployment.ray_address is None


def is_simulated(grid: Grid) -> bool:
    """Say whether Flower simulates the clients; this is then the process that it starts Ray from."""
    return type(grid).__name__ == "InMemoryGrid"


def warn_of_open_ray(grid: Grid) -> None:
    """Log a warning in a simulation whose Ray asks for no token."""
    if is_simulated(grid) and os.environ.get("RAY_AUTH_MODE") != "token":
        log(
            WARNING,
            "the Ray of this simulation runs code from anybody who reaches its ports: "
            "use python -m tools.run, or start Flower's SuperLink with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN",
        )


def run_rounds(grid: Grid, config: Config, run: RunDirectory) -> dict[str, Any]:
    """Gather the clients, run every round, leave the final model and summary in the run directory; return that."""
    torch.set_num_threads(config.train.threads)
    run.open_events()
    if config.split.auto_save_split_models:
        # Only a run that has written its model has been as far as storing it split, and may find files of its own.
        StorageManager.prepare(*split_place(config), overwrite=(run.path / "model.safetensors").exists())
    model = initial_model(config)
    state = model.state_dict()
    sent, private = keys_of(config, model)
    frozen = {key: tensor for key, tensor in state.items() if key not in {*sent, *private}}
    base = keep_base(config.models_dir, frozen) if config.lora.enabled else None
    if config.privacy.enabled:
        check_floating({key: state[key].numpy() for key in sent})
    polled = PolledGrid(grid, any_node=is_simulated(grid) or (isinstance(grid, InlineGrid) and grid.any_node))
    roster = build_roster(config, polled, base, ClientLedger(run))
    strategy = build_strategy(config, roster, run, model, private)
    done = run.last_round()
    if done:
        saved, facts = run.load_round(done)
        load_global(model, {key: saved.pop(key) for key in sent})
        strategy.restore(done, facts, {key: tensor.numpy() for key, tensor in saved.items()})
        log(INFO, "%s goes on after round %d of %d", config.run_name, done, config.num_rounds)
    if done < config.num_rounds and not run.summary.totals["stopped_early"]:
        polled.on_reply = partial(take_replies, run, strategy)
        polled.on_sent = partial(run.clock.enter_after, "send", "train")
        try:
            roster.wait(config.strategy.wait_for_clients, config.strategy.min_clients)
        finally:
            run.append("roster", done, **roster.facts())
        check_validation(config, roster)
        samples = sum(member.claim.train for member in roster.members.values())
        if warning := find_oversize(config.model, config.dataset, samples):
            log(WARNING, "%s", warning)
        with suppress(StoppedEarly):
            strategy.start(
                polled,
                ArrayRecord({key: pack(state[key].numpy()) for key in sent}),
                num_rounds=config.num_rounds - done,
                timeout=config.strategy.timeout,
                evaluate_fn=partial(end_round, config, run, strategy, model),
            )
    selected, _ = run.load_round(run.summary.selected_round())
    load_global(model, {key: selected[key] for key in sent})
    return save_final_model(config, run, model, base)


def count_releases(run: RunDirectory) -> ReleaseLedger:
    """Log what local differential privacy protects and what not, and return the count of what clients release."""
    log(WARNING, "%s", describe_plan(run.config.privacy, run.config.num_rounds))
    log(
        WARNING, "privacy.enabled=true protects trained tensors only; these leave a client as they are: %s", UNPROTECTED
    )
    return ReleaseLedger(run)


def take_replies(run: RunDirectory, strategy: FedAvg, new: Sequence[Message], done: int, asked: int) -> None:
    """Hand over replies as they come, and say how many clients have replied, or how many nodes while clients join."""
    if run.clock.phase == "configure":
        run.show_progress(strategy.phase.server_round, "join", done, asked)
        return
    phase = strategy.phase
    phase.take(new)
    run.show_progress(phase.server_round, phase.kind, phase.done(), len(phase.names))


def initial_model(config: Config) -> nn.Module:
    """Build the model with weights from a file or drawn from the run's seed, and with adapters if there are any."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "model"))
        model = build(config.model, config.dataset)
        if config.model.pretrained is not None:
            log(INFO, "starting from %s", load_pretrained(model, Path(config.model.pretrained)))
        if config.lora.enabled:
            adapt(model, config.lora, config.lora.rank)
            mark_only_lora_as_trainable(model)
        if config.lora.adapter is not None:
            import_adapter(model, Path(config.lora.adapter))
    return model


def keys_of(config: Config, model: nn.Module) -> tuple[list[str], list[str]]:
    """Name the tensors of the global model that travel (without adapters all), and those that each client keeps."""
    layout = layout_of(model)
    return global_keys(layout.tensors, layout.trained, config.strategy.aggregation)


def load_global(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what travels into the server's model, whose base stays."""
    odd = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not odd, odd


def save_final_model(config: Config, run: RunDirectory, model: nn.Module, base: Base | None) -> dict[str, Any]:
    """Write the final model, adapters folded in, and the adapter alone where it is all that changed; then finish."""
    digest = run.save_model(merged_state_dict(model) if base else model.state_dict())
    rule = RULES.get(config.strategy.aggregation or "")
    if base is not None and rule is not None and not rule.folds and not rule.private_b:
        shutil.rmtree(run.path / "adapter", ignore_errors=True)  # of an earlier end of this run, resumed
        export_adapter(model, run.path / "adapter", base.digest)
    if config.split.auto_save_split_models:
        leave_split(config, run.path)
    return run.finish(digest)


def leave_split(config: Config, path: Path) -> None:
    """Store the final model of the run directory `path` split as well."""
    folder, name, p1, p2 = split_place(config)
    options: dict[str, Any] = {"name": name, "overwrite": config.resume, "dropout": config.model.dropout}
    ModelFactory.create_split_models("vit", path, p1, p2, storage_path=folder, auto_save=True, **options)
    log(INFO, "stored split at %d and %d in %s", p1, p2, folder)


def build_roster(config: Config, grid: PolledGrid, base: Base | None, ledger: ClientLedger) -> Roster:
    """Return the roster of the clients "0" to clients - 1 or, with shards, of those that the manifest lists."""
    keys = ClientKeys(Path(config.deployment.client_keys)) if config.deployment.client_keys else None
    common: dict[str, Any] = {"base": base, "keys": keys, "ledger": ledger, "any_node": grid.any_node}
    if not config.distributed_data.enabled:
        expected = [str(i) for i in range(config.clients)]
        known = partial(check_against_partition, cache(partial(samples_dealt, config)))
        return Roster(grid, expected, config.run_name, config.dataset.classes, known, **common)
    manifest = open_manifest(config.manifest_path, config.clients, config.partition.kind)

    def check(claim: Claim) -> str | None:
        record, digest = manifest.get(claim.client_id), claim.shard_digest
        return check_claim(record, claim.client_id, claim.train, claim.val, claim.test, claim.label_hist, digest)

    strict = config.distributed_data.strict_check
    return Roster(grid, list(manifest), config.run_name, config.dataset.classes, check, strict, **common)


def samples_dealt(config: Config) -> list[tuple[int, int, int]] | None:
    """Return each client's training, validation and test samples, if the data lie on this machine too."""
    if not is_prepared(config.data_dir / config.dataset.name):
        return None
    partition = open_partition(config)
    held_out = [len(rows) for rows in partition.val] if partition.val else [0] * len(partition.train)
    pairs = zip(partition.train, held_out, partition.test, strict=True)
    return [(len(train), val, len(test)) for train, val, test in pairs]


def check_against_partition(dealt: Callable[[], list[tuple[int, int, int]] | None], claim: Claim) -> str | None:
    """Return what is wrong with a claim where the partition is known; see samples_dealt."""
    known = dealt()
    if known is None:
        return None
    claimed = (claim.train, claim.val, claim.test)
    for split, said, given in zip(
        ("training", "validation", "test"), claimed, known[int(claim.client_id)], strict=True
    ):
        if said != given:
            return f"claims {said} {split} samples, the partition gives it {given}"
    return None


def check_validation(config: Config, roster: Roster) -> None:
    """Raise FederationError when the run chooses by validation samples and no client has any."""
    if config.chooses and not any(member.claim.val for member in roster.members.values()):
        raise FederationError(
            "evaluate.select=best and stopping.metric choose by validation samples, of which no client has any: set "
            "evaluate.select=last and stopping.metric=null, or give the clients more samples"
        )


def build_strategy(config: Config, roster: Roster, run: RunDirectory, model: nn.Module, private: list[str]) -> FedAvg:
    """Build the strategy that the config names; private are the tensors that each client keeps."""
    settings = config.strategy
    optimizer = None
    if settings.server_optimizer is not None:
        optimizer = ServerOptimizer(settings.server_optimizer, settings.server_lr, settings.server_momentum)
    releases = count_releases(run) if config.privacy.enabled else None
    if settings.aggregation is None:
        return FedAvg(roster, run, config, optimizer, releases)
    layers, fresh = list(adapted_layers(model)), partial(fresh_adapter, config, model)
    return FedLoRA(roster, run, config, optimizer, releases, layers=layers, private=private, fresh=fresh)


def fresh_adapter(config: Config, model: nn.Module, server_round: int) -> dict[str, np.ndarray]:
    """Draw a new lora_A for every layer, from the run's seed and the round."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "adapter", server_round))
        layers = adapted_layers(model).items()
        return {f"{name}.lora_A": draw_lora_A(layer.lora_A).numpy() for name, layer in layers}


def end_round(
    config: Config, run: RunDirectory, strategy: FedAvg, model: nn.Module, flower_round: int, arrays: ArrayRecord
) -> MetricRecord | None:
    """Evaluate on the server if the config says so, then complete the round; Flower calls this before round 1 too.

    Raises StoppedEarly after a round that is to be the last.
    """
    run.clock.enter("central")
    server_round = strategy.done + flower_round
    if flower_round == 0 and strategy.done:
        run.clock.start()
        return None  # that round is complete
    evaluated = server_round == 0 or strategy.is_evaluated(server_round)
    found = (
        evaluate_centrally(config, run, model, server_round, arrays) if config.evaluate.central and evaluated else None
    )
    if server_round:
        run.save_round(server_round, views(arrays) | strategy.state(arrays), strategy.facts())
        if run.summary.totals["stopped_early"]:
            raise StoppedEarly
    else:
        run.clock.start()
    return found


def evaluate_centrally(
    config: Config, run: RunDirectory, model: nn.Module, server_round: int, arrays: ArrayRecord
) -> MetricRecord:
    """Evaluate the global model on the whole test artifact, for the record: nothing chooses by it."""
    folder = ensure_artifacts(config.data_dir, config.dataset.name) / "test"
    dataset = OfflineDataset(folder, normalization=config.dataset.normalization)
    load_global(model, arrays.to_torch_state_dict())
    batches = ClientLoader(
        dataset, np.arange(len(dataset)), config.evaluate.batch_size, image_size=config.model.image_size
    )
    found = evaluate(model.to(choose_device(config.train.device)), batches)
    model.cpu()
    values = {"loss": found.loss_sum / found.count}
    if config.dataset.classes:
        values["accuracy"] = found.correct / found.count
    run.append("central", server_round, **values)
    return MetricRecord(dict(values))
