"""Floor 1, limits: variables of the environment about CPUs.

The module sets nothing and decides nothing.

Schedulers and other libraries set the number of CPUs that a job may use; such a number only lowers
the number of workers. Only `SAFEPOOL_MAX_WORKERS` replaces the computed number.

Not covered:
    * ``OMP_NUM_THREADS`` and similar variables: threads of one process, not workers.
    * ``SLURM_CPUS_ON_NODE`` and ``SLURM_JOB_CPUS_PER_NODE``: of the job, not of this task.
    * ``GOMAXPROCS``, ``DOTNET_PROCESSOR_COUNT``, ``RAYON_NUM_THREADS``: other run times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from safepool.errors import UnreadableLimitError
from safepool.limits._types import Limit, Skipped


class BoundVariable(NamedTuple):
    """A variable with an upper bound.

    Attributes:
        no_ceiling: A word that sets no ceiling, if the variable has one.
    """

    name: str
    set_by: str
    documented: str
    no_ceiling: str | None = None


BOUNDS = (
    BoundVariable(
        name="LOKY_MAX_CPU_COUNT",
        set_by="users of loky and joblib",
        documented="loky, README, `loky.cpu_count`",
    ),
    BoundVariable(
        name="PYTHON_CPU_COUNT",
        set_by="users of Python 3.13 and later",
        documented="Python, Command line and environment, PYTHON_CPU_COUNT",
        no_ceiling="default",
    ),
    BoundVariable(
        name="SLURM_CPUS_PER_TASK",
        set_by="Slurm, if --cpus-per-task was given",
        documented="Slurm, srun, OUTPUT ENVIRONMENT VARIABLES",
    ),
    BoundVariable(
        name="PBS_NCPUS",
        set_by="OpenPBS: ncpus of the job on this host",
        documented="PBS Professional User's Guide, Environment Variables",
    ),
    BoundVariable(
        name="LSB_DJOB_NUMPROC",
        set_by="LSF: slots of the job",
        documented="IBM Spectrum LSF, Environment variables set for job execution",
    ),
    BoundVariable(
        name="NSLOTS",
        set_by="Grid Engine: slots of a parallel job",
        documented="Grid Engine, qsub(1), ENVIRONMENTAL VARIABLES",
    ),
)

# The name under which Python keeps `-X cpu_count=4`, and how it is shown.
X_OPTION = "-X cpu_count"

EXACT_WORKERS = "SAFEPOOL_MAX_WORKERS"

# Nine digits: more CPUs than any machine has, and far from where int() takes long.
_COUNT = re.compile(r"\s*0*([1-9][0-9]{0,8})\s*", re.ASCII)


def parse_count(text: str, *, source: str) -> int:
    """Parse a variable that holds a number of CPUs or workers.

    Args:
        text: A positive whole number.
        source: The variable's name. Kept in the error.

    Returns:
        The number.

    Raises:
        UnreadableLimitError: The text has another form: empty, zero, negative, ``24(x2)``.

    Example:
        >>> parse_count("4", source="SLURM_CPUS_PER_TASK")
        4
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise UnreadableLimitError(source, text, "a positive whole number")
    return int(match[1])


def read_environment(
    environ: Mapping[str, str], x_options: Mapping[str, str | bool]
) -> tuple[tuple[Limit, ...], Limit | None, tuple[Skipped, ...]]:
    """Read every variable of the table.

    Returns:
        The upper bounds in the order of the table, the exact number of workers if one is
        set, and what could not be used.

    Example:
        >>> bounds, exact, skipped = read_environment({"NSLOTS": "4", "PBS_NCPUS": "x"}, {})
        >>> bounds[0].cpus, exact, skipped[0].source
        (4.0, None, 'PBS_NCPUS')
    """
    skipped: list[Skipped] = []
    bounds: list[Limit] = []
    for variable in BOUNDS:
        text = environ.get(variable.name)
        if text is not None and (variable.no_ceiling is None or text != variable.no_ceiling):
            bounds.extend(_limit(variable.name, text, skipped))
    option = x_options.get("cpu_count")
    if option is not None and option != "default":
        bounds.extend(_limit(X_OPTION, str(option), skipped))
    text = environ.get(EXACT_WORKERS)
    exact = _limit(EXACT_WORKERS, text, skipped) if text is not None else []
    return tuple(bounds), exact[0] if exact else None, tuple(skipped)


def _limit(name: str, text: str, skipped: list[Skipped]) -> list[Limit]:
    try:
        count = parse_count(text, source=name)
    except UnreadableLimitError as error:
        found = text if len(text) <= 80 else text[:77] + "..."
        reason = f"expected {error.expected}, found {found!r}"
        skipped.append(Skipped(source=name, reason=reason, was_set=True))
        return []
    return [Limit(name=name, cpus=float(count), source=name, raw=text)]
