"""privacy.publish=totals: no number of a single client in anything that the server's side of a run writes."""

import json
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from flapp import client_app
from flapp.config.load import compose, config_digest, differences, to_json
from flapp.config.schema import ConfigError
from flapp.data.shards.manifest import Manifest
from flapp.messages import METRICS
from flapp.model.files import load_tensors
from flapp.server import publish
from flapp.server.publish import published, tell_reason
from flapp.server.roster import FederationError
from tests.conftest import Federate, break_and_resume, break_off, read_clients, read_lines, refusal_of
from tests.server.test_roster import Nodes, claim_of, gather
from tests.support.federations import nodes, sites
from tests.support.html_page import report_on
from tests.support.replies import lying, set_claim, trained_in
from tools.deployment.submit import refusals
from tools.running.progress import Progress

TOTALS = "privacy.publish=totals"
BASE = ("model=linear", "clients=8", "train.steps=4", "checkpoint=off", "strategy.norm_limit=null")
ODD = (
    *("num_rounds=2", "strategy.robust=norm_bound", "strategy.clip_multiple=0.9", "strategy.max_weight_share=0.2"),
    *("strategy.min_clients=4", "strategy.wait_for_clients=0.1", "evaluate.validation_fraction=0.2"),
    "results.tensorboard=true",
)
TOY = ("experiment=toy_regression", "clients=2", "num_rounds=3")
PRIVATE = {  # what no file may have
    *("client_seconds", "client_bytes_up", "client_bytes_down", "client_ranks", "update_norm", "absent", "failures"),
    *("capped", "val_capped", "clipped", "left_out", "refused", "warnings", "label_hist", "samples", "labels"),
    *("reason", "train", "val", "test", "asked_clients"),
}
NAMES = re.compile(r"\bclients? (\d|[a-z]+ \d)|\bnode \d")
LOSS = 4141.125  # in the text of an error
Found = tuple[dict[str, Any], Path, str]  # metrics.json, the run directory, the log


def odd_clients(name: str, reply: Message) -> Message:
    """Let client 6 claim too much, client 5 send a negative time, and the others each a time of their own."""
    if reply.has_content():
        set_claim(reply.content, "6", train=98765)
        if trained_in(reply) is not None:
            found = reply.content.metric_records[METRICS]
            found["seconds"] = -5151.25 if name == "5" else 1000.0 + 1.001 * int(name)
    return reply


@pytest.fixture(scope="module")
def run_both(federate: Federate) -> dict[str, Found]:
    """Return the same run with privacy.publish=all and totals: one client is absent, others refused, failing, odd."""
    real, found = client_app.fit, {}
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]

    def fit(*args: Any) -> Any:
        if args[1].client_id == "4" and args[1].instructions.server_round == 2 and args[-1] == "train":
            raise ValueError(f"the loss is {LOSS}")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app, "fit", fit)
        for kind in ("all", "totals"):
            lines.clear()
            logging.getLogger("flwr").addHandler(handler)
            words = (*BASE, *ODD, f"privacy.publish={kind}")
            summary, path = federate(*words, nodes=nodes(8)[:7], tamper=odd_clients)
            logging.getLogger("flwr").removeHandler(handler)
            found[kind] = summary, path, "\n".join(lines)
    return found


def texts(path: Path, log: str) -> Iterator[tuple[str, str]]:
    """Yield everything that a run has written, by file; settings may be any number."""
    yield "log", re.sub(r"line \d+", "", log)
    for file in path.rglob("*"):
        if file.is_file() and file.name not in ("config.yaml", "model.safetensors"):
            yield file.name, file.read_bytes().decode("latin-1")


def numbers_of(values: Any) -> Iterator[str]:
    """Yield the numbers in nested values as JSON writes them, where they are distinctive."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from numbers_of(value)
    elif isinstance(values, int | float) and len(text := json.dumps(values)) > (2 if isinstance(values, int) else 5):
        yield text


def private_numbers(path: Path) -> set[str]:
    """Return the numbers of single clients in the files of a run with privacy.publish=all."""
    found = {number for line in read_clients(path).values() for number in numbers_of([line["train"], line["test"]])}
    for text in (path / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        keys = [key for key in line if key in PRIVATE or key.endswith(("_spread", "_by_client"))]
        found |= {number for key in keys if "bytes" not in key for number in numbers_of(line[key])}
        found |= set(re.findall(r"-?\d{3,}(?:\.\d+)?", json.dumps([line.get("refused"), line.get("failures")])))
    return found


def keys_in(values: Any) -> set[str]:
    if isinstance(values, list):
        return set().union(*map(keys_in, values))
    return {*values, *keys_in(list(values.values()))} if isinstance(values, dict) else set()


def test_numbers_of_single_clients_are_in_no_file_and_not_in_the_log(run_both: dict[str, Found]) -> None:
    _, whole, log = run_both["all"]
    private = private_numbers(whole)
    assert {"98765", "-5151.25", "1003.003", "1001.001"} <= private
    assert len(private) > 60
    written = "".join(text for _, text in texts(whole, log))
    assert "-5151.25" in log
    assert str(LOSS) in log
    patterns = {number: re.compile(rf"(?<![\w.]){re.escape(number)}(?!\w|\.\d)") for number in (*private, str(LOSS))}
    assert all(pattern.search(written) for pattern in patterns.values())  # so the search finds them
    for name, text in texts(*run_both["totals"][1:]):
        assert [number for number, pattern in patterns.items() if pattern.search(text)] == [], name


def test_no_field_and_no_line_of_the_log_is_about_a_single_client(run_both: dict[str, Found]) -> None:
    _, path, log = run_both["totals"]
    for file in ("metrics.jsonl", "environment.jsonl", "metrics.json", "progress.json"):
        text = (path / file).read_text()
        for line in [json.loads(text)] if file.endswith(".json") else map(json.loads, text.splitlines()):
            keys = keys_in(line if line.get("kind") != "round" else {**line, "phases": {}})
            odd = {key for key in keys if key in PRIVATE or "by_client" in key or "spread" in key}
            assert odd == set(), file
    assert {frozenset(line) for line in read_clients(path).values()} == {
        frozenset({"kind", "client", "round", "shard_digest"})
    }
    assert NAMES.search(run_both["all"][2])
    assert NAMES.search(log) is None


def test_counts_say_how_many_clients_were_left_out(run_both: dict[str, Found]) -> None:
    (lines, whole), summaries = ([read_lines(run_both[kind][1], "train") for kind in ("totals", "all")]), run_both
    for line, full in zip(lines, whole, strict=True):
        for key in ("capped", "clipped", "failures"):
            count = f"{key.removesuffix('s')}_count" if key == "failures" else f"{key}_count"
            assert line[count] == len(full[key]) > 0
        assert line["absent_count"] == 1
        assert {key: line[key] for key in ("loss", "replies", "bytes_up")} == {
            key: full[key] for key in ("loss", "replies", "bytes_up")
        }
    odd = "sent a reply that does not count"
    assert [line["failure_kinds"] for line in lines] == [{odd: 1}, {"failed": 1, odd: 1}]
    (roster,) = read_lines(run_both["totals"][1], "roster")
    assert roster["refused_count"] == summaries["totals"][0]["refused_count"] == 1
    assert refusals(summaries["totals"][0]).startswith("clients or nodes refused: 1 (privacy.publish=totals hides")
    log = summaries["totals"][2]
    assert f"round 2: 1 client failed; 1 client {odd} (privacy.publish=totals hides who and why: a trial" in log
    assert "round 1: strategy.max_weight_share=0.2 caps" in log
    assert re.search(r"round 1: \d updates are clipped to 0.9 times the median length", log)
    assert re.search(r"a client failed:\n.*client_app.py.*\nValueError \(privacy", log, re.DOTALL)


def test_both_kinds_of_runs_end_in_the_same_bytes_and_figures(run_both: dict[str, Found]) -> None:
    (whole, one, _), (totals, two, _) = run_both["all"], run_both["totals"]
    for key in ("model_sha256", "accuracy", "val_accuracy", "loss", "best_round", "bytes_up", "refused_count"):
        assert totals[key] == whole[key], key
    assert config_digest(compose([*BASE])) == config_digest(compose([*BASE, TOTALS]))
    for kind in ("evaluate", "central"):
        for line, full in zip(read_lines(two, kind), read_lines(one, kind), strict=True):
            assert {key: full[key] for key in line if key in full and key not in ("time", "seconds")} == {
                key: line[key] for key in line if key in full and key not in ("time", "seconds")
            }


def test_tensorboard_has_totals_only(run_both: dict[str, Found]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_both["totals"][1] / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/clipped_count", "evaluate/accuracy"} <= set(tags)
    assert [tag for tag in tags if "spread" in tag or "norm" in tag or tag.partition("/")[2] in PRIVATE] == []


def test_the_report_says_what_is_withheld(run_both: dict[str, Found], tmp_path: Path) -> None:
    page = report_on(tmp_path / "totals.html", run_both["totals"][1])
    said = " ".join(page.said.split())
    for words in (
        *("Withheld by privacy.publish=totals: samples, accuracy and seconds of each client",),
        *("Withheld by privacy.publish=totals: who was left out, and why", "sent a reply that does not count 2 1, 2"),
        *("Withheld by privacy.publish=totals: the spread over clients", "train absent 2 1, 2", "roster refused 1 0"),
    ):
        assert words in said, words
    assert "are not recorded" not in said
    assert any("Accuracy. global" in alt for alt in page.alts)
    whole = report_on(tmp_path / "all.html", run_both["all"][1])
    assert "Withheld" not in whole.said


def test_commands_show_counts(run_both: dict[str, Found], capsys: pytest.CaptureFixture[str], data_home: Path) -> None:
    path = run_both["totals"][1]
    settings = compose([f"home={data_home}", f"run_name={path.name}", *BASE, *ODD, TOTALS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAPP_FORMAT", "text")
        shown = Progress(settings, path)
        shown.reader._offset = 0  # as if the rounds were new
        shown.look()
        text = capsys.readouterr().err
        patch.setenv("FLAPP_FORMAT", "json")
        shown.reader._offset = 0
        shown.look()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "round 1: 1 client sent a reply that does not count (privacy.publish=totals hides who" in text
    assert re.search(r"round 1 clipped \d clients \(privacy", text)
    assert NAMES.search(text) is None
    assert [keys_in(event) & PRIVATE for event in events] == [set(), set()]
    assert [sum(event["failure_kinds"].values()) for event in events] == [1, 2]
    assert all(event["clipped_count"] > 0 for event in events)


def test_clients_that_krum_leaves_out_are_counted(federate: Federate) -> None:
    words = (*BASE, "num_rounds=1", "strategy.robust=multi_krum", "strategy.malicious=2", TOTALS)
    _, path = federate(*words)
    (line,) = read_lines(path, "train")
    assert line["left_out_count"] == 4
    assert "left_out" not in line


@pytest.mark.parametrize("kind", ["central-secure", "central-seeded", "local"])
def test_totals_go_with_noise(federate: Federate, data_home: Path, kind: str) -> None:
    """A round that has been released with secure noise keeps its line in a file of its own."""
    privacy, _, noise = kind.partition("-")
    words = (f"privacy={privacy}", "privacy.delta=1e-3", *([f"privacy.noise={noise}"] if noise else []))
    run = (*TOY, *words, TOTALS, f"run_name=totals-{kind}")
    break_off(federate, 2, "aggregate_evaluate", *run)
    release = data_home / "runs" / f"totals-{kind}" / "release.safetensors"
    assert release.exists() == (noise == "secure")
    if release.exists():
        assert keys_in(json.loads(load_tensors(release)[1]["line"])) & PRIVATE == set()
    summary, path = federate(*run, "resume=true")
    assert summary["status"] == "finished"
    lines = read_lines(path, "train")
    assert [line["epsilon"] > 0 for line in lines] == [True] * 3
    assert [keys_in(line) & PRIVATE for line in lines] == [set()] * 3
    if noise == "seeded":
        assert federate(*TOY, *words)[0]["model_sha256"] == summary["model_sha256"]


def test_a_run_that_broke_off_is_resumed_to_the_bytes_of_one_that_publishes_all(federate: Federate) -> None:
    whole, _ = federate(*TOY)
    for place in ("aggregate_train", "facts"):
        resumed, path = break_and_resume(federate, 2, place, *TOY, TOTALS, f"run_name=totals-{place}")
        assert resumed["model_sha256"] == whole["model_sha256"]
        assert "there is no" not in (path / "metrics.jsonl").read_text()
        assert {"train", "labels"} & keys_in(list(read_clients(path).values())) == set()


def test_a_resumed_run_finds_out_that_data_changed(federate: Federate) -> None:
    run = (*TOY, TOTALS, "run_name=totals-changed")
    break_off(federate, 2, "facts", *run)
    tamper = lying({"1": {"shard_digest": "f" * 64}})
    with pytest.raises(ConfigError, match="client 1: its data changed since the run began"):
        federate(*run, "resume=true", tamper=tamper)
    _, path = federate(*run, "resume=true", "resume_anyway=true", tamper=tamper)
    (line,) = read_lines(path, "resumed_anyway")
    assert line["changed"] == ["the data of 1 of the clients"]


def test_a_resumed_run_keeps_what_it_publishes_and_runs_of_an_older_flapp_published_all(federate: Federate) -> None:
    run = (*TOY, "run_name=totals-kept")
    break_off(federate, 2, "facts", *run, TOTALS)
    with pytest.raises(ConfigError, match=r"other settings \(privacy.publish was totals, is all\)"):
        federate(*run, "resume=true")
    settings = compose([*TOY])
    older = json.loads(to_json(settings))
    del older["privacy"]["publish"]
    assert differences(older, settings) == []
    assert differences(older, compose([*TOY, TOTALS])) == ["privacy.publish was all, is totals"]


def test_a_run_that_fails_says_how_many_failed_and_not_who(federate: Federate, caplog: Any) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if trained_in(reply) is not None:
            reply.content.metric_records[METRICS]["seconds"] = -77.125
        return reply

    odd = "round 1: 2 clients sent a reply that does not count (privacy.publish=totals hides who and why"
    with pytest.raises(FederationError, match=re.escape(odd)) as caught:
        federate(*TOY, TOTALS, "run_name=totals-failed", tamper=tamper)
    assert "(0 of 2 clients gave a valid train reply, strategy.min_replies=1)" in str(caught.value)
    assert "77.125" not in caplog.text + str(caught.value)


def test_a_run_that_cannot_start_names_clients_but_not_their_numbers(federate: Federate, data_home: Path) -> None:
    tamper = lying({"0": {"train": 98765, "label_hist": ()}, "1": {"source_digest": "e" * 64}})
    with pytest.raises(FederationError, match="client 0: privacy.publish=totals hides why: a trial") as caught:
        federate(*TOY, TOTALS, "run_name=totals-refused", "strategy.min_clients=2", tamper=tamper)
    assert "client 1: runs other source (eeeeeeeeeeee)" in str(caught.value)
    for _, text in texts(data_home / "runs" / "totals-refused", str(caught.value)):
        assert "98765" not in text


def test_a_warning_about_odd_data_names_the_client_only(caplog: pytest.LogCaptureFixture) -> None:
    tell = partial(tell_reason, compose([TOTALS]).privacy)
    nodes = Nodes(n0=[claim_of("0")])
    roster = gather(nodes, ["0"], check_claim=lambda claim: "claims 98765 samples", strict=False, tell=tell)
    assert list(roster.members) == ["0"]
    assert "client 0: privacy.publish=totals hides why" in caplog.text
    assert "98765" not in caplog.text


def test_shards_of_simulated_clients_log_no_samples_and_those_of_a_site_do(
    federate: Federate, shards: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [
        *("experiment=femnist_fedavg", "clients=3", "num_rounds=1", "train.steps=1", "model=linear", "checkpoint=off"),
        *("strategy.fraction_train=1", "strategy.fraction_evaluate=1", "evaluate.personal_epochs=0"),
        *("partition=round_robin", f"distributed_data.shard_path={tmp_path / 'shards'}"),
    ]
    caplog.set_level(logging.INFO)
    for more, given, is_told in (
        ([TOTALS, "run_name=totals-shards"], None, False),
        ([TOTALS, "run_name=totals-sites"], sites("012"), True),
    ):
        caplog.clear()
        federate(*words, *more, nodes=given)
        assert ("samples from" in caplog.text) == is_told


def test_a_new_field_is_withheld_until_it_is_listed() -> None:
    privacy, line = compose([TOTALS]).privacy, {"kind": "train", "round": 1, "time": 2.0, "loss": 3.0, "new": 4.0}
    assert published(privacy, line) == {key: value for key, value in line.items() if key != "new"}
    assert published(privacy, {**line, "kind": "unknown"}) == {"kind": "unknown", "round": 1, "time": 2.0}
    assert published(compose([]).privacy, line) == line
    counted = published(privacy, {**line, "clipped": {"3": 0.5}})
    assert published(privacy, counted) == counted
    assert {"failed", publish.LATE} == set(publish.count_kinds(["failed: it has 12 samples", publish.LATE]))


def test_a_node_that_died_is_reported_as_such() -> None:
    died = "failed: its process ended before it answered (killed, or out of memory)"
    assert publish.count_kinds([died, died, "failed: loss 3.25"]) == {"failed": 1, died: 2}
    assert tell_reason(compose([TOTALS]).privacy, died.removeprefix("failed: ")) in died


@pytest.mark.parametrize("setting", ["strategy.fraction_train=0.1", "strategy.fraction_evaluate=0.1"])
def test_totals_of_one_client_are_refused(setting: str) -> None:
    refused = f"privacy.publish=totals adds up clients, and {setting} of clients=8 is one client: raise one of them"
    assert refusal_of([*BASE, TOTALS, setting]) == refused
