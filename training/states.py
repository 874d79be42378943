"""The backbone as an actor: reads the transcripts of all lanes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from actors.messages import Message
from orchestrator.backbone import Backbone, Device
from orchestrator.head import Checkpoint
from training.features import features


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class StatesActor:
    """The backbone for all lanes, with what a head of this kind makes of hidden states: batches what is asked at the
    same time and keeps hidden states on disk."""

    def __init__(
        self,
        folder: str,
        head: Checkpoint,
        max_tokens: int,
        device: Device,
        cache: Path,
        revision: str,
    ) -> None:
        self._backbone = Backbone.load(folder, reads=head.info.reads, device=device, singular=head.singular or None)
        self._head = head
        self._max_tokens = max_tokens
        self._cache = cache
        self._revision = revision
        self._asked: list[tuple[Sequence[tuple[Message, ...]], asyncio.Future[NDArray[np.float32]]]] = []
        self._busy = False

    async def states(self, transcripts: Sequence[tuple[Message, ...]]) -> NDArray[np.float32]:
        """What the weights of a head multiply, `[N, d or m]`."""
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
        hidden = features(
            self._backbone,
            talks,
            prompt_format=self._head.info.prompt_format,
            max_tokens=self._max_tokens,
            revision=self._revision,
            cache=self._cache,
        )
        found: NDArray[np.float32] = self._head.features(hidden).numpy()
        return found
