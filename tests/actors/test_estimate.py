"""The estimate leans upward and counts everything that costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.estimate import DEFAULT_OUTPUT_TOKENS, estimate_tokens, text_tokens
from actors.messages import ChatRequest, ImagePart, Message, ResponseFormat, TextPart, ToolCall, ToolSpec

PROSE = "The committee met on a rainy Tuesday to consider whether the old bridge should be repaired or replaced. "


def test_leans_upward_on_prose_code_and_chinese() -> None:
    assert text_tokens(PROSE * 10) > 220  # about 20 tokens a sentence with current tokenizers
    assert text_tokens("for i in range(10):\n    print(i ** 2)\n") >= 13
    assert text_tokens("今天天气很好，我们去公园散步吧") >= 15


def test_counts_messages_tools_images_and_the_answer() -> None:
    plain = ChatRequest((Message("user", "hi"),), max_tokens=10)
    base = estimate_tokens(plain)
    assert base.output == 10
    assert base.total == base.input + 10
    tool = ToolSpec("find", "finds things", {"type": "object", "properties": {"what": {"type": "string"}}})
    assert estimate_tokens(plain.with_(tools=(tool,))).input > base.input + 20
    schema = ResponseFormat("json_schema", schema={"type": "object", "properties": {"a": {"type": "integer"}}})
    assert estimate_tokens(plain.with_(response_format=schema)).input > base.input + 10
    call = Message("assistant", "", tool_calls=(ToolCall("1", "find", '{"what": "' + "x" * 300 + '"}'),))
    assert estimate_tokens(plain.with_(messages=(*plain.messages, call))).input > base.input + 100
    image = Message("user", (TextPart("hi"), ImagePart("data:image/png;base64," + "A" * 100_000)))
    assert base.input + 1000 < estimate_tokens(plain.with_(messages=(image,))).input < base.input + 2000


def test_an_answer_of_unknown_length_is_made_to_fit_the_limit() -> None:
    request = ChatRequest((Message("user", "x" * 300),))
    assert estimate_tokens(request).output == DEFAULT_OUTPUT_TOKENS
    fitted = estimate_tokens(request, limit=500)
    assert fitted.total == 500
    assert estimate_tokens(request, limit=50).total > 50  # the question alone does not fit: that must show
    assert estimate_tokens(request.with_(max_tokens=4000), limit=500).output == 4000


@given(st.text(), st.text())
def test_more_text_is_never_fewer_tokens(one: str, other: str) -> None:
    assert text_tokens(one + other) >= max(text_tokens(one), text_tokens(other))
