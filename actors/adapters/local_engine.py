"""Continuous batching over a transformers model, on CPU or GPU.

One thread owns the model. Between two decoding steps requests join the batch (short prompts are read together, a long
one alone and in pieces, and their key-value cache is put beside the others', padded on the left) and leave it, so
nobody waits for the longest answer. The scheme is Orca's iteration-level scheduling (Yu et al. 2022, §3).

Every row has its own sampling settings, random generator and, with LoRA, its own adapter. In float32 a row's tokens
do not depend on who shares the batch; in bfloat16 rounding can tip a near tie.
"""

from __future__ import annotations

import os

# OpenMP reads this when torch is imported. By default its threads spin while they wait for each other: where other
# processes want the same cores (the router, the gateway) a decoding step then takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from actors.adapters.decoding import Detokenizer, StopFilter, sample
from actors.adapters.local_model import LoadedModel, load_model
from actors.adapters.text_worker import Finished, check_length, render
from actors.errors import FuguError, WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, FinishReason, Usage

PREFILL_TOKENS = 256
"""Prompt tokens, padding included, read between two decoding steps: well under half a second on two cores."""
CACHE_BYTES = 2 << 30
"""Key-value cache for all rows together; a row alone is always let in."""
BATCH_TIMEOUT = 6 * 3600.0


Event = str | Finished | FuguError


@dataclass(eq=False, slots=True)
class Generation:
    """One request in the engine. `emit` is called from the engine's thread: with pieces of text, then once with
    `Finished` or an error. Setting `cancelled` ends it before the next step, without a further event."""

    prompt: list[int]
    adapter: str | None
    max_tokens: int
    temperature: float
    top_p: float
    random: torch.Generator
    detokenizer: Detokenizer
    stop: StopFilter
    emit: Callable[[Event], None]
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    cancelled: bool = False

    @property
    def cached(self) -> int:
        """Tokens in the key-value cache while decoding: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1


class LocalEngine:
    """A model in memory, its LoRA adapters, and the thread that decodes. Make it with `load`, end it with `close`."""

    def __init__(self, loaded: LoadedModel, *, max_batch: int = 16, context: int | None = None) -> None:
        model, tokenizer = loaded.model, loaded.tokenizer
        config = model.config.get_text_config()
        self.context = min(config.max_position_embeddings, context or config.max_position_embeddings)
        self._model = model
        self._tokenizer = tokenizer
        self._adapters = loaded.adapters
        self._adapted = loaded.rows
        self._max_batch = max_batch
        defaults = model.generation_config
        ends = defaults.eos_token_id if isinstance(defaults.eos_token_id, list) else [defaults.eos_token_id]
        self._ends = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self._temperature = 1.0 if defaults.temperature is None else float(defaults.temperature)
        self._top_p = 1.0 if defaults.top_p is None else float(defaults.top_p)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._token_bytes = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
        self._longest_token = max(len(token) for token in tokenizer.get_vocab())
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._closed = False
        # What follows belongs to the thread.
        self._joining: tuple[list[Generation], DynamicCache] | None = None
        self._rows: list[Generation] = []
        self._cache: Any = None  # a DynamicCache while there are rows
        self._thread = threading.Thread(target=self._run, name="local-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "auto",
        adapters: Mapping[str, Path] | None = None,
        max_batch: int = 16,
        dtype: torch.dtype | None = None,
        context: int | None = None,
    ) -> LocalEngine:
        """Load a model folder and the LoRA adapters (worker name → folder) over it.

        `dtype` defaults to bfloat16 on a GPU and on a CPU that computes in it, else float32. `context` shortens the
        model's own context length, in tokens.

        Raises:
            ConfigError: the folder holds no chat model we can load, an adapter does not fit, or there is no GPU.
        """
        loaded = load_model(folder, device=device, adapters=adapters or {}, dtype=dtype)
        return cls(loaded, max_batch=max_batch, context=context)

    def prepare(self, request: ChatRequest, emit: Callable[[Event], None], *, adapter: str | None = None) -> Generation:
        """Turn a request into tokens and settings; takes time with the prompt's length, so call it off the event
        loop. Tools, response formats and fields we do not know have no effect here.

        Raises:
            ContextLengthError: no room is left for an answer.
            WorkerRejectedError: the request needs what a text model cannot do, or its chat template refuses it.
        """
        text = render(self._tokenizer, request.messages)
        if len(text) > self.context * self._longest_token:
            # Not even in the longest tokens does this fit; counting exactly would take long.
            check_length(len(text) // self._longest_token, self.context, at_least=True)
        prompt = self._encode(text)
        check_length(len(prompt), self.context)
        room = self.context - len(prompt)
        random = torch.Generator()
        if request.seed is None:
            random.seed()
        else:
            random.manual_seed(request.seed % 2**63)
        return Generation(
            prompt=prompt,
            adapter=None if adapter is None else self._adapters[adapter],
            max_tokens=min(request.max_tokens or room, room),
            temperature=self._temperature if request.temperature is None else request.temperature,
            top_p=self._top_p if request.top_p is None else request.top_p,
            random=random,
            detokenizer=Detokenizer(self._decode),
            stop=StopFilter(request.stop),
            emit=emit,
        )

    def submit(self, generation: Generation) -> None:
        """Queue a prepared generation; its events follow."""
        with self._changed:
            if self._closed:
                raise WorkerUnavailableError("the local engine is closed")
            self._waiting.append(generation)
            self._changed.notify()

    @property
    def busy(self) -> int:
        """How many generations wait or run."""
        with self._changed:
            return len(self._waiting) + len(self._rows) + (len(self._joining[0]) if self._joining else 0)

    def generate_batch(self, requests: Sequence[ChatRequest], *, adapter: str | None = None) -> list[ChatReply]:
        """Answer many requests and wait for all: `replies[i]` answers `requests[i]`. For labelling.

        Raises:
            FuguError: the first error of any request; the others are cancelled.
        """
        running: list[Generation] = []
        futures: list[Future[Finished]] = []
        try:
            for request in requests:
                future: Future[Finished] = Future()
                futures.append(future)
                running.append(self.prepare(request, _resolver(future), adapter=adapter))
                self.submit(running[-1])
            ends = [future.result(timeout=BATCH_TIMEOUT) for future in futures]
        finally:
            for generation in running:
                generation.cancelled = True
        return [
            ChatReply(worker=adapter or "", text=end.text, finish_reason=end.reason, usage=end.usage) for end in ends
        ]

    def close(self, timeout: float = 10.0) -> None:
        """Fail what is running and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    # Text ----------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # The thread ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            try:
                if not self._take():
                    break
                if self._joining is not None:
                    self._prefill(*self._joining)
                if self._rows:
                    self._step()
            except Exception as error:  # out of memory and the like: everyone in the batch must hear of it
                self._fail(f"the local model failed: {type(error).__name__}")
        self._fail("the local engine was closed")

    def _take(self) -> bool:
        """Drop what was cancelled and let the next requests in; False when closed. Sleeps while there is nothing."""
        with self._changed:
            while not self._closed:
                self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
                # Only a long prompt is still being read here, and that is read alone.
                if self._joining is not None and self._joining[0][0].cancelled:
                    self._joining = None
                self._keep([index for index, row in enumerate(self._rows) if not row.cancelled])
                if self._joining is None and (new := self._next()):
                    self._joining = (new, DynamicCache())
                if self._joining is not None or self._rows:
                    return True
                self._changed.wait()
            return False

    def _next(self) -> list[Generation]:
        """Who joins now, in the order in which they came: as many as are read in one go, or the first alone."""
        new: list[Generation] = []
        while self._waiting and self._has_room([*new, self._waiting[0]]):
            longest = max(len(row.prompt) for row in [*new, self._waiting[0]])
            if new and longest * (len(new) + 1) > PREFILL_TOKENS:
                break
            new.append(self._waiting.popleft())
        return new

    def _has_room(self, new: Sequence[Generation]) -> bool:
        """Rows are padded to the longest, so the cache's final size is rows × longest."""
        rows = [*self._rows, *new]
        longest = max(len(row.prompt) + row.max_tokens for row in rows)
        fits = len(rows) * longest * self._token_bytes <= CACHE_BYTES
        return len(rows) == 1 or (len(rows) <= self._max_batch and fits)

    def _prefill(self, rows: list[Generation], cache: DynamicCache) -> None:
        """Read the next piece of each prompt; after the last one sample the first tokens and join the batch."""
        start = cache.get_seq_length()
        pieces = [row.prompt[start : start + PREFILL_TOKENS] for row in rows]
        width = max(map(len, pieces))
        tokens = torch.tensor([[0] * (width - len(piece)) + piece for piece in pieces])
        lengths = torch.tensor([[len(piece)] for piece in pieces])
        before = width - lengths  # the padding of each row
        mask = (torch.arange(width) >= before).long() if before.any() else None
        positions = (start + torch.arange(width) - before).clamp(min=0)
        logits = self._forward(rows, tokens, positions, mask, cache)
        if start + width < len(rows[0].prompt):
            return
        self._joining = None
        self._join(rows, [index for index, row in enumerate(rows) if self._advance(row, logits[index])], cache)

    def _step(self) -> None:
        """One token for every row; rows that are done leave."""
        width = self._cache.get_seq_length() + 1
        lengths = torch.tensor([row.cached for row in self._rows])
        mask = (torch.arange(width) >= width - 1 - lengths[:, None]).long()
        newest = torch.tensor([[row.tokens[-1]] for row in self._rows])
        logits = self._forward(self._rows, newest, lengths[:, None], mask, self._cache)
        self._keep([index for index, row in enumerate(self._rows) if self._advance(row, logits[index])])

    def _forward(
        self,
        rows: Sequence[Generation],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last of `tokens` [rows, length]; the cache grows by them."""
        device = self._model.device
        names = {}
        if self._adapted is not None:
            self._adapted.choose([row.adapter for row in rows], device, self._model.dtype)
        elif self._adapters:
            names = {"adapter_names": [row.adapter or "__base__" for row in rows]}
        output = self._model(
            input_ids=tokens.to(device),
            position_ids=positions.to(device),
            attention_mask=None if mask is None else mask.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **names,
        )
        return output.logits[:, -1]

    def _advance(self, row: Generation, logits: torch.Tensor) -> bool:
        """Sample a token, emit the text that is now certain, and say whether the row goes on."""
        uniform = float(torch.rand((), generator=row.random, dtype=torch.float64)) if row.temperature else 0.0
        token = sample(logits, row.temperature, row.top_p, uniform)
        row.tokens.append(token)
        ended = token in self._ends
        full = len(row.tokens) >= row.max_tokens
        text = row.stop.push("" if ended else row.detokenizer.push(token))
        if ended or full:
            text += row.stop.push(row.detokenizer.flush())
            text += row.stop.flush()
        if text:
            row.text.append(text)
            row.emit(text)
        if not (ended or full or row.stop.stopped):
            return True
        reason: FinishReason = "stop" if ended or row.stop.stopped else "length"
        row.emit(Finished("".join(row.text), reason, Usage(len(row.prompt), len(row.tokens)), row.stop.by))
        return False

    def _join(self, new: Sequence[Generation], indices: list[int], cache: Any) -> None:
        """Put these of `new` into the batch, with their part of the cache."""
        if not indices:
            return
        rows = [new[index] for index in indices]
        _cut(cache, indices if len(indices) < len(new) else None, max(row.cached for row in rows))
        self._rows += rows
        if self._cache is None:
            self._cache = cache
            return
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            ours.keys = _stack(ours.keys, theirs.keys)
            ours.values = _stack(ours.values, theirs.values)

    def _keep(self, indices: list[int]) -> None:
        """Keep only these rows, and of the cache only the columns that one of them uses."""
        if len(indices) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in indices]
        if not self._rows:
            self._cache = None
        else:
            _cut(self._cache, indices, max(row.cached for row in self._rows))

    def _fail(self, message: str) -> None:
        with self._changed:
            failed = [*self._rows, *(self._joining[0] if self._joining else [])]
            if self._closed:
                failed += self._waiting
                self._waiting.clear()
        self._rows, self._cache, self._joining = [], None, None
        for row in failed:
            row.emit(WorkerUnavailableError(message))


def _cut(cache: Any, indices: list[int] | None, width: int) -> None:
    """Leave these rows of a cache (None: all) and its last `width` columns."""
    rows = slice(None) if indices is None else indices
    for layer in cache.layers:
        layer.keys = layer.keys[rows, :, -width:]
        layer.values = layer.values[rows, :, -width:]


def _stack(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Two caches [rows, heads, length, size] over each other, the shorter padded on the left."""
    width = max(ours.shape[2], theirs.shape[2])
    padded = [torch.nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in (ours, theirs)]
    return torch.cat(padded)


def _resolver(future: Future[Finished]) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        if isinstance(event, Finished):
            future.set_result(event)
        elif isinstance(event, FuguError):
            future.set_exception(event)

    return emit
