"""What the vllm adapter does without vLLM; with it, see `tests/vllm`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from actors.adapters.vllm import VllmEngine, _lora_rank
from actors.errors import ConfigError


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'fugu-ray\[vllm\]'"):
        VllmEngine.load(tmp_path)


def test_the_rank_vllm_is_built_for_holds_every_adapter(tmp_path: Path) -> None:
    def adapter(rank: int) -> Path:
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        return folder

    four, twelve, huge = adapter(4), adapter(12), adapter(1000)
    assert _lora_rank({}) == 8
    assert _lora_rank({"a": four}) == 8
    assert _lora_rank({"a": four, "b": twelve}) == 16
    with pytest.raises(ConfigError, match="rank 1000"):
        _lora_rank({"a": huge})
    with pytest.raises(ConfigError, match=r"a: .* no LoRA adapter"):
        _lora_rank({"a": tmp_path})
