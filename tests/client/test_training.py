"""The local loop, against plain PyTorch and float64 numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from flapp.training import StepRules, build_optimizer, evaluate, scheduled_lr, train

X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 20, 8)]


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 4))


def plain_steps(optimizer: type[torch.optim.Optimizer], epochs: int = 1, mu: float = 0.0, **rules: float) -> nn.Module:
    """Train a model in plain PyTorch; mu is FedProx's."""
    net = model()
    start = [p.detach().clone() for p in net.parameters()]
    stepper = optimizer(net.parameters(), lr=0.1, **rules)  # type: ignore[call-arg]
    for x, y in BATCHES * epochs:
        stepper.zero_grad()
        pull = sum(((p - s) ** 2).sum() for p, s in zip(net.parameters(), start, strict=True))
        (nn.functional.cross_entropy(net(x), y) + (mu / 2 * pull if mu else 0)).backward()
        stepper.step()
    return net


def assert_equal(one: nn.Module, other: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("name", "kind", "rules"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.5}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.5}),
    ],
)
def test_training_takes_pytorchs_steps(name: str, kind: type[torch.optim.Optimizer], rules: dict[str, float]) -> None:
    ours = model()
    train(ours, BATCHES, build_optimizer(ours, name, 0.1, **rules), epochs=2)
    assert_equal(ours, plain_steps(kind, epochs=2, **rules))


def test_steps_count_batches_over_as_many_passes_as_needed() -> None:
    for steps in (1, 3, 7):
        net, other = model(), model()
        loss = train(net, BATCHES, build_optimizer(net, "sgd", 0.1), steps=steps)
        assert train(other, (BATCHES * 3)[:steps], build_optimizer(other, "sgd", 0.1)) == loss
        assert_equal(net, other)


def test_training_returns_the_mean_loss_over_samples() -> None:
    net = model()
    found = train(net, BATCHES, build_optimizer(net, "sgd", 0.0))
    assert found == pytest.approx(evaluate(net, BATCHES).loss_sum / 20)


def test_evaluation_returns_exact_sums() -> None:
    net = model(dropout=0.5)
    found = evaluate(net, BATCHES)
    logits = net.eval()(X).detach().double().numpy()
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(20), Y.numpy()]
    assert found.count == 20
    assert found.correct == int((logits.argmax(1) == Y.numpy()).sum())
    assert found.loss_sum == pytest.approx(losses.sum(), rel=1e-6)


def test_regression_is_evaluated_by_the_squared_error() -> None:
    net, targets = nn.Linear(3, 1), torch.randn(20)
    found = evaluate(net, [(X, targets)])
    exact = ((net(X).detach().double().squeeze(1) - targets.double()) ** 2).sum()
    assert found.loss_sum == pytest.approx(exact.item(), rel=1e-6)
    assert found.correct == 0


def test_dropout_is_drawn_from_the_seed_and_leaves_the_callers_generator_alone() -> None:
    results = []
    for seed in (1, 1, 2):
        net = model(dropout=0.5)
        torch.manual_seed(99)
        train(net, BATCHES, build_optimizer(net, "sgd", 0.1), seed=seed)
        results.append((net[0].weight.detach(), torch.rand(1)))  # type: ignore[index]
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    assert results[0][1] == results[2][1]


def test_a_loss_that_is_not_finite_ends_training() -> None:
    net = model()
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) after 30 steps: lower train.lr"):
        train(net, BATCHES, build_optimizer(net, "sgd", 1e30), epochs=10)


def test_training_on_nothing_is_an_error() -> None:
    net = model()
    for steps in (None, 3):
        with pytest.raises(ValueError, match="no training sample"):
            train(net, [], build_optimizer(net, "sgd", 0.1), steps=steps)


def test_the_cosine_schedule_starts_at_lr_and_ends_near_zero() -> None:
    rates = [scheduled_lr(0.1, "cosine", r, 10) for r in range(1, 11)]
    assert rates[0] == 0.1
    assert rates[5] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.05 * (1 + math.cos(0.9 * math.pi)))
    assert {scheduled_lr(0.1, "constant", r, 10) for r in range(1, 11)} == {0.1}


def test_accumulated_batches_make_the_step_of_one_large_batch_and_leftover_batches_make_a_last_step() -> None:
    small, large = model(), model()
    halves = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8, 12)]
    train(small, halves, build_optimizer(small, "sgd", 0.1), rules=StepRules(accumulate=2))
    train(large, [(X[:8], Y[:8]), (X[8:16], Y[8:16])], build_optimizer(large, "sgd", 0.1))
    assert_equal(small, large, rtol=1e-6, atol=1e-7)
    accumulated, single = model(), model()
    train(accumulated, BATCHES[:1], build_optimizer(accumulated, "sgd", 0.1), rules=StepRules(accumulate=5))
    train(single, BATCHES[:1], build_optimizer(single, "sgd", 0.1))
    assert_equal(accumulated, single)


def test_the_proximal_term_is_the_gradient_of_fedprox() -> None:
    ours = model()
    train(ours, BATCHES, build_optimizer(ours, "sgd", 0.1), rules=StepRules(proximal_mu=0.5))
    assert_equal(ours, plain_steps(torch.optim.SGD, mu=0.5), rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_a_norm() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    train(net, BATCHES[:1], build_optimizer(net, "sgd", 1.0), rules=StepRules(clip_norm=0.01))
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(net.parameters(), before, strict=True)])
    assert moved.norm() == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_autocast_trains_float32_weights() -> None:
    exact, rough = model(), model()
    train(exact, BATCHES, build_optimizer(exact, "sgd", 0.1))
    train(rough, BATCHES, build_optimizer(rough, "sgd", 0.1), rules=StepRules(precision="bfloat16"))
    assert {p.dtype for p in rough.parameters()} == {torch.float32}
    assert_equal(exact, rough, rtol=0.1, atol=0.02)
    assert not torch.equal(exact[0].weight, rough[0].weight)
