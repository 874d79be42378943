"""Labelling the embedded pool as a new user would: the shipped configuration, real models, a few tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import label
from training.label import LabelRun
from training.outcomes import read_outcomes
from training.tasks import TaskSource

pytestmark = [pytest.mark.ray, pytest.mark.model]

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "embedded.yaml"


def test_the_embedded_pool(ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = LabelRun(
        CONFIG, tmp_path, ("embedded:add,fact",), TaskSource(count=2, seed=3), samples=1, max_tokens=24, budget_usd=1.0
    )
    report = label.run(settings)
    assert report.complete
    assert report.stopped == ""
    found = read_outcomes(tmp_path)
    assert len(found.outcomes) == len(found.workers) * 4
    assert all(outcome.output_tokens and outcome.output_tokens <= 24 for outcome in found.outcomes)
    assert all(outcome.response for outcome in found.outcomes)
    shown = capfd.readouterr().err
    assert all(worker in shown for worker in found.workers)
    assert f"{report.requests} requests" in shown
    assert label.run(settings).requests == report.requests
