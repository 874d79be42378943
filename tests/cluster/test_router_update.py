"""A router replica takes other checkpoints while it decides (the class itself, without Serve around it)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.config import RouterConfig
from actors.errors import FuguError
from actors.messages import Message
from actors.model_files import resolve_model
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
from serve.router import Answer, Question, RouterReplica, Served, place_of
from tests.orchestrator.tiny import DIMENSION, tiny_folder

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    (folder / "tiny").mkdir()
    files = resolve_model(str(tiny_folder(folder / "tiny")))
    weight = torch.randn(2, DIMENSION, generator=torch.Generator().manual_seed(1))
    for name, workers, head in (("yes", NAMES, weight), ("no", NAMES, -weight), ("others", ("c", "d"), weight)):
        info = CheckpointInfo(workers=workers, backbone=files.id, revision=files.revision)
        save_checkpoint(folder / f"{name}.safetensors", Checkpoint(info=info, weight=head))
    return folder


def questions(count: int) -> list[Question]:
    talks = [(Message("user", f"question {number}"),) for number in range(count)]
    return [Question(talk, frozenset(NAMES), 0, ("argmax", "sample")[n % 2]) for n, talk in enumerate(talks)]


async def decided(replica: RouterReplica, asked: list[Question]) -> list[Answer]:
    # What @serve.batch wraps.
    assert replica._routers is not None
    assert replica._served is not None
    answers = await asyncio.to_thread(replica._decide, asked, replica._routers, replica._served.share, {})
    assert all(isinstance(answer, Answer) for answer in answers)
    return answers  # type: ignore[return-value]


def replica_of(folder: Path) -> RouterReplica:
    return RouterReplica(RouterConfig(backbone=str(folder / "tiny"), max_tokens=128), NAMES)


def served(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return Served(str(folder / f"{name}.safetensors"), **more).json()


async def test_another_checkpoint_and_back(folder: Path) -> None:
    replica, asked = replica_of(folder), questions(12)[::2]
    await replica.reconfigure(served(folder, "yes"))
    assert await replica.status() is None
    first = [answer.worker for answer in await decided(replica, asked)]
    await replica.reconfigure(served(folder, "no"))
    second = [answer.worker for answer in await decided(replica, asked)]
    assert all(old != new for old, new in zip(first, second, strict=True))
    assert (await replica.serving())["checkpoint"].endswith("no.safetensors")


async def test_one_that_does_not_fit_is_refused_and_the_old_one_stays(folder: Path) -> None:
    replica, asked = replica_of(folder), questions(8)
    await replica.reconfigure(served(folder, "yes"))
    before = [answer.worker for answer in await decided(replica, asked)]
    await replica.reconfigure(served(folder, "others"))
    assert await replica.status() is None, "it goes on"
    assert [answer.worker for answer in await decided(replica, asked)] == before
    told = await replica.serving()
    assert told["checkpoint"].endswith("yes.safetensors")
    assert "c" in told["refused"]
    await replica.reconfigure(served(folder, "no"))
    assert (await replica.serving())["refused"] is None


async def test_a_first_one_that_does_not_fit_is_told(folder: Path) -> None:
    replica = replica_of(folder)
    await replica.reconfigure(served(folder, "others"))
    assert isinstance(await replica.status(), FuguError)


async def test_the_canary_decides_its_share(folder: Path) -> None:
    replica, asked = replica_of(folder), questions(40)
    await replica.reconfigure(served(folder, "yes"))
    stable = await decided(replica, asked)
    await replica.reconfigure(served(folder, "no"))
    other = await decided(replica, asked)
    await replica.reconfigure(served(folder, "yes", canary=str(folder / "no.safetensors"), share=0.4))
    mixed = await decided(replica, asked)
    for question, old, new, answer in zip(asked, stable, other, mixed, strict=True):
        tried = place_of(question.messages) < 0.4
        assert answer.source == ("canary" if tried else "head")
        assert answer.worker == (new if tried else old).worker
        assert answer.probabilities == pytest.approx((new if tried else old).probabilities, abs=1e-5)
    assert 4 < sum(answer.source == "canary" for answer in mixed) < 36
