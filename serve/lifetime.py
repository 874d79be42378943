"""A server's life as a command: progress while it starts, signals, and an end that leaves no process behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.markup import escape

from actors.config import FuguConfig
from actors.errors import FuguError
from serve import environment

if TYPE_CHECKING:
    from actors.pool import WorkerPool
    from serve.app import Server

READY_SECONDS = 600.0
STOP_SECONDS = 20.0
# What ray.shutdown may take after the processes that it talks to have ended.
LAST_SECONDS = 3.0
# A signal sent to the process and to its group arrives twice; that is one wish.
TWICE_SECONDS = 0.5


def run(
    config: FuguConfig,
    *,
    address: str | None,
    dashboard: bool,
    timeout: float,
    console: Console,
    errors: Console,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code. A second signal kills at once what was started."""
    with _Signals() as signals:
        try:
            with running(
                config, console=errors, address=address, dashboard=dashboard, timeout=timeout, made=signals.made
            ) as server:
                console.print(f"\n[bold green]fugu is ready[/] at [bold]{server.url}/v1[/]", soft_wrap=True)
                console.print(_curl(server.url, bool(config.serve.api_keys)), markup=False, soft_wrap=True)
                console.print("[dim]Ctrl-C stops it.[/]")
                signals.wait()
                errors.print("[dim]stopping: running requests may finish (Ctrl-C again to force)[/]")
            if not server.stopped:
                # Ray's own exit hook would wait for processes that are gone.
                console.file.flush()
                os._exit(0)
        except FuguError as error:
            errors.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


@contextmanager
def running(
    config: FuguConfig,
    *,
    console: Console,
    address: str | None = None,
    dashboard: bool = False,
    timeout: float = READY_SECONDS,
    made: list[Path] | None = None,
) -> Iterator[Server]:
    """A server that is ready, stopped at the end whatever happens. Folders it makes are added to `made`, for a caller
    that may end without leaving this context.

    Raises:
        FuguError: it cannot start; says which part and why.
        KeyboardInterrupt: a signal came while it started.
    """
    folder = Path(tempfile.mkdtemp(prefix="fugu-"))
    if made is not None:
        made.append(folder)
    started = time.monotonic()
    server: Server | None = None
    served = False
    try:
        with _ending_processes():
            try:
                if not environment.prepare(config.serve, folder) and config.serve.ha_proxy:
                    console.print("[yellow]HAProxy is not installed here; Ray Serve's own proxy is used (slower).[/]")
                from serve.app import Server

                with _progress(console) as tell:
                    server = Server.start(config, address=address, dashboard=dashboard, progress=tell)
                    server.wait_ready(timeout, tell)
                console.print(f"[dim]ready after {time.monotonic() - started:.0f} s[/]")
                served = True
                yield server
            finally:
                if server is not None:
                    lost = _ray_died if server.owns_ray else None
                    stop = partial(server.stop, drain=served)
                    server.stopped = _bounded(stop, config.serve.drain + STOP_SECONDS, lost)
    finally:
        # Only now: while they live, Serve and HAProxy would write it anew.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def pool_of(config: FuguConfig, *, console: Console) -> Iterator[WorkerPool]:
    """The provider actors of a configuration in a Ray of their own, without a gateway."""
    environment.prepare(config.serve.model_copy(update={"ha_proxy": False}), Path())
    import ray

    from actors.pool import WorkerPool
    from serve.app import NAMESPACE, init_ray

    with _ending_processes():
        try:
            with _progress(console) as tell:
                tell("starting Ray")
                init_ray(dashboard=False)
                tell("starting the workers")
                pool = WorkerPool.connect(config, namespace=NAMESPACE)
            yield pool
        finally:
            if ray.is_initialized():
                ray.shutdown()


def on_a_free_port(config: FuguConfig) -> FuguConfig:
    changes = {"host": "127.0.0.1", "port": environment.free_ports(1)[0]}
    return config.model_copy(update={"serve": config.serve.model_copy(update=changes)})


def first_key(config: FuguConfig) -> str | None:
    return config.serve.api_keys[0].get_secret_value() if config.serve.api_keys else None


class _Signals:
    """SIGINT and SIGTERM: the first asks for an orderly end, a later one kills every process started from here
    and removes the folders in `made`."""

    def __init__(self) -> None:
        self.made: list[Path] = []
        self._asked = threading.Event()
        self._first = 0.0
        self._waiting = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Until a signal asks for the end."""
        self._waiting = True
        while not self._asked.wait(0.5):
            pass

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked.is_set() and now - self._first < TWICE_SECONDS:
            return
        if self._asked.is_set():
            # At once: without its raylet, Ray may end this process too at any moment.
            _kill(psutil.Process().children(recursive=True))
            for folder in self.made:
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(128 + number)
        self._asked.set()
        self._first = now
        if not self._waiting:
            raise KeyboardInterrupt


@contextmanager
def _ending_processes() -> Iterator[None]:
    """Whatever was started inside and is still there at the end is killed: Ray's processes and HAProxy."""
    before = set(psutil.Process().children(recursive=True))
    seen: set[psutil.Process] = set()

    def look() -> None:
        seen.update(set(psutil.Process().children(recursive=True)) - before)

    # Processes of Ray may lose their parent before they end; then they are found only if they were seen earlier.
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(1.0):
            look()

    watcher = threading.Thread(target=watch, name="process-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        look()
        stopped.set()
        _, alive = psutil.wait_procs(seen, timeout=3.0)
        _kill(alive)
        psutil.wait_procs(alive, timeout=3.0)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _bounded(action: Callable[[], None], seconds: float, lost: Callable[[], bool] | None) -> bool:
    """Run it in a thread, so that a step that hangs cannot hang the end, and signals are still heard. Where `lost`
    says that there is nothing left to talk to, it gets a moment more. Returns whether it came to its end."""
    thread = threading.Thread(target=action, name="stop", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.2)
        if lost is not None and lost():
            lost = None
            deadline = min(deadline, time.monotonic() + LAST_SECONDS)
    return not thread.is_alive()


def _ray_died() -> bool:
    """Whether our Ray lost one of its two vital processes: a supervisor may signal all of a service at once."""
    vital = {"gcs_server", "raylet"}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                vital.discard(process.name())
    return bool(vital)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Tells the current step: a spinner on a terminal, a line per step elsewhere."""
    last = ""
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda text: status.update(escape(text))
        return

    def tell(text: str) -> None:
        nonlocal last
        if text != last:
            last = text
            console.print(escape(text), soft_wrap=True)

    yield tell


def _curl(url: str, key: bool) -> str:
    body = {"model": "fugu", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    lines = [f"curl {url}/v1/chat/completions", "  -H 'Content-Type: application/json'"]
    if key:
        lines.append('  -H "Authorization: Bearer $FUGU_API_KEY"')
    lines.append(f"  -d {shlex.quote(json.dumps(body))}")
    return " \\\n".join(lines)
