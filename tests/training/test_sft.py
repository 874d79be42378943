from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import DataError
from training.sft import kl_loss, reached, soft_targets, solve, standardisation

NAN = math.nan


def test_targets_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, NAN], [0.5, 0.5, 0.5]])
    targets = soft_targets(scores, 1 / math.log(3))  # score 1 against 0 is then 3 to 1
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0.25, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_loss_by_hand() -> None:
    targets = torch.tensor([[0.75, 0.25, 0.0]])
    known = torch.tensor([[True, True, False]])
    logits = torch.tensor([[0.0, 0.0, 50.0]])  # the unknown worker's logit must not matter
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(kl_loss(logits, targets, known)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_loss(torch.tensor([[math.log(3), 0.0, -7.0]]), targets, known)) == pytest.approx(0, abs=1e-6)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN]), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from([0.05, 0.25, 1.0]),
)
def test_targets_are_distributions_over_the_known_and_the_loss_is_never_negative(
    rows: list[list[float]], tau: float
) -> None:
    rows = [row for row in rows if not all(math.isnan(score) for score in row)] or [[1.0, 0.0, NAN, NAN]]
    scores = torch.tensor(rows)
    targets = soft_targets(scores, tau)
    assert bool((targets[scores.isnan()] == 0).all())
    torch.testing.assert_close(targets.sum(-1), torch.ones(len(rows)))
    logits = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    assert float(kl_loss(logits, targets, ~scores.isnan())) >= -1e-6


def clusters(count: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """Three kinds of tasks, each solved by one worker; features tell the kind and are badly scaled."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(count) % 3
    features = torch.randn(count, 8, generator=generator)
    features[torch.arange(count), kind] += 4
    scales = torch.tensor([1e-3, 1, 100, 1, 1, 1, 1, 1.0])
    scores = torch.nn.functional.one_hot(kind, 3).float()
    return features * scales + 5 * scales, scores


def standard(features: torch.Tensor) -> torch.Tensor:
    shift, scale = standardisation(features)
    return (features - shift) * scale


def test_training_finds_who_solves_what() -> None:
    features, scores = clusters()
    inputs = standard(features)
    found = solve(inputs, scores, tau=0.25, decay=0.1)
    assert float(reached(found.prior + inputs @ found.weight.T, scores).mean()) > 0.97
    # All workers are as good on average: before the first step the policy is uniform, KL = ln 3 less the targets'
    # entropy.
    p = torch.softmax(torch.tensor([4.0, 0.0, 0.0]), 0)
    start = math.log(3) + float((p * p.log()).sum())
    assert found.losses[0] == pytest.approx(start, rel=1e-4)
    assert found.losses[-1] < 0.1 * found.losses[0]


def test_steps_may_end_before_the_best_is_reached() -> None:
    features, scores = clusters(30)
    inputs = standard(features)
    unmoved = solve(inputs, scores, tau=0.25, decay=0.1, steps=0)
    assert not unmoved.weight.any()
    early, late = (solve(inputs, scores, tau=0.25, decay=0.1, steps=steps).losses[-1] for steps in (2, 100))
    assert early > 1.5 * late


def test_the_loss_curve_is_the_kept_one() -> None:
    features, scores = clusters(30)
    inputs = standard(features)
    got = solve(inputs, scores, tau=0.25, decay=0.1).losses
    assert got == solve(inputs, scores, tau=0.25, decay=0.1).losses
    assert [got[step] for step in (0, 1, 2, 4)] == pytest.approx([0.92129, 0.68739, 0.11937, 0.03593], rel=1e-3)


def test_masked_labels_teach_nothing_about_the_missing_worker() -> None:
    features, scores = clusters()
    inputs = standard(features)
    hidden = scores.clone()
    hidden[::2, 2] = NAN
    zeroed = scores.clone()
    zeroed[::2, 2] = 0.0
    third = scores[:, 2] == 1
    chances = []
    for table in (hidden, zeroed):
        found = solve(inputs, table, tau=0.25, decay=1.0)
        policy = torch.softmax(found.prior + inputs @ found.weight.T, -1)
        chances.append(float(policy[third, 2].mean()))
    masked, imputed = chances
    # Half of worker 2's successes are hidden; taken as failures they would halve its chances on its own ground.
    assert masked > 0.8
    assert imputed < 0.75


def test_rows_with_one_known_worker_change_nothing() -> None:
    features, scores = clusters(30)
    inputs = standard(features)
    extra = torch.cat([scores, torch.tensor([[NAN, 1.0, NAN]] * 10)])
    more = torch.cat([inputs, torch.full((10, 8), 1e4)])
    given, same = (solve(*pair, tau=0.25, decay=0.1) for pair in ((inputs, scores), (more, extra)))
    assert torch.equal(same.weight, given.weight)
    assert torch.equal(same.prior, given.prior)


def test_a_constant_feature_is_left_out() -> None:
    features, _ = clusters(30)
    features[:, 5] = 1e4
    shift, scale = standardisation(features)
    assert float(scale[5]) == 0
    rest = torch.arange(8) != 5
    moved = ((features - shift) * scale)[:, rest]
    torch.testing.assert_close(moved.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.std(0, unbiased=False), torch.ones(7))


def test_reached_is_the_score_of_the_most_probable_known_worker() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, NAN]])
    assert reached(logits, scores).tolist() == pytest.approx([0.3, 0.2])


@pytest.mark.parametrize(
    ("features", "scores", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "do not match"),
        (torch.full((2, 3), NAN), torch.zeros(2, 2), "features hold numbers that are not finite"),
        (torch.zeros(2, 3), torch.full((2, 2), 1.5), "outside 0..1"),
        (torch.zeros(2, 3), torch.tensor([[1.0, NAN], [NAN, NAN]]), "nothing to learn"),
        (torch.zeros(0, 3), torch.zeros(0, 2), "nothing to learn"),
    ],
)
def test_bad_data_is_refused(features: torch.Tensor, scores: torch.Tensor, says: str) -> None:
    with pytest.raises(DataError, match=says):
        solve(features, scores, tau=0.25, decay=1.0)


def test_sft_needs_no_ray() -> None:
    import subprocess
    import sys

    code = "import training.sft, training.features, training.label, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
