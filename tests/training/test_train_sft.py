"""What `fugu train sft` compares and writes where nothing is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import ConfigError, DataError, FuguError
from orchestrator.head import CheckpointInfo, Read, load_checkpoint
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import SUBJECTS, WORKERS, world
from training import train_sft
from training.features import middle_read, read_limit
from training.fit import folds_of
from training.outcomes import Outcomes, read_outcomes, write_outcomes
from training.train_sft import SftRun, check, choose


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    world(folder / "outcomes", tasks=300)
    return folder


def settings(place: Path, out: Path, **more: Any) -> SftRun:
    given = {"backbone": str(place / "tiny"), "max_tokens": 128, "progress": False, "cache": place / "states.sqlite"}
    return SftRun(place / "outcomes", out / "router.safetensors", **{**given, **more})


def test_defaults_make_a_head_that_routes(place: Path, tmp_path: Path) -> None:
    report = train_sft.run(settings(place, tmp_path, folds=3))
    assert len(report.tried) == 4
    assert report.held_out is not None
    assert report.held_out.candidate == report.settings
    assert report.held_out.value == max(one.value for one in report.tried)
    # Verbs are data sets here, four of each worker's: held out whole, they say nothing of whom they belong to.
    assert report.held_out.unseen is not None
    assert report.held_out.seen > report.best_single_score + 0.1
    head = load_checkpoint(report.out)
    assert head.landmarks is not None
    assert head.prior is not None
    known = {task.domain for task in read_outcomes(place / "outcomes").tasks}
    assert len(head.info.domains) == head.landmarks.count
    assert set(head.info.domains) <= known
    assert head.info.reads == (Read(2, "body"),)
    assert head.info.max_tokens == 128
    assert head.info.workers[int(head.prior.argmax())] == report.best_single
    assert report.numbers == head.weight.numel() + 3
    told = json.loads(json.dumps(report.json()))
    assert told["settings"] == {"tau": 0.5, "decay": report.settings.decay, "gamma": report.settings.gamma}
    assert len(told["tried"]) == 4
    assert head.info.trained["held_out"]["seen"] == report.held_out.seen
    assert report.table().row_count == 9
    # Equal inputs, equal head.
    again = train_sft.run(settings(place, tmp_path / "again", folds=3))
    assert torch.equal(load_checkpoint(again.out).weight, head.weight)


def test_partial_labels_are_masked(place: Path, tmp_path: Path) -> None:
    found = read_outcomes(place / "outcomes")
    left = tuple(one for one in found.outcomes if one.worker != "maps" or int(one.task_id[1:]) % 2)
    write_outcomes(tmp_path / "part", Outcomes(found.tasks, left))
    plain = {"taus": (0.5,), "decays": (0.3,), "gammas": (1.0,)}
    whole = train_sft.run(settings(place, tmp_path, **plain))
    part = train_sft.run(replace(settings(place, tmp_path / "out", **plain), outcomes=tmp_path / "part"))
    assert part.tasks == whole.tasks
    held = found.split("val")
    (whole_share, part_share) = (
        float(np.mean(np.array(chosen(place, report.out, held)) == "maps")) for report in (whole, part)
    )
    # Taken as failures, missing labels would halve what it gets.
    assert part_share > 0.7 * whole_share


def chosen(place: Path, path: Path, held: Outcomes) -> list[str]:
    from training.features import task_states

    head = load_checkpoint(path)
    cache = place / "states.sqlite"
    hidden = task_states(
        held.tasks, head.info, place / "tiny", singular={}, max_tokens=128, cache=cache, progress=False
    )
    return [head.info.workers[row] for row in head.logits(hidden).argmax(-1).tolist()]


def test_folds_keep_equal_entries_together() -> None:
    names = [verb for verbs in SUBJECTS.values() for verb in verbs] * 5
    parts = folds_of(names, 3, seed=1)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(60))
    sides = [{names[row] for row in part.tolist()} for part in parts]
    assert [len(side) for side in sides] == [4, 4, 4]
    assert not sides[0] & sides[1]
    assert [part.tolist() for part in folds_of(names, 3, seed=1)] == [part.tolist() for part in parts]
    assert [part.tolist() for part in folds_of(names, 3, seed=2)] != [part.tolist() for part in parts]


def test_one_candidate_is_taken_untried_and_few_tasks_are_too_few() -> None:
    hidden, scores = torch.randn(8, 4), torch.rand(8, 3)
    one = SftRun(Path(), Path(), taus=(0.5,), decays=(1.0,), gammas=(2.0,), progress=False)
    assert choose(hidden, scores, ["a"] * 8, one)[1] == ()
    with pytest.raises(DataError, match="8 tasks are too few for 5 folds"):
        choose(hidden, scores, ["a"] * 8, replace(one, decays=(1.0, 2.0)))
    # A linear head has no use for gamma: it is not tried twice.
    _, tried = choose(
        hidden, scores, ["a"] * 8, replace(one, head="linear", gammas=(1.0, 4.0), decays=(1.0, 2.0), folds=2)
    )
    assert len(tried) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"taus": ()}, "tau must be"),
        ({"taus": (0.0,)}, "tau must be"),
        ({"decays": (0.0,)}, "decay must be a positive"),
        ({"gammas": (-1.0,)}, "gamma must be a positive"),
        ({"landmarks": 0}, "at least one landmark"),
        ({"folds": 1}, "at least two folds"),
        ({"workers": ("a", "a")}, "named twice"),
    ],
)
def test_bad_settings(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(SftRun(Path(), Path(), **change))


def test_where_a_backbone_is_read_and_how_far(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 30}')
    assert middle_read(tmp_path) == Read(16, "body")
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    assert middle_read(tmp_path) == Read(1, "body")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FuguError, match="does not say how many layers"):
        middle_read(tmp_path)
    info = CheckpointInfo(WORKERS, "none", "0")
    assert (read_limit(info), read_limit(info, 300)) == (1024, 300)
    assert read_limit(replace(info, trained={"read_tokens": 77})) == 77
    new = replace(info, max_tokens=256)
    assert (read_limit(new), read_limit(new, 300), read_limit(new, 100)) == (256, 256, 100)
