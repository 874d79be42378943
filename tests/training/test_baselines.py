from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training import baselines
from training.outcomes import Outcome

NAN = math.nan


def test_lookup_falls_back_to_all_tasks_for_what_is_unknown() -> None:
    scores = np.array([[1.0, 0.0], [0.5, NAN], [0.0, 1.0]])
    got = baselines.lookup(["x", "x", "y"], scores, ["y", "x", "new"])
    assert got.tolist() == [[0.0, 1.0], [0.75, 0.0], [0.5, 0.5]]
    # Worker 1 is unknown in z: its mean over all tasks stands in.
    assert baselines.lookup(["z", "y"], np.array([[0.2, NAN], [0.0, 0.8]]), ["z"]).tolist() == [[0.2, 0.8]]


def two_places() -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:  # type: ignore[type-arg]
    """Training tasks around two places, worker 0 good at one, worker 1 at the other; four tasks to route."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(80) % 2
    train = torch.randn(80, 6, generator=generator)
    train[:, 0] += 8 * place
    scores = np.stack([1.0 - place.numpy(), 0.25 + 0.5 * place.numpy()], axis=1)
    scores[::8, 0] = NAN
    hidden = torch.zeros(4, 6)
    hidden[2:, 0] = 8
    return train, scores, hidden


@pytest.mark.parametrize("way", ["kNN", "k-means", "MLP"])
def test_ways_on_hidden_states_find_the_right_worker(way: str) -> None:
    train, scores, hidden = two_places()
    if way == "kNN":
        got = baselines.nearest(train, scores, hidden, neighbours=5)
        assert got[0].tolist() == pytest.approx([1.0, 0.25])
    elif way == "k-means":
        got = baselines.clusters(train, scores, hidden, seed=1)
        assert got[0].tolist() == pytest.approx([1.0, 0.25], abs=0.1)
        assert np.array_equal(got, baselines.clusters(train, scores, hidden, seed=1))
    else:
        got, numbers = baselines.mlp(train, scores, hidden, tau=0.25, seed=1)
        assert numbers == 6 * 64 + 64 + 64 * 2 + 2
    assert got.argmax(1).tolist() == [0, 0, 1, 1]


def test_the_luck_free_oracle_does_not_profit_from_noise() -> None:
    rng = np.random.default_rng(1)
    # Eight equal workers that are right half of the time: the plain oracle is far above one half, the luck-free not.
    samples = [[tuple((rng.random(4) < 0.5).astype(float)) for _ in range(8)] for _ in range(400)]
    plain = np.mean([max(np.mean(taken) for taken in task) for task in samples])
    assert plain > 0.8
    fair = baselines.luck_free_oracle(samples, np.random.default_rng(0))
    assert fair.mean() == pytest.approx(0.5, abs=0.03)
    # Sure workers: nothing is lost.
    assert baselines.luck_free_oracle([[(1.0, 1.0), (0.0, 0.0, 0.0)]], rng).tolist() == [1.0]
    # One sample is no evidence to choose on.
    assert np.isnan(baselines.luck_free_oracle([[(1.0,), (0.0, 1.0)]], rng)).all()


def test_self_consistency_takes_the_most_frequent_answer() -> None:
    def outcome(answers: tuple[str, ...], samples: tuple[float, ...]) -> Outcome:
        return Outcome("t", "w", float(np.mean(samples)), samples, answers)

    scores, calls = baselines.self_consistency(
        [
            outcome(("4", " 4 ", "5"), (1.0, 1.0, 0.0)),
            outcome(("6", "5", "5"), (1.0, 0.0, 0.0)),
            outcome(("a", "b"), (0.0, 1.0)),  # equals: the earlier
            outcome((), (1.0,)),
            None,
        ]
    )
    assert scores[:3].tolist() == [1.0, 0.0, 0.0]
    assert calls[:3].tolist() == [3, 3, 2]
    assert np.isnan(scores[3:]).all()


def test_shares_by_domain() -> None:
    got = baselines.by_domain(["y", "x", "y", "y"], [0, 1, 1, 1], ("a", "b"))
    assert list(got) == ["x", "y"]
    assert got["x"] == {"a": 0.0, "b": 1.0}
    assert got["y"] == pytest.approx({"a": 1 / 3, "b": 2 / 3})
