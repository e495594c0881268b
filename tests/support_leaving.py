"""Tasks that start programs and do not wait for them."""

from __future__ import annotations

import subprocess

# By name, a shell's text. Each prints the process ids of what it leaves behind, which has the
# program's standard output: whoever reads that sees its end when all of them have ended.
LEFT = {
    "a child": "exec >&2 sleep 300",
    "a family": (
        "sleep 300 >&2 & echo $!; "
        "sh -c 'echo $$; sleep 300 >&2 & echo $!; exec >&2; wait' & exec >&2; wait"
    ),
    "a daemon": "sleep 300 >&2 & echo $!",
    "a busy daemon": "while :; do sleep 0.01; done >&2 & echo $!",
}


def leave(names: list[str]) -> list[int]:
    """Start such programs, wait for none, and return their process ids."""
    return [pid for name in names for pid in _start(name)]


def _start(name: str) -> list[int]:
    daemon = "daemon" in name
    started = subprocess.Popen(
        ["sh", "-c", LEFT[name]],
        stdout=subprocess.PIPE,
        stderr=1,
        text=True,
        start_new_session=daemon,
    )
    assert started.stdout is not None
    with started.stdout as said:
        pids = [int(line) for line in said]
    if daemon:
        started.wait()  # what it has started is nobody's child now
        return pids
    started.returncode = 0  # nobody waits for it
    return [started.pid, *pids]
