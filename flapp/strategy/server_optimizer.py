"""Flower's server optimisers (Reddi et al. 2021, arXiv:2003.00295; Hsu et al. 2019) over our own average.

We pass the average to Flower's strategy as if it were the reply of its only client, and it returns the new model. Its
moments are tensors that a resumed run must have, so they are kept with each round.

What Flower 1.41 computes in round t = 1, 2, ..., from the global model x and the average y, with d = y - x, b1 the
server_momentum, b2 = 0.99, tau = 0.001 and m = v = 0 before round 1:

    fedadam   m = b1 m + (1 - b1) d    v = b2 v + (1 - b2) d^2                       x + eta_t m / (sqrt(v) + tau)
    fedyogi   m = b1 m + (1 - b1) d    v = v - (1 - b2) d^2 sign(v - d^2)            x + eta m / (sqrt(v) + tau)
    fedavgm   m = b1 m + d                                                           x + eta m

    eta_t = eta sqrt(1 - b2^(t + 1)) / (1 - b1^(t + 1))

This differs from algorithm 2 of Reddi et al. in two ways. There v begins at tau^2 or more, here at 0. There fedadam
has no bias correction: eta_t is eta. Flower's is Adam's (Kingma & Ba 2015, arXiv:1412.6980), with the exponent t + 1 in
place of t. FedAvgM is that of Hsu et al., without a factor 1 - b1: with b1 = 0.9 a steady update moves the model ten
times as far as with b1 = 0. Rounds are counted from the beginning of the run, even after a resume.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi

from flapp.messages import ARRAYS, NUM_EXAMPLES, TRAIN, as_record, pack, view, views

MOMENTS = ("m_t", "v_t")


class ServerOptimizer:
    """Step from the global model along the average: `fedadam`, `fedyogi` or `fedavgm`; integers take the average.

    lr is Flower's default for that optimiser if None.
    """

    def __init__(self, name: str, lr: float | None, momentum: float) -> None:
        kinds: dict[str, Any] = {"fedadam": FedAdam, "fedyogi": FedYogi, "fedavgm": FedAvgM}
        rate, beta = ("server_learning_rate", "server_momentum") if name == "fedavgm" else ("eta", "beta_1")
        self.flower = kinds[name](**{beta: momentum} | ({} if lr is None else {rate: lr}))

    def step(self, current: ArrayRecord, average: ArrayRecord, server_round: int) -> ArrayRecord:
        """Return the new global model, in the dtypes of the current one."""
        floats = [key for key, array in average.items() if view(array).dtype.kind == "f"]
        before, after = (as_record({key: record[key] for key in floats}) for record in (current, average))
        self.flower.current_arrays = before if isinstance(self.flower, FedAvgM) else views(before)
        metrics = MetricRecord({NUM_EXAMPLES: 1})
        reply = Message(RecordDict({ARRAYS: after, "metrics": metrics}), dst_node_id=1, message_type=TRAIN)
        stepped, _ = self.flower.aggregate_train(server_round, [reply])
        new = {key: pack(view(stepped[key]).astype(view(current[key]).dtype)) for key in floats}
        return as_record({key: new.get(key, array) for key, array in average.items()})

    def state(self, keys: ArrayRecord) -> dict[str, np.ndarray]:
        """Return the moments as tensors with names of their own."""
        if isinstance(self.flower, FedAvgM):
            floats = [key for key, array in keys.items() if view(array).dtype.kind == "f"]
            vector = self.flower.momentum_vector or []
            return {f"momentum/{key}": value for key, value in zip(floats, vector, strict=bool(vector))}
        moments = {name: getattr(self.flower, name) or {} for name in MOMENTS}
        return {f"{name}/{key}": value for name, moment in moments.items() for key, value in moment.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back the tensors of `state`."""
        for name in ("momentum", *MOMENTS):
            moment = {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}
            if moment and name == "momentum":
                self.flower.momentum_vector = list(moment.values())
            elif moment:
                setattr(self.flower, name, moment)
