"""The demo's control group: made only where it may be, and always taken away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import support_cgroups

from safepool.cli import demo

if TYPE_CHECKING:
    from pathlib import Path

    from safepool.limits import Throttling

groups = demo.host().groups
GroupLeftError, NoGroupError, Site = groups.GroupLeftError, groups.NoGroupError, groups.Site
find_site, quota_group = groups.find_site, groups.quota_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

REASON = support_cgroups.without_control_groups()
needs_groups = pytest.mark.skipif(REASON is not None, reason=str(REASON))

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
TOP = "sys/fs/cgroup"
USER = f"{TOP}/user.slice"
SESSION = f"{USER}/session-1.scope"

# What every group of version 2 but the root has.
LEAF = {"cgroup.type": "domain\n", "cpu.max": "max 100000\n", "cgroup.subtree_control": "\n"}


def v2(own: str, groups: dict[str, dict[str, str]]) -> dict[str, str]:
    files = {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": V2_MOUNT}
    for directory, held in groups.items():
        files |= {f"{directory}/{name}": text for name, text in held.items()}
    return files


ROOT = {"cgroup.controllers": "cpu memory pids\n", "cgroup.subtree_control": "cpu memory\n"}

# One row per machine: its files, and the group that a new one is made in; or words of the
# reason why there is none.
SITES: dict[str, tuple[dict[str, str], tuple[int, str, bool] | str]] = {
    "v1, below the own group": (
        {
            "proc/self/cgroup": "4:cpu:/batch/job 1\n0::/\n",
            "proc/self/mountinfo": V1_MOUNT,
            "sys/fs/cgroup/cpu/batch/job 1/cpu.cfs_quota_us": "-1\n",
        },
        (1, "sys/fs/cgroup/cpu/batch/job 1", False),
    ),
    "v2, the real root hands out cpu": (v2("/", {TOP: ROOT}), (2, TOP, False)),
    "v2, the real root does not yet": (
        v2("/", {TOP: ROOT | {"cgroup.subtree_control": "memory\n"}}),
        (2, TOP, True),
    ),
    "v2, the own group hands out cpu": (
        v2("/user.slice", {TOP: ROOT, USER: LEAF | {"cgroup.subtree_control": "cpu\n"}}),
        (2, USER, False),
    ),
    "v2, a login session below a slice that does": (
        v2(
            "/user.slice/session-1.scope",
            {TOP: ROOT, USER: LEAF | {"cgroup.subtree_control": "cpu\n"}, SESSION: LEAF},
        ),
        (2, USER, False),
    ),
    "v2, a session with a limit that must hold": (
        v2(
            "/user.slice/session-1.scope",
            {
                TOP: ROOT,
                USER: LEAF | {"cgroup.subtree_control": "cpu\n"},
                SESSION: LEAF | {"cpu.max": "50000 100000\n"},
            },
        ),
        "limits of its own",
    ),
    "v2, a session with a memory limit": (
        v2(
            "/user.slice/session-1.scope",
            {
                TOP: ROOT,
                USER: LEAF | {"cgroup.subtree_control": "cpu\n"},
                SESSION: LEAF | {"memory.max": "1048576\n"},
            },
        ),
        "limits of its own",
    ),
    "v2, a container's own root with processes in it": (
        v2("/", {TOP: LEAF | {"cgroup.controllers": "cpu memory\n"}}),
        "passes the cpu controller to its children",
    ),
    "no control groups": ({"proc/self/mountinfo": ""}, "no control group of its own"),
    "no mount": (
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": ""},
        "no control group of its own",
    ),
}


def captured(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("machine", SITES)
def test_the_place_of_a_new_group(machine: str, tmp_path: Path) -> None:
    files, expected = SITES[machine]
    root = captured(tmp_path, files)

    if isinstance(expected, str):
        with pytest.raises(NoGroupError) as caught:
            find_site(root)
        assert expected in caught.value.reason
        assert "\n" not in caught.value.reason
    else:
        version, parent, hands_out_cpu = expected
        assert find_site(root) == Site(
            version=version, parent=root / parent, hands_out_cpu=hands_out_cpu
        )


def test_version_2_is_written_and_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root is told to hand the controller out only as long as the group is there."""
    files, _ = SITES["v2, the real root does not yet"]
    root = captured(tmp_path, files)
    # The kernel's files go with their directory; a real one must be emptied.
    monkeypatch.setattr(groups, "_remove_empty", shutil.rmtree)

    with quota_group(0.5, root=root) as group:
        assert (root / TOP / "cgroup.subtree_control").read_text() == "+cpu"
        assert group.directory.parent == root / TOP
        assert (group.directory / "cpu.max").read_text() == "50000 100000"
        assert group.limit.cpus == 0.5
        assert group.limit.source == str(group.directory / "cpu.max")

    assert not group.directory.exists()
    assert (root / TOP / "cgroup.subtree_control").read_text() == "-cpu"


def test_a_group_of_that_name_is_left_alone(tmp_path: Path) -> None:
    files, _ = SITES["v2, the real root hands out cpu"]
    theirs = captured(tmp_path, files) / TOP / f"safepool-demo-{os.getpid()}"
    theirs.mkdir()

    with pytest.raises(NoGroupError, match="there already"), quota_group(1, root=tmp_path):
        pass

    assert theirs.is_dir()


def test_a_group_that_does_not_go_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = SITES["v2, the real root hands out cpu"]
    monkeypatch.setattr(groups, "_EMPTY_WITHIN_S", 0.05)

    # A captured machine's directory keeps its files, so it cannot be removed.
    with pytest.raises(GroupLeftError) as caught, quota_group(1, root=captured(tmp_path, files)):
        pass

    assert f"rmdir {caught.value.directory}" in str(caught.value)


JOIN_AND_SPIN = """\
import sys
from safepool.limits import read_limits
with open(sys.argv[1], "w") as file:
    file.write("0")
print(read_limits().cpu_quota, flush=True)
while True:
    pass
"""


@needs_groups
def test_the_group_is_real_and_ends_with_all_that_is_in_it() -> None:
    """A process that has joined is under the quota, and is killed with the group."""
    with quota_group(0.25) as group:
        joined = subprocess.Popen(
            [sys.executable, "-c", JOIN_AND_SPIN, str(group.members_file)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert joined.stdout is not None
        assert float(joined.stdout.readline()) == 0.25
        assert group.members_file.read_text().split() == [str(joined.pid)]
        support_cgroups.come_first(group.directory)
        throttling = wait_until_throttled(group)

    assert not group.directory.exists()
    joined.stdout.close()
    assert joined.wait(timeout=60) == -9
    assert 0 < throttling.throttled_periods <= throttling.periods
    assert throttling.throttled_us > 0
    assert group.throttling() is None


def wait_until_throttled(group: groups.QuotaGroup) -> Throttling:
    """One process that spins has more than a quarter of a CPU at once, where it comes first."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        throttling = group.throttling()
        if throttling is not None and throttling.throttled_us:
            return throttling
        time.sleep(0.02)
    pytest.fail("the kernel never froze the group")


@needs_groups
def test_the_group_goes_when_the_block_raises() -> None:
    made = []

    def be_interrupted_inside() -> None:
        with quota_group(1) as group:
            made.append((group.directory, group.directory.is_dir()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted_inside()

    [(directory, was_there)] = made
    assert was_there
    assert not directory.exists()


@needs_groups
def test_more_than_the_groups_above_allow_is_refused() -> None:
    """Version 1 lets no group have more than its parent: no group, and a reason."""
    code = (
        "from safepool.cli import demo\n"
        "groups = demo.host().groups\n"
        "try:\n"
        "    with groups.quota_group(1) as group:\n"
        "        print('made')\n"
        "except groups.NoGroupError as error:\n"
        "    print(error.reason)\n"
    )
    with support_cgroups.control_group(cpus=0.5) as outer:
        if outer.version == 2:
            pytest.skip("version 2 lets a group be configured above its parent")
        said = outer.run(code)
        left = [path.name for path in outer.cpu.iterdir() if path.is_dir()]

    assert "the groups around it do not allow it" in said
    assert left == []
