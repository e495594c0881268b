"""Captured machines: every row of machines.json gives the quota that its kernel enforces.

Then the same machines broken at random: every one of them is survived.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from safepool.limits import QuotaWatch, read_cpu_limits, read_limits, read_throttling

MACHINES: dict[str, dict[str, Any]] = {
    row["name"]: row
    for row in json.loads(Path(__file__).with_name("machines.json").read_text("utf-8"))
}

# Every kind of machine that the resolver is for. A family without a row, or a row without
# a family, is a hole.
FAMILIES = {
    "docker",
    "escapes",
    "hybrid",
    "kubernetes",
    "lxc",
    "missing",
    "mounts",
    "namespace",
    "podman",
    "slurm",
    "systemd",
    "threads",
    "version 1",
    "version 2",
    "wsl2",
}

# Rows whose quota can only be right if what was wrong is also told.
TOLD = {
    "v2-empty-file": "/sys/fs/cgroup/cpu.max",
    "v2-unit-suffix": "/sys/fs/cgroup/cpu.max",
    "v1-zero-period": "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us",
    "v1-v2-format": "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us",
    "v1-garden-good-bad": "/proc/self/cgroup",
    "missing-proc-cgroup": "/proc/self/cgroup",
    "missing-mountinfo-v1-docker": "/proc/self/mountinfo",
    "empty-proc-files": "/proc/self/mountinfo",
    "cpumax-is-directory": "/sys/fs/cgroup/cpu.max",
    "link-in-a-circle": "/sys/fs/cgroup/a/cpu.max",
}


def build(machine: dict[str, Any], root: Path) -> None:
    """Write a machine's files, folders and links below a folder."""
    for name in machine.get("dirs", ()):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in machine["files"].items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for name, target in machine.get("links", {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    for name in machine.get("unreadable", ()):
        # A link to itself: unreadable (ELOOP) for root too, which a file mode is not.
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(path.name)


@pytest.mark.parametrize("name", MACHINES)
def test_quota_of_a_captured_machine(name: str, tmp_path: Path) -> None:
    """The smallest quota over the own group and every visible ancestor, exactly."""
    machine = MACHINES[name]
    build(machine, tmp_path)

    limits = read_limits(root=tmp_path)

    expected = [machine["expect"], machine.get("alt_expect", machine["expect"])]
    assert limits.cpu_quota in [row["quota_cpus"] for row in expected]
    assert read_cpu_limits(root=tmp_path).quotas == limits.quotas
    for limit in limits.quotas:
        assert limit.source.startswith("/")
        assert limit.raw
        assert str(tmp_path) not in limit.source


@pytest.mark.parametrize("name", [name for name, row in MACHINES.items() if "unreadable" in row])
def test_an_unreadable_file_is_told(name: str, tmp_path: Path) -> None:
    """What could not be read is in `skipped`, by name and reason."""
    build(MACHINES[name], tmp_path)

    skipped = {entry.source for entry in read_limits(root=tmp_path).skipped}

    assert {f"/{path}" for path in MACHINES[name]["unreadable"]} <= skipped


@pytest.mark.parametrize(("name", "source"), TOLD.items())
def test_what_was_not_usable_is_told(name: str, source: str, tmp_path: Path) -> None:
    """No limit because of a broken file is never the same as no limit."""
    build(MACHINES[name], tmp_path)

    skipped = {entry.source: entry.reason for entry in read_limits(root=tmp_path).skipped}

    assert skipped[source]


@pytest.mark.parametrize(
    "name", ["v2-docker-2cpu", "k8s-v2-pod-tighter", "v1-parent-limit-leaf-minus1"]
)
def test_a_sound_machine_has_nothing_to_tell(name: str, tmp_path: Path) -> None:
    """Files that are absent on every machine are no news."""
    build(MACHINES[name], tmp_path)

    assert read_limits(root=tmp_path).skipped == ()


def test_levels_come_innermost_first(tmp_path: Path) -> None:
    """Every level is reported, in the order in which the kernel nests them."""
    build(MACHINES["v2-three-levels"], tmp_path)

    assert [limit.cpus for limit in read_limits(root=tmp_path).quotas] == [6.0, 4.0, 8.0]


def test_a_level_above_the_namespace_comes_after_its_root(tmp_path: Path) -> None:
    """``/..`` is one level above ``/``, although it is the longer path."""
    build(MACHINES["v2-docker-2cpu"], tmp_path)
    mountinfo = tmp_path / "proc/self/mountinfo"
    above = "80 22 0:26 /.. /above rw - cgroup2 cgroup2 rw\n"
    mountinfo.write_text(above + mountinfo.read_text())
    (tmp_path / "above").mkdir()
    (tmp_path / "above/cpu.max").write_text("400000 100000\n")

    assert [limit.cpus for limit in read_limits(root=tmp_path).quotas] == [2.0, 4.0]


def test_throttling_is_read_from_the_group_that_binds(tmp_path: Path) -> None:
    """The kernel counts in the group that has the quota; the smallest one is asked."""
    build(MACHINES["v2-three-levels"], tmp_path)
    for path, count in (("a/b/c", 1), ("a/b", 2), ("a", 3)):
        (tmp_path / "sys/fs/cgroup" / path / "cpu.stat").write_text(
            f"nr_periods 9\nnr_throttled {count}\nthrottled_usec 7\n"
        )

    throttling = read_throttling(tmp_path)

    assert throttling is not None
    assert throttling.source == "/sys/fs/cgroup/a/b/cpu.stat"
    assert throttling.throttled_periods == 2


@pytest.mark.parametrize("text", ["", "usage_usec 1\n", None], ids=repr)
def test_throttling_without_counters_is_unknown(text: str | None, tmp_path: Path) -> None:
    """No file, or one without the counters: not known, which is not zero."""
    build(MACHINES["v2-docker-2cpu"], tmp_path)
    if text is not None:
        (tmp_path / "sys/fs/cgroup/cpu.stat").write_text(text)

    assert read_throttling(tmp_path) is None


def test_a_watch_looks_again_when_its_files_have_gone(tmp_path: Path) -> None:
    """A remount elsewhere: the own group's name is the same, its directory is not."""
    build(MACHINES["v2-service-150"], tmp_path)
    watch = QuotaWatch(tmp_path)
    before = watch.read().cpu_quota
    (tmp_path / "sys/fs/cgroup").rename(tmp_path / "elsewhere")
    mountinfo = tmp_path / "proc/self/mountinfo"
    mountinfo.write_text(mountinfo.read_text().replace("/sys/fs/cgroup", "/elsewhere"))

    assert (before, watch.read().cpu_quota) == (1.5, 1.5)


def test_a_watch_repeats_what_was_not_usable(tmp_path: Path) -> None:
    """What was skipped when the directories were found is told at every reading, once."""
    build(MACHINES["v1-garden-good-bad"], tmp_path)
    watch = QuotaWatch(tmp_path)

    assert watch.read().skipped == watch.read().skipped == read_cpu_limits(tmp_path).skipped


def test_a_captured_machine_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    """Affinity comes from the capture, and nothing is asked of this system."""
    build(MACHINES["namespace-own-group-found-by-scan"], tmp_path)

    limits = read_limits(root=tmp_path)

    assert limits.affinity.cpus == 4.0
    assert limits.affinity.source == "/proc/self/status"
    assert limits.bounds == ()
    assert limits.open_files is None
    assert limits.shared_memory is None


def test_an_empty_folder_is_a_machine_without_limits(tmp_path: Path) -> None:
    """Nothing known is not an error."""
    limits = read_limits(root=tmp_path)

    assert limits.binding.cpus is None
    assert limits.cpu_quota is None


def test_every_family_has_a_machine_and_every_machine_a_family() -> None:
    """A family without a row, or a row outside the table, is a test that never ran."""
    assert {row["family"] for row in MACHINES.values()} == FAMILIES


def test_every_machine_has_an_expectation_and_its_reason() -> None:
    """A row that expects nothing cannot fail."""
    for row in MACHINES.values():
        quota = row["expect"]["quota_cpus"]
        assert quota is None or (quota > 0 and math.isfinite(quota))
        assert row["why"]
        assert row["origin"]
    rows = json.loads(Path(__file__).with_name("machines.json").read_text("utf-8"))
    assert len(rows) == len(MACHINES), "two machines have one name"


def _cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) + 1)])


def _spoil_bytes(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes()) or bytearray(b"0")
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)


def _shuffle_lines(path: Path, chance: random.Random) -> None:
    lines = path.read_bytes().split(b"\n")
    chance.shuffle(lines)
    path.write_bytes(b"\n".join(lines))


def _shuffle_fields(path: Path, chance: random.Random) -> None:
    fields = path.read_bytes().split(b" ")
    chance.shuffle(fields)
    path.write_bytes(b" ".join(fields))


def _take_anothers_text(path: Path, chance: random.Random) -> None:
    other = chance.choice(list(MACHINES.values()))["files"]
    if other:
        path.write_text(other[chance.choice(list(other))], "utf-8", "surrogateescape")


def _negate_numbers(path: Path, chance: random.Random) -> None:
    sign = chance.choice([b"-", b"0", b"+", b"99999999999999999999", b"0."])
    path.write_bytes(path.read_bytes().replace(b"1", sign + b"1"))


def _add_bytes(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 200)))


def _remove(path: Path, _: random.Random) -> None:
    path.unlink()


def _make_directory(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _make_pipe(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_link(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to(chance.choice(["/", "..", "/dev/zero", path.name, "../" * 40 + "etc/passwd"]))


HARMS = (
    _cut,
    _spoil_bytes,
    _shuffle_lines,
    _shuffle_fields,
    _take_anothers_text,
    _negate_numbers,
    _add_bytes,
    _remove,
    _make_directory,
    _make_pipe,
    _make_link,
)


@pytest.mark.parametrize("name", MACHINES)
def test_a_broken_machine_is_survived(name: str, tmp_path: Path) -> None:
    """Whatever is in the files: no exception, no hang, and no quota of zero or below."""
    chance = random.Random(name)
    for attempt in range(8):
        root = tmp_path / str(attempt)
        root.mkdir()
        build(MACHINES[name], root)
        files = sorted(
            path for path in root.rglob("*") if path.is_file() and not path.is_symlink()
        )
        for path in chance.sample(files, min(len(files), chance.randint(1, 3))):
            chance.choice(HARMS)(path, chance)

        limits = read_limits(root=root)

        for limit in limits.quotas:
            assert limit.cpus is None or (limit.cpus > 0 and math.isfinite(limit.cpus))
        assert all(entry.source and entry.reason for entry in limits.skipped)
        shutil.rmtree(root)


def test_a_link_cannot_leave_the_capture(tmp_path: Path) -> None:
    """A capture is data from elsewhere: this system's files are not read through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "cpu.max").write_text("100000 100000\n")
    root = tmp_path / "machine"
    build(MACHINES["v2-docker-2cpu"], root)
    limit = root / "sys/fs/cgroup/cpu.max"
    limit.unlink()

    for target in ("../../../../outside/cpu.max", str(outside / "cpu.max")):
        limit.symlink_to(target)
        assert read_limits(root=root).cpu_quota is None
        limit.unlink()
