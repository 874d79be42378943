"""Programs that do what they must not, in both ways of shutting in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from actors.errors import GradingError
from training import jail
from training.sandbox import Bounds, Mode, Ran, Started, isolation, run

MODES: tuple[Mode, ...] = ("namespaces", "landlock")
QUICK = Bounds(wall_s=2.0, cpu_s=2)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    chosen: Mode = request.param
    try:
        run((sys.executable, "-I", "-c", ""), mode=chosen)
    except GradingError as error:
        pytest.skip(f"this machine has no {chosen}: {error.message}")
    return chosen


def python(code: str, mode: Mode, bounds: Bounds = QUICK, stdin: bytes = b"", **files: str) -> Ran:
    return run((sys.executable, "-I", "-c", code), mode=mode, bounds=bounds, stdin=stdin, files=files)


def alive(word: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if word in " ".join(process.info["cmdline"] or [])]


def test_this_machine_can_shut_programs_in() -> None:
    assert isolation() in MODES


def test_a_program_gets_its_input_files_and_output(mode: Mode) -> None:
    code = "import sys; print(open('data.txt').read(), sys.stdin.read()); print('e', file=sys.stderr); sys.exit(3)"
    big = b"x" * 300_000
    ran = run((sys.executable, "-I", "-c", code), mode=mode, files={"data.txt": "héllo"}, stdin=big)
    assert (ran.status, ran.end, ran.stderr) == (3, "exited", b"e\n")
    assert ran.stdout == "héllo ".encode() + big + b"\n"


def test_no_network(mode: Mode) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16):
    try:
        socket.socket(family, socket.SOCK_STREAM if family != 16 else socket.SOCK_RAW)
        print("made", family)
    except OSError as error:
        print(type(error).__name__)
try:
    socket.create_connection(("127.0.0.1", {port}), 1)
    print("connected")
except OSError:
    print("refused")
"""
        ran = python(code, mode)
    assert ran.stdout.split() == [b"PermissionError"] * 4 + [b"refused"], ran


def test_nothing_outside_is_read_or_written(mode: Mode, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    os.chmod(tmp_path, 0o777)
    os.chmod(secret, 0o666)
    code = f"""
import os
for path in ({str(secret)!r}, "/etc/passwd", "/root/.bashrc", "/proc/{os.getpid()}/environ", "/var/log"):
    try:
        open(path).read() if not os.path.isdir(path) else os.listdir(path)
        print("read", path)
    except OSError:
        pass
for path in ({str(secret)!r}, {str(tmp_path / "new")!r}, "/usr/x", "/etc/x", "/var/tmp/x", "/dev/shm/x", "/x"):
    try:
        open(path, "w").write("!")
        print("wrote", path)
    except OSError:
        pass
open("mine", "w").write("x")
print(sorted(os.environ), os.getcwd() == os.environ["HOME"])
"""
    ran = python(code, mode)
    assert ran.stdout.decode().startswith("['HOME', 'LANG', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH',"), ran
    assert ran.stdout.decode().endswith("True\n")
    assert secret.read_text() == "s3cret"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_no_rights(mode: Mode) -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.unshare(0x10000000), libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), libc.ptrace(0, 0, 0, 0))
for action in (lambda: os.setuid(0), lambda: os.kill(1, 9), lambda: os.chroot("/")):
    try:
        action()
        print("done", os.getuid())
    except OSError:
        print("no")
"""
    said = python(code, mode).stdout.decode().split("\n")
    assert said[0] == "-1 -1 -1"
    # In its own process namespace, a signal to the first process is sent and has no effect.
    assert said[1] == "no" or os.getuid() != 0
    assert said[3] == "no"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("while True: pass", ("cpu", "wall")),
        ("import time; time.sleep(60)", ("wall",)),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", ("wall", "cpu", "processes")),
        ("while True: print('x' * 100000)", ("output",)),
        (
            "import os, time\nfor _ in range(8):\n  if not os.fork():\n    x = bytearray(b'x') * (250 << 20)\n"
            "    time.sleep(60)\ntime.sleep(60)",
            ("memory",),
        ),
    ],
    ids=["loop", "sleep", "fork bomb", "output", "memory of many"],
)
def test_bounds(mode: Mode, code: str, end: tuple[str, ...]) -> None:
    mark = f"# {os.urandom(8).hex()}\n"
    begin = time.monotonic()
    # Filling memory takes as long as the machine takes; nothing but the bound in question may end it.
    ran = python(mark + code, mode, replace(QUICK, wall_s=50.0) if end == ("memory",) else QUICK)
    assert ran.end in end
    assert ran.status < 0
    assert time.monotonic() - begin < (60 if end == ("memory",) else 12)
    assert len(ran.stdout) <= QUICK.output_bytes
    assert alive(mark.strip()) == []


def test_memory_and_files_of_one_process(mode: Mode) -> None:
    assert b"MemoryError" in python("bytearray(4 << 30)", mode).stderr
    assert b"File too large" in python("open('big', 'wb').write(bytes(17 << 20))", mode).stderr


def test_children_that_outlive_the_program_are_ended(mode: Mode) -> None:
    mark = os.urandom(8).hex()
    code = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(50)  # {mark}"])
    os._exit(0)
time.sleep(0.3)
print("done")
"""
    ran = python(code, mode)
    assert (ran.end, ran.status, ran.stdout) == ("exited", 0, b"done\n")
    assert ran.seconds < 5
    assert alive(mark) == []


def test_nothing_is_left_when_the_grader_itself_is_killed(mode: Mode) -> None:
    mark = os.urandom(8).hex()
    program = f"""
import sys
from training.sandbox import run
run((sys.executable, "-I", "-c", "import os, time; os.fork(); time.sleep(50)  # {mark}"), mode={mode!r})
"""
    root = Path(__file__).resolve().parents[2]
    grader = subprocess.Popen((sys.executable, "-c", program), cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    inside = [sys.executable, "-I", "-c"]
    deadline = time.monotonic() + 20
    while not any(process.info["cmdline"][:3] == inside for process in alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    grader.kill()
    grader.wait()
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(mark) == []


def test_threads_may_run_programs_at_the_same_time(mode: Mode) -> None:
    said: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: said.append(python(f"print({n})", mode).stdout)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == [b"%d\n" % n for n in range(6)]


def test_leaving_the_context_ends_the_program(mode: Mode) -> None:
    mark = os.urandom(8).hex()
    argv = (sys.executable, "-I", "-c", f"import time; print(1, flush=True); time.sleep(50)  # {mark}")
    with Started(argv, bounds=Bounds(wall_s=None), mode=mode) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline() == b"1\n"
    assert alive(mark) == []


def test_where_nothing_can_shut_in_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.sandbox._JAIL", Path(__file__).with_name("no_jail.py"))
    with pytest.raises(GradingError, match="the sandbox failed"):
        run((sys.executable, "-c", "print(1)"), mode="landlock")
    with pytest.raises(GradingError, match="no way to run untrusted programs"):
        isolation.__wrapped__()


def test_the_filter_knows_every_machine_alike() -> None:
    assert len({len(calls) for _, calls in jail.FORBIDDEN.values()}) == 1
