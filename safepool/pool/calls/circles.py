"""A directed graph in the order of what leads to what, circles in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_N = TypeVar("_N")


def components(edges: Mapping[_N, Sequence[_N]]) -> list[list[_N]]:
    """Return the nodes in cycles, each cycle after the cycles that it leads to.

    Source:
        R. Tarjan, Depth-first search and linear graph algorithms, 1972.

    Example:
        >>> components({"a": ["b"], "b": ["c"], "c": ["b"], "d": []})
        [['b', 'c'], ['a'], ['d']]
    """
    found: list[list[_N]] = []
    number: dict[_N, int] = {}
    lowest: dict[_N, int] = {}
    path: list[_N] = []
    done: set[_N] = set()
    for start in edges:
        todo = [] if start in number else [(start, iter(edges[start]))]
        while todo:
            node, others = todo[-1]
            if node not in number:
                number[node] = lowest[node] = len(number)
                path.append(node)
            for other in others:
                if other not in number:
                    todo.append((other, iter(edges[other])))
                    break
                if other not in done:
                    lowest[node] = min(lowest[node], number[other])
            else:
                todo.pop()
                if todo:
                    above = todo[-1][0]
                    lowest[above] = min(lowest[above], lowest[node])
                if lowest[node] == number[node]:
                    place = path.index(node)
                    found.append(path[place:])
                    done.update(path[place:])
                    del path[place:]
    return found
