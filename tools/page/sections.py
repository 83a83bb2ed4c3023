"""The sections about one run: tables and notes. Each says what the run does not record."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from flapp.listing import list_names
from flapp.server.summary import in_words
from flapp.untrusted import read_json
from tools.bench import HEADS, Row
from tools.cli import by_number, count, in_bytes, some
from tools.page.charts import MB
from tools.page.drawing import Picture
from tools.page.markup import Html, facts, figures, folded, join, note, section, table, tag
from tools.page.reading import STORES_OPENED, ReportError
from tools.page.run import Run, Stores, number

MOST_REASONS, MOST_CLIENTS = 20, 20
NONE = "-"
NO_ROUND_LINES = "metrics.jsonl has no line for a whole round: an older flapp wrote it, or no round was completed."
Pictures = Mapping[str, Sequence[Picture]]


def setup_of(run: Run) -> dict[str, object]:
    found = run.config.get
    model, strategy = [found("model.name", NONE)], [found("strategy.name", NONE)]
    if size := found("model.image_size"):
        model.append(f"at {size} pixels")
    if found("lora.enabled"):
        model.append(f"with adapters of rank {found('lora.rank', NONE)}")
    strategy += [found(key) for key in ("strategy.aggregation", "strategy.server_optimizer") if found(key)]
    strategy += [found("strategy.robust")] if found("strategy.robust", "none") != "none" else []
    clients, share = str(found("clients", NONE)), found("strategy.fraction_train")
    if isinstance(share, int | float) and share < 1:
        clients += f", {share:.3g} of them in a round" if share < 0.01 else f", {share:.0%} in a round"
    partition = f" ({found('partition.kind')})" if found("partition.kind") else ""
    return {
        "model": " ".join(map(str, model)),
        "dataset": f"{found('dataset.name', NONE)}{partition}",
        "clients": clients,
        "strategy": ", ".join(map(str, strategy)),
    }


def summary_of(run: Run) -> dict[str, object]:
    best_round, best_value = run.best()
    accuracy, sent = run.final("accuracy"), run.total("bytes_up") + run.total("bytes_down")
    digest = run.summary.get("model_sha256")
    return {
        "status": badge(run.status),
        "rounds": f"{run.rounds} of {run.config.get('num_rounds', NONE)}",
        "accuracy": digits(accuracy),
        "personal": digits(run.final("personal_accuracy")),
        "loss": digits(run.final("loss")),
        "objective": digits(run.final(run.objective)),
        "epsilon": brief(epsilon_of(run)),
        "best round": NONE if best_round is None else f"{best_round} ({digits(best_value)})",
        "up": in_bytes(run.total("bytes_up")),
        "down": in_bytes(run.total("bytes_down")),
        "accuracy / MB": brief(None if accuracy is None or not sent else accuracy / (sent / MB)),
        "seconds": NONE if (seconds := number(run.summary, "seconds")) is None else f"{seconds:,.1f}",
        "SHA-256": tag("code", digest[:12] if digest else NONE),
    }


def epsilon_of(run: Run) -> float | None:
    """Return the epsilon that a run with differential privacy has spent so far."""
    values = run.series("train", "epsilon")[1]
    return float(values[-1]) if len(values) else None


def scores_of(run: Run) -> dict[str, object]:
    """Return the user's own scores at the end of a run."""
    return {name.replace("_", " "): digits(value) for name, value in (run.summary.get("scores") or {}).items()}


def objectives(runs: Iterable[Run]) -> Html:
    names = sorted({in_words(run.objective) for run in runs})
    if len(names) > 1:
        return note(f"The objectives are {', '.join(names)}. They also decide which round is the best.")
    return note(f"The objective is {names[0]}. It also decides which round is the best.")


def alerts(run: Run, name: str = "") -> Html:
    """Say what went wrong: a failure, a run without an end, files that are missing or cut off."""
    said: list[Html] = []
    if run.status == "failed":
        error = run.summary.get("error") or "metrics.json does not say why"
        said.append(tag("p", tag("b", f"{name}Failed: "), error, class_="error"))
    elif run.status == "unfinished":
        said.append(tag("p", tag("b", f"{name}Unfinished: "), _where(run), class_="error"))
    said += [note(f"{name}{text}.") for text in run.notes]
    starts = [line["round"] for line in run.lines.get("roster", ())][1:]
    if starts:
        said.append(note(f"{name}Resumed after round {', '.join(map(str, starts))}."))
    for after, changed in run.resumed_anyway():
        text = f"Resumed anyway after round {after}, though this had changed: {some(changed)}."
        said.append(tag("p", tag("b", name), text, class_="warning"))
    if refused := max(len(run.roster("refused")), int(run.summary.get("refused_count") or 0)):
        where = "" if run.withholds else " The section “Left out” gives the reasons."
        said.append(note(f"{name}Clients or nodes refused: {refused:,}.{where}"))
    for line in run.lines.get("stop", ())[-1:]:
        best, patience = line.get("best_round"), line.get("patience")
        why = f"{in_words(str(line.get('metric')))} was best in round {best}, patience is {patience}"
        if line.get("metric") == "epsilon":
            why = f"epsilon is {brief(line.get('value'))}, one more round would exceed {brief(line.get('budget'))}"
        said.append(note(f"{name}Stopped early after round {line['round']}: {why}."))
    return join(said)


def _where(run: Run) -> str:
    text = "there is no metrics.json: it is still running, or it was killed."
    if run.progress:
        asked = f"{run.progress.get('replies')} of {run.progress.get('asked')} replies"
        text += f" progress.json: round {run.progress.get('round')} of {run.progress.get('rounds')}"
        text += f", {run.progress.get('phase')}, {asked}."
    elif not run.lines:
        text += " No round has begun."
    return text


def sections_of(run: Run, drawn: Pictures | None, level: str = "h2") -> Html:
    """Return everything about one run below its summary; without pictures, only what needs none."""
    shown = [section(title, act(run, drawn[title]), level=level) for title, act in DRAWN.items()] if drawn else []
    told = [section(title, act(run), level=level) for title, act in TOLD.items()]
    return join(shown + told)


def learning(run: Run, drawn: Sequence[Picture]) -> Html:
    said = []
    if not len(run.series("evaluate", "loss")[0]):
        said.append(note("Nothing has been evaluated, so there is no accuracy and no spread over clients."))
    elif run.config.get("dataset.classes") == 0:
        said.append(note("The data have no classes, so there is no accuracy."))
    if run.withholds:
        said.append(withheld("the spread over clients and the length of updates"))
    if "best_round" not in run.summary and run.best()[0] is not None:
        said.append(note("metrics.json names no best round; the one marked is the best in metrics.jsonl."))
    return join([figures(drawn), *said])


def clients(run: Run, drawn: Sequence[Picture]) -> Html:
    samples, accuracy = run.roster("samples"), run.clients.last.get("accuracy_by_client", {})
    personal = run.clients.last.get("personal_accuracy_by_client", {})
    known = {name: value for name, value in accuracy.items() if value is not None}
    names = sorted(samples | accuracy | personal, key=lambda name: (known.get(name, 2.0), by_number(name)))
    seconds: Mapping[str, float] = run.clients.sums.get("client_seconds", {})
    ranks = run.clients.last.get("client_ranks", {})
    failed = Counter(client for who in run.clients.failures.values() for _, client in who)
    rows = []
    for name in names[:MOST_CLIENTS]:
        held = [str((samples.get(name) or {}).get(part, NONE)) for part in ("train", "val", "test")]
        measured = [digits(found.get(name)) for found in (accuracy, personal)]
        spent = f"{seconds[name]:,.1f}" if name in seconds else NONE
        rank = [f"{ranks[name]:g}" if name in ranks else NONE] if ranks else []
        rows.append([name, *held, *measured, *rank, spent, str(failed[name])])
    heads = ["client", "train", "val", "test", "accuracy", "personal", "training s", "failures"]
    if ranks:
        heads.insert(6, "rank")
    what = f"{len(rows)} of {len(names):,} clients, lowest accuracy of the last evaluation first"
    said = []
    if run.withholds:
        said.append(withheld("samples, accuracy and seconds of each client"))
    elif not drawn and run.config.get("dataset.classes") != 0:
        said.append(note("The samples of each client and class are not recorded."))
    return join([figures(drawn), *said, folded(what, table(heads, rows, range(1, len(heads)))) if rows else ""])


def traffic(run: Run, drawn: Sequence[Picture]) -> Html:
    if not drawn:
        return note("No bytes are recorded.")
    said = f"{in_bytes(run.total('bytes_up'))} up, {in_bytes(run.total('bytes_down'))} down, counted from the messages"
    each = [run.clients.sums.get(key) for key in ("client_bytes_up", "client_bytes_down")]
    if each[0] and each[1]:
        up, down = (in_bytes(max(found.values())) for found in each if found)
        said += f"; of one client at most {up} up and {down} down"
    return join([figures(drawn), note(f"{said}.")])


def times(run: Run, drawn: Sequence[Picture]) -> Html:
    phases = run.phases()
    if not phases:
        return note("No times are recorded.")
    whole = sum(seconds.sum() for _, seconds in phases.values())
    rows = []
    for name, (_, seconds) in phases.items():
        shown = [brief(value) for value in (*np.percentile(seconds, [50, 90]), seconds.sum())]
        rows.append([name, *shown, f"{seconds.sum() / whole:.1%}"])
    found = table(["phase", "median s", "p90 s", "sum s", "share"], rows, range(1, 5))
    known = "Only the times of training and evaluation are known, from the first message to the last."
    said = _coverage(run) if run.lines.get("round") else f"{NO_ROUND_LINES} {known}"
    return join([figures(drawn, found), note(said)])


def _coverage(run: Run) -> str:
    """Say how much of the rounds' wall time the phases account for."""
    timed = [line for line in run.lines["round"] if line.get("seconds")]
    ratios = [sum((line.get("phases") or {}).values()) / line["seconds"] for line in timed]
    if not ratios:
        return "The wall time of the rounds is not recorded."
    low, middle, high = np.percentile(ratios, [0, 50, 100])
    return f"The phases add up to {middle:.1%} of a round's wall time (median; {low:.1%} to {high:.1%})."


def checkpoints(run: Run, drawn: Sequence[Picture]) -> Html:
    stores = {who: found for who, found in (("server", run.server), ("clients", run.homes)) if found}
    columns = [_store_column(found) for found in stores.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]] if columns else []
    held = table(["store", *stores], rows, (1, 2))
    said = []
    if not run.server:
        said.append("The server's store is not in the run directory.")
    if not run.homes:
        kept = run.config.get("checkpoint.enabled") is not False
        said.append(f"Clients {'have no stores of this run on this machine' if kept else 'keep nothing in this run'}.")
    elif run.homes.opened < run.homes.files:
        shown = f"{run.homes.opened} of the {run.homes.files:,} clients' stores were opened"
        said.append(f"{shown} (at most {STORES_OPENED}, spread evenly); sizes are of all files.")
    if not drawn:
        said.append(f"No growth by round: {NO_ROUND_LINES}")
    problems = [problem for found in (run.server, run.homes) if found for problem in found.problems]
    said += [f"Not read: {problem}." for problem in problems[:MOST_REASONS]]
    return join([figures(drawn, held), *map(note, said)])


def _store_column(found: Stores) -> dict[str, str]:
    logical, stored = found.logical_bytes, found.stored_bytes
    return {
        "files": f"{found.files:,}",
        "size of files": in_bytes(found.file_bytes),
        "rounds kept": f"{found.rounds:,}",
        "bytes of the models": in_bytes(logical) if found.opened else NONE,
        "bytes stored, without repeats": in_bytes(stored) if found.opened else NONE,
        "deduplication": f"x {logical / stored:.2f}" if stored else NONE,
    }


def left_out(run: Run) -> Html:
    """List the clients that failed or were refused, warned, absent, capped or clipped, and why."""
    if run.withholds:
        return join([counts_of_left_out(run), withheld("who was left out, and why")])
    told = run.clients
    failures = sorted(told.failures.items(), key=lambda item: -len(item[1]))
    rows = []
    for (kind, reason), who in failures[:MOST_REASONS]:
        names = sorted({name for _, name in who}, key=by_number)
        rows.append([kind, reason, f"{len(who):,}", rounds(at for at, _ in who), list_names(names)])
    parts = [table(["step of the round", "reason", "times", "rounds", "clients"], rows, (2,))]
    if (more := len(failures) - MOST_REASONS) > 0:
        parts.append(note(f"{more} more reasons, each given less often, are not shown."))
    for key, title in (("refused", "refused"), ("warnings", "let in with a warning")):
        by_reason: dict[str, list[str]] = {}
        for name, reason in run.roster(key).items():
            by_reason.setdefault(str(reason), []).append(name)
        parts.append(table([title, "reason"], [[list_names(names), reason] for reason, names in by_reason.items()]))
    rows = [[name, f"{times:,}"] for name, times in told.absent.most_common()]
    parts.append(clients_table(["absent", "times"], rows))
    capped = sorted(told.capped.items(), key=lambda item: -max(item[1])[0])
    rows = [[name, f"{max(found)[0]:.1%}", rounds(at for _, at in found)] for name, found in capped]
    parts.append(clients_table(["capped", "claimed share of the samples", "rounds"], rows))
    if capped:
        limit = run.config.get("strategy.max_weight_share", NONE)
        parts.append(note(f"A client counts for at most strategy.max_weight_share={limit} of a round."))
    rows = [
        [name, f"{len(found):,}", brief(min(found)[0]), rounds(at for _, at in found)]
        for name, found in sorted(told.clipped.items(), key=often_first)
    ]
    parts.append(clients_table(["clipped", "times", "smallest factor", "rounds"], rows, (1, 2)))
    rows = [[n, f"{len(found):,}", rounds(found)] for n, found in sorted(told.not_taken.items(), key=often_first)]
    parts.append(clients_table([f"not taken by {run.config.get('strategy.robust', NONE)}", "times", "rounds"], rows))
    return join(parts) or note("No client failed, was refused, absent or capped.")


def counts_of_left_out(run: Run) -> Html:
    """Count the clients that were left out, where privacy.publish=totals withholds who they are."""
    rows = []
    for kind, lines in run.lines.items():
        found: dict[str, list[tuple[int, int]]] = {}
        for line in lines:
            counts = {key.removesuffix("_count"): line[key] for key in line if key.endswith("_count")}
            counts.pop("failure", None)
            for reason, times in (line.get("failure_kinds", {}) | counts).items():
                found.setdefault(reason.replace("_", " "), []).append((line["round"], times))
        for reason, at in found.items():
            is_state = kind in ("roster", "refused")  # whose lines count who is refused at that moment
            if times := at[-1][1] if is_state else sum(count for _, count in at):
                rows.append([kind, reason, f"{times:,}", rounds(number for number, count in at if count)])
    return table(["step of the round", "what", "times", "rounds"], rows, (2,)) or note("No client was left out.")


def withheld(what: str) -> Html:
    """Say what a run with privacy.publish=totals does not write down."""
    return note(f"Withheld by privacy.publish=totals: {what}.")


def clients_table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = (1,)) -> Html:
    """Return a table of the first clients in `rows`, and a note if there are more."""
    more = f"{len(rows):,} clients were {heads[0]}; the first {MOST_REASONS} are shown."
    return join([table(heads, rows[:MOST_REASONS], right), note(more) if len(rows) > MOST_REASONS else ""])


def often_first(item: tuple[str, Sequence[object]]) -> tuple[int, object]:
    """Return a key that sorts clients by how often something happened to them, then by id."""
    return -len(item[1]), by_number(item[0])


def rounds(numbers: Iterable[int]) -> str:
    return list_names([str(each) for each in sorted(set(numbers))])


def settings(run: Run) -> Html:
    """Return the digests and, folded, every setting."""
    source = [line["source_digest"] for line in run.lines.get("roster", ()) if line.get("source_digest")]
    digests = {
        "run directory": run.path.absolute(),
        "model": run.summary.get("model_sha256"),
        "config": run.server.config_digest if run.server else None,
        "source": source[-1] if source else None,
    }
    known = [(name, tag("code", value)) if value else (name, "not recorded") for name, value in digests.items()]
    rows = [[key, tag("code", value)] for key, value in run.config.items()]
    every = folded(count(len(rows), "setting"), table(["setting", "value"], rows)) if rows else ""
    return join([facts(known), every])


def log(run: Run) -> Html:
    """Return the end of the log of a run that did not finish."""
    if run.status == "finished":
        return Html()
    if not run.log:
        return note(
            "There is no log.txt. `flwr run` writes none. "
            "Without deployment=inline, tools.run writes it when the run ends."
        )
    return tag("pre", "\n".join(run.log))


DRAWN: dict[str, Callable[[Run, Sequence[Picture]], Html]] = {
    "Learning": learning,
    "Clients and classes": clients,
    "Traffic": traffic,
    "Time of a round": times,
    "Checkpoints": checkpoints,
}
TOLD: dict[str, Callable[[Run], Html]] = {"Left out": left_out, "Digests and settings": settings, "Log": log}


def badge(text: str, status: str = "") -> Html:
    """Return text in the colour of a run's status; without `status`, the text is the status."""
    return tag("span", text, class_=f"status {status or text}")


def digits(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def brief(value: float | None) -> str:
    """Return a number with three significant digits, or as a whole number from 100 on."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def benchmarks(path: Path) -> Html:
    """Return the table and the machine of a file of tools.benchmark; raises ReportError when it is not one."""
    try:
        found = read_json(path)
        rows = []
        for values in found["rows"]:
            row = Row(**{name: values[name] for name in Row.__dataclass_fields__})
            status = {"met": "finished", "within limit": "unfinished"}.get(row.verdict, "failed")
            rows.append([badge(cell, status) if cell == row.verdict else cell for cell in row.cells()])
        machine = facts(found["machine"].items())
        took = f"The measurements took {found['seconds']:.0f} s. Ratios of times compare medians of interleaved runs."
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        raise ReportError(f"{path} is not a file of tools.benchmark: write one with its --json") from None
    return section("Benchmarks", table(HEADS, rows, (2, 3, 4)), note(took), machine)
