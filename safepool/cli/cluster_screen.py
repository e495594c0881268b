"""Floor 7: ``safepool --cluster ADDRESS``: each node's limits, in the form of `limits_screen`.

A Dask worker of each node reads the limits, so the limits are those of a ``ClusterPool``'s calls
there. The command gives up after `_CONNECT_S` seconds without a scheduler, and after `_ANSWER_S`
seconds without a node. The exit code is 1 if a node has a problem, and 2 if no node was found.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import safepool
from safepool.cli.colour import paint_for
from safepool.cli.limits_screen import Screen, ScreenError, read_screen
from safepool.cli.text import as_ascii, counted, json_of
from safepool.cluster.carriers.dask import connect
from safepool.cluster.pool import ClusterPool

if TYPE_CHECKING:
    from safepool.cluster import NodeInfo

_CONNECT_S = 10.0
_ANSWER_S = 10.0
# The same as on a screen of this machine.
_SAMPLE_S = 0.3


def run(address: str, *, as_json: bool) -> int:
    """Print the limits of each node.

    Returns:
        The exit code: 1 if a node has a problem.

    Raises:
        MissingExtraError: Dask is not installed.
        ScreenError: No scheduler or no node was found.
    """
    try:
        client = connect(address, timeout_s=_CONNECT_S)
    except (OSError, ValueError, TypeError) as error:
        raise ScreenError(
            f"cannot connect to a Dask scheduler at {as_ascii(address)}: "
            f"{as_ascii(str(error)) or type(error).__name__}. Pass the address that the "
            "scheduler writes when it starts, such as tcp://10.0.0.1:8786"
        ) from error
    with client, ClusterPool(client) as pool:
        shell = pool._scheduler
        shell.begin()
        shell.wait_for_answers(_ANSWER_S)
        nodes = {node.name: node for node in pool.nodes()}
        answers = shell.ask(read_node, timeout_s=_ANSWER_S)
        unused = shell.unused_places()
    if not nodes:
        told = as_ascii("; ".join(f"{place}: {why}" for place, why in unused.items()))
        where = as_ascii(address)
        raise ScreenError(
            f"the Dask scheduler at {where} has no worker that can be used "
            f"({told or 'it lists none'}). Start one with: dask worker {where}"
        )
    screens = {name: answer for name, answer in answers.items() if isinstance(answer, Screen)}
    unused |= {nodes[name].place: str(answers[name]) for name in answers.keys() - screens.keys()}
    if as_json:
        print(_as_json(nodes, screens, unused))
    else:
        print(_as_text(nodes, screens, unused))
    return 1 if any(screen.has_problem for screen in screens.values()) else 0


def read_node(_pool: object) -> Screen:
    """Read the limits of the process of an agent. On a node."""
    return read_screen(sample_s=_SAMPLE_S)


def _as_json(
    nodes: dict[str, NodeInfo], screens: dict[str, Screen], unused: dict[str, str]
) -> str:
    told = [
        {
            "place": nodes[name].place,
            "name": name,
            "workers": nodes[name].workers,
            **screen.as_object(),
        }
        for name, screen in screens.items()
    ]
    return json_of({"version": safepool.__version__, "nodes": told, "unused": unused})


def _as_text(
    nodes: dict[str, NodeInfo], screens: dict[str, Screen], unused: dict[str, str]
) -> str:
    paint = paint_for(sys.stdout, os.environ)
    parts = [screen.as_text(paint, who=f"node {as_ascii(n)}") for n, screen in screens.items()]
    workers = sum(nodes[name].workers for name in screens)
    lines = [f"ClusterPool: {counted(workers, 'worker')} on {counted(len(screens), 'node')}"]
    lines += [f"   {as_ascii(place)} is not used: {as_ascii(w)}" for place, w in unused.items()]
    return "\n\n".join([*parts, "\n".join(lines)])
