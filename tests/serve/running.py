"""`fugu serve` as a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from serve.environment import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


class RunningServer:
    """Starts on entering, within `patience` seconds, stops on leaving (SIGTERM, then force). `config` goes to `folder`,
    with a free port."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *options: str,
        environ: dict[str, str] | None = None,
        patience: float = START_SECONDS,
    ):
        self.folder = folder
        self._patience = patience
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "output.txt"
        self._options = options
        serve = {**config.get("serve", {}), "port": self.port}
        # JSON is YAML.
        self.config = folder / "fugu.yaml"
        self.config.write_text(json.dumps({**config, "serve": serve}))
        self._environ = {**os.environ, "FUGU_STATE": str(folder / "state"), **(environ or {})}
        # What the test session sets for its own Ray is not for this one.
        for name in [name for name in self._environ if name.startswith("RAY_")]:
            del self._environ[name]

    def __enter__(self) -> RunningServer:
        command = [sys.executable, str(REPOSITORY / "fugu.py"), "serve", "--config", str(self.config), *self._options]
        with self.output.open("wb") as output:
            self.process = psutil.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=self._environ, cwd=REPOSITORY
            )
        deadline = time.monotonic() + self._patience
        while "Ctrl-C stops it" not in self.text:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"fugu serve did not start:\n{self.text}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        tree = self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([self.process, *tree], timeout=30)
        for process in alive:
            process.kill()

    @property
    def text(self) -> str:
        """All that it wrote to its standard output and error."""
        return self.output.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """Every process that it started, at any depth."""
        try:
            return list(self.process.children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def find(self, title: str) -> list[psutil.Process]:
        """Its processes whose command line begins so (Ray names its workers `ray::…`)."""
        found = []
        for process in self.tree():
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def session_folder(self) -> Path:
        """Where its Ray keeps its logs."""
        for process in self.tree():
            for argument in process.cmdline():
                if argument.startswith(("--log_dir=", "--log-dir=")):
                    return Path(argument.partition("=")[2]).parent
        raise AssertionError("its Ray has no log folder")


def wait_until(condition: Any, timeout: float = 10.0) -> float:
    """Seconds until `condition()` is true; fails after `timeout`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, "did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began
