"""A conductor with a model of its own: hosted by the workers' provider actor, on their engine, under an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.config import FuguConfig
from actors.messages import ChatRequest, Message
from actors.pool import WorkerPool
from orchestrator.conductor import Pool, conduct
from orchestrator.conductor_card import ConductorCard, write_card
from serve.conductor import Knobs, conducting, why_no_conductor
from serve.memory import ActorStore
from serve.store import Kept
from tests.actors.tiny_chat import random_adapter, tiny_chat_folder
from tests.serve.running import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

REQUEST = ChatRequest((Message("user", "What is 17 + 25?"),), temperature=0, max_tokens=8)


async def test_it_shares_the_workers_engine(ray_session: None, tmp_path: Path) -> None:
    model = tiny_chat_folder(tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter", seed=1)
    write_card(adapter, ConductorCard(("plain", "gone"), "compact", steps="bare"))
    config = FuguConfig.model_validate(
        {
            "workers": [{"name": "plain", "provider": "local", "model": str(model), "device": "cpu"}],
            "conductor": {
                "model": str(model),
                "adapter": adapter,
                "device": "cpu",
                "style": "compact",
                "steps": "bare",
                "max_tokens": 8,
                "retries": 1,
            },
        }
    )
    assert why_no_conductor(config) is None
    pool = WorkerPool.connect(config, with_conductor=True)
    try:
        await pool.ready()
        assert list(pool.workers) == ["plain", "conductor"]
        (plain,), (conductor,) = pool._shards.values()
        assert plain is conductor, "one actor, and so one copy of the weights"
        said = {name: (await worker.complete(REQUEST)).text for name, worker in pool.workers.items()}
        assert said["plain"] != said["conductor"], "the adapter is the conductor's alone"

        conductor = conducting(config, pool.workers)
        assert conductor.names == ("plain", "gone")
        result = await conduct(
            REQUEST,
            conductor.writer,
            Pool(conductor.names, {"plain": pool.workers["plain"]}),
            ("plain",),
            conductor.settings(Knobs()),
        )
    finally:
        pool.shutdown()
    # Random weights write no workflow; the best single worker answers, as it would have alone.
    (round,) = result.rounds
    assert [writing.reply.worker for writing in round.writings] == ["conductor"] * 2
    assert round.bare
    assert result.answer is not None
    assert result.answer.text == said["plain"]
    assert result.cost_usd is None


async def test_the_store_outlives_its_actor(ray_session: None, tmp_path: Path) -> None:
    import ray

    store = ActorStore(tmp_path / "kept.sqlite")
    try:
        await store.put((Kept("workflow", "x", b"plan"),), "", seconds=60)
        ray.kill(store._found(), no_restart=False)
        assert await store.get("workflow", "x", "") == b"plan"
        assert await store.get("workflow", "x", "somebody else") is None
        # Another gateway finds the same actor; and when that is gone for good, a new one finds the file.
        other = ActorStore(tmp_path / "kept.sqlite")
        assert await other.get("workflow", "x", "") == b"plan"
        store.shutdown()
        wait_until(
            lambda: store._name not in {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}
        )
        assert await ActorStore(tmp_path / "kept.sqlite").get("workflow", "x", "") == b"plan"
        assert await ActorStore(tmp_path / "kept.sqlite").delete("workflow", "x", "")
    finally:
        store.shutdown()
