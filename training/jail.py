"""The program that `training.sandbox` starts: shuts a command in, watches over it and ends all that it started.

    python -I jail.py SPEC REPORT      two file descriptors: what to run (JSON), and where to say how it ended

Standard library only, as it runs before anything else can be trusted. Two ways of shutting in, both without anything
installed: `namespaces` (own network, processes and file tree, as bubblewrap does it) and `landlock` (Linux 5.13+, where
namespaces are forbidden, as in many containers). Both add a seccomp filter, resource limits, and a user without rights.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
import time
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
TICK = 0.02  # seconds between two looks at memory and number of processes
ROOM = "/tmp"  # where the command lives in a file tree of its own

# linux/sched.h, linux/mount.h
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_RDONLY = 2, 4, 32, 4096, 16384, 1 << 18, 1
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
AT_RECURSIVE = 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 8, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
CAP_DAC_READ_SEARCH = 2

# Calls that a program under test has no use for: sockets (io_uring makes them too), other processes' memory, mounts,
# namespaces, the kernel's key ring. Per machine: the audit number of its ABI, then the call numbers.
FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 101, 165, 248, 249, 250, 272, 298, 304, 308, 310, 311, 321, 323, 425, 438)),
    "aarch64": (0xC00000B7, (198, 117, 40, 217, 218, 219, 97, 241, 265, 268, 270, 271, 280, 282, 425, 438)),
}


class ToldToEnd(BaseException):
    """The one who asked no longer wants it, or is gone."""


class RefusedError(Exception):
    """This way of shutting in is not possible here."""


def main() -> None:
    spec_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(spec_fd, "rb") as file:
        spec: dict[str, Any] = json.load(file)
    os.set_inheritable(report_fd, False)
    signal.signal(signal.SIGTERM, told_to_end)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != spec["parent"]:
        return
    try:
        report = supervise(spec)
    except (RefusedError, OSError) as error:
        report = {"end": "refused", "status": 0, "reason": str(error)}
    os.write(report_fd, json.dumps(report).encode())


def supervise(spec: dict[str, Any]) -> dict[str, Any]:
    """Start the command shut in, wait for it within its bounds, and leave nothing of it behind."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if spec["mode"] == "namespaces":
        leave_namespaces()
    told, tell = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(told)
        be_first(spec, tell)
    os.close(tell)
    try:
        end, said = watch(spec, told)
    except ToldToEnd:
        end, said = "wall", b""
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()
    if end != "exited":
        return {"end": end, "status": -signal.SIGKILL}
    if said.startswith(b"refused"):
        raise RefusedError(said.decode(errors="replace")[8:])
    if len(said) != 4:
        return {"end": "exited", "status": -signal.SIGKILL}
    status = os.waitstatus_to_exitcode(struct.unpack("i", said)[0])
    return {"end": "cpu" if status == -signal.SIGXCPU else "exited", "status": status}


def told_to_end(_number: int, _frame: Any) -> None:
    raise ToldToEnd


def watch(spec: dict[str, Any], told: int) -> tuple[str, bytes]:
    """Until the first process inside says how the command ended, or a bound is reached: which, and what it said."""
    # From here the supervisor holds none of the command's pipes, so that their end is seen outside.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    begin = time.monotonic()
    wall = spec["wall_s"]
    while not select.select([told], [], [], TICK)[0]:
        if wall is not None and time.monotonic() - begin > wall:
            return "wall", b""
        pids = descendants()
        if sum(map(resident, pids)) > spec["memory_bytes"]:
            return "memory", b""
        if len(pids) > spec["processes"] + 4:
            return "processes", b""
    return "exited", os.read(told, 4096)


def be_first(spec: dict[str, Any], tell: int) -> None:
    """The first process inside: shuts itself in, starts the command, says how it ended. Never returns."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        room = spec["room"]
        if spec["mode"] == "namespaces":
            room = ROOM
            own_file_tree(spec)
            write_files(spec, room)
            drop_rights(spec["uid"], keep_reading=False)
        else:
            write_files(spec, room)
            drop_rights(spec["uid"], keep_reading=os.getuid() == 0)
            landlock([*spec["readable"], *DEVICES], [room, *DEVICES])
        forbid_calls()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user has cleared it
        command = os.fork()
        if command == 0:
            run(spec, room)
        prctl(PR_SET_DUMPABLE, 0)
        os.closerange(0, 3)
        while True:
            pid, status = os.wait()
            if pid == command:
                os.write(tell, struct.pack("i", status))
                break
    except BaseException as error:
        os.write(tell, f"refused {type(error).__name__}: {error}".encode()[:2000])
    os._exit(0)


def run(spec: dict[str, Any], room: str) -> None:
    """Become the command. Never returns."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(room)
        limits = {
            resource.RLIMIT_CPU: spec["cpu_s"],
            resource.RLIMIT_AS: spec["memory_bytes"],
            resource.RLIMIT_FSIZE: spec["file_bytes"],
            resource.RLIMIT_NPROC: spec["process_limit"],
            resource.RLIMIT_NOFILE: 256,
            resource.RLIMIT_CORE: 0,
        }
        for kind, value in limits.items():
            if value is not None:
                resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU else value))
        os.closerange(3, 1024)
        environment = {**spec["environment"], "HOME": room, "TMPDIR": room}
        os.execve(spec["argv"][0], spec["argv"], environment)
    except BaseException as error:
        os.write(2, f"cannot start {spec['argv'][0]}: {error}".encode())
    os._exit(127)


def write_files(spec: dict[str, Any], room: str) -> None:
    """The command's own files; the room becomes its user's."""
    for name, text in spec["files"].items():
        with open(os.path.join(room, name), "w", encoding="utf-8") as file:
            file.write(text)
    if spec["uid"] is not None:
        os.chown(room, spec["uid"], spec["uid"])


# Namespaces


def leave_namespaces() -> None:
    """New network (without any interface up), process, user and message-queue namespaces for what is forked next."""
    own = NEWNET | NEWPID | NEWIPC | NEWUTS
    # Root without this right (in a container) may still be allowed a user namespace.
    if os.getuid() == 0 and LIBC.unshare(own) == 0:
        return
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(own | NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def own_file_tree(spec: dict[str, Any]) -> None:
    """A root that holds the readable paths, read-only and at their own places, a few devices, and a room in memory."""
    check(LIBC.unshare(NEWNS), "unshare")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    sources = {}
    for path in (*spec["readable"], *DEVICES):
        if os.path.islink(path):
            sources[path] = -1
        elif os.path.exists(path):
            sources[path] = os.open(path, os.O_PATH)
    links = {path: os.readlink(path) for path, source in sources.items() if source < 0}
    base = "/tmp"
    # The new root covers /tmp; the sources are held open, so that those below /tmp are still reached.
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir(base + ROOM, 0o755)
    mount("tmpfs", base + ROOM, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={spec['room_bytes']},nr_inodes=4096")
    for path, source in sources.items():
        place = base + path
        os.makedirs(os.path.dirname(place), 0o755, exist_ok=True)
        if source < 0:
            os.symlink(links[path], place)
            continue
        if stat.S_ISDIR(os.fstat(source).st_mode):
            os.makedirs(place, exist_ok=True)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{source}", place, None, MS_BIND | MS_REC)
        read_only(place)
        os.close(source)
    # The mounts on it keep their own flags.
    mount(None, base, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot(base)
    os.chdir("/")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    check(LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def read_only(path: str) -> None:
    """Mounts at and below a path; mount_setattr(2) with MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID."""
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
    call = LIBC.syscall(MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    check(call, f"mount_setattr {path}")


# Landlock


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def landlock(readable: list[str], writable: list[str]) -> None:
    """Only these paths can be read, only these written, and no process outside can be signalled. Needs no right."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise RefusedError("the kernel has neither namespaces for this user nor Landlock")
    known = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    attributes = _RulesetAttributes(known, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = LIBC.syscall(LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    check(ruleset, "landlock_create_ruleset")
    read, file_only = 1 | 4 | 8, 1 | 2 | 4 | (1 << 14) | (1 << 15)  # execute, read files, read folders
    for paths, allowed in ((readable, read), (writable, known)):
        for path in paths:
            if not os.path.exists(path):
                continue
            source = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = allowed & known & (-1 if stat.S_ISDIR(os.fstat(source).st_mode) else file_only)
            rule = _PathRule(rights, source)
            check(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0), f"landlock_add_rule {path}")
            os.close(source)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    check(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


# Rights


def drop_rights(uid: int | None, *, keep_reading: bool) -> None:
    """Become `uid` (where we are root) without any capability. `keep_reading` keeps root's way into folders that are
    closed to others, as the interpreter may lie in one; Landlock then says which can be read."""
    for capability in range(64):
        if capability != CAP_DAC_READ_SEARCH or not keep_reading:
            LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if uid is not None:
        prctl(PR_SET_KEEPCAPS, int(keep_reading))
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    kept = 1 << CAP_DAC_READ_SEARCH if keep_reading else 0
    header = struct.pack("Ii", 0x20080522, 0)
    check(LIBC.capset(header, struct.pack("6I", kept, kept, kept, 0, 0, 0)), "capset")
    if keep_reading:
        prctl(PR_CAP_AMBIENT, 2, CAP_DAC_READ_SEARCH)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def forbid_calls() -> None:
    """A seccomp filter: the calls of FORBIDDEN fail with EPERM, another ABI than the machine's own is fatal."""
    if platform.machine() not in FORBIDDEN:
        raise RefusedError(f"there is no system call filter for {platform.machine()}")
    abi, calls = FORBIDDEN[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000
    program = [(load, 0, 0, 4), (equal, 1, 0, abi), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, deny)]  # the x32 numbers of x86-64
    for call in calls:
        program += [(equal, 0, 1, call), (answer, 0, 0, deny)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(filter_))


# Watching and ending


def descendants() -> list[int]:
    """Every process below this one; orphans count, as this process takes them in."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
            for task in tasks:
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    below = [int(number) for number in file.read().split()]
                found += below
                waiting += below
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def end_all() -> None:
    """Kill all descendants, those included that are born meanwhile. The death of a namespace's first process takes all
    others with it; elsewhere they are stopped first, so that none can fork on while the others are looked for."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        pids = descendants()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def prctl(option: int, value: int, argument: int = 0) -> None:
    check(LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(argument), 0, 0), "prctl")


def check(result: int, what: str) -> None:
    if result < 0:
        raise RefusedError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
