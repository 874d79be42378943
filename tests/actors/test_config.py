"""The configuration file: what is wrong is named by its place, keys stay secret, missing keys disable."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.config import FuguConfig, WorkerSpec
from actors.config_file import load_config
from actors.errors import ConfigError
from actors.pool import grouped

KEY = "sk-0123456789abcdefghij"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(text, encoding="utf-8")
    return path


WORKER = "  - {name: a, provider: openai, model: m"


def test_a_whole_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
workers:
  - name: gpt
    provider: openai
    model: ${MODEL:-some-model}
    api_key: ${GPT_KEY}
    headers: {x-team: "${TEAM}"}
    limits: {requests_per_minute: 500, tokens_per_minute: 200000, concurrency: 8}
    price: {input: 1.25, output: 10.0, cached_input: 0.125}
    timeout: {connect: 5, first_byte: 120, total: 3600}
    tags: [closed, us]
  - {name: old, provider: replay, model: gpt-3, outcomes: recorded}
router: {checkpoint: head.safetensors}
serve: {port: 9000}
""",
    )
    config = load_config(path, {"GPT_KEY": KEY, "TEAM": "fish"})
    gpt, old = config.active
    assert gpt.api_key is not None
    assert gpt.api_key.get_secret_value() == KEY
    assert gpt.headers["x-team"].get_secret_value() == "fish"
    assert (gpt.model, gpt.url) == ("some-model", "https://api.openai.com/v1")
    assert old.outcomes == tmp_path / "recorded"
    assert config.router.checkpoint == tmp_path / "head.safetensors"
    assert config.serve.port == 9000
    assert KEY not in repr(config)
    assert KEY not in config.model_dump_json()


def test_a_conductor_of_its_own_shares_the_engine_of_a_worker(tmp_path: Path) -> None:
    text = "workers: [{name: a, provider: local, model: m, context: 512}]\nconductor: {model: m, adapter: lora}"
    config = load_config(write(tmp_path, text), {})
    assert config.conductor is not None
    spec = config.conductor.spec()
    assert spec is not None
    assert (spec.name, spec.adapter) == ("conductor", tmp_path / "lora")
    assert grouped([*config.active, spec]) == [(config.workers[0], spec)]
    prompted = load_config(write(tmp_path, f"workers:\n{WORKER}}}\nconductor: {{worker: a}}"), {}).conductor
    assert prompted is not None
    assert prompted.spec() is None


def test_a_missing_key_disables_its_worker_only(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"workers:\n{WORKER}, api_key: '${{A_KEY}}'}}\n  - {{name: b, provider: gemini, model: m}}\n"
    )
    config = load_config(path, {})
    assert [spec.name for spec in config.active] == ["b"]
    assert config.disabled == {"a": "A_KEY is not set"}
    assert load_config(path, {"A_KEY": ""}).disabled == config.disabled
    assert load_config(path, {"A_KEY": KEY}).disabled == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers: []", "workers"),
        ("workers: 5", "workers: must be a list"),
        ("[]", "must be a mapping"),
        ("{}", "workers: must be a list"),
        (f"workers:\n{WORKER}, mdoel: x}}", "workers.0.mdoel: unknown key"),
        (f"workers:\n{WORKER}}}\nserver: {{}}", "server: unknown key"),
        (f"workers:\n{WORKER}}}\ndisabled: {{}}", "disabled: unknown key"),
        (f"workers:\n{WORKER}, limits: {{concurrency: 0}}}}", "workers.0.limits.concurrency"),
        (f"workers:\n{WORKER}, timeout: {{total: .nan}}}}", "workers.0.timeout.total"),
        (f"workers:\n{WORKER}, timeout: {{total: .inf}}}}", "workers.0.timeout.total"),
        (f"workers:\n{WORKER}, base_url: ftp://x}}", "base_url.*http"),
        (f"workers:\n{WORKER}, base_url: '${{NOT_SET}}'}}", "base_url.*NOT_SET is not set"),
        (f"workers:\n{WORKER}}}\n{WORKER}}}", "unique.*a"),
        (f"workers:\n{WORKER}, limits: {{concurrency: 3}}, shards: 4}}", "too small to share"),
        (f"workers:\n{WORKER}, adapter: x}}", "for local and vllm"),
        ("workers:\n  - {name: a, provider: local, model: m, shards: 2}", "one engine"),
        ("workers:\n  - {name: a, provider: replay, model: m}", "outcomes"),
        ("workers:\n  - {name: 'a b', provider: openai, model: m}", "workers.0.name"),
        (f"workers:\n{WORKER}, api_key: '${{K}}'}}", "no worker is left.*K is not set"),
        (f"workers:\n{WORKER}}}\nrouter: {{checkpoint: 'file:///none/x'}}", "there is no file file:///none/x"),
        (f"workers:\n{WORKER}}}\nconductor: {{pins: {{1: 's3://b/x'}}}}", "conductor.pins.1: s3://b/x is not a path"),
        (f"workers:\n{WORKER}, adapter: 's3://b/x'}}", "workers.0.adapter: s3://b/x is not a path"),
        (f"workers:\n{WORKER}}}\nrouter: {{pins: 5}}", "router.pins: "),
        (f"workers:\n{WORKER}}}\nserve: {{api_keys: [short]}}", "8 characters"),
        (f"workers:\n{WORKER}}}\nconductor: {{}}", "conductor: .*either `worker`.*or `model`"),
        (f"workers:\n{WORKER}}}\nconductor: {{worker: a, model: m}}", "either `worker`.*or `model`"),
        (f"workers:\n{WORKER}}}\nconductor: {{worker: b}}", "conductor.worker: there is no worker b"),
        (f"workers:\n{WORKER}}}\nconductor: {{worker: a, adapter: x}}", "adapter: of a `model`"),
        (f"workers:\n{WORKER}}}\nconductor: {{worker: a, max_steps: 6}}", "conductor.max_steps"),
        (f"workers:\n{WORKER}}}\nconductor: {{worker: a, max_stpes: 3}}", "conductor.max_stpes: unknown key"),
        (f"workers:\n{WORKER}}}\nconductor: {{worker: a, style: haiku}}", "conductor.style"),
        (
            "workers: [{name: conductor, provider: openai, model: m}]\nconductor: {worker: conductor}",
            "no worker can be called conductor",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text), {})
    assert "pool.yaml" in str(caught.value)


def test_no_error_shows_a_key(tmp_path: Path) -> None:
    broken = [
        f"workers:\n  - name: a\n    api_key: {KEY}\n   model: [",
        f"workers:\n{WORKER}, api_key: {{a: {KEY}}}}}",
        f"workers:\n{WORKER}, api_key: [{KEY}]}}",
        f"workers:\n{WORKER}, api_key: {KEY}, limits: {KEY}}}",
        f"workers:\n{WORKER}}}\nserve: {{api_keys: {KEY}}}",
    ]
    for text in broken:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, text), {})
        assert KEY not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml", {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "binary.yaml", {})


def test_an_address_loses_its_trailing_slash() -> None:
    spec = WorkerSpec.model_validate(
        {"name": "a", "provider": "openai", "model": "m", "base_url": "http://localhost:8080/v1/"}
    )
    assert spec.url == "http://localhost:8080/v1"


def test_a_configuration_does_not_change() -> None:
    config = FuguConfig.model_validate({"workers": [{"name": "a", "provider": "openai", "model": "m"}]})
    with pytest.raises(ValueError, match="frozen"):
        config.workers[0].name = "b"  # type: ignore[misc]
