"""`fugu up` for real, on this machine: `python -m tests.cluster.local_up`.

Two machines are made of namespaces (processes, mounts and a network of their own), each with an sshd, and a cluster
file for `provider: local` is made of cluster/onprem.yaml. Then what a user does: `fugu up`, `fugu submit train evolve`,
`fugu deploy`, a request over the network, `fugu status`, `fugu down`. At the end no process of Ray may be left on
either machine. Nothing outside the namespaces is touched: `ray stop`, which `ray up` and `ray down` run on the
machines, would end every Ray of this one.

Needs root on Linux with unshare, ip, sshd, ssh and rsync: apt-get install openssh-server openssh-client rsync iproute2
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "openssh-server openssh-client rsync iproute2 util-linux"
TOOLS = ("unshare", "ip", "sshd", "ssh", "ssh-keygen", "rsync", "mount")
LAPTOP, HEAD, WORKER = "10.88.0.1", "10.88.0.2", "10.88.0.3"
PORT = 8000
KEY = "local-cluster-key-93d1"
JOB_SECONDS = 400.0
HOME = "/tmp/home"
# Where the pieces lie that all machines share, as a cluster's shared storage.
SHARED = Path("/mnt/fugu-local-up")


def why_not() -> str | None:
    """Why it cannot run here; None: it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make namespaces"
    missing = [name for name in TOOLS if _which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install {PACKAGES})"
    made = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if made.returncode == 0 else f"namespaces are not allowed here: {made.stderr.strip()}"


def main() -> None:
    reason = why_not()
    if reason is not None:
        sys.exit(f"cannot run here: {reason}")
    with tempfile.TemporaryDirectory(prefix="fugu-up-") as folder:
        command = [
            "unshare",
            "-n",
            "-m",
            "-p",
            "-f",
            "--mount-proc",
            "--kill-child",
            sys.executable,
            "-m",
            __spec__.name,
        ]
        code = subprocess.run([*command, "inside", folder], cwd=ROOT, check=False).returncode
        if SHARED.exists() and not any(SHARED.iterdir()):
            SHARED.rmdir()
        sys.exit(code)


def inside(folder: Path) -> None:
    """The user's own machine, in namespaces of its own; the other two are within."""
    SHARED.mkdir(exist_ok=True)
    _sh(f"mount --bind {folder} {SHARED}")
    home = SHARED / "laptop"
    home.mkdir()
    # Our own /tmp: Ray's launcher keeps files there that name a cluster.
    _sh("mount -t tmpfs tmpfs /tmp")
    os.environ |= {
        "HOME": str(home),
        "COLUMNS": "200",
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/sbin:{os.environ['PATH']}",
    }
    for name in [name for name in os.environ if name.startswith(("RAY_", "FUGU_"))]:
        del os.environ[name]
    _network()
    _keys()
    machines = [_machine("2", HEAD, '{"egress": 1000, "serve": 1000}'), _machine("3", WORKER, '{"rollout": 1000}')]
    try:
        work()
        _step("nothing of Ray is left")
        for name, address in (("2", HEAD), ("3", WORKER)):
            left = _processes(address)
            assert not left, f"machine {name} still runs {left}"
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()


def work() -> None:
    """What a user does, with `fugu` alone."""
    cluster = _cluster_file()
    pool = _pool()

    def told() -> str:
        return _status(cluster)

    _step("fugu up")
    _fugu("up", str(cluster))
    _until("both machines are in", lambda: told().count("10.88.0.") >= 2, 240, told)
    _step("fugu submit train evolve")
    out = SHARED / "router.safetensors"
    evolve = ["train", "evolve", "--config", str(pool), "--outcomes", str(SHARED / "outcomes"), "--out", str(out)]
    evolve += ["--mode", "fugu", "--generations", "2", "--population", "4", "--size", "4", "--backbone"]
    evolve += [str(SHARED / "tiny"), "--read-tokens", "128", "--quiet"]
    _fugu("submit", "--cluster", str(cluster), "--name", "evolution", *evolve)
    _until("the evolution is done", lambda: "SUCCEEDED" in _job(cluster, "evolution"), JOB_SECONDS, told)
    assert out.exists(), "the checkpoint was written to shared storage"
    _step("fugu deploy")
    _fugu(
        "deploy", str(pool), "--cluster", str(cluster), "--host", "0.0.0.0", "--checkpoint", str(out), "--wait", "300"
    )
    for address in (HEAD, WORKER):
        reply = _ask(address, "question 3")
        trace = reply["fugu"]
        print(f"  {address} answered through {trace['worker']}, decided by {trace['source']}")
        assert reply["choices"][0]["message"]["content"] in ("x", "y")
        assert trace["source"] == "head"
    status = told()
    print(status)
    assert "evolution" in status
    assert str(out) in status, "status tells which checkpoint decides"
    _step("fugu down")
    _fugu("down", str(cluster), "--yes")


def _network() -> None:
    _sh("ip link set lo up && ip link add br0 type bridge && ip link set br0 up")
    _sh(f"ip addr add {LAPTOP}/24 dev br0 && ip route add default dev br0")
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    _sh("mount -t tmpfs tmpfs /run/netns")
    for name, address in (("2", HEAD), ("3", WORKER)):
        inner = f"ip netns exec machine{name}"
        _sh(f"ip netns add machine{name} && ip link add v{name} type veth peer name eth0 netns machine{name}")
        _sh(f"ip link set v{name} master br0 up && {inner} ip link set lo up && {inner} ip link set eth0 up")
        _sh(f"{inner} ip addr add {address}/24 dev eth0 && {inner} ip route add default via {LAPTOP}")


def _keys() -> None:
    for name in ("host", "user"):
        _sh(f"ssh-keygen -q -t ed25519 -N '' -f {SHARED}/{name}")
    shutil.copy(SHARED / "user.pub", SHARED / "authorized")


def _machine(name: str, address: str, resources: str) -> subprocess.Popen[bytes]:
    """An sshd in process and mount namespaces of its own; the home of its user and /tmp are the machine's."""
    (SHARED / f"env{name}").write_text(f"FUGU_RESOURCES={resources}\nFUGU_STATE={SHARED}/state\nPOOL_KEY={KEY}\n")
    config = SHARED / f"sshd{name}"
    lines = [f"ListenAddress {address}", f"HostKey {SHARED}/host", f"AuthorizedKeysFile {SHARED}/authorized"]
    lines += ["PermitRootLogin yes", "StrictModes no", "UsePAM no", "PidFile none", "PasswordAuthentication no"]
    lines += ["MaxStartups 50", f"SetEnv FUGU_ENV={SHARED}/env{name}"]
    config.write_text("\n".join(lines) + "\n")
    start = SHARED / f"start{name}.sh"
    start.write_text(
        f"set -e\nmount -t tmpfs tmpfs /tmp\nmkdir -p {HOME} /run/sshd\nexport HOME={HOME}\n"
        f"sed 's|^root:\\(.*\\):[^:]*:\\([^:]*\\)$|root:\\1:{HOME}:/bin/bash|' /etc/passwd > /tmp/passwd\n"
        f"mount --bind /tmp/passwd /etc/passwd\n'{sys.executable}' -m {__spec__.name} venv {HOME}/venv\n"
        f"exec {_which('sshd')} -D -e -f {config}\n"
    )
    command = ["ip", "netns", "exec", f"machine{name}", "unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child"]
    log = (SHARED / f"sshd{name}.log").open("wb")
    process = subprocess.Popen([*command, "sh", str(start)], cwd=ROOT, stdout=log, stderr=log)
    _until(f"machine {name} takes ssh", lambda: _ssh(address, "true").returncode == 0, 30)
    return process


def make_venv(folder: Path) -> None:
    """The machine's image: an environment with what this one has, and no pip, so that nothing can be installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "all.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for name, module in (("ray", "ray.scripts.scripts"), ("serve", "ray.serve.scripts"), ("fugu", "fugu")):
        main = "cli" if name == "serve" else "main"
        script = folder / "bin" / name
        script.write_text(f"#!{folder}/bin/python\nimport sys\nfrom {module} import {main}\nsys.exit({main}())\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    wanted = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    (folder / ".fugu").write_bytes(subprocess.run(["cksum"], input=wanted, capture_output=True, check=True).stdout)


def _cluster_file() -> Path:
    import yaml

    raw = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text())
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


def _pool() -> Path:
    """Two workers that answer from recorded outcomes, so that no network is needed, and a tiny backbone."""
    import yaml

    from tests.orchestrator.tiny import tiny_folder
    from training.outcomes import Outcome, Outcomes, Task, write_outcomes

    tiny_folder(SHARED / "tiny")
    tasks, outcomes = [], []
    for number in range(40):
        prompt, split = f"question {number}", ("train", "val")[number % 2]
        tasks.append(Task(f"t{number}", prompt, "x", "d", "s", split, "exact"))
        for index, worker in enumerate(("even", "odd")):
            right = number // 2 % 2 == index
            answer = "x" if right else "y"
            outcomes.append(Outcome(f"t{number}", worker, float(right), (float(right),), answers=(answer,)))
    write_outcomes(SHARED / "outcomes", Outcomes(tuple(tasks), tuple(outcomes)))
    workers = [
        {"name": name, "provider": "replay", "model": name, "outcomes": str(SHARED / "outcomes")}
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


def _ask(address: str, prompt: str) -> dict[str, Any]:
    import httpx

    body = {"model": "fugu", "messages": [{"role": "user", "content": prompt}], "fugu": {"trace": True}}
    url = f"http://{address}:{PORT}/v1/chat/completions"
    reply = httpx.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def _fugu(*arguments: str) -> None:
    command = [sys.executable, str(ROOT / "fugu.py"), *arguments]
    done = subprocess.run(command, cwd=SHARED, timeout=600, check=False)
    assert done.returncode == 0, f"fugu {' '.join(arguments[:2])} ended with {done.returncode}"


def _status(cluster: Path) -> str:
    command = [sys.executable, str(ROOT / "fugu.py"), "status", "--cluster", str(cluster)]
    done = subprocess.run(command, cwd=SHARED, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def _job(cluster: Path, name: str) -> str:
    line = next((line for line in _status(cluster).splitlines() if name in line), "")
    assert "FAILED" not in line, line
    return line


def _processes(address: str) -> list[str]:
    found = _ssh(address, "ps -eo args").stdout.splitlines()
    return [line for line in found if any(word in line for word in ("raylet", "gcs_server", "ray::", "haproxy"))]


def _ssh(address: str, command: str) -> subprocess.CompletedProcess[str]:
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=3"]
    ssh = ["ssh", "-q", "-i", str(SHARED / "user"), *options, f"root@{address}", command]
    return subprocess.run(ssh, capture_output=True, text=True, timeout=30, check=False)


def _until(what: str, condition: Any, seconds: float, tell: Any = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{tell()}"
        time.sleep(0.5)


def _step(text: str) -> None:
    print(f"== {text}", flush=True)


def _sh(command: str) -> None:
    subprocess.run(["sh", "-ec", command], check=True)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")


if __name__ == "__main__":
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    if action == "inside":
        inside(Path(sys.argv[2]))
    elif action == "venv":
        make_venv(Path(sys.argv[2]))
    else:
        main()
