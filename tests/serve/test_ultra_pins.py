"""`fugu-ultra-DATE`: the adapter and the checkpoint of a date, whatever the rolling name does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.config import FuguConfig
from actors.config_file import load_config, parse_config
from actors.errors import CheckpointError, ConfigError
from actors.pool import WorkerPool
from orchestrator.conductor_card import ConductorCard, write_card
from serve.api.health import Readiness
from serve.conductor import WEIGHTS, conducting, pinned_conductors, why_no_conductor
from serve.deploy import CODE, Arguments
from serve.emit import serve_config, text
from serve.gateway import Gateway
from serve.store import SqliteStore
from tests.actors.tiny_chat import random_adapter, tiny_chat_folder
from tests.serve.test_gateway import get, post
from tests.serve.test_own_conductor import REQUEST
from tests.serve.test_pins import Asked
from tests.serve.test_ultra import Scripted, plan

OLD = "20261101"


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path / "state"))


def adapter(folder: Path, **card: Any) -> Path:
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(folder.name.encode())
    write_card(folder, ConductorCard(("a", "b"), **{"style": "paper", **card}))
    return folder


def router(folder: Path) -> dict[str, Any]:
    """The gateway does not read them."""
    return {"checkpoint": str(folder / "new.safetensors"), "pins": {OLD: str(folder / "old.safetensors")}}


def config_of(folder: Path, **conductor: Any) -> FuguConfig:
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in ("a", "b")]
    return FuguConfig.model_validate({"workers": specs, "router": router(folder), "conductor": conductor})


def gateway(folder: Path, config: FuguConfig, **writes: str) -> tuple[Gateway, dict[str, Scripted]]:
    workers = {name: Scripted(name, f"by {name}") for name in ("a", "b")}
    writers = {name.replace("_", "-"): Scripted(name.replace("_", "-"), said) for name, said in writes.items()}
    everyone: dict[str, Any] = {**workers, **writers}
    app = Gateway(
        config,
        list(workers.values()),
        Asked(),  # type: ignore[arg-type]
        Readiness({}),
        ultra=(conducting(config, everyone), SqliteStore(folder / "workflows.sqlite")),
        ultra_pins=pinned_conductors(config, everyone),
    )
    return app, everyone


async def test_the_adapter_of_a_date_writes_its_plans(tmp_path: Path) -> None:
    old = adapter(tmp_path / "old", style="compact", steps="bare")
    new = adapter(tmp_path / "new")
    config = config_of(tmp_path, model="m", adapter=new, pins={OLD: old})
    assert why_no_conductor(config) is None
    write = {"conductor": plan(("a", "of today", ())), "conductor_20261101": plan(("b", "of then", ()))}
    app, writers = gateway(tmp_path, config, **write)
    models = (await get(app, "/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["fugu", "fugu-ultra", f"fugu-{OLD}", f"fugu-ultra-{OLD}"]
    assert models[-1]["sha256"] == hashlib.sha256(b"old").hexdigest()
    for model, said, writer in (
        ("fugu-ultra", "by a", "conductor"),
        (f"fugu-ultra-{OLD}", "by b", f"conductor-{OLD}"),
        ("fugu-ultra", "by a", "conductor"),
    ):
        body = (await post(app, model=model, fugu={"trace": True})).json()
        assert (body["model"], body["choices"][0]["message"]["content"]) == (model, said)
        assert (body["fugu"]["conductor"], body["fugu"]["rounds"][0]["writings"][0]["error"]) == (writer, None)
    asked = writers[f"conductor-{OLD}"].requests[0]
    assert asked.messages[0].text != writers["conductor"].requests[0].messages[0].text, "as it was trained"
    # The one worker of its plan was told the subtask alone.
    assert writers["b"].requests[-1].messages[-1].text == "of then"


async def test_what_decides_is_of_that_date_too(tmp_path: Path) -> None:
    """Without an adapter only the router's checkpoint can move. No plan comes about: who answers is the router's."""
    config = config_of(tmp_path, model="m")
    app, _ = gateway(tmp_path, config, conductor="no plan")
    for model, said in (("fugu-ultra", "by a"), (f"fugu-ultra-{OLD}", "by b")):
        assert (await post(app, model=model)).json()["choices"][0]["message"]["content"] == said
    # A rolling adapter that has no pin of the date is no frozen one.
    rolling = config_of(tmp_path, model="m", adapter=adapter(tmp_path / "new"))
    app, _ = gateway(tmp_path, rolling, conductor="no plan")
    assert (await post(app, model=f"fugu-ultra-{OLD}")).status_code == 404


def test_pins_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    old = adapter(tmp_path / "old")
    with pytest.raises(ValueError, match=r"router\.pins"):
        config_of(tmp_path, model="m", pins={"20261231": old})
    with pytest.raises(ValueError, match=r"pins: of a `model`"):
        config_of(tmp_path, worker="a", pins={OLD: old})
    specs = [{"name": f"conductor-{OLD}", "provider": "openai", "model": "m"}]
    with pytest.raises(ValueError, match="no worker can be called"):
        FuguConfig.model_validate(
            {"workers": specs, "router": router(tmp_path), "conductor": {"model": "m", "pins": {OLD: old}}}
        )
    with pytest.raises(CheckpointError, match=f"conductor.pins.{OLD}.*can be read from here"):
        why_no_conductor(config_of(tmp_path, model="m", pins={OLD: tmp_path / "none"}))
    write_card(old, ConductorCard(("x",), "paper"))
    with pytest.raises(CheckpointError, match="trained with x"):
        why_no_conductor(config_of(tmp_path, model="m", pins={OLD: old}))


def test_a_pin_whose_adapter_was_exchanged_is_refused(tmp_path: Path) -> None:
    old, found = adapter(tmp_path / "old"), hashlib.sha256(b"old").hexdigest()
    path = tmp_path / "pool.yaml"

    def written(digest: str, pin: str = OLD) -> FuguConfig:
        path.write_text(
            "workers: [{name: a, provider: local, model: m}, {name: b, provider: local, model: m}]\n"
            f"conductor: {{model: m, pins: {{{OLD}: old}}, pin_sha256: {{{pin}: {digest}}}}}\n"
        )
        return load_config(path)

    assert why_no_conductor(written(found)) is None
    (application,) = yaml.safe_load(text(serve_config(path)))["applications"]
    assert application["args"]["config"]["conductor"]["pin_sha256"] == {OLD: found}
    with pytest.raises(CheckpointError, match="there is no such pin"):
        why_no_conductor(written(found, "20261102"))
    with pytest.raises(ConfigError, match="pin_sha256"):
        written("9f86")
    kept = written(found)
    (old / WEIGHTS).write_bytes(b"another")
    with pytest.raises(CheckpointError, match=f"conductor.pins.{OLD}.*, and not {found}"):
        why_no_conductor(kept)


def test_a_file_says_it_with_dates_and_relative_paths(tmp_path: Path) -> None:
    old = adapter(tmp_path / "old")
    path = tmp_path / "pool.yaml"
    path.write_text(
        "workers: [{name: a, provider: local, model: m}]\n"
        f"conductor: {{model: m, adapter: old, pins: {{{OLD}: old}}}}\n"
    )
    config = load_config(path)
    assert config.conductor is not None
    assert config.conductor.pins == {OLD: old}
    (application,) = yaml.safe_load(text(serve_config(path)))["applications"]
    arguments = Arguments.model_validate(application["args"])
    deployed = parse_config(arguments.config, CODE / arguments.base, "deployed")
    assert deployed.conductor == config.conductor
    path.write_text(path.read_text().replace(OLD, "latest"))
    with pytest.raises(ConfigError, match="pins"):
        load_config(path)


@pytest.mark.ray
@pytest.mark.timeout(180)
async def test_all_of_them_share_the_workers_engine(ray_session: None, tmp_path: Path) -> None:
    model = tiny_chat_folder(tmp_path / "model")
    new, old = (random_adapter(model, tmp_path / name, seed=seed) for seed, name in enumerate(("new", "old"), 1))
    local = {"model": str(model), "device": "cpu"}
    config = FuguConfig.model_validate(
        {
            "workers": [{"name": "plain", "provider": "local", **local}],
            "conductor": {**local, "adapter": new, "pins": {OLD: old}},
        }
    )
    pool = WorkerPool.connect(config, with_conductor=True)
    try:
        await pool.ready()
        assert list(pool.workers) == ["plain", "conductor", f"conductor-{OLD}"]
        assert len({shard.name for shards in pool._shards.values() for shard in shards}) == 1
        said = {name: (await worker.complete(REQUEST)).text for name, worker in pool.workers.items()}
        assert len(set(said.values())) == 3, said
    finally:
        pool.shutdown()
