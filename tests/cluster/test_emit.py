"""`fugu serve --emit-serve-config`: what Serve takes, without a key in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ConfigError
from actors.messages import Message
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
from serve.emit import serve_config, text
from serve.router import place_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "workers" in yaml.safe_load(path.read_text()))


def written(folder: Path, **changes: Any) -> Path:
    """A pool of two with keys from the environment and a checkpoint beside it."""
    for name, roles in (("plain", False), ("roles", True)):
        info = CheckpointInfo(workers=("a", "b"), backbone="tiny", revision="1", roles=roles)
        weight = torch.zeros(info.rows, 8)
        save_checkpoint(folder / f"{name}.safetensors", Checkpoint(info=info, weight=weight))
    config: dict[str, Any] = {
        "workers": [
            {"name": name, "provider": "openai", "model": name, "api_key": f"${{{name.upper()}_API_KEY}}"}
            for name in ("a", "b")
        ],
        "router": {"checkpoint": "plain.safetensors", "choose": "sample"},
        "serve": {"api_keys": ["${FUGU_API_KEY}"], "host": "0.0.0.0", "port": 8100, "router_replicas": {"max": 3}},
        **changes,
    }
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_serve_takes_what_every_configuration_becomes(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.deploy import Arguments

    made = yaml.safe_load(text(serve_config(path)))
    (application,) = ServeDeploySchema.model_validate(made).applications
    assert application.import_path == "serve.deploy:build"
    assert Arguments.model_validate(application.args).base == Path("configs"), "the same on every node"


def test_what_is_told_and_where(tmp_path: Path) -> None:
    made = serve_config(written(tmp_path))
    assert made["http_options"] == {"host": "0.0.0.0", "port": 8100, "keep_alive_timeout_s": 90}
    (application,) = made["applications"]
    assert application["args"]["config"]["router"] == {"choose": "sample"}
    assert application["args"]["config"]["workers"][0]["api_key"] == "${A_API_KEY}", "filled in on the node"
    assert application["args"]["decides"] == "workers"
    checkpoint = str(tmp_path / "plain.safetensors")
    assert application["deployments"] == [
        {"name": "Router", "user_config": {"checkpoint": checkpoint, "canary": None, "share": 0.0}}
    ]


def test_another_checkpoint_changes_nothing_else(tmp_path: Path) -> None:
    """Else Serve would start every replica anew."""
    path = written(tmp_path)
    before, after = serve_config(path), serve_config(path, checkpoint=str(tmp_path / "roles.safetensors"))
    assert after["applications"][0]["args"].pop("decides") == "roles"
    assert before["applications"][0]["args"].pop("decides") == "workers"
    router = after["applications"][0]["deployments"][0]
    assert router["user_config"]["checkpoint"] == str(tmp_path / "roles.safetensors")
    router["user_config"] = before["applications"][0]["deployments"][0]["user_config"]
    assert after == before


def test_a_canary(tmp_path: Path) -> None:
    path = written(tmp_path)
    by_option = serve_config(path, canary="s3://bucket/new.safetensors", share=0.05)
    told = by_option["applications"][0]["deployments"][0]["user_config"]
    assert told == {
        "checkpoint": str(tmp_path / "plain.safetensors"),
        "canary": "s3://bucket/new.safetensors",
        "share": 0.05,
    }
    canary = {"checkpoint": "plain.safetensors", "canary": {"checkpoint": "roles.safetensors", "share": 0.2}}
    told = serve_config(written(tmp_path, router=canary))["applications"][0]["deployments"][0]["user_config"]
    assert (told["canary"], told["share"]) == (str(tmp_path / "roles.safetensors"), 0.2)
    with pytest.raises(ConfigError, match="share without a canary"):
        serve_config(written(tmp_path), share=0.5)


def test_checkpoints_at_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read here to tell what they decide, and stay addresses for the nodes."""
    monkeypatch.setenv("FUGU_CACHE", str(tmp_path / "cache"))
    written(tmp_path)
    told = {"checkpoint": f"file://{tmp_path}/roles.safetensors"}
    told |= {"canary": {"checkpoint": f"file://{tmp_path}/plain.safetensors", "share": 0.2}}
    (application,) = serve_config(written(tmp_path, router=told))["applications"]
    assert application["args"]["decides"] == "roles"
    assert application["deployments"][0]["user_config"] == {
        "checkpoint": told["checkpoint"],
        "canary": f"file://{tmp_path}/plain.safetensors",
        "share": 0.2,
    }
    assert "checkpoint" not in application["args"]["config"]["router"]


def test_nothing_to_decide(tmp_path: Path) -> None:
    (application,) = serve_config(written(tmp_path, router={}))["applications"]
    assert application["args"]["decides"] == "nothing"
    assert application["deployments"] == []


def test_a_checkpoint_that_cannot_be_read(tmp_path: Path) -> None:
    path = written(tmp_path, router={"checkpoint": "none.safetensors"})
    with pytest.raises(ConfigError, match=r"none.safetensors cannot be read from here"):
        serve_config(path)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"serve": {"api_keys": ["written-out-1234"]}}, r"serve\.api_keys\.0"),
        (
            {"workers": [{"name": "a", "provider": "openai", "model": "a", "api_key": "sk-written-out"}]},
            r"workers\.a\.api_key",
        ),
        (
            {"workers": [{"name": "a", "provider": "openai", "model": "a", "headers": {"x-key": "written-out-1234"}}]},
            r"workers\.a\.headers\.x-key",
        ),
    ],
)
def test_a_key_that_is_written_out_is_refused(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where) as caught:
        serve_config(written(tmp_path, **changes))
    assert "written-out" not in caught.value.message


def test_a_public_address_wants_keys(tmp_path: Path) -> None:
    path = written(tmp_path, serve={"host": "0.0.0.0"})
    with pytest.raises(ConfigError):
        serve_config(path)
    assert serve_config(path, host="127.0.0.1")["http_options"]["host"] == "127.0.0.1"


@given(st.lists(st.text(), min_size=200, max_size=200, unique=True), st.floats(0.05, 0.95))
def test_a_share_of_the_conversations_goes_to_the_canary(firsts: list[str], share: float) -> None:
    tried = 0
    for first in firsts:
        talk = [Message("user", first)]
        place = place_of(talk)
        assert 0 <= place < 1
        later = [Message("system", "s"), *talk, Message("assistant", "x"), Message("user", "y")]
        assert place_of(later) == place, "a conversation stays with who began it"
        tried += place < share
    # Six standard deviations.
    assert abs(tried / 200 - share) < 6 * (share * (1 - share) / 200) ** 0.5
