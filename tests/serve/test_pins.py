"""Dated pins: checkpoints that stay, served beside the rolling names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.config import FuguConfig, RouterConfig
from actors.config_file import load_config, parse_config
from actors.errors import ConfigError
from actors.messages import Message
from actors.model_files import resolve_model
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
from serve.api.health import Readiness
from serve.checkpoint import check_pins
from serve.deploy import CODE, Arguments
from serve.emit import serve_config, text
from serve.gateway import Gateway
from serve.router import Answer, Question, RouterReplica, Served
from serve.trace import Choice
from tests.orchestrator.tiny import DIMENSION, tiny_folder
from tests.serve.test_gateway import Scripted, get, post


def checkpoint(
    path: Path, model: Path, prefers: int, *, roles: bool = False, workers: tuple[str, ...] = ("a", "b")
) -> Path:
    """A head that always prefers one of the workers."""
    files = resolve_model(str(model))
    info = CheckpointInfo(workers=workers, backbone=files.id, revision=files.revision, roles=roles)
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


async def test_a_pin_stays_when_a_worker_joins_the_pool(files: dict[str, Any], tmp_path: Path) -> None:
    model = Path(files["backbone"])
    grown = checkpoint(tmp_path / "grown.safetensors", model, 2, workers=("a", "b", "c"))
    config = RouterConfig(**{**files, "checkpoint": grown})
    replica: Any = RouterReplica(config, ["c", "a", "b"])
    await replica.reconfigure(Served.of(config).json())
    assert await replica.status() is None
    questions = [
        Question((Message("user", "hello"),), frozenset("abc"), None, "argmax", pin=pin)
        for pin in (None, "20261101", "20261102")
    ]
    answers = replica._decide(questions, replica._routers, 0.0, replica._pinned)
    assert [answer.worker for answer in answers] == ["c", "b", "b"]
    assert set(answers[1].probabilities) == {"a", "b"}
    shrunk: Any = RouterReplica(config, ["c", "a"])
    await shrunk.reconfigure(Served.of(config).json())
    assert "rows for b, not in this pool" in (await shrunk.status()).message


class InProcess:
    """Asks a replica as the gateway's client does, without Serve between."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    async def choose(self, question: Question) -> Choice:
        it = self.replica
        (answer,) = it._decide([question], it._routers, it._served.share, it._pinned)
        assert isinstance(answer, Answer)
        return Choice(answer.worker, answer.probabilities, answer.source)

    async def status(self) -> None:
        return None


async def test_a_pin_never_moves(files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints behind one gateway, while the rolling name gets others: by update, by canary, one that is
    refused."""
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in ("a", "b")]
    config = FuguConfig.model_validate({"workers": specs, "router": files})
    replica = replica_of(config.router)
    first = Served.of(config.router).json()
    await replica.reconfigure(first)
    app = Gateway(config, [Scripted("a", "by a"), Scripted("b", "by b")], InProcess(replica), Readiness({}))

    async def said(model: str) -> str:
        return str((await post(app, model=model)).json()["choices"][0]["message"]["content"])

    updates = [
        (first, "by a"),
        ({"checkpoint": str(files["pins"]["20261101"]), "canary": None, "share": 0.0}, "by b"),
        ({**first, "canary": str(files["pins"]["20261101"]), "share": 1.0}, "by b"),
        ({"checkpoint": str(tmp_path / "none.safetensors"), "canary": None, "share": 0.0}, "by b"),
        (first, "by a"),
    ]
    for served, rolling in updates:
        await replica.reconfigure(served)
        assert await said("fugu") == rolling
        for pin in ("20261101", "20261102"):
            assert await said(f"fugu-{pin}") == "by b", "whatever the rolling name does"


async def test_an_emitted_configuration_serves_its_pins(files: dict[str, Any], tmp_path: Path) -> None:
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in ("a", "b")]
    pins = {int(pin): str(file) for pin, file in files["pins"].items()}
    written = {"workers": specs, "router": {**files, "checkpoint": str(files["checkpoint"]), "pins": pins}}
    path = tmp_path / "pool.yaml"
    path.write_text(yaml.safe_dump(written))
    (application,) = yaml.safe_load(text(serve_config(path)))["applications"]
    arguments = Arguments.model_validate(application["args"])
    assert arguments.config is not None
    config = parse_config(arguments.config, CODE / arguments.base, "deployed")
    assert config.router.pins == files["pins"]
    replica = replica_of(config.router)
    (deployment,) = application["deployments"]
    await replica.reconfigure(deployment["user_config"])
    decider = InProcess(replica)
    chosen = []
    for pin in (None, "20261101"):
        question = Question((Message("user", "hello"),), frozenset("ab"), None, "argmax", pin=pin)
        chosen.append((await decider.choose(question)).worker)
    assert chosen == ["a", "b"]


def test_pins_that_cannot_be_kept_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in ("a", "b")]
    path = tmp_path / "pool.yaml"
    router: dict[str, Any] = {"pins": {"20261101": str(files["checkpoint"])}}
    for wrong, why in ((router, "router.checkpoint"), ({"pins": {"20261101": "none.safetensors"}}, "cannot be read")):
        rolling = {"checkpoint": str(files["checkpoint"])} if why == "cannot be read" else {}
        path.write_text(yaml.safe_dump({"workers": specs, "router": {**wrong, **rolling}}))
        with pytest.raises(ConfigError, match=why):
            serve_config(path)
        with pytest.raises(ConfigError, match=why):
            check_pins(load_config(path).router, rolling.get("checkpoint"))


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
    told = {model["id"]: model.get("sha256") for model in (await get(app, "/v1/models")).json()["data"]}
    old, roles = (sha256_of(file) for file in files["pins"].values())
    assert list(told.values()) == [None, old, roles, roles]
    assert (await get(app, "/v1/models/fugu-20261101")).json()["sha256"] == old
    for model, said in (("fugu", "by a"), ("fugu-20261101", "by b")):
        body = (await post(app, model=model)).json()
        assert (body["model"], body["choices"][0]["message"]["content"]) == (model, said)
    unknown = await post(app, model="fugu-20261231")
    assert (unknown.status_code, "'fugu-20261101'" in unknown.text) == (404, True)


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


async def test_a_pin_whose_file_was_exchanged_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    old, new = files["pins"]["20261101"], files["checkpoint"]
    pinned = {**files, "checkpoint": str(new), "pins": {"20261101": str(old)}}
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in ("a", "b")]
    path = tmp_path / "pool.yaml"

    def written(**digests: str) -> RouterConfig:
        path.write_text(yaml.safe_dump({"workers": specs, "router": {**pinned, "pin_sha256": digests}}))
        return load_config(path).router

    kept = written(**{"20261101": sha256_of(old)})
    check_pins(kept, kept.checkpoint)
    assert serve_config(path)["applications"][0]["args"]["config"]["router"]["pin_sha256"] == kept.pin_sha256
    replica = replica_of(kept)
    await replica.reconfigure(Served.of(kept).json())
    assert await replica.status() is None

    exchanged = written(**{"20261101": sha256_of(new)})
    with pytest.raises(ConfigError, match=f"{sha256_of(old)}, and not {sha256_of(new)}"):
        check_pins(exchanged, exchanged.checkpoint)
    replica = replica_of(exchanged)
    await replica.reconfigure(Served.of(exchanged).json())
    assert "another file than the one that was pinned" in (await replica.status()).message

    without = written(**{"20261102": sha256_of(old)})
    with pytest.raises(ConfigError, match="there is no such pin"):
        check_pins(without, without.checkpoint)
    with pytest.raises(ConfigError, match="pin_sha256"):
        written(**{"20261101": "9f86"})


def test_paths_are_relative_to_the_file_and_names_are_dates(tmp_path: Path) -> None:
    text = "workers: [{name: a, provider: local, model: m}]\nrouter: {pins: {%s: old.safetensors}}\n"
    path = tmp_path / "fugu.yaml"
    for date in ("20261101", "'20261101'"):
        path.write_text(text % date)
        assert load_config(path).router.pins == {"20261101": tmp_path / "old.safetensors"}
    path.write_text(text % "latest")
    with pytest.raises(ConfigError, match="pins"):
        load_config(path)
