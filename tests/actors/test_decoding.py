"""Sampling, detokenising and stop strings."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.adapters.decoding import Detokenizer, StopFilter, sample
from tests.orchestrator.tiny import tiny_tokenizer


def test_temperature_zero_takes_the_most_probable() -> None:
    assert sample(torch.tensor([0.0, 3.0, 2.9]), 0, 0.1, 0.99) == 1


@pytest.mark.parametrize("size", [5, 1000])
@pytest.mark.parametrize("top_p", [0.35, 0.8, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_draws_every_token_as_often_as_its_probability(temperature: float, top_p: float, size: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(7)) * 2
    points = 4000
    drawn = [sample(logits, temperature, top_p, (point + 0.5) / points) for point in range(points)]
    counts = torch.bincount(torch.tensor(drawn), minlength=size) / points
    # The nucleus, computed the slow way: the fewest most probable tokens that reach top_p together.
    expected = torch.softmax(logits.double() / temperature, 0)
    ranked, order = expected.sort(descending=True)
    if top_p < 1:
        size_of_nucleus = int((ranked.cumsum(0) < top_p).sum()) + 1
        expected[order[size_of_nucleus:]] = 0
        expected /= expected.sum()
    assert (counts - expected).abs().max() <= 1.5 / points
    assert not ((expected == 0) & (counts > 0)).any()


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=40),
    temperature=st.floats(0.01, 2),
    top_p=st.floats(0.01, 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_sampling_always_gives_a_possible_token(
    logits: list[float], temperature: float, top_p: float, uniform: float
) -> None:
    token = sample(torch.tensor(logits), temperature, top_p, uniform)
    assert torch.softmax(torch.tensor(logits) / temperature, 0)[token] > 0


def _decode(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


TOKENIZER = tiny_tokenizer()


@given(text=st.text(alphabet=st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=30))
def test_characters_come_out_whole(text: str) -> None:
    detokenizer = Detokenizer(_decode)
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces = [detokenizer.push(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_pieces_add_up_to_the_decoding_of_all_tokens(tokens: list[int]) -> None:
    detokenizer = Detokenizer(_decode)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()
    assert text == _decode(tokens)


@given(
    text=st.text(alphabet="ab\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_nothing_from_the_first_stop_string_on_gets_out(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    filtered = StopFilter(stops)
    out = [filtered.push(text[start:end]) for start, end in pairwise(places)]
    # The first stop string to be complete ends the text, even where a longer one began before it.
    ends = next(
        (found for end in places if (found := [text[:end].index(stop) for stop in stops if stop in text[:end]])), []
    )
    assert filtered.stopped == bool(ends)
    assert not ends or text[min(ends) :].startswith(filtered.by)
    seen = ""
    for piece in out:  # at every moment, not only at the end
        seen += piece
        assert not any(stop in seen for stop in stops)
    assert seen + filtered.flush() == text[: min(ends, default=len(text))]
