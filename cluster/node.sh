#!/bin/sh
# What a node does: `setup` (once), `ray start --head …` or `ray start --address=…` (start Ray, in place of one that
# runs, unless that is what would be started: serve/node.py), `stop` (end it), `run COMMAND…` (in the cluster's
# environment), `job ARGUMENTS…` (fugu with these, on this Ray), `env` (that environment, for a shell). Ray's launcher
# calls it.
set -eu

code=$(cd "$(dirname "$0")/.." && pwd)
venv=${FUGU_VENV:-$HOME/venv}
action=$1
shift

setup() {
    if [ ! -x "$venv/bin/python" ]; then
        for python in python3.11 python3.12 python3.13 python3; do
            "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
        done
        "$python" -m venv "$venv"
    fi
    # Dependencies once, and again when they change; the code itself is used where it lies.
    wanted=$(cat "$code/pyproject.toml" "$code/constraints.txt" | cksum)
    if [ "$(cat "$venv/.fugu" 2>/dev/null)" != "$wanted" ]; then
        "$venv/bin/pip" install --disable-pip-version-check -q -c "$code/constraints.txt" -e "$code[train]"
        echo "$wanted" > "$venv/.fugu"
    fi
    # `ray down`, `ray exec` and `fugu` find the same programs and settings as Ray itself.
    line=". $HOME/.fugu/profile"
    mkdir -p "$HOME/.fugu"
    echo "eval \"\$(FUGU_VENV='$venv' sh '$code/cluster/node.sh' env)\"" > "$HOME/.fugu/profile"
    grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null || echo "$line" >> "$HOME/.bashrc"
}

environment() {
    secrets=${FUGU_ENV:-/etc/fugu/env}
    echo "export PATH='$venv/bin:$PATH'"
    echo "export PYTHONPATH='$code'"
    if [ -r "$secrets" ]; then
        # Read as text, never run: what stands behind the first = is the value.
        sed -n "s/'/'\\\\''/g; s/^\([A-Za-z_][A-Za-z0-9_]*\)=\(.*\)$/export \1='\2'/p" "$secrets"
    fi
    echo "export RAY_AUTH_MODE=token"
    PYTHONPATH="$code" "$venv/bin/python" -m serve.environment "$HOME/.fugu/serve"
}

stop() {
    ray stop --grace-period 10 > /dev/null
}

start() {
    # The dashboard is for the head itself; from elsewhere it is reached through ssh.
    case " $* " in *" --head "*)
        set -- "$@" --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1
        [ -z "${FUGU_REDIS_PASSWORD:-}" ] || set -- "$@" --redis-password="$FUGU_REDIS_PASSWORD"
        ;;
    esac
    [ -z "${FUGU_RESOURCES:-}" ] || set -- "$@" --resources="$FUGU_RESOURCES"
    if python -m serve.node unchanged "$@"; then
        echo "Ray runs here as it would be started now; it goes on."
        return
    fi
    stop
    ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -Hn)"
    ray "$@" --disable-usage-stats
    python -m serve.node note "$@"
}

case $action in
    setup) setup ;;
    env) environment ;;
    run)
        eval "$(environment)"
        exec "$@"
        ;;
    job)
        eval "$(environment)"
        cd "$code"
        FUGU_RAY=auto exec fugu "$@"
        ;;
    ray)
        eval "$(environment)"
        start "$@"
        ;;
    stop)
        eval "$(environment)"
        stop
        ;;
    *)
        echo "node.sh: there is no action $action" >&2
        exit 2
        ;;
esac
