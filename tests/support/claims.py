"""Change what clients claim in their reply to an attest message."""

from typing import Any

from flwr.app import RecordDict

from flapp.messages import CLAIMS


def set_claim(content: RecordDict, client_id: str, /, **values: Any) -> None:
    """Change fields of a client's claim, named as in Claim; content without a claim of this client stays unchanged."""
    record: Any = content.config_records.get(CLAIMS)
    if record is None or client_id not in record["client-id"]:
        return
    index = record["client-id"].index(client_id)
    if "label_hist" in values:
        counts, sizes = list(values.pop("label_hist")), record["classes"]
        start = sum(sizes[:index])
        before, after = record["label-hist"][:start], record["label-hist"][start + sizes[index] :]
        record["label-hist"] = [*before, *counts, *after]
        values["classes"] = len(counts)
    for name, value in values.items():
        column = record[name.replace("_", "-")]
        record[name.replace("_", "-")] = [*column[:index], value, *column[index + 1 :]]
