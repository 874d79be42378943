"""Dated pins: checkpoints that stay, served beside the rolling names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.config import FuguConfig, RouterConfig, load_config
from actors.errors import ConfigError
from actors.messages import Message
from actors.model_files import resolve_model
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
from serve.api.health import Readiness
from serve.gateway import Gateway
from serve.router import Answer, Question, RouterReplica, Served
from serve.trace import Choice
from tests.orchestrator.tiny import DIMENSION, tiny_folder
from tests.serve.test_gateway import Scripted, get, post


def checkpoint(path: Path, model: Path, prefers: int, *, roles: bool = False) -> Path:
    """A head that always prefers one of the workers a and b."""
    files = resolve_model(str(model))
    info = CheckpointInfo(workers=("a", "b"), backbone=files.id, revision=files.revision, roles=roles)
    prior = torch.zeros(info.rows)
    prior[prefers] = 4.0
    save_checkpoint(path, Checkpoint(info=info, weight=torch.zeros(info.rows, DIMENSION), prior=prior))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pins")
    model = tiny_folder(folder / "backbone")
    return {
        "backbone": str(model),
        "max_tokens": 256,
        "checkpoint": checkpoint(folder / "new.safetensors", model, 0),
        "pins": {
            "20261101": checkpoint(folder / "old.safetensors", model, 1),
            "20261102": checkpoint(folder / "roles.safetensors", model, 1, roles=True),
        },
    }


def replica_of(config: RouterConfig) -> Any:
    """The deployment's own class, without Serve around it."""
    return RouterReplica(config, ["a", "b"])


async def test_each_name_decides_with_its_own_checkpoint(files: dict[str, Any]) -> None:
    config = RouterConfig(**files)
    replica = replica_of(config)
    await replica.reconfigure(Served.of(config).json())
    assert await replica.status() is None

    def question(pin: str | None) -> Question:
        return Question((Message("user", "hello"),), frozenset("ab"), None, "argmax", pin=pin)

    answers = replica._decide(
        [question(pin) for pin in (None, "20261101", None, "20261102")],
        replica._routers,
        0.0,
        replica._pinned,
    )
    assert all(isinstance(answer, Answer) for answer in answers)
    assert [answer.worker for answer in answers] == ["a", "b", "a", "b"]


async def test_a_pin_that_does_not_load_is_told(files: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    config = RouterConfig(**{**files, "pins": {"20261103": broken}})
    replica = replica_of(config)
    await replica.reconfigure(Served.of(config).json())
    assert "broken.safetensors" in (await replica.status()).message


class Asked:
    """Decides by the pin it is asked for."""

    async def choose(self, question: Question) -> Choice:
        worker = "a" if question.pin is None else "b"
        return Choice(worker, dict.fromkeys(sorted(question.allowed), 0.5), "head", "worker")

    async def status(self) -> None:
        return None


async def test_pins_are_models_of_their_own(files: dict[str, Any]) -> None:
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in ("a", "b")]
    config = FuguConfig.model_validate({"workers": specs, "router": files})
    workers = [Scripted("a", "by a"), Scripted("b", "by b")]
    app = Gateway(config, workers, Asked(), Readiness({}))  # type: ignore[arg-type]
    listed = [model["id"] for model in (await get(app, "/v1/models")).json()["data"]]
    assert listed == ["fugu", "fugu-20261101", "fugu-20261102", "fugu-trinity-20261102"]
    for model, said in (("fugu", "by a"), ("fugu-20261101", "by b")):
        body = (await post(app, model=model)).json()
        assert (body["model"], body["choices"][0]["message"]["content"]) == (model, said)
    unknown = await post(app, model="fugu-20261231")
    assert (unknown.status_code, "'fugu-20261101'" in unknown.text) == (404, True)


def test_paths_are_relative_to_the_file_and_names_are_dates(tmp_path: Path) -> None:
    text = "workers: [{name: a, provider: local, model: m}]\nrouter: {pins: {%s: old.safetensors}}\n"
    path = tmp_path / "fugu.yaml"
    for date in ("20261101", "'20261101'"):
        path.write_text(text % date)
        assert load_config(path).router.pins == {"20261101": tmp_path / "old.safetensors"}
    path.write_text(text % "latest")
    with pytest.raises(ConfigError, match="pins"):
        load_config(path)
