"""Running a program that nobody vouches for: code that a worker wrote, and verifiers that evaluate what it wrote.

The program gets no network, no environment, no files but an interpreter and its own folder (in memory where possible,
gone afterwards), no rights, and bounds for time, memory, processes, file size and output. When it ends or has to, all
that it started ends with it. `training.jail` does the work in a process of its own; what cannot be shut in is not run.

What it is not: a defence against faults of the kernel, or against a program that watches how long it takes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from actors.errors import GradingError

Mode = Literal["namespaces", "landlock"]
End = Literal["exited", "wall", "cpu", "memory", "processes", "output"]

_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# User numbers that nobody has; one of its own for each run makes the limit on processes count only the run's.
_FIRST_UID, _UIDS = 0x30000000, 0x08000000
# What the supervisor gets beyond the program's wall-clock time to end everything.
_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds and bytes. `memory_bytes` bounds each process's address space and what all of them hold together;
    `room_bytes` all files together where they are in memory. None: not bounded."""

    wall_s: float | None = 10.0
    cpu_s: int | None = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    room_bytes: int = 64 << 20
    processes: int = 32
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended. `status` is its exit code, or minus the signal that ended it; `end` says which bound was
    reached, `exited` if none."""

    status: int
    end: End
    stdout: bytes
    stderr: bytes
    seconds: float


def run(
    argv: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    bounds: Bounds | None = None,
    readable: Sequence[str] = (),
    mode: Mode | None = None,
) -> Ran:
    """Run a program (`argv[0]` an absolute path) in a folder that holds `files`, and wait for its end.

    Safe from several threads at once. `readable` adds paths that it may read.

    Raises:
        GradingError: this machine offers no way to shut a program in, or the sandbox itself failed.
    """
    bounds = bounds or Bounds()
    with Started(argv, files=files, bounds=bounds, readable=readable, mode=mode) as started:
        return started.finish(stdin)


@functools.cache
def isolation() -> Mode:
    """How programs are shut in here: tried once per process.

    Raises:
        GradingError: in no way; says what the machine lacks.
    """
    reasons = []
    tries: tuple[Mode, ...] = ("namespaces", "landlock")
    for mode in tries:
        try:
            with Started((sys.executable, "-I", "-c", "print(1)"), bounds=Bounds(), mode=mode) as started:
                ran = started.finish(b"")
        except GradingError as error:
            reasons.append(f"{mode}: {error.message}")
            continue
        if ran.stdout == b"1\n":
            return mode
        reasons.append(f"{mode}: {ran.stderr.decode(errors='replace')[-300:]}")
    raise GradingError(
        "this machine offers no way to run untrusted programs. Linux with user namespaces, or Linux 5.13 or later with "
        f"Landlock, is needed ({'; '.join(reasons)})"
    )


class Started:
    """A program that runs shut in, with pipes to it. Leaving the context ends it and all that it started."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        files: Mapping[str, str] | None = None,
        bounds: Bounds,
        readable: Sequence[str] = (),
        mode: Mode | None = None,
    ) -> None:
        mode = mode or isolation()
        self._bounds = bounds
        self._begin = time.monotonic()
        self._room = tempfile.mkdtemp(prefix="fugu-room-") if mode == "landlock" else None
        root = os.getuid() == 0
        own_ids = root or mode == "namespaces"
        spec: dict[str, Any] = {
            **asdict(bounds),
            "argv": list(argv),
            "files": dict(files or {}),
            "readable": _readable(readable),
            "environment": _ENVIRONMENT,
            "mode": mode,
            "room": self._room,
            "parent": os.getpid(),
            "uid": _FIRST_UID + secrets.randbelow(_UIDS) if root else None,
            # Without a user or user namespace of its own the limit counts all that this user runs.
            "process_limit": bounds.processes if own_ids else bounds.processes + _threads_of_user(),
        }
        spec_fd = os.memfd_create("spec")
        os.write(spec_fd, json.dumps(spec).encode())
        os.lseek(spec_fd, 0, os.SEEK_SET)
        self._report, report_fd = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(_JAIL), str(spec_fd), str(report_fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(spec_fd, report_fd),
                start_new_session=True,
                env={},
                cwd="/",
            )
        except OSError as error:
            self._clean()
            raise GradingError(f"cannot start the sandbox: {error.strerror}") from error
        finally:
            os.close(spec_fd)
            os.close(report_fd)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # input that nobody will read any more
                pipe.close()
        self._clean()

    def kill(self) -> None:
        """End it, and everything that it started."""
        if self.process.poll() is not None:
            return
        self.process.terminate()  # the supervisor ends what is inside, then itself
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def finish(self, stdin: bytes) -> Ran:
        """Give it all its input, take all its output, and wait for its end within the bounds."""
        output, too_much = self._exchange(stdin)
        seconds = time.monotonic() - self._begin
        if too_much:
            self.kill()
            return Ran(-signal.SIGKILL, "output", output[0], output[1], seconds)
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise GradingError("the sandbox did not end its program in time") from None
        said = os.read(self._report, 1 << 16)
        if not said:
            raise GradingError(f"the sandbox failed: {output[1].decode(errors='replace')[-300:]}")
        report = json.loads(said)
        if report["end"] == "refused":
            raise GradingError(f"the sandbox cannot work here: {report['reason']}")
        return Ran(report["status"], report["end"], output[0], output[1], seconds)

    def _exchange(self, stdin: bytes) -> tuple[tuple[bytes, bytes], bool]:
        """Both outputs, each cut at the bound, and whether one was reached."""
        process, bound = self.process, self._bounds.output_bytes
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        wall = self._bounds.wall_s
        deadline = None if wall is None else self._begin + wall + _GRACE_SECONDS
        parts: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        left = memoryview(stdin)
        with selectors.DefaultSelector() as selector:
            for number in parts:
                selector.register(number, selectors.EVENT_READ)
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin.fileno(), selectors.EVENT_WRITE)
            while selector.get_map():
                if deadline is not None and time.monotonic() > deadline:
                    raise GradingError("the sandbox did not end its program in time")
                for key, _ in selector.select(1.0):
                    number = key.fd
                    if number in parts:
                        data = os.read(number, 1 << 16)
                        parts[number] += data
                        if len(parts[number]) > bound:
                            return self._cut(parts), True
                        if not data:
                            selector.unregister(number)
                        continue
                    try:
                        left = left[os.write(number, left) :] if left else left
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(number)
                        with contextlib.suppress(BrokenPipeError):  # it ended without reading its input
                            process.stdin.close()
        return self._cut(parts), False

    def _cut(self, parts: Mapping[int, bytearray]) -> tuple[bytes, bytes]:
        out, err = (bytes(part[: self._bounds.output_bytes]) for part in parts.values())
        return out, err

    def _clean(self) -> None:
        os.close(self._report)
        if self._room is not None:
            shutil.rmtree(self._room, ignore_errors=True)


def _readable(more: Sequence[str]) -> list[str]:
    """The system's programs and libraries, this interpreter's, and `more`; none inside another."""
    paths = [*_SYSTEM, *(os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, *more))]
    if os.path.abspath(sys.prefix) != os.path.realpath(sys.prefix):
        paths.append(os.path.abspath(sys.prefix))
    kept: list[str] = []
    for path in sorted(dict.fromkeys(paths), key=len):
        inside = any(path == other or path.startswith(other.rstrip("/") + "/") for other in kept)
        if os.path.lexists(path) and not inside:
            kept.append(path)
    return kept


def _threads_of_user() -> int:
    """How many threads this user runs: what RLIMIT_NPROC counts."""
    count, uid = 0, os.getuid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
    return count
