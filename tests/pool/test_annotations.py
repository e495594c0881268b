"""Annotations and type aliases of a script arrive, and are not evaluated in order to be sent."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from support_programs import run_program

if TYPE_CHECKING:
    from pathlib import Path

# The usual style from Python 3.14 on: what only the type checker knows, without quotes.
UNKNOWN = """
import annotationlib, dataclasses, typing
if typing.TYPE_CHECKING:
    from decimal import Decimal
class Known: pass
class Account:
    balance: Decimal
    owner: Known
    def add(self, more: Decimal, by: Known) -> Account:
        return more
class Child(Account):
    __slots__ = ()
    def back(self, other: Child) -> Decimal: ...
@dataclasses.dataclass
class Row:
    account: Account
    seen: typing.ClassVar[int] = 3
    amount: Decimal | None = None
def around(kind):
    class Inner:
        it: kind
        def get(self, other: kind): ...
    return Inner
Inner = around(Known)
class Pair[T]:
    first: T
    def get(self, other: T) -> T: ...
def add(account: Account, more: Decimal) -> Decimal:
    return more
def name_of(one):
    return getattr(one, "__forward_arg__", None) or getattr(one, "__name__", repr(one))
def look():
    forward = annotationlib.Format.FORWARDREF
    seen = []
    for thing in (Account, Account.add, Child.back, Row, Row.__init__, Inner, Inner.get, Pair,
                  Pair.get, add):
        found = annotationlib.get_annotations(thing, format=forward)
        seen.append({name: name_of(one) for name, one in found.items()})
    assert annotationlib.get_annotations(Account.add, format=forward)["by"] is Known
    assert annotationlib.get_annotations(Account, format=forward)["owner"] is Known
    assert [field.name for field in dataclasses.fields(Row)] == ["account", "amount"]
    return seen
def told(pool):
    assert pool.submit(add, Account(), 3).result() == 3
    assert pool.submit(add, Account(), 3).result() == 3
    assert pool.submit(Account().add, 4, None).result() == 4
    assert type(pool.submit(lambda: Row(Account())).result()) is Row
    assert pool.submit(look).result() == look(), (pool.submit(look).result(), look())
"""

# Python 3.12.
ALIASES = """
import typing
type Vec = list[int]
type Tree = dict[str, Tree | None]
type Pairs[T] = list[tuple[T, T]]
type Late = NotYet
type Nested[T] = T | list[Nested[T]]
type One[T: (int, str)] = list[Two[T]]
type Two[T] = dict[str, One[T]]
class Node[T: Node]:
    def get(self, x: T) -> Two[T]: return Node.__type_params__[0].__bound__ is Node
class Box[T]:
    def put(self, x: T) -> Vec: return [x]
def total(numbers: Vec, more: Tree | None = None) -> int: return sum(numbers)
def values(): return Vec.__value__, Tree.__value__, Pairs.__value__, Pairs[int], Vec.__name__
def is_own(vec=Vec): return vec is Vec
def back(): return Vec, Tree, Pairs
def nested(x: Nested[int], y: One[int]):
    number, more = Nested.__value__.__args__
    assert number is Nested.__type_params__[0] is more.__args__[0].__args__[0]
    return repr(One.__value__), One.__type_params__[0].__constraints__, Two.__name__
def late(x: Late) -> Late: return x
def inside():
    type Own = set[int]
    def use(x: Own) -> str: return repr(Own.__value__)
    return use
def told(pool):
    assert pool.submit(total, [1, 2]).result() == 3
    assert repr(pool.submit(values).result()) == repr(values())
    assert pool.submit(is_own).result()
    assert [one is two for one, two in zip(pool.submit(back).result(), back())] == [True] * 3
    assert pool.submit(late, 1).result() == 1
    assert pool.submit(nested, 1, 2).result() == nested(1, 2)
    assert pool.submit(Node().get, 1).result()
    assert pool.submit(inside(), 1).result() == "set[int]"
    assert pool.submit(Box().put, 1).result() == [1]
"""

# The version that each needs.
PROGRAMS = {"unknown": ((3, 14), UNKNOWN), "aliases": ((3, 12), ALIASES)}
END = """
import gc
from safepool import ProcessPool
gc.freeze()
with ProcessPool(1) as pool:
    told(pool)
print("right")
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(name, marks=pytest.mark.skipif(sys.version_info < needs, reason="syntax"))
        for name, (needs, _) in PROGRAMS.items()
    ],
)
def test_they_arrive(program: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROGRAMS[program][1] + END)
    done = run_program("script.py", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("right\n", "")
