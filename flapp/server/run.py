"""One run of a federation on the server: restore the saved state, train the remaining rounds, save the final model."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from torch import nn

from flapp.architecture import adapt, build, choose_device, find_oversize, split_place
from flapp.base import Base, keep_base
from flapp.central import describe_central, is_secure
from flapp.config.load import derive_seed
from flapp.config.schema import Config, ConfigError
from flapp.custom import enable, own
from flapp.data.loader import ClientLoader
from flapp.data.offline import OfflineDataset
from flapp.data.shards.manifest import Manifest, check_claim, open_manifest
from flapp.data.sources import is_prepared
from flapp.messages import Claim, as_record, pack, views
from flapp.model.adapter_files import export_adapter, find_export_fault, import_adapter
from flapp.model.files import to_numpy
from flapp.model.lora import adapted_layers, layout_of, mark_only_lora_as_trainable, merged_state_dict
from flapp.model.lora_layers import draw_lora_A
from flapp.model.pretrained import load_pretrained
from flapp.model.split.factory import ModelFactory
from flapp.model.split.files import StorageManager
from flapp.partitions import open_partition, prepared
from flapp.privacy import UNPROTECTED, check_floating, describe_plan
from flapp.server.client_keys import ClientKeys
from flapp.server.grid import PolledGrid
from flapp.server.journals import ClientLedger, ReleaseLedger
from flapp.server.observer import Observer
from flapp.server.publish import is_whole, tell_reason
from flapp.server.releases import CentralLedger
from flapp.server.roster import FederationError, Roster
from flapp.server.run_dir import RunDirectory
from flapp.server.summary import StoppedEarly
from flapp.strategy.central import Central, private
from flapp.strategy.fedavg import FedAvg
from flapp.strategy.fedlora import FedLoRA, global_keys
from flapp.strategy.lora_rules import RULES
from flapp.strategy.server_optimizer import ServerOptimizer
from flapp.training import evaluate


class Run:
    """Run the rounds of a federation; its results go into `directory`."""

    def __init__(self, grid: Grid, directory: RunDirectory) -> None:
        self.directory = directory
        self.config = config = directory.config
        self.observer = directory.observer
        torch.set_num_threads(config.train.threads)
        self.observer.open_events()
        if config.split.auto_save_split_models:
            # A run stores its split model after model.safetensors. If that exists, the split files may be its own.
            is_written = (directory.path / "model.safetensors").exists()
            StorageManager.check(*split_place(config), overwrite=is_written)
        self.model = initial_model(config)
        state = self.model.state_dict()
        self.sent, kept = keys_of(config, self.model)
        frozen = {key: tensor for key, tensor in state.items() if key not in {*self.sent, *kept}}
        self.base = keep_base(config.models_dir, frozen) if config.lora.enabled else None
        self.central: Central | None = None
        releases = None
        if config.privacy.kind != "none":
            check_floating({key: to_numpy(state[key]) for key in self.sent})
        if config.privacy.kind == "local":
            releases = count_releases(directory)
        if config.privacy.kind == "central":
            check_trained(self.model, self.sent)
            self.central = Central(config, count_central(directory))
        self.grid = PolledGrid(grid)
        self.roster = build_roster(config, self.grid, self.base, ClientLedger(directory))
        self.strategy = build_strategy(config, self.roster, self.observer, self.model, kept, releases, self.central)
        self.restored: ArrayRecord | None = None  # the global model with which this start began, if it resumed the run
        self.last: ArrayRecord | None = None  # the global model after the last round of this start

    def run(self) -> dict[str, Any]:
        """Run all rounds that are left and return the summary."""
        done = self.restore()
        if self.central and not self.observer.summary.totals["stopped_early"]:
            self.plan_budget(self.central, done)
        if done < self.config.num_rounds and not self.observer.summary.totals["stopped_early"]:
            self.gather(done)
            self.train(done)
        return self.finish()

    def restore(self) -> int:
        """Load the state after the last complete round, and return the number of that round."""
        done = self.directory.last_round()
        if done:
            saved, facts = self.directory.load_round(done)
            found = {key: saved.pop(key) for key in self.sent}
            # This raises if they do not fit. Clients are sent the saved tensors, not the model's, which may be rounded.
            self.load_global(found)
            self.restored = as_record({key: pack(to_numpy(tensor)) for key, tensor in found.items()})
            self.strategy.restore(done, facts, {key: to_numpy(tensor) for key, tensor in saved.items()})
            log(INFO, "%s continues after round %d of %d", self.config.run_name, done, self.config.num_rounds)
        return done

    def plan_budget(self, central: Central, done: int) -> None:
        """Find the last round within the budget. If none is left, raise ConfigError, or stop a resumed run."""
        central.begin(done, self.restored or self.initial())
        if central.last_round > done or done == self.config.num_rounds:
            return
        if done == 0:
            raise ConfigError(
                f"privacy.epsilon={self.config.privacy.epsilon:g} is the budget, epsilon so far is "
                f"{central.ledger.epsilon():.4g}, and after one more round {central.ledger.epsilon(1):.4g}: "
                "start a new run with a larger budget or privacy.noise_multiplier"
            )
        self.stop_by_budget(central, done)

    def stop_by_budget(self, central: Central, server_round: int) -> None:
        """Note that the next round would exceed the budget."""
        budget, spent = self.config.privacy.epsilon, central.ledger.epsilon()
        self.observer.append("stop", server_round, metric="epsilon", value=spent, budget=budget)

    def gather(self, done: int) -> None:
        """Wait for the clients; raises FederationError when too few come or their data do not suffice."""
        config = self.config
        self.grid.on_reply, self.grid.on_sent = self.take_replies, self.observer.sent
        try:
            self.roster.wait(config.strategy.wait_for_clients, config.strategy.min_clients)
        finally:
            self.observer.append("roster", done, **self.roster.facts())
        claims = [member.claim for member in self.roster.members.values()]
        if config.chooses and not any(claim.val for claim in claims):
            raise FederationError(
                "evaluate.select=best and stopping.metric choose by validation samples, of which no client has any: "
                "set evaluate.select=last and stopping.metric=null, or give the clients more samples"
            )
        if warning := find_oversize(config.model, config.dataset, sum(claim.train for claim in claims)):
            log(WARNING, "%s", warning)

    def train(self, done: int) -> None:
        """Run the rounds after round `done`."""
        arrays, self.restored = self.restored, None
        if arrays is None:
            arrays = self.initial()
        with suppress(StoppedEarly):
            self.strategy.start(
                cast(Grid, self.grid),
                arrays,
                num_rounds=self.config.num_rounds - done,
                timeout=self.config.strategy.timeout,
                evaluate_fn=self.end_round,
            )

    def initial(self) -> ArrayRecord:
        """Return the global model before round 1."""
        state = self.model.state_dict()
        return as_record({key: pack(to_numpy(state[key])) for key in self.sent})

    def take_replies(self, new: Sequence[Message], done: int, asked: int) -> None:
        """Hand replies to the strategy as they come, and show how many clients, or nodes that join, have replied."""
        if self.observer.clock.phase == "configure":
            self.observer.show_progress(self.strategy.phase.server_round, "join", done, asked)
            return
        phase = self.strategy.phase
        phase.take(new)
        self.observer.show_progress(phase.server_round, phase.kind, phase.done(), len(phase.names))

    def end_round(self, flower_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Complete a round, evaluated here if the config says so; Flower also calls this before round 1, as round 0."""
        self.observer.enter("central")
        server_round = self.strategy.done + flower_round
        found = None
        is_complete = flower_round == 0 and server_round > 0  # an earlier start evaluated and saved it
        is_evaluated = server_round == 0 or self.strategy.is_evaluated(server_round)
        if self.config.evaluate.central and is_evaluated and not is_complete:
            found = self.evaluate_centrally(server_round, arrays)
        if flower_round == 0:
            self.observer.clock.start()
            return found
        self.last = arrays
        if self.central and server_round == self.central.last_round < self.config.num_rounds:
            self.stop_by_budget(self.central, server_round)
        self.directory.save_round(server_round, views(arrays) | self.strategy.state(arrays), self.strategy.facts())
        if self.observer.summary.totals["stopped_early"]:
            raise StoppedEarly
        return found

    def evaluate_centrally(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate the global model on the whole test artifact, for information only: no decision uses it."""
        config = self.config
        folder = prepared(config) / "test"
        dataset = OfflineDataset(folder, normalization=config.dataset.normalization)
        self.load_global(arrays.to_torch_state_dict())
        rows, size = np.arange(len(dataset)), config.evaluate.batch_size
        batches = ClientLoader(dataset, rows, size, image_size=config.model.image_size)
        loss, count = own(config, "train.loss"), own(config, "evaluate.metrics")
        found = evaluate(self.model.to(choose_device(config.train.device)), batches, loss, count)
        self.model.cpu()
        values = {"loss": found.loss_sum / found.count}
        if config.dataset.classes:
            values["accuracy"] = found.correct / found.count
        sums = {"sums": found.sums} if found.sums else {}
        self.observer.append("central", server_round, **values, **sums, **self.strategy.score(sums, ""))
        return MetricRecord(dict(values))

    def finish(self) -> dict[str, Any]:
        """Save the model of the last round, or of the best one if evaluate.select says so; return the summary."""
        config, path = self.config, self.directory.path
        selected = self.observer.summary.selected_round()
        if self.last is not None and selected == self.observer.summary.totals["rounds"]:
            self.load_global(self.last.to_torch_state_dict())
        else:
            saved, _ = self.directory.load_round(selected)
            self.load_global({key: saved[key] for key in self.sent})
        digest = self.directory.save_model(merged_state_dict(self.model) if self.base else self.model.state_dict())
        rule = RULES.get(config.strategy.aggregation or "")
        if self.base is not None and rule is not None and not rule.folds and not rule.private_b:
            shutil.rmtree(path / "adapter", ignore_errors=True)  # from an earlier end of this run
            if fault := find_export_fault(self.model):
                log(WARNING, "no adapter folder is written, because PEFT's format cannot hold this model: %s", fault)
            else:
                export_adapter(self.model, path / "adapter", self.base.digest)
        if config.split.auto_save_split_models:
            save_split(config, path)
        return self.directory.finish(digest)

    def load_global(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Update the server's model with tensors that clients are sent; the frozen base stays as it is."""
        odd = self.model.load_state_dict(tensors, strict=False).unexpected_keys
        assert not odd, odd


def initial_model(config: Config) -> nn.Module:
    """Build the model, with adapters if the config says so, and weights from a file or drawn from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "model"))
        model = build(config.model, config.dataset)
        if config.model.pretrained is not None:
            found = load_pretrained(model, Path(config.model.pretrained))
            head = "head loaded" if found.head_loaded else "new head"
            positions = "positions resized" if found.interpolated else "positions as stored"
            text = "starting from %s (SHA-256 %s): %s, %s"
            log(INFO, text, config.model.pretrained, found.sha256[:12], head, positions)
            if found.assumed:
                log(INFO, "a file alone does not say heads, activation and pooling: assumed %s", found.assumed)
        if config.lora.enabled:
            adapt(model, config.lora, config.lora.rank)
            mark_only_lora_as_trainable(model)
        if config.lora.adapter is not None:
            import_adapter(model, Path(config.lora.adapter))
    return model


def keys_of(config: Config, model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the keys of the tensors that clients are sent, and of those that each client keeps to itself.

    If the model has no adapters, clients are sent all tensors.
    """
    layout = layout_of(model)
    return global_keys(layout.tensors, layout.trained, config.strategy.aggregation)


def fresh_adapter(config: Config, model: nn.Module, server_round: int) -> dict[str, np.ndarray]:
    """Draw a new lora_A for every layer, from the run's seed and the round."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "adapter", server_round))
        layers = adapted_layers(model).items()
        return {f"{name}.lora_A": to_numpy(draw_lora_A(layer.lora_A)) for name, layer in layers}


def save_split(config: Config, path: Path) -> None:
    """Store the final model of the run directory `path` as a split model, too."""
    folder, name, p1, p2 = split_place(config)
    options: dict[str, Any] = {"name": name, "overwrite": config.resume, "dropout": config.model.dropout}
    ModelFactory.create_split_models("vit", path, p1, p2, storage_path=folder, auto_save=True, **options)
    log(INFO, "stored split at %d and %d in %s", p1, p2, folder)


def count_releases(directory: RunDirectory) -> ReleaseLedger:
    """Log what local differential privacy protects and what it does not; return the count of releases."""
    log(WARNING, "%s", describe_plan(directory.config.privacy, directory.config.num_rounds))
    log(WARNING, "privacy=local protects trained tensors only; these leave a client as they are: %s", UNPROTECTED)
    return ReleaseLedger(directory)


def count_central(directory: RunDirectory) -> CentralLedger:
    """Log what central differential privacy protects and what it does not; return the count of releases."""
    config = directory.config
    log(WARNING, "%s", describe_central(config))
    readers = "the server and the run directory get" if is_whole(config.privacy) else "the server gets"
    log(WARNING, "privacy=central protects the model only; %s: %s", readers, UNPROTECTED)
    if not is_secure(config):
        text = "privacy.noise=seeded is for experiments, because every client knows the seed and so the noise: set %s"
        log(WARNING, text, "privacy.noise=secure")
    return CentralLedger(directory)


def check_trained(model: nn.Module, sent: Sequence[str]) -> None:
    """Raise ConfigError for tensors that noise would spoil: those that are not trained, and tied weights."""
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    if odd := [key for key in sent if key not in trained]:
        raise ConfigError(
            f"privacy=central adds noise to every tensor that travels, and {odd[0]} is not trained ({len(odd)} such "
            "tensors): use a model without buffers and frozen tensors, such as GroupNorm in place of BatchNorm, or "
            "train adapters"
        )
    names: dict[int, str] = {}
    for key in sent:
        if (first := names.setdefault(id(named[key]), key)) != key:
            raise ConfigError(
                f"privacy=central adds noise under each name, and {first} and {key} are one tensor, which would get "
                "noise twice: use a model without tied weights, or train adapters"
            )


def build_roster(config: Config, grid: PolledGrid, base: Base | None, ledger: ClientLedger) -> Roster:
    """Return the roster of the clients "0" to clients - 1 or, with shards, of those that the manifest lists."""
    expected = [str(i) for i in range(config.clients)]
    options: dict[str, Any] = {"check_claim": partial(check_against_partition, cache(partial(count_samples, config)))}
    if config.distributed_data.enabled:
        data = config.dataset.samples
        manifest = open_manifest(config.manifest_path, config.clients, config.partition.kind, data)
        expected, check = list(manifest), partial(check_against_manifest, manifest)
        options = {"check_claim": check, "strict": config.distributed_data.strict_check}
    if config.deployment.client_keys:
        options["keys"] = ClientKeys(Path(config.deployment.client_keys))
    options |= {"base": base, "ledger": ledger, "any_node": grid.any_node, "code": enable(config)}
    options["tell"] = partial(tell_reason, config.privacy)
    return Roster(cast(Grid, grid), expected, config.dataset.classes, **options)


def check_against_manifest(manifest: Manifest, claim: Claim) -> str | None:
    """Return what is wrong with the claim of a client that has a shard of its own."""
    record, digest = manifest.get(claim.client_id), claim.shard_digest
    return check_claim(record, claim.client_id, claim.train, claim.val, claim.test, claim.label_hist, digest)


def count_samples(config: Config) -> list[tuple[int, int, int]] | None:
    """Return each client's training, validation and test samples by the partition, if the data is on this machine."""
    if not is_prepared(config.data_dir / config.dataset.name):
        return None
    partition = open_partition(config)
    train, test = (list(map(len, rows)) for rows in (partition.train, partition.test))
    val = list(map(len, partition.val)) or [0] * len(train)
    return list(zip(train, val, test, strict=True))


def check_against_partition(count: Callable[[], list[tuple[int, int, int]] | None], claim: Claim) -> str | None:
    """Return what is wrong with a claim, if `count` knows the samples of each client; see count_samples."""
    if (counts := count()) is not None:
        claimed = (claim.train, claim.val, claim.test)
        pairs = zip(("training", "validation", "test"), claimed, counts[int(claim.client_id)], strict=True)
        for split, said, given in pairs:
            if said != given:
                return f"claims {said} {split} samples, the partition gives it {given}"
    return None


def build_strategy(
    config: Config,
    roster: Roster,
    observer: Observer,
    model: nn.Module,
    kept: list[str],
    releases: ReleaseLedger | None = None,
    central: Central | None = None,
) -> FedAvg:
    """Build the strategy that the config names; kept: the tensors that each client keeps."""
    settings = config.strategy
    optimizer = None
    if settings.server_optimizer is not None:
        optimizer = ServerOptimizer(settings.server_optimizer, settings.server_lr, settings.server_momentum)
    strategy: Callable[..., FedAvg] = strategy_class(config)
    if central:
        strategy = partial(private(strategy_class(config)), central=central)
    if settings.aggregation is None:
        return strategy(roster, observer, config, optimizer, releases)
    layers = {name: layer.is_transposed for name, layer in adapted_layers(model).items()}
    fresh = partial(fresh_adapter, config, model)
    options = {"layers": layers, "private": kept, "fresh": fresh}
    return strategy(roster, observer, config, optimizer, releases, **options)


def strategy_class(config: Config) -> type[FedAvg]:
    """Return FedAvg, FedLoRA, or the user's own subclass of it; raises ConfigError for anything else."""
    base = FedAvg if config.strategy.aggregation is None else FedLoRA
    found: object = own(config, "strategy.target") or base
    if not (isinstance(found, type) and issubclass(found, base)):
        fix = f"derive it from flapp.strategy.{base.__name__.lower()}.{base.__name__}"
        raise ConfigError(f"strategy.target={config.strategy.target} is not a subclass of {base.__name__}: {fix}")
    return found
