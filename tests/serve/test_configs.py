"""The configurations that ship load, with their keys in the environment and without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from actors.config import FuguConfig
from actors.config_file import load_config
from actors.errors import ConfigError
from serve.app import needs_router
from serve.conductor import why_no_conductor

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The other files there are settings of trainings.
POOLS = sorted(path for path in CONFIGS.glob("*.yaml") if "workers" in yaml.safe_load(path.read_text()))
KEYS = {
    f"{name}_API_KEY": f"key-of-{name}" for name in ("OPENAI", "ANTHROPIC", "GEMINI", "COMPATIBLE", "GEMMA", "FUGU")
}


@pytest.mark.parametrize("path", POOLS, ids=lambda path: path.stem)
def test_loads_with_every_key(path: Path) -> None:
    config = load_config(path, KEYS)
    assert config.disabled == {}
    assert len(config.active) >= 2
    for key in KEYS.values():
        assert key not in repr(config)


def test_embedded_needs_nothing() -> None:
    config = load_config(CONFIGS / "embedded.yaml", {})
    assert {spec.provider for spec in config.active} == {"local"}
    assert len({spec.model for spec in config.active}) == 1, "one engine is shared"
    adapters = [spec.adapter for spec in config.active if spec.adapter is not None]
    assert len(set(adapters)) == len(adapters) == 4
    assert all((folder / "adapter_model.safetensors").is_file() for folder in adapters)
    assert [spec.name for spec in config.active if spec.adapter is None] == ["general"]
    assert needs_router(config)
    assert config.router.checkpoint == CONFIGS.parent / "checkpoints" / "embedded.safetensors"
    assert why_no_conductor(config) is None
    assert config.conductor is not None
    assert config.conductor.spec() is not None, "a model of its own, trained for this pool"


def test_open_models_need_no_key() -> None:
    assert load_config(CONFIGS / "open-models.yaml", {}).disabled == {}


def test_frontier_without_keys_says_which_are_missing() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "frontier.yaml", {})
    for name in ("OPENAI", "ANTHROPIC", "GEMINI", "COMPATIBLE"):
        assert f"{name}_API_KEY is not set" in caught.value.message


def test_frontier_with_one_key_uses_that_worker() -> None:
    config = load_config(CONFIGS / "frontier.yaml", {"GEMINI_API_KEY": "key-of-gemini"})
    assert [spec.name for spec in config.active] == ["gemini"]
    assert why_no_conductor(config) == "its conductor, the worker gpt, is disabled (OPENAI_API_KEY is not set)"
    assert config.disabled["gpt"] == "OPENAI_API_KEY is not set"
    assert {spec.provider for spec in load_config(CONFIGS / "frontier.yaml", KEYS).active} == {
        "openai",
        "anthropic",
        "gemini",
    }


def test_the_commented_vllm_workers_are_right_too() -> None:
    lines = (CONFIGS / "open-models.yaml").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "# - name: small")
    block = []
    for line in lines[start:]:
        if not line.strip().startswith("#"):
            break
        block.append(re.sub(r"^  # ?", "", line))
    workers = yaml.safe_load("\n".join(block))
    config = FuguConfig.model_validate({"workers": workers})
    assert [(spec.name, spec.provider) for spec in config.workers] == [("small", "vllm"), ("small-maths", "vllm")]
