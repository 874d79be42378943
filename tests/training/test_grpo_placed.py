"""Learner and engines in one placement group; the resource "bench" of the session's Ray stands for nodes that train."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from actors.config_file import load_config
from actors.errors import CheckpointError, ClusterError
from tests.actors.tiny_chat import tiny_chat_folder
from tests.training.conductors import pool_file
from training.grpo import GrpoSettings, LoraShape
from training.grpo_placed import bundles, run
from training.grpo_train import GrpoRun, VllmSettings
from training.lora import STATE

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def settings(tmp_path: Path, **more: Any) -> GrpoRun:
    model = tiny_chat_folder(tmp_path)
    pool = pool_file(tmp_path, model)
    pool.write_text(json.dumps({**json.loads(pool.read_text()), "placement": {"train": "bench"}}))
    grpo = GrpoSettings(steps=2, questions=1, group=2, max_tokens=4, lora=LoraShape(rank=2, alpha=4), seed=7)
    given = {"model": str(model), "device": "cpu", "precision": "float32", "progress": False, "validation": 0}
    return GrpoRun(tmp_path / "adapter", pool, grpo, state=tmp_path / "state", address="auto", **given, **more)


def groups() -> dict[str, dict[str, Any]]:
    from ray.util import placement_group_table

    return dict(placement_group_table())


def until_all_is_free() -> None:
    import ray

    deadline = time.monotonic() + 30
    while any(ray.available_resources().get(name, 0) < has for name, has in {"CPU": 1, "bench": 10}.items()):
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_what_is_asked_for(ray_session: None, tmp_path: Path) -> None:
    run_ = settings(tmp_path, vllm=VllmSettings(engines=2, gpus=0.5))
    config, where = load_config(run_.config), {"bench": 0.001}
    engine = {"CPU": 1, "GPU": 0.5, "bench": 0.001}
    assert bundles(run_, config, where) == [{"CPU": 1, "bench": 0.001}, engine, engine], "these nodes have no GPU"
    given = settings(tmp_path, gpus=2.0)
    assert bundles(given, config, where) == [{"CPU": 1, "GPU": 2.0, "bench": 0.001}]
    elsewhere = config.model_copy(update={"placement": config.placement.model_copy(update={"train": "none-yet"})})
    assert bundles(run_, elsewhere, {"none-yet": 0.001})[0]["GPU"] == 0.5, "what the engine on that GPU leaves"


def test_a_group_is_given_back_with_what_runs_in_it(ray_session: None) -> None:
    import ray
    from ray.exceptions import RayActorError

    from actors.placement import at, reserved

    class Stays:
        def group(self) -> str:
            return str(ray.util.get_current_placement_group().id.hex())

    until_all_is_free()
    with reserved([{"CPU": 1, "bench": 1}, {"CPU": 1, "bench": 2}], 30) as group:
        free = ray.available_resources()
        assert free["bench"] == 7
        remote: Any = ray.remote(Stays)
        actor = remote.options(num_cpus=1, **at(group, 1)).remote()
        assert ray.get(actor.group.remote(), timeout=60) == group.id.hex()
    with pytest.raises(RayActorError):
        ray.get(actor.group.remote(), timeout=60)
    until_all_is_free()


def test_no_room_is_told_and_nothing_stays_reserved(ray_session: None) -> None:
    from actors.placement import reserved

    before = set(groups())
    asked = [{"CPU": 1, "GPU": 0.5}, {"GPU": 2}]
    with (
        pytest.raises(ClusterError, match=r"\[1 CPU, 0\.5 GPU\] and \[2 GPU\] together within 0\.3 s: .*4 CPU, 10 b"),
        reserved(asked, 0.3),
    ):
        pytest.fail("there is no GPU")
    (new,) = set(groups()) - before
    assert groups()[new]["state"] == "REMOVED"


def test_a_run_learns_in_the_group(ray_session: None, tmp_path: Path) -> None:
    before = set(groups())
    run_ = settings(tmp_path)
    # What the learner's node writes goes to the address from there.
    report = run(run_, out=f"file://{tmp_path}/bucket/made", state=f"file://{tmp_path}/bucket/kept", reserve=60)
    assert report.steps == 2
    assert (tmp_path / "bucket" / "made" / "grpo.json").exists()
    assert (tmp_path / "bucket" / "kept" / STATE).exists()
    assert not run_.out.exists()
    (new,) = set(groups()) - before
    told = groups()[new]
    assert told["bundles"] == {0: {"CPU": 1.0, "bench": 0.001}}
    assert told["state"] == "REMOVED"


def test_what_is_wrong_there_is_told_here(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run(settings(tmp_path, resume=True), reserve=60)
