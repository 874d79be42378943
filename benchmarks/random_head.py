"""Write a router checkpoint with a random head for given workers: decisions cost what trained ones cost.

python -m benchmarks.random_head OUT.safetensors NAME NAME …
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig

from actors.model_files import resolve_model
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("workers", nargs="+")
    parser.add_argument("--backbone", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--roles", action="store_true")
    arguments = parser.parse_args()
    files = resolve_model(arguments.backbone)
    info = CheckpointInfo(tuple(arguments.workers), files.id, files.revision, roles=arguments.roles)
    dimension = AutoConfig.from_pretrained(files.folder, local_files_only=True).hidden_size
    weight = 0.01 * torch.randn(info.rows, dimension, generator=torch.Generator().manual_seed(1))
    save_checkpoint(arguments.out, Checkpoint(info, weight))


if __name__ == "__main__":
    main()
