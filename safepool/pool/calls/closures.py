"""Names that other names of the script lead to: found, pickled and sent in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepool.errors import let_handlers_pass
from safepool.pool.calls.deliveries import Delivery, Needs, versions
from safepool.pool.calls.table import Added, Closure, Table, imports_of_script
from safepool.pool.calls.values import definitions, pickle_additions
from safepool.pool.calls.walk import QUIET_BYTES, UNASKED_S, Walk, components, entries, linked
from safepool.pool.hands import within
from safepool.transport.additions import additions_to, homes
from safepool.transport.marks import main_space

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.pool.calls.known import Known

# Markers for a name without an object.
_IMPORTS, _MISSING = "import", "del"
ADDED = "with"
"""The same, of what the script has put into modules."""


def close(table: Table, roots: frozenset[str]) -> Closure:
    """Find the objects that names lead to."""
    if table.imports is None or len(main_space()) != table.look_at:
        _look_beside(table)
    walk = Walk(table)
    walk.go(roots)
    if table.added is not None:
        walk.go_if_possible(table.added.names)
    walk.finish()
    known = _in_order(table, walk.reached)
    deliveries = [*table.beside, *(one.delivery for one in known)]
    if table.added is not None:
        deliveries.append(table.added.delivery)
    needs = Needs(dict.fromkeys(deliveries))
    # A class tells of changes of what it has not: a path that is gone needs no check of its own.
    checked = {path for one in known if one.attributes for path in one.attributes.by_path}
    return Closure(
        [one for one in known if not one.is_deleted_attribute or one.names[0] in checked],
        frozenset(walk.absent),
        table.beside,
        needs,
    )


def _look_beside(table: Table) -> None:
    """Look at the namespace as a whole: it has other names than at the last look."""
    size = len(main_space())
    imports = imports_of_script()
    beside: list[Delivery] = []
    if not table.main:
        new = Delivery(next(versions), (_IMPORTS,), (0,), {"imports": imports})
        beside.append(table.beside[0] if table.imports == imports else new)
    walk = Walk(table, quiet=True)
    walk.go(definitions())
    walk.finish()
    known = _in_order(table, walk.reached)
    beside += [one.delivery for one in known if one.delivery.size_bytes < QUIET_BYTES]
    if walk.missing:
        told = {"missing": walk.missing}
        beside.append(Delivery(next(versions), (_MISSING,), (0,), told))
    table.imports, table.beside = imports, tuple(beside)  # together: the walk may have failed
    if not table.main:
        _look_for_additions(table, imports)
    table.look_at = size


def _look_for_additions(table: Table, imports: list[str]) -> None:
    found = {one.place: one for one in additions_to(homes(imports))}
    before = {} if table.added is None else table.added.numbers
    if found.keys() == before.keys():
        return
    table.added = None
    numbers = {place: before.get(place) or next(versions) for place in found}
    what = {numbers[place]: one for place, one in found.items()}
    try:
        pickled, names, shared = within(UNASKED_S, lambda: pickle_additions(what))
    except Exception as error:  # noqa: BLE001 -- it takes too long
        let_handlers_pass(error)
        return
    delivery = Delivery(next(versions), (ADDED,), (0,), {"added": True}, [pickled], shared)
    table.added = Added((*found.values(),), numbers, names, delivery) if found else None


def _in_order(table: Table, reached: Iterable[str]) -> list[Known]:
    """Return what some names are pickled in, what others need to be loaded before those.

    That is what they refer to, and if possible what their functions use: a class may run
    code when it is made.
    """
    known = entries(table, reached)
    ordered: list[Known] = []
    edges = {one: linked(known, one, one.refs | one.uses) for one in known.values()}
    for circle in components(edges):
        inside = {name: one for one in circle for name in one.names}
        for (one,) in components({one: linked(inside, one, one.refs) for one in circle}):
            ordered.append(one)
    return ordered


def find_additions() -> bool:
    """Tell whether the script has put something into modules."""
    return bool(additions_to(homes(imports_of_script())))
