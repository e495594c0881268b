"""What reads text or bytes that others wrote, each as a function of bytes, and a fuzzer for it.

``python tests/support_fuzz.py frames 60`` runs Atheris on one of them for so many seconds, where
that is installed. `grow` needs nothing: it keeps an input that leads the interpreter from one
line to another where no input before did, and goes on from there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safepool import cli
from safepool.cli.report import ReportError, read
from safepool.errors import UnreadableLimitError
from safepool.limits import read_limits, read_oom_counts, read_throttling
from safepool.limits.affinity import parse_cpu_list
from safepool.limits.environment import (
    BOUNDS,
    EXACT_WORKERS,
    X_OPTION,
    parse_count,
    read_environment,
)
from safepool.limits.gpus import parse_visible, read_gpus
from safepool.limits.levels import parse_number
from safepool.limits.memory import parse_memory_stat
from safepool.limits.mounts import parse_mountinfo, reachable, unescape
from safepool.limits.place import components, parse_own_groups
from safepool.limits.quota import parse_cfs_quota, parse_cpu_max, parse_cpu_stat
from safepool.limits.waiting import parse_idle, parse_schedstat
from safepool.transport.frames import CorruptFrameError, FrameReader, Kind, encode
from safepool.workers.board import LANE_CALLS, RECORD, Board, numbers_of, records_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType, FrameType

PACKAGE = str(Path(cli.__file__).parents[1])
# A thousand folders are made and removed: on a disk that takes seconds.
_IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
# What a board holds of a call that has returned.
_RECORD = RECORD.pack(1, 5, 3, 2) + b"abc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader.

    Attributes:
        read: Feeds it; raises if it does what it must not.
        seeds: Inputs to begin with.
        words: What inputs are made of.
        inputs: How many a run of every day tries.
    """

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]
    inputs: int


# --- the readers -----------------------------------------------------------------------------

# By the first byte of the input.
_PARSERS: tuple[Callable[[str], object], ...] = (
    lambda text: parse_cpu_max(text, source="s"),
    lambda text: parse_cfs_quota(text, "100000", source="s"),
    lambda text: parse_cfs_quota("1000", text, source="s"),
    lambda text: parse_cpu_stat(text, source="s"),
    lambda text: parse_number(text, source="s"),
    parse_memory_stat,
    lambda text: parse_number(text, source="s", unit="tasks"),
    lambda text: parse_cpu_list(text, source="s"),
    lambda text: parse_count(text, source="s"),
    parse_own_groups,
    lambda text: reachable(parse_mountinfo(text)),
    unescape,
    components,
    parse_visible,
    parse_schedstat,
    lambda text: parse_idle(text, range(4)),
)


def _read_limit(data: bytes) -> None:
    text = data[1:].decode("utf-8", "surrogateescape")
    with contextlib.suppress(UnreadableLimitError):
        _PARSERS[data[0] % len(_PARSERS) if data else 0](text)


# What a machine is read from, in the order in which an input says it, with NUL between.
_FILES = (
    "proc/self/cgroup",
    "proc/self/mountinfo",
    "sys/fs/cgroup/cpu.max",
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/pids.max",
    "sys/fs/cgroup/memory.events",
    "sys/fs/cgroup/cpu.stat",
    "sys/fs/cgroup/cgroup.controllers",
    "sys/fs/cgroup/a/cpu.max",
)


def _read_machine(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as root:
        for name, content in zip(_FILES, data.split(b"\0"), strict=False):
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        limits = read_limits(root, environ={})
        assert all(limit.cpus is None or limit.cpus > 0 for limit in limits.quotas)
        read_throttling(root)
        read_oom_counts(root)


def _read_frames(data: bytes) -> None:
    """Read a stream in pieces; the first byte says how long they are."""
    piece_bytes, stream = 1 + (data[0] if data else 0), memoryview(data)[1:]
    reader, at = FrameReader(), 0
    with contextlib.suppress(CorruptFrameError):
        while at < len(stream):
            room = reader.buffer()
            count = min(piece_bytes, len(room), len(stream) - at)
            assert count
            room[:count] = stream[at : at + count]
            room.release()
            at += count
            for frame in reader.received(count):
                assert frame.kind in Kind


def _read_board(data: bytes) -> None:
    """Read a board that a worker has scribbled on, and records that it sent."""
    board = Board.create()
    if not board:  # the system has none
        return
    try:
        # The cells, the lane and the results: each begins with a part of the input.
        cells = board._cells.cast("B")
        parts = data.split(b"|", 2)
        for view, part in zip((cells, board._lane, board._results), parts, strict=False):
            view[: min(len(part), len(view))] = part[: len(view)]
        cells.release()
        assert 0 <= board.claimed < 2**65
        assert 0 <= board.began < 2**65
        for look in (board.peek, board.left):
            with contextlib.suppress(ValueError):
                left = look()
                assert len(left.numbers) <= LANE_CALLS
                _read_records(left.records)
        assert isinstance(board.fault(), str)
    finally:
        board.close()
    with contextlib.suppress(ValueError):
        _read_records(data)
    with contextlib.suppress(ValueError):
        numbers_of(data[0] if data else 0, data[1:])


def _read_records(data: bytes) -> None:
    assert sum(len(pickled) for *_, pickled in records_of(data)) <= len(data)


_parser = functools.cache(cli._parser)


def _read_command_line(data: bytes) -> None:
    """Parse a command line, and do not do what it says."""
    words = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
    ours, _ = cli._split(words)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            _parser().parse_known_args(ours)
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
    assert code in (0, 2)
    if code == 2:
        assert err.getvalue().count("\n") <= 1 + data.count(b"\n"), err.getvalue()


_VARIABLES = (*(row.name for row in BOUNDS), EXACT_WORKERS, "CUDA_VISIBLE_DEVICES")


def _read_environment(data: bytes) -> None:
    """Read variables; the byte before each value says which one it is."""
    environ = {
        _VARIABLES[line[0] % len(_VARIABLES)]: line[1:].decode("utf-8", "surrogateescape")
        for line in data.split(b"\0")
        if line
    }
    bounds, exact, _ = read_environment(environ, {"cpu_count": environ.get(X_OPTION, "4")})
    assert all(limit.cpus is not None and limit.cpus >= 1 for limit in bounds)
    assert exact is None or exact.cpus
    read_gpus(environ, "/no/such/folder")


def _read_trace(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=_IN_MEMORY) as file:
        file.write(data)
        file.flush()
        try:
            report = read(file.name)
        except ReportError:
            return
    text = report.as_text()
    assert all((line + " ").isprintable() for line in text.splitlines()), text
    json.loads(report.as_json(), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in text.split())


_MOUNTINFO = (
    b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
    b"30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    b"31 23 0:27 /a\\040b /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
)
_DIGITS = _words("0 -1 1 max 100000 50000 9223372036854771712 18446744073709551616 1e9 \u0662")
_BLANKS = (b" ", b"\n", b"\t", b"\0", b"/", b":", b",", b"\\040", b"..", b"\xff")
_HEAD = b'[\n{"name": "safepool", "ph": "M", "pid": 1, "args": {}, "ts": 0},\n'
_TASK = (
    b'{"name": "f", "cat": "task", "ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 5,'
    b' "args": {"outcome": "value", "waited_us": 1}},\n'
)
_WORKER = (
    b'{"name": "start", "cat": "worker", "ph": "i", "pid": 1, "tid": 1, "ts": 0, "args": {}},\n'
)

TARGETS: dict[str, Target] = {
    "limits parsers": Target(
        read=_read_limit,
        seeds=(
            b"\x00250000 100000\n",
            b"\x01-1",
            b"\x03nr_periods 5\nnr_throttled 1\nthrottled_usec 7\n",
            b"\x04max\n",
            b"\x05anon 5\ninactive_file 7\n",
            b"\x070-3,5,7-9:1/2\n",
            b"\x083(x2)",
            b"\x090::/a/b\n4:cpu,cpuacct:/c\n",
            b"\x0a" + _MOUNTINFO,
            b"\x0ba\\040b",
            b"\x0f" + b"cpu  1 2 3 4\ncpu0 1 2 3 4 5\n",
        ),
        words=(*_DIGITS, *_BLANKS, *_words("cpu cpu0 cgroup2 nr_periods 0-3 - (x2)")),
        inputs=3_000,
    ),
    "machine": Target(
        read=_read_machine,
        seeds=(
            b"\0".join((b"0::/a\n", _MOUNTINFO, b"max 100000\n", b"max", b"5", b"oom_kill 1\n")),
            b"\0".join((b"0::/\n", _MOUNTINFO, b"50000 100000", b"4096", b"max", b"", b"x 1")),
        ),
        words=(*_DIGITS, *_BLANKS, *_words("cpu memory pids 0::/a cgroup cgroup2 oom_kill")),
        inputs=150,
    ),
    "frames": Target(
        read=_read_frames,
        seeds=(
            b"\x05" + b"".join(encode(Kind.TASK, 1, [b"abc", bytes(100)])),
            b"\xff" + b"".join([*encode(Kind.STOP, 0), *encode(Kind.RESULT, 2, [b"x"])]),
        ),
        words=(
            b"sp\x02",
            b"\0\0\0\1",
            b"\xff\xff\xff\xff",
            b"\x40" + bytes(7),
            b"\x80" + bytes(7),
        ),
        inputs=1_500,
    ),
    "board": Target(
        read=_read_board,
        seeds=(
            _RECORD + RECORD.pack(2, 5, 0, 2),
            bytes(range(1, 9)) * 12 + b"|" + bytes(64) + b"|" + _RECORD,
        ),
        words=(b"|", bytes(8), b"\xff" * 8, b"\1" + bytes(7), b"\x10" + bytes(7)),
        inputs=300,
    ),
    "command line": Target(
        read=_read_command_line,
        seeds=(
            b"run\0--workers\0002\0--threads\0auto\0--\0python\0x.py",
            b"demo\0--cpus\0001.5\0--plot\0x.svg",
            b"doctor\0--pid\0001\0--json",
            b"report\0run.json",
            b"env\0--force",
        ),
        words=(
            *_words(
                "run demo doctor report env limits -- --workers --threads --cpus --json --pid = "
                "--watch --reserve --explain --help --version nan inf -1 1e400 \u0663 "
                "99999999999999999999"
            ),
            *(b"\0", b"\n", b"\x1b[2J", b"%s", b"\xff"),
        ),
        inputs=60,
    ),
    "environment variables": Target(
        read=_read_environment,
        seeds=(b"\x004\0\x013(x2)\0\x02x", b"\x050,1,MIG-1/2/3\0\x06-1\0\x07\n"),
        words=(*_DIGITS, *_BLANKS, *_words("(x2) 4, GPU- MIG- 9" + "9" * 5000)),
        inputs=600,
    ),
    "trace": Target(
        read=_read_trace,
        seeds=(_HEAD + _WORKER + _TASK, _HEAD + _TASK + b"]\n"),
        words=(
            *_words(
                '"ts": "dur": "args": "tid": null NaN 1e308 -1 [ ] { } , "\\ud800" "\\u001b[2J" '
                '"outcomes": {"a":1} "calls": 3.5 true "C" "throttled" "ms": "break" "why": '
                '"dropped\\u0020events"'
            ),
            *(b"\n", b"\x1b[2J", b"\xff"),
        ),
        inputs=500,
    ),
}


# --- the fuzzer ------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random, target: Target, others: list[bytes]) -> bytes:
    """Change an input in one to four places."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice([1, 2, 4, 8, 32]))
        match rng.randrange(7):
            case 0:
                changed[at:at] = rng.choice(target.words)
            case 1:
                changed[at:end] = rng.choice(target.words)
            case 2:
                del changed[at:end]
            case 3:
                changed[at:at] = changed[at:end]
            case 4 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 5 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case _:
                changed[at:] = rng.choice(others)[rng.randrange(len(changed) + 1) :]
    return bytes(changed[:5_000])


class _Ways:
    """Notes which line of the package came after which."""

    def __init__(self) -> None:
        self.found: set[tuple[CodeType, int, int]] = set()
        self._ours: dict[CodeType, bool] = {}

    def run(self, read: Callable[[bytes], object], data: bytes) -> bool:
        """Feed a reader; tell whether it went a way that it never went before."""
        before, tracer = len(self.found), sys.gettrace()
        sys.settrace(self._call)
        try:
            read(data)
        finally:
            sys.settrace(tracer)
        return len(self.found) > before

    def _call(self, frame: FrameType, _event: str, _argument: object) -> Any:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            ours = self._ours[code] = code.co_filename.startswith(PACKAGE)
        if not ours:
            return None
        last, add = 0, self.found.add

        def line(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal last
            if event == "line":
                add((code, last, last := frame.f_lineno))
            return line

        return line


def grow(target: Target, *, inputs: int, seed: str) -> int:
    """Try inputs that grow from those which found something new.

    Returns:
        How many steps from line to line were found.

    Raises:
        AssertionError: An input made the reader raise, or say what it must not; it is named.
    """
    gc.collect()  # what runs while garbage of earlier tests is freed is no way of the reader
    rng, ways = random.Random(seed), _Ways()
    corpus: list[bytes] = []
    begin = [b"", *target.seeds]
    for number in range(len(begin) + inputs):
        if number < len(begin):
            data = begin[number]
        else:
            data = mutate(rng.choice(corpus), rng, target, corpus)
        try:
            new = ways.run(target.read, data)
        except Exception as error:
            raise AssertionError(f"input {data!r} (seed {seed}) ends with {error!r}") from error
        if new or number < len(begin):
            corpus.append(data)
    return len(ways.found)


def main(arguments: Iterable[str]) -> None:
    """Let Atheris do it."""
    import atheris

    name, seconds = arguments
    target = TARGETS[name]
    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(data)
        options = [f"-max_total_time={seconds}", "-max_len=5000", "-timeout=300", "-verbosity=0"]
        atheris.Setup([sys.argv[0], corpus, *options], target.read)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
