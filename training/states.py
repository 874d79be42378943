"""The backbone as an actor: reads the transcripts of all lanes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray
from torch import Tensor

from actors.messages import Message
from orchestrator.backbone import Backbone, Device
from orchestrator.head import CheckpointInfo
from training.features import features


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class StatesActor:
    """The backbone for all lanes: batches what is asked at the same time and keeps hidden states on disk."""

    def __init__(
        self,
        folder: str,
        info: CheckpointInfo,
        singular: Mapping[str, Tensor],
        max_tokens: int,
        device: Device,
        cache: Path,
        revision: str,
    ) -> None:
        self._backbone = Backbone.load(folder, reads=info.reads, device=device, singular=singular or None)
        self._info = info
        self._max_tokens = max_tokens
        self._cache = cache
        self._revision = revision
        self._asked: list[tuple[Sequence[tuple[Message, ...]], asyncio.Future[NDArray[np.float32]]]] = []
        self._busy = False

    async def states(self, transcripts: Sequence[tuple[Message, ...]]) -> NDArray[np.float32]:
        """Hidden states `[N, d]`."""
        future: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._asked.append((transcripts, future))
        if not self._busy:
            self._busy = True
            try:
                while self._asked:
                    await self._answer()
            finally:
                self._busy = False
        return await future

    async def _answer(self) -> None:
        asked, self._asked = self._asked, []
        talks = [talk for transcripts, _ in asked for talk in transcripts]
        try:
            states = await asyncio.to_thread(self._read, talks)
        except Exception as error:
            for _, future in asked:
                future.set_exception(error)
            return
        begin = 0
        for transcripts, future in asked:
            future.set_result(states[begin : begin + len(transcripts)])
            begin += len(transcripts)

    def _read(self, talks: Sequence[tuple[Message, ...]]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = features(
            self._backbone,
            talks,
            prompt_format=self._info.prompt_format,
            max_tokens=self._max_tokens,
            revision=self._revision,
            cache=self._cache,
        ).numpy()
        return found
