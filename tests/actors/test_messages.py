"""Requests have one fingerprint wherever they are hashed, and differ where they differ."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from actors.messages import (
    ChatRequest,
    ImagePart,
    Message,
    ResponseFormat,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolSpec,
    Usage,
)

REQUEST = ChatRequest(
    (Message("system", "s"), Message("user", (TextPart("look"), ImagePart("data:image/png;base64,AA==")))),
    tools=(ToolSpec("f", "does", {"type": "object", "b": 1, "a": [1, None, 2.5]}),),
    extra={"top_k": 5, "nested": {"x": True}},
)

CHANGES: list[dict[str, Any]] = [
    {"messages": (Message("user", "other"),)},
    {"messages": (Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),)),)},
    {"tools": ()},
    {"tool_choice": ToolChoice("none")},
    {"parallel_tool_calls": False},
    {"max_tokens": 1},
    {"temperature": 0.0},
    {"top_p": 0.5},
    {"stop": ("x",)},
    {"seed": 0},
    {"response_format": ResponseFormat("json_object")},
    {"reasoning_effort": "low"},
    {"extra": {"top_k": 6, "nested": {"x": True}}},
    {"sample_index": 1},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_every_field_is_in_the_fingerprint(changes: dict[str, Any]) -> None:
    assert REQUEST.with_(**changes).fingerprint() != REQUEST.fingerprint()


def test_every_field_was_tried() -> None:
    without = {"max_attempts", "asides"}
    assert {name for changes in CHANGES for name in changes} == set(ChatRequest.__dataclass_fields__) - without


def test_what_no_worker_is_told_does_not_change_its_answer() -> None:
    assert REQUEST.with_(max_attempts=1, asides=(1,)).fingerprint() == REQUEST.fingerprint()


def test_the_same_request_has_the_same_fingerprint_in_another_process() -> None:
    reordered = REQUEST.with_(extra={"nested": {"x": True}, "top_k": 5})
    assert reordered.fingerprint() == REQUEST.fingerprint()
    program = "import sys, pickle; print(pickle.loads(sys.stdin.buffer.read()).fingerprint())"
    there = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(REQUEST), capture_output=True, check=True, timeout=60
    )
    assert there.stdout.decode().strip() == REQUEST.fingerprint()


def test_message_text_leaves_images_out() -> None:
    message = REQUEST.messages[1]
    assert message.text == "look"
    assert [image.url for image in message.images] == ["data:image/png;base64,AA=="]
    assert Message("user", "plain").images == ()


def test_usage_adds_up() -> None:
    total = Usage(1, 2, 3, 4) + Usage(10, 20, 30, 40)
    assert total == Usage(11, 22, 33, 44)
    assert total.total_tokens == 33
