"""Machines on this machine, for programs that do with `fugu` what a user does with a cluster.

Each is a set of namespaces (processes, mounts and a network of its own) with an sshd; a user's own machine stands
beside them. Nothing outside the namespaces is touched: `ray stop`, which `ray up` and `ray down` run on the machines,
would end every Ray of this one.

Needs root on Linux: apt-get install openssh-server openssh-client rsync iproute2 util-linux
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "openssh-server openssh-client rsync iproute2 util-linux"
TOOLS = ("unshare", "ip", "sshd", "ssh", "ssh-keygen", "rsync", "mount")
LAPTOP, HEAD, WORKER = "10.88.0.1", "10.88.0.2", "10.88.0.3"
PORT = 8000
KEY = "local-cluster-key-93d1"
HOME = "/tmp/home"
# Where the pieces lie that all machines share, as a cluster's shared storage; and the user's copy of the code.
SHARED = Path("/mnt/fugu-machines")
CODE = SHARED / "code"
_BEGAN = time.monotonic()


def why_not() -> str | None:
    """Why there can be no machines here; None: there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make namespaces"
    if any(Path(place).resolve().is_relative_to("/tmp") for place in (ROOT, sys.prefix, sys.base_prefix)):
        return "the checkout or its Python lies in /tmp, of which each machine has its own"
    missing = [name for name in TOOLS if which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install {PACKAGES})"
    try:
        SHARED.mkdir(exist_ok=True)
    except OSError as error:
        return f"{SHARED} cannot be made: {error.strerror}"
    attempt = f"ip link add br0 type bridge; mount --bind /tmp {SHARED}; mount -t tmpfs tmpfs /tmp"
    command = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "sh", "-ec", attempt]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if made.returncode == 0 else f"namespaces are not allowed here: {made.stderr.strip()}"


def run_inside(module: str, *arguments: str) -> int:
    """Run `python -m module inside ARGUMENTS…` in namespaces of its own, which end with everything in them; its exit
    code. There, `enter` comes first."""
    reason = why_not()
    if reason is not None:
        sys.exit(f"cannot run here: {reason}")
    with tempfile.TemporaryDirectory(prefix="fugu-machines-") as folder:
        command = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", sys.executable, "-m", module]
        environment = os.environ | {"FUGU_MACHINES": folder}
        code = subprocess.run([*command, "inside", *arguments], cwd=ROOT, env=environment, check=False).returncode
    if not any(SHARED.iterdir()):
        SHARED.rmdir()
    return code


def enter() -> None:
    """Become the user's own machine: a home, a /tmp and a network of its own, and a copy of the code."""
    _sh(f"mount --bind {os.environ['FUGU_MACHINES']} {SHARED}")
    home = SHARED / "laptop"
    home.mkdir()
    # Ray's launcher keeps files there that name a cluster.
    _sh("mount -t tmpfs tmpfs /tmp")
    os.environ |= {
        "HOME": str(home),
        "COLUMNS": "200",
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/sbin:{os.environ['PATH']}",
    }
    for name in [name for name in os.environ if name.startswith(("RAY_", "FUGU_"))]:
        del os.environ[name]
    _sh("ip link set lo up && ip link add br0 type bridge && ip link set br0 up")
    _sh(f"ip addr add {LAPTOP}/24 dev br0 && ip route add default dev br0")
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    _sh("mount -t tmpfs tmpfs /run/netns")
    for name in ("host", "user"):
        _sh(f"ssh-keygen -q -t ed25519 -N '' -f {SHARED}/{name}")
    shutil.copy(SHARED / "user.pub", SHARED / "authorized")
    CODE.mkdir()
    for item in [*_cluster()["file_mounts"].values(), "cluster.yaml"]:
        source, unwanted = ROOT / item, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, CODE / item, ignore=unwanted)
        elif source.is_file():
            shutil.copy(source, CODE / item)


def machine(address: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A machine with an sshd; the home of its user and /tmp are its own. `environment` is its /etc/fugu/env."""
    name = f"machine{address.rpartition('.')[2]}"
    inner = f"ip netns exec {name}"
    _sh(f"ip netns add {name} && ip link add v{name} type veth peer name eth0 netns {name}")
    _sh(f"ip link set v{name} master br0 up && {inner} ip link set lo up && {inner} ip link set eth0 up")
    _sh(f"{inner} ip addr add {address}/24 dev eth0 && {inner} ip route add default via {LAPTOP}")
    given = {"FUGU_STATE": f"{SHARED}/state", "POOL_KEY": KEY, **environment}
    (SHARED / f"{name}.env").write_text("".join(f"{key}={value}\n" for key, value in given.items()))
    config = SHARED / f"{name}.sshd"
    lines = [f"ListenAddress {address}", f"HostKey {SHARED}/host", f"AuthorizedKeysFile {SHARED}/authorized"]
    lines += ["PermitRootLogin yes", "StrictModes no", "UsePAM no", "PidFile none", "PasswordAuthentication no"]
    lines += ["MaxStartups 50", f"SetEnv FUGU_ENV={SHARED}/{name}.env"]
    config.write_text("\n".join(lines) + "\n")
    start = SHARED / f"{name}.sh"
    start.write_text(
        f"set -e\nmount -t tmpfs tmpfs /tmp\nmkdir -p {HOME} /run/sshd\nexport HOME={HOME}\ntouch {HOME}/.bashrc\n"
        f"sed 's|^root:\\(.*\\):[^:]*:\\([^:]*\\)$|root:\\1:{HOME}:/bin/bash|' /etc/passwd > /tmp/passwd\n"
        f"mount --bind /tmp/passwd /etc/passwd\n'{sys.executable}' -m tests.cluster.machines {HOME}/venv\n"
        f"exec {which('sshd')} -D -e -f {config}\n"
    )
    command = ["ip", "netns", "exec", name, "unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child"]
    log = (SHARED / f"{name}.log").open("wb")
    process = subprocess.Popen([*command, "sh", str(start)], cwd=ROOT, stdout=log, stderr=log)
    until(f"{name} takes ssh", lambda: ssh(address, "true").returncode == 0, 60)
    return process


def make_venv(folder: Path) -> None:
    """A machine's image: an environment with what this one has, and no pip, so that nothing can be installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "all.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for name, module in (("ray", "ray.scripts.scripts"), ("serve", "ray.serve.scripts"), ("fugu", "fugu")):
        main = "cli" if name == "serve" else "main"
        script = folder / "bin" / name
        script.write_text(f"#!{folder}/bin/python\nimport sys\nfrom {module} import {main}\nsys.exit({main}())\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    wanted = (CODE / "pyproject.toml").read_bytes() + (CODE / "constraints.txt").read_bytes()
    (folder / ".fugu").write_bytes(subprocess.run(["cksum"], input=wanted, capture_output=True, check=True).stdout)


def cluster_file() -> Path:
    """cluster/onprem.yaml for the machines `HEAD` and `WORKER`."""
    import yaml

    raw = _cluster()
    raw["provider"] |= {"head_ip": HEAD, "worker_ips": [WORKER]}
    raw["auth"] = {"ssh_user": "root", "ssh_private_key": str(SHARED / "user")}
    # Small machines: the rest of the memory is somebody else's.
    for kind in ("head", "worker"):
        (command,) = raw[f"{kind}_start_ray_commands"]
        cpus = "" if kind == "head" else " --num-cpus=2"
        raw[f"{kind}_start_ray_commands"] = [f"{command} --object-store-memory=150000000{cpus}"]
    path = SHARED / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def pool_file(**worker: Any) -> Path:
    """Two workers that answer from recorded outcomes, so that no network is needed, and a tiny backbone."""
    import yaml

    from tests.orchestrator.tiny import tiny_folder
    from training.outcomes import Outcome, Outcomes, Task, write_outcomes

    tiny_folder(SHARED / "tiny")
    tasks, outcomes = [], []
    for number in range(40):
        prompt, split = f"question {number}", ("train", "val")[number % 2]
        tasks.append(Task(f"t{number}", prompt, "x", "d", "s", split, "exact"))
        for index, name in enumerate(("even", "odd")):
            right = number // 2 % 2 == index
            answer = "x" if right else "y"
            outcomes.append(Outcome(f"t{number}", name, float(right), (float(right),), answers=(answer,)))
    write_outcomes(SHARED / "outcomes", Outcomes(tuple(tasks), tuple(outcomes)))
    workers = [
        {"name": name, "provider": "replay", "model": name, "outcomes": str(SHARED / "outcomes"), **worker}
        for name in ("even", "odd")
    ]
    config: dict[str, Any] = {
        "workers": workers,
        "router": {"backbone": str(SHARED / "tiny"), "max_tokens": 128},
        "serve": {"api_keys": ["${POOL_KEY}"], "port": PORT},
    }
    path = SHARED / "pool.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def checkpoint_file() -> Path:
    """A head for the workers of `pool_file`, which comes first."""
    import torch

    from actors.model_files import resolve_model
    from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
    from tests.orchestrator.tiny import DIMENSION

    files = resolve_model(str(SHARED / "tiny"))
    info = CheckpointInfo(workers=("even", "odd"), backbone=files.id, revision=files.revision)
    weight = torch.randn(info.rows, DIMENSION, generator=torch.Generator().manual_seed(1))
    path = SHARED / "router.safetensors"
    save_checkpoint(path, Checkpoint(info=info, weight=weight))
    return path


def ask(address: str, prompt: str, key: str = KEY) -> tuple[int, dict[str, Any]]:
    """Status and body; status 0 where nothing answers, or not as JSON."""
    import httpx

    body = {"model": "fugu", "messages": [{"role": "user", "content": prompt}], "fugu": {"trace": True}}
    url = f"http://{address}:{PORT}/v1/chat/completions"
    try:
        reply = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False)
        return reply.status_code, reply.json()
    except (httpx.HTTPError, ValueError) as error:
        return 0, {"error": type(error).__name__}


class Asking:
    """Requests to a machine one after the other, from a thread, and how they ended: by status, 0 for no connection."""

    def __init__(self, address: str, key: str = KEY) -> None:
        self.ended: dict[int, int] = {}
        self._address = address
        self._key = key
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    @property
    def answered(self) -> int:
        return self.ended.get(200, 0)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        number = 0
        while not self._over.wait(0.1):
            code, _ = ask(self._address, f"question {number % 40}", self._key)
            self.ended[code] = self.ended.get(code, 0) + 1
            number += 1


def fugu(*arguments: str, quiet: bool = False) -> str:
    """Run a command as the user; what it printed, where `quiet` (it is shown otherwise)."""
    command = [sys.executable, str(CODE / "fugu.py"), *arguments]
    out = subprocess.PIPE if quiet else None
    done = subprocess.run(
        command, cwd=SHARED, timeout=600, check=False, stdout=out, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"fugu {' '.join(arguments[:2])} ended with {done.returncode}\n{done.stdout or ''}"
    return done.stdout or ""


def status(cluster: Path) -> str:
    """What `fugu status` prints."""
    return fugu("status", "--cluster", str(cluster), quiet=True)


def processes(address: str) -> list[str]:
    """The processes of Ray on a machine."""
    found = ssh(address, "ps -eo args").stdout.splitlines()
    return [line for line in found if any(word in line for word in ("raylet", "gcs_server", "ray::", "haproxy"))]


def ssh(address: str, command: str) -> subprocess.CompletedProcess[str]:
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=3"]
    started = ["ssh", "-q", "-i", str(SHARED / "user"), *options, f"root@{address}", command]
    return subprocess.run(started, capture_output=True, text=True, timeout=60, check=False)


def until(what: str, condition: Callable[[], bool], seconds: float, tell: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{tell()}"
        time.sleep(0.5)


def step(text: str) -> None:
    print(f"== {text} ({time.monotonic() - _BEGAN:.0f} s)", flush=True)


def which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")


def _cluster() -> dict[str, Any]:
    import yaml

    raw: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text())
    return raw


def _sh(command: str) -> None:
    subprocess.run(["sh", "-ec", command], check=True)


if __name__ == "__main__":
    make_venv(Path(sys.argv[1]))
