"""Variables that each worker has for itself, by its place in the pool: ``env=``, ``gpus=``."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from safepool.arguments import ENVIRONMENT, check
from safepool.limits.gpus import read_gpus
from safepool.machine import tell_once

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Variables computed with the pool, so that an error is raised there; those of later workers are
# computed later.
_MOST_AHEAD = 256
# More than any machine has: a number is taken at its word where no device can be counted.
_MOST_DEVICES = 4096


class Variables:
    """Variables of single workers, in addition to those of all workers.

    Args:
        devices: By variable, its values in the first, second, ... worker, and again from the
            first.
        function: The caller's function, whose variables take precedence. Called once for each
            place, here in the program.
    """

    def __init__(
        self,
        devices: Mapping[str, Sequence[str]],
        function: Callable[[int], Mapping[str, str]] | None,
    ) -> None:
        self._devices = devices
        self._function = function
        self._known: dict[int, dict[str, str]] = {}

    def prepare(self, workers: int) -> None:
        """Compute the variables of ``workers`` workers, in the calling thread.

        Raises:
            TypeError: The function returned no mapping of text to text.
            ValueError: The function returned something that cannot be an environment.
            Exception: The function raised that.
        """
        for place in range(min(workers, _MOST_AHEAD)):
            self.of(place)

    def of(self, place: int) -> dict[str, str]:
        """Return the variables of the worker that has this place; raises as :meth:`prepare`."""
        found = self._known.get(place)
        if found is None:
            found = {name: ids[place % len(ids)] for name, ids in self._devices.items()}
            if self._function is not None:
                found |= self._ask(self._function, place)
            self._known[place] = found
        return found

    def _ask(self, function: Callable[[int], Mapping[str, str]], place: int) -> Mapping[str, str]:
        try:
            said = function(place)
        except Exception as error:
            error.add_note(
                f"raised by env({place}), the function that returns a worker's variables"
            )
            raise
        check(f"env({place})", said, ENVIRONMENT)
        return said


def devices_of(gpus: Literal["auto"] | int | Sequence[int | str]) -> dict[str, tuple[str, ...]]:
    """Return, by variable, the values for each worker.

    Args:
        gpus: The same as for :class:`safepool.ProcessPool`.

    Raises:
        ValueError: The system has fewer devices than ``gpus``.
    """
    found = read_gpus(os.environ)
    lists = {name: ids for name, ids in found.lists.items() if ids}
    if gpus == "auto":
        if not lists:
            tell_once(
                f'gpus="auto" finds no GPU in {found.source}. Workers see the same devices as '
                "this program. Pass gpus= a list of devices if there are GPUs"
            )
        return lists
    if not isinstance(gpus, Sequence):
        count = operator.index(gpus)
        seen = min((len(ids) for ids in lists.values()), default=0)
        if seen < count and (lists or found.is_said):
            raise ValueError(
                f"gpus must be at most {seen}, the devices in {found.source}, not {count}. Pass "
                "a list to name devices yourself"
            )
        if lists:
            return {name: ids[:count] for name, ids in lists.items()}
        gpus = range(min(count, _MOST_DEVICES))
    return dict.fromkeys(lists or found.lists, tuple(str(device) for device in gpus))
