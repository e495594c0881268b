"""Every parser: its documented texts, the other version's texts, and anything at all."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.errors import UnreadableLimitError
from safepool.limits.affinity import parse_cpu_list
from safepool.limits.environment import parse_count
from safepool.limits.levels import NO_LIMIT, parse_number
from safepool.limits.memory import parse_memory_stat
from safepool.limits.mounts import parse_mountinfo, reachable, unescape
from safepool.limits.place import components, parse_own_groups
from safepool.limits.quota import parse_cfs_quota, parse_cpu_max, parse_cpu_stat

if TYPE_CHECKING:
    from collections.abc import Callable

# One row per text of cpu.max: the CPUs, None for no ceiling, an exception for another shape.
CPU_MAX: dict[str, float | type[Exception] | None] = {
    "250000 100000\n": 2.5,
    "max 100000\n": None,
    "max\n": None,
    "250000\n": 2.5,
    " 250000\t100000 ": 2.5,
    "250000 100000 7\n": 2.5,
    "1000 1000000\n": 0.001,
    f"{2**44} 1000\n": 2**44 / 1000,
    "9223372036854775807 9223372036854775807\n": 1.0,
    "": UnreadableLimitError,
    "\n": UnreadableLimitError,
    "0 100000\n": UnreadableLimitError,
    "100000 0\n": UnreadableLimitError,
    "-1\n": UnreadableLimitError,
    "-1 100000\n": UnreadableLimitError,
    "MAX 100000\n": UnreadableLimitError,
    "maximum 100000\n": UnreadableLimitError,
    "1.5 100000\n": UnreadableLimitError,
    "200_000 100000\n": UnreadableLimitError,
    "0x10 100000\n": UnreadableLimitError,
    "1e5 100000\n": UnreadableLimitError,
    "200000 abc\n": UnreadableLimitError,
    "200000,100000\n": UnreadableLimitError,
    "٢٠٠٠٠٠ 100000\n": UnreadableLimitError,
    "\x00\x01\udcff": UnreadableLimitError,
    "9" * 5000 + " 100000\n": UnreadableLimitError,
}

# One row per pair of quota and period of version 1.
CFS: dict[tuple[str, str], float | type[Exception] | None] = {
    ("150000\n", "100000\n"): 1.5,
    ("-1\n", "100000\n"): None,
    ("-1\n", "garbage"): None,
    ("150000", ""): 1.5,
    ("150000", "0\n"): UnreadableLimitError,
    ("150000", "-1\n"): UnreadableLimitError,
    ("150000", "abc"): UnreadableLimitError,
    ("0\n", "100000\n"): UnreadableLimitError,
    ("-2\n", "100000\n"): UnreadableLimitError,
    ("", "100000\n"): UnreadableLimitError,
    ("1000 5000\n", "100000\n"): UnreadableLimitError,
    ("max 100000\n", "100000\n"): UnreadableLimitError,
    ("max\n", "100000\n"): UnreadableLimitError,
}

BYTES: dict[str, int | type[Exception] | None] = {
    "1073741824\n": 1 << 30,
    "0\n": 0,
    "max\n": None,
    "9223372036854771712\n": None,  # 4 KiB pages
    "9223372036854710272\n": None,  # 64 KiB pages
    "9223372036854775807\n": None,  # before Linux 3.19
    str(NO_LIMIT - 1): NO_LIMIT - 1,
    "-1\n": UnreadableLimitError,
    "1G\n": UnreadableLimitError,
    "": UnreadableLimitError,
}

TASKS: dict[str, int | type[Exception] | None] = {
    "1024\n": 1024,
    "max\n": None,
    "0\n": 0,
    "-1\n": UnreadableLimitError,
    "": UnreadableLimitError,
    "1 2\n": UnreadableLimitError,
}

CPU_LISTS: dict[str, int | type[Exception]] = {
    "0": 1,
    "0-3\n": 4,
    "0-3,8,10-11": 7,
    "1023-1026": 4,
    "0-3,2-5": 6,
    "0-999999998": 999_999_999,
    "": UnreadableLimitError,
    "3-1": UnreadableLimitError,
    "0-": UnreadableLimitError,
    "a": UnreadableLimitError,
    "0,,1": UnreadableLimitError,
    "ffffffff": UnreadableLimitError,
}

COUNTS: dict[str, int | type[Exception]] = {
    "4": 4,
    " 4\n": 4,
    "007": 7,
    "": UnreadableLimitError,
    " ": UnreadableLimitError,
    "0": UnreadableLimitError,
    "-2": UnreadableLimitError,
    "+2": UnreadableLimitError,
    "1.5": UnreadableLimitError,
    "24(x2)": UnreadableLimitError,
    "1,2": UnreadableLimitError,
    "abc": UnreadableLimitError,
    "²": UnreadableLimitError,
    "9" * 30: UnreadableLimitError,
}


def _outcome(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except UnreadableLimitError:
        return UnreadableLimitError


@pytest.mark.parametrize("text", CPU_MAX, ids=lambda text: repr(text[:30]))
def test_cpu_max(text: str) -> None:
    """Quota over period; anything that is not documented is said to be so."""
    assert _outcome(lambda: parse_cpu_max(text, source="s").cpus) == CPU_MAX[text]


@pytest.mark.parametrize("texts", CFS, ids=repr)
def test_cfs_quota(texts: tuple[str, str]) -> None:
    """Quota over period, where -1 is no quota; version 2's texts are not taken for it."""
    assert _outcome(lambda: parse_cfs_quota(*texts, source="s").cpus) == CFS[texts]


@pytest.mark.parametrize("text", BYTES, ids=repr)
def test_bytes(text: str) -> None:
    """The kernel's ways of saying "no limit" are none; a real number stays exact."""
    assert _outcome(lambda: parse_number(text, source="s")) == BYTES[text]


@pytest.mark.parametrize("text", TASKS, ids=repr)
def test_pids(text: str) -> None:
    """A number of tasks or max."""
    assert _outcome(lambda: parse_number(text, source="s", unit="tasks")) == TASKS[text]


@pytest.mark.parametrize("text", CPU_LISTS, ids=repr)
def test_cpu_list(text: str) -> None:
    """CPUs are counted once, without expanding the list."""
    assert _outcome(lambda: parse_cpu_list(text, source="s")) == CPU_LISTS[text]


@pytest.mark.parametrize("text", COUNTS, ids=lambda text: repr(text[:30]))
def test_count(text: str) -> None:
    """A positive whole number and nothing else."""
    assert _outcome(lambda: parse_count(text, source="s")) == COUNTS[text]


def test_the_error_names_source_and_text() -> None:
    """Whoever reads the message can open the file."""
    with pytest.raises(UnreadableLimitError, match=r"/sys/fs/cgroup/cpu\.max") as caught:
        parse_cpu_max("junk", source="/sys/fs/cgroup/cpu.max")

    assert caught.value.found == "junk"


def test_a_broken_period_is_blamed_on_the_period() -> None:
    """Version 1 has two files; the error names the one that is wrong."""
    with pytest.raises(UnreadableLimitError) as caught:
        parse_cfs_quota("1000", "x", source="/c/cpu.cfs_quota_us")

    assert caught.value.source == "/c/cpu.cfs_period_us"


STAT_V1 = "nr_periods 10\nnr_throttled 4\nthrottled_time 2000000\nnr_bursts 0\nburst_time 0\n"
STAT_V2 = "usage_usec 5\nnr_periods 10\nnr_throttled 4\nthrottled_usec 2000\n"


@pytest.mark.parametrize("text", [STAT_V1, STAT_V2], ids=["version 1", "version 2"])
def test_cpu_stat_of_both_versions_says_the_same(text: str) -> None:
    """Version 1 counts in nanoseconds, version 2 in microseconds."""
    stat = parse_cpu_stat(text, source="s")

    assert (stat.periods, stat.throttled_periods, stat.throttled_us) == (10, 4, 2000)


def test_cpu_stat_without_the_controller_is_not_zero() -> None:
    """Version 2's cpu.stat without the cpu controller has usage only."""
    with pytest.raises(UnreadableLimitError):
        parse_cpu_stat("usage_usec 5\nuser_usec 3\nsystem_usec 2\n", source="s")


def test_throttling_between_two_readings() -> None:
    """The counters only grow; their difference is what happened in between."""
    before = parse_cpu_stat(STAT_V2, source="s")
    after = parse_cpu_stat(STAT_V2.replace("10", "15").replace("2000", "2600"), source="s")

    assert ((after - before).periods, (after - before).throttled_us) == (5, 600)


OWN_GROUPS = {
    "0::/\n": {"": ()},
    "0::/a b:c/\\x2d\n": {"": ("a b:c", "\\x2d")},
    "0::/../../x\n": {"": ("..", "..", "x")},
    "4:cpu,cpuacct:/x\n1:name=cpu:/trap\n": {"cpu": ("x",), "cpuacct": ("x",)},
    "3:cpuset:/x": {"cpuset": ("x",)},
    "0::/é\u2028\x0b\x85/x\n": {"": ("é\u2028\x0b\x85", "x")},
    "0::a\n0:\n0\n\n::\nx:cpu:/a\n": {},
    "0::/a/../b\n": {},
    "1:cpu:/first\n2:cpu:/second\n": {"cpu": ("first",)},
    "0::/" + "a/" * 3000: {},
}


@pytest.mark.parametrize("text", OWN_GROUPS, ids=lambda text: repr(text[:40]))
def test_own_groups(text: str) -> None:
    """Two colons separate; the path is taken as it is; broken lines are left out."""
    assert parse_own_groups(text) == OWN_GROUPS[text]


MOUNT_LINES = {
    "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw": ("/sys/fs/cgroup", "cgroup2", "rw"),
    "30 23 0:26 / /a rw shared:1 master:2 propagate_from:3 unbindable - tmpfs t rw,x": (
        "/a",
        "tmpfs",
        "rw,x",
    ),
    "80 22 0:80 / /mnt/c rw - 9p C:\\134 rw,path=C:\\Program Files;uid=0": (
        "/mnt/c",
        "9p",
        "rw,path=C:\\Program Files;uid=0",
    ),
    "40 22 0:40 / /a\\040-\\040cgroup2\\040b rw - tmpfs cgroup2 rw": (
        "/a - cgroup2 b",
        "tmpfs",
        "rw",
    ),
    "41 22 0:40 / /empty-source rw - tmpfs  rw": ("/empty-source", "tmpfs", "rw"),
    "1 0 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1": None,
    "random line": None,
    "x 0 8:1 / / rw - ext4 a rw": None,
    "30 23 0:26 / /sys/fs/cgroup rw cgroup2 cgroup2 rw": None,
    "": None,
}


@pytest.mark.parametrize("line", MOUNT_LINES)
def test_mount_line(line: str) -> None:
    """Optional fields, blanks and hyphens do not move a field; a broken line is left out."""
    found = [(mount.point, mount.type, mount.options) for mount in parse_mountinfo(line)]

    assert found == ([MOUNT_LINES[line]] if MOUNT_LINES[line] is not None else [])


def test_a_broken_line_hides_no_other() -> None:
    """One line that is not understood must not disable all limits."""
    lines = "\n".join(MOUNT_LINES)

    assert len(parse_mountinfo(lines)) == sum(row is not None for row in MOUNT_LINES.values())


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30))
def test_octal_escapes_make_a_round_trip(path: str) -> None:
    """Whatever a path holds, the kernel's escapes are undone exactly."""
    escaped = path
    for character in "\\ \t\n":  # the kernel's own set; backslash first, as it makes new ones
        escaped = escaped.replace(character, f"\\{ord(character):03o}")

    assert unescape(escaped) == path


@given(st.binary(max_size=20))
def test_bytes_that_are_no_utf8_survive_unescaping(data: bytes) -> None:
    """A name in another coding still leads to its directory."""
    escaped = "".join(f"\\{byte:03o}" for byte in data)

    assert unescape(escaped).encode("utf-8", "surrogateescape") == data


ANYTHING = st.one_of(
    st.text(max_size=60),
    st.text("0123456789 -max\n\t:/.,(", max_size=40),
    st.binary(max_size=60).map(lambda data: data.decode("utf-8", "surrogateescape")),
)

PARSERS: dict[str, Callable[[str], object]] = {
    "cpu.max": lambda text: parse_cpu_max(text, source="s"),
    "cfs quota": lambda text: parse_cfs_quota(text, "100000", source="s"),
    "cfs period": lambda text: parse_cfs_quota("1000", text, source="s"),
    "cpu.stat": lambda text: parse_cpu_stat(text, source="s"),
    "bytes": lambda text: parse_number(text, source="s"),
    "memory.stat": parse_memory_stat,
    "pids": lambda text: parse_number(text, source="s", unit="tasks"),
    "cpu list": lambda text: parse_cpu_list(text, source="s"),
    "count": lambda text: parse_count(text, source="s"),
    "own groups": parse_own_groups,
    "mountinfo": lambda text: reachable(parse_mountinfo(text)),
    "unescape": unescape,
    "components": components,
}


@pytest.mark.parametrize("name", PARSERS)
@given(text=ANYTHING)
def test_no_text_raises_anything_but_the_documented_error(name: str, text: str) -> None:
    """A parser answers, or raises UnreadableLimitError with the text it was given."""
    try:
        PARSERS[name](text)
    except UnreadableLimitError as error:
        assert error.found in {text, text.partition(":")[2]}  # noqa: PT017 -- both ways are right


@given(st.integers(1, 2**44), st.integers(1000, 10**6), st.integers(1, 2**44))
def test_comparing_floats_never_turns_the_exact_order_round(
    quota: int, period: int, other: int
) -> None:
    """The division is correctly rounded, so the smaller fraction is never the larger float."""
    one = parse_cpu_max(f"{quota} {period}", source="s").cpus
    two = parse_cfs_quota(str(other), str(period + 1), source="s").cpus
    assert one is not None
    assert two is not None

    if Fraction(quota, period) <= Fraction(other, period + 1):
        assert one <= two
    else:
        assert one >= two


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=40))
def test_a_cpu_list_counts_what_was_written(cpus: set[int]) -> None:
    """Any set of CPUs, written as single numbers, is counted exactly."""
    assert parse_cpu_list(",".join(map(str, cpus)), source="s") == len(cpus)
