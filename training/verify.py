"""The program behind graders that evaluate what a worker wrote (symbolic mathematics, reasoning-gym's verifiers).

It runs inside `training.sandbox`, reads one JSON request per line and answers each with one JSON line. Every request is
worked on in a fork of its own that is killed after its time, so that one answer can neither hang nor change the grading
of the next. math-verify needs this: its own time limit is `signal.alarm`, which works in a main thread only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import time
from typing import Any

NEEDS = {"reasoning_gym": ("reasoning_gym",), "maths": ("math_verify",)}
CLOSED = ("$", "\\boxed", "\\[", "\\(", "\\begin")


def main() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    warm: set[str] = set()
    for line in requests:
        request = json.loads(line)
        try:
            if request["kind"] not in warm:
                # Here once, so that no fork pays for it.
                for name in NEEDS[request["kind"]]:
                    importlib.import_module(name)
                if request["kind"] == "maths":
                    equivalent("\\frac{1}{2}", "$0.5$")  # the parsers build their tables when first used
                gc.freeze()
                warm.add(request["kind"])
            reply = in_a_fork(request, answers)
        except ImportError as error:
            reply = {"error": f"{error}; install the extra `train`", "missing": True}
        except OSError as error:
            reply = {"error": f"cannot fork: {error}", "missing": True}
        os.write(answers, json.dumps(reply).encode() + b"\n")


def in_a_fork(request: dict[str, Any], answers: int) -> dict[str, Any]:
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answers)
        os.close(told)
        os.setsid()
        seconds = int(request["seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        try:
            reply: dict[str, Any] = {"score": score(request)}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        os.write(tell, json.dumps(reply).encode())
        os._exit(0)
    os.close(tell)
    said = b""
    deadline = time.monotonic() + request["seconds"]
    while (left := deadline - time.monotonic()) > 0 and select.select([told], [], [], left)[0]:
        data = os.read(told, 4096)
        said += data
        if not data:
            break
    late = time.monotonic() >= deadline
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    if late and not said:
        return {"error": f"took longer than {request['seconds']:g} s", "late": True}
    try:
        reply = json.loads(said)
    except json.JSONDecodeError:
        return {"error": "ended without a result"}
    return reply if isinstance(reply, dict) else {"error": "ended without a result"}


def score(request: dict[str, Any]) -> float:
    if request["kind"] == "reasoning_gym":
        import reasoning_gym

        verifier = reasoning_gym.get_score_answer_fn(request["family"])
        return float(verifier(answer=request["answer"], entry=request["entry"]))
    return float(equivalent(request["reference"], request["answer"]))


def equivalent(reference: str, answer: str) -> bool:
    """Whether two mathematical expressions, LaTeX or plain, are equal."""
    from math_verify import parse, verify

    # A bare `\\frac{1}{2}` is read as LaTeX only between dollars.
    gold = parse(reference if any(mark in reference for mark in CLOSED) else f"${reference}$")
    if not gold:
        raise ValueError("the reference is not a mathematical expression")
    answer = answer.rstrip(" .")
    found = parse(answer)
    if not found and not any(mark in answer for mark in CLOSED):
        found = parse(f"${answer}$")
    return bool(found) and bool(verify(gold, found))


if __name__ == "__main__":
    main()
