"""The wheel, not the tree: built, installed into a fresh environment, used from there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Without isolation the build needs no network: the backend has to be there already.
BUILD_TOOLS = ("build", "hatchling")

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(tool) for tool in BUILD_TOOLS),
    reason=f"building the wheel offline needs {' and '.join(BUILD_TOOLS)}",
)

SNIPPET = """
from concurrent.futures import Executor, Future

import safepool


def double(number: int) -> int:
    return 2 * number


def run(pool: Executor) -> Future[int]:
    return pool.submit(double, 21)


def main() -> int:
    with safepool.ProcessPool() as pool:
        return run(pool).result() + sum(pool.map(double, [1, 2])) + safepool.cpu_count()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A virtual environment that holds the wheel.

    Attributes:
        bin: Its folder of commands.
        site: Its folder of packages.
    """

    bin: Path
    site: Path

    def run(self, *command: str | Path, cwd: Path) -> str:
        """Run one of its commands away from the tree, and return what it printed."""
        name, *arguments = command
        return run([self.bin / name, *arguments], cwd=cwd)


def run(command: list[str | Path], *, cwd: Path) -> str:
    """Run a command without the tree on its path; a failure shows its output."""
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel once."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel; its dependencies are those of the running environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig as s; print(s.get_path('purelib'))"],
                    cwd=folder).strip())  # fmt: skip
    # A .pth file adds a folder behind the environment's own, and runs none of its .pth files:
    # an editable install of the tree in there stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
         "--no-index", "--disable-pip-version-check", wheel],
        cwd=folder,
    )  # fmt: skip
    return Installed(bin=folder / "bin", site=site)


def test_the_package_comes_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    """Every module that the tree has is in the wheel, with the marker of a typed package."""
    place = installed.run(
        "python", "-c", "import safepool; print(safepool.__file__)", cwd=tmp_path
    )
    package = installed.site / "safepool"

    assert Path(place.strip()) == package / "__init__.py"
    shared = {f"cli/host/{name}" for name in _files(ROOT / "benchmarks" / "host")}
    assert _files(package) == _files(ROOT / "safepool") | shared
    assert (package / "py.typed").exists()


def test_the_demo_finds_its_quota_and_its_picture(installed: Installed, tmp_path: Path) -> None:
    code = (
        "from safepool.cli import demo; print(demo.host().__file__, demo.host().draw.__module__)"
    )
    place = installed.site / "safepool" / "cli" / "host" / "__init__.py"

    said = installed.run("python", "-c", code, cwd=tmp_path)

    assert said.split() == [str(place), "safepool.cli.host.plot"]


def test_nothing_but_the_package_is_in_the_wheel(wheel: Path) -> None:
    """No top-level `tests` or `benchmarks` lands in a user's site-packages."""
    listing = run([sys.executable, "-m", "zipfile", "--list", wheel], cwd=wheel.parent)
    names = [line.split()[0] for line in listing.splitlines()[1:]]

    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"safepool"}


def test_the_version_is_said_once(installed: Installed, tmp_path: Path) -> None:
    """The metadata and the package agree."""
    code = (
        "import importlib.metadata, safepool\n"
        "print(importlib.metadata.version('safepool'), safepool.__version__)"
    )

    in_metadata, in_package = installed.run("python", "-c", code, cwd=tmp_path).split()

    assert in_metadata == in_package


def test_the_command_works(installed: Installed, tmp_path: Path) -> None:
    """The entry point is installed, and leads to the command."""
    assert "safepool" in installed.run("safepool", "--help", cwd=tmp_path)


def test_a_pool_works_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    """Workers start without the tree."""
    code = (
        "import safepool\n"
        "with safepool.ProcessPool(1) as pool:\n"
        "    print(pool.submit(abs, -42).result())"
    )

    assert installed.run("python", "-c", code, cwd=tmp_path).strip() == "42"


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_a_users_program_type_checks_strictly(installed: Installed, tmp_path: Path) -> None:
    """The installed package carries its types."""
    program = tmp_path / "program.py"
    program.write_text(SNIPPET)
    python = installed.bin / "python"

    output = run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, program],
        cwd=tmp_path,
    )

    assert "no issues found" in output


def _files(package: Path) -> set[str]:
    return {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
