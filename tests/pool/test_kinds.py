"""Every kind of class and object that a script has works by value, as under a fork.

The program asks itself what is right: it does the same in its own process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support_programs import run_program

if TYPE_CHECKING:
    from pathlib import Path

# Of each class: how an instance is made, and what there is to see of it and of its class.
CLASSES = """
import sys, abc, enum, typing, dataclasses, collections, ctypes, functools, types
import weakref, contextlib, asyncio, datetime


class Slots:
    __slots__ = ("x", "__y")

    def __init__(self, x):
        self.x = x
        self.__y = x

    def y(self):
        return self.__y


class StrSlot:
    __slots__ = "__only"

    def __init__(self):
        self.__only = 1

    def get(self):
        return self.__only


class DictSlot:
    __slots__ = {"a": "doc of a"}

    def __init__(self):
        self.a = 1


class Both(Slots):
    __slots__ = ("__dict__", "__weakref__", "z")

    def __init__(self, x):
        super().__init__(x)
        self.z = 3
        self.free = 4


class Empty(Slots):
    __slots__ = ()


class Sub(Slots):
    pass


@dataclasses.dataclass(slots=True, frozen=True)
class Frozen:
    a: int
    b: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, weakref_slot=True, kw_only=True)
class Weak:
    a: int = 1


class NT(typing.NamedTuple):
    a: int
    b: str = "b"

    def both(self):
        return self.a, self.b


T = typing.TypeVar("T")


class GNT(typing.NamedTuple, typing.Generic[T]):
    a: T


CNT = collections.namedtuple("CNT", "x y", defaults=[2])


class SubNT(CNT):
    __slots__ = ()

    def total(self):
        return self.x + self.y


class Color(enum.Enum):
    RED = 1
    GREEN = "g"
    CRIMSON = 1

    def show(self):
        return self.name.lower()


class Planet(enum.Enum):
    EARTH = (5.97, 6.37)
    MARS = (0.64, 3.39)

    def __init__(self, mass, radius):
        self.mass, self.radius = mass, radius

    @property
    def density(self):
        return self.mass / self.radius


class Coord(bytes, enum.Enum):
    def __new__(cls, value, label):
        obj = bytes.__new__(cls, [value])
        obj._value_ = value
        obj.label = label
        return obj

    PX = (1, "P.X")
    PY = (2, "P.Y")


class Perm(enum.Flag):
    R = enum.auto()
    W = enum.auto()
    RW = R | W


class IPerm(enum.IntFlag, boundary=enum.KEEP):
    A = 1
    B = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Name(enum.StrEnum):
    A = enum.auto()


class Point3(tuple, enum.Enum):
    ORIGIN = (0, 0)


class WithMissing(enum.Enum):
    X = 1

    @classmethod
    def _missing_(cls, v):
        return cls.X


class Unhash(enum.Enum):
    L = [1]


class BaseE(enum.Enum):
    def __init__(self, *a):
        self.extra = a


class DerE(BaseE):
    ONE = 1, 2


class G(typing.Generic[T]):
    def __init__(self, x):
        self.x = x


class GI(G[int]):
    pass


class Proto(typing.Protocol):
    def go(self) -> int: ...


@typing.runtime_checkable
class RProto(typing.Protocol):
    def go(self) -> int: ...


class Impl(Proto):
    def go(self):
        return 3


class Abstract(abc.ABC):
    @abc.abstractmethod
    def f(self): ...
    @property
    @abc.abstractmethod
    def p(self): ...


class Concrete(Abstract):
    def f(self):
        return 1

    @property
    def p(self):
        return 2


class Registered:
    pass


Abstract.register(Registered)


class TD(typing.TypedDict, total=False):
    a: int


class KW:
    kinds = {}

    def __init_subclass__(cls, *, kind, **kw):
        super().__init_subclass__(**kw)
        cls.kind = kind
        KW.kinds[kind] = cls.__name__


class KWChild(KW, kind="k"):
    __slots__ = ("v",)

    def __init__(self):
        self.v = 1


class Meta(type):
    def __new__(m, n, b, ns, *, tag, **kw):
        c = super().__new__(m, n, b, ns)
        c.tag = tag
        return c

    def __init__(c, *a, **k):
        pass

    def __call__(cls, *a):
        o = super().__call__(*a)
        o.called = True
        return o


class Metad(metaclass=Meta, tag=5):
    pass


class Strict(type):
    def __setattr__(cls, n, v):
        raise AttributeError("frozen class")


class StrictC(metaclass=Strict):
    x = 1


class Interned:
    made = {}
    count = 0

    def __new__(cls, n):
        if n not in cls.made:
            cls.made[n] = one = super().__new__(cls)
            one.n = n
            cls.count += 1
        return cls.made[n]

    def __reduce__(self):
        return Interned, (self.n,)


Interned("early")


class HeldWeakly:
    made = weakref.WeakValueDictionary()

    def __new__(cls, n):
        one = cls.made.get(n)
        if one is None:
            cls.made[n] = one = super().__new__(cls)
            one.n = n
        return one

    def __reduce__(self):
        return HeldWeakly, (self.n,)


held = HeldWeakly("held")


class Lonely:
    one = None

    def __new__(cls):
        if cls.one is None:
            cls.one = super().__new__(cls)
            cls.one.tag = "the one"
        return cls.one


Lonely()


class Needs(type):
    def __new__(m, n, b, ns):
        if b and "field" not in ns:
            raise TypeError("field needed")
        return super().__new__(m, n, b, ns)


class NeedsBase(metaclass=Needs):
    pass


class NeedsC(NeedsBase):
    field = 1


class ABCKw(abc.ABC):
    def __init_subclass__(cls, *, name):
        cls.name = name


class ABCChild(ABCKw, name="n"):
    pass


class St(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("a", ctypes.c_char), ("b", ctypes.c_int), ("c", ctypes.c_int * 3)]

    def total(self):
        return self.b + sum(self.c)


class Un(ctypes.Union):
    _fields_ = [("i", ctypes.c_int), ("f", ctypes.c_float)]


class Anon(ctypes.Structure):
    _anonymous_ = ("u",)
    _fields_ = [("u", Un), ("k", ctypes.c_int)]


class Node(ctypes.Structure):
    pass


Node._fields_ = [("value", ctypes.c_int), ("next", ctypes.POINTER(Node))]


class Big(ctypes.BigEndianStructure):
    _fields_ = [("x", ctypes.c_uint16)]


Made = type("Made", (), {"x": 1, "get": lambda self: self.x})


class Desc:
    def __set_name__(self, o, n):
        self.n = "_" + n

    def __get__(self, o, t=None):
        return self if o is None else getattr(o, self.n, None)

    def __set__(self, o, v):
        setattr(o, self.n, v)


class HasDesc:
    d = Desc()
    __slots__ = ("_d",)

    def __init__(self):
        self.d = 4


class Weaks:
    seen = weakref.WeakKeyDictionary()
    vals = weakref.WeakValueDictionary()
    ws = weakref.WeakSet()

    def __init__(self):
        Weaks.seen[self] = 1
        Weaks.vals["a"] = self
        Weaks.ws.add(self)


class Outer:
    class Inner:
        def __init__(self):
            self.x = 1

    part = functools.partialmethod(lambda self, a, b: (a, b), 1)

    @staticmethod
    def s():
        return 1

    @classmethod
    def c(cls):
        return cls.__qualname__

    @functools.cached_property
    def cp(self):
        return 5

    @property
    def p(self):
        return 6

    @p.setter
    def p(self, v):
        pass


class Child(Outer):
    def c2(self):
        return super().c()


class Num(int):
    __slots__ = ()

    def twice(self):
        return self * 2


class Dt(datetime.datetime):
    pass


class GetState:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1

    def __getstate__(self):
        return {"a": self.a}

    def __setstate__(self, s):
        self.a = s["a"]


class NewArgs:
    __slots__ = ("a",)

    def __new__(cls, a):
        o = super().__new__(cls)
        o.a = a
        return o

    def __getnewargs__(self):
        return (self.a,)


NS = types.SimpleNamespace(a=1)
MAKE = {
    "Slots": (lambda: Slots(1), lambda o: (o.x, o.y(), hasattr(o, "__dict__"))),
    "StrSlot": (StrSlot, lambda o: o.get()),
    "DictSlot": (DictSlot, lambda o: o.a),
    "Both": (lambda: Both(1), lambda o: (o.x, o.y(), o.z, o.free, bool(weakref.ref(o)()))),
    "Empty": (lambda: Empty(1), lambda o: (o.x, hasattr(o, "__dict__"))),
    "Sub": (lambda: Sub(2), lambda o: (o.x, o.y(), hasattr(o, "__dict__"))),
    "Frozen": (lambda: Frozen(1), lambda o: (repr(o), 0)),
    "Weak": (Weak, lambda o: (repr(o), bool(weakref.ref(o)()))),
    "NT": (
        lambda: NT(1),
        lambda o: (repr(o), o.both(), o._replace(a=2), NT._fields, NT._field_defaults),
    ),
    "GNT": (lambda: GNT(1), lambda o: (repr(o), GNT[int])),
    "CNT": (lambda: CNT(1), lambda o: (repr(o), o._asdict(), CNT._field_defaults, o.x)),
    "SubNT": (lambda: SubNT(1), lambda o: (o.total(), repr(o), hasattr(o, "__dict__"))),
    "Color": (
        lambda: Color.RED,
        lambda o: (
            o is Color.RED,
            o.show(),
            list(Color),
            Color.CRIMSON is o,
            Color("g"),
            Color["RED"],
            Color.__members__,
        ),
    ),
    "Planet": (
        lambda: Planet.MARS,
        lambda o: (o is Planet.MARS, o.mass, o.density, Planet((5.97, 6.37))),
    ),
    "Coord": (
        lambda: Coord.PY,
        lambda o: (o is Coord.PY, bytes(o).hex(), o.value, o.label, Coord(1).label),
    ),
    "Perm": (
        lambda: Perm.RW,
        lambda o: (
            o is Perm.RW,
            repr(o),
            Perm.R in o,
            Perm["RW"],
            list(Perm),
            Perm(3),
            ~Perm.R,
        ),
    ),
    "IPerm": (lambda: IPerm.A, lambda o: (o is IPerm.A, repr(IPerm(9)), IPerm(3))),
    "Level": (lambda: Level.HIGH, lambda o: (o is Level.HIGH, o + 1, Level(1))),
    "Name": (lambda: Name.A, lambda o: (o is Name.A, o.upper(), str(o))),
    "Point3": (lambda: Point3.ORIGIN, lambda o: (o is Point3.ORIGIN, tuple(o), o.value)),
    "WithMissing": (lambda: WithMissing.X, lambda o: WithMissing(77) is o),
    "Unhash": (lambda: Unhash.L, lambda o: (o is Unhash.L, o.value)),
    "DerE": (lambda: DerE.ONE, lambda o: (o is DerE.ONE, o.extra, o.value)),
    "G": (lambda: G(1), lambda o: (o.x, G[int], G.__parameters__)),
    "GI": (lambda: GI(1), lambda o: (o.x, GI.__orig_bases__)),
    "Impl": (Impl, lambda o: (o.go(), isinstance(o, RProto), isinstance(3, RProto))),
    "Concrete": (
        Concrete,
        lambda o: (
            o.f(),
            o.p,
            isinstance(o, Abstract),
            isinstance(Registered(), Abstract),
            isinstance(3, Abstract),
            sorted(Abstract.__abstractmethods__),
        ),
    ),
    "TD": (
        lambda: TD(a=1),
        lambda o: (o, TD.__annotations__, TD.__optional_keys__, TD.__total__, TD(a=2)),
    ),
    "KWChild": (KWChild, lambda o: (o.v, o.kind, KW.kinds, KWChild.__mro__[1:])),
    "Metad": (Metad, lambda o: (o.called, Metad.tag, type(Metad).__name__)),
    "StrictC": (StrictC, lambda o: o.x),
    "Interned": (
        lambda: Interned("late"),
        lambda o: (o.n, o is Interned("late"), Interned("early").n, sorted(Interned.made)),
    ),
    "HeldWeakly": (lambda: HeldWeakly("held"), lambda o: (o.n, o is HeldWeakly("held"))),
    "Lonely": (Lonely, lambda o: (o.tag, o is Lonely())),
    "NeedsC": (NeedsC, lambda o: o.field),
    "ABCChild": (ABCChild, lambda o: (o.name, isinstance(o, ABCKw), ABCChild.__mro__)),
    "St": (
        lambda: St(b"x", 2, (1, 2, 3)),
        lambda o: (o.a, o.b, list(o.c), o.total(), ctypes.sizeof(o)),
    ),
    "Un": (lambda: Un(i=3), lambda o: (o.i, ctypes.sizeof(Un))),
    "Anon": (lambda: Anon(Un(i=3), 4), lambda o: (o.i, o.k)),
    "Big": (lambda: Big(258), lambda o: (o.x, bytes(o))),
    "Made": (Made, lambda o: o.get()),
    "HasDesc": (HasDesc, lambda o: (o.d, hasattr(o, "__dict__"))),
    "Weaks": (Weaks, lambda o: (Weaks() in Weaks.seen,)),
    "Outer": (
        Outer,
        lambda o: (
            o.part(2),
            o.s(),
            o.c(),
            o.cp,
            o.p,
            Outer.Inner.__qualname__,
            Outer.Inner().x,
        ),
    ),
    "Inner": (Outer.Inner, lambda o: (o.x, type(o).__qualname__)),
    "Child": (Child, lambda o: (o.c2(), o.part(3))),
    "Num": (lambda: Num(3), lambda o: (o.twice(), hasattr(o, "__dict__"))),
    "Dt": (lambda: Dt(2020, 1, 1), lambda o: repr(o)),
    "GetState": (GetState, lambda o: o.a),
    "NewArgs": (lambda: NewArgs(3), lambda o: o.a),
    "NS": (lambda: NS, lambda o: o.a),
}


def make(name):
    return MAKE[name][0]()


def look(name, o):
    return repr(MAKE[name][1](o)), type(o) is type(MAKE[name][0]())


def told(pool):
    for name in MAKE:
        made = make(name)
        seen = look(name, made)
        there = pool.submit(look, name, made).result(timeout=60)
        assert there == seen, (name, there, seen)
        back = look(name, pool.submit(make, name).result(timeout=60))
        assert back == seen, (name, back, seen)
    node = Node(1)
    assert (
        pool.submit(lambda: Node(2, ctypes.pointer(Node(3))).next.contents.value).result() == 3
    )
    try:
        pool.submit(lambda: setattr(Slots(1), "typo", 1)).result()
    except AttributeError:
        return "right"
"""

# Functions, their arguments, and the objects that they know each other by.
NAMES = """
import asyncio, builtins, contextlib, dataclasses, functools
import sys, threading, types, typing, weakref
from typing import (
    NewType,
    TypeVar,
    ParamSpec,
    TypeVarTuple,
    Generic,
    Callable,
    Literal,
    Optional,
    Annotated,
)

UserId = NewType("UserId", int)
T = TypeVar("T", bound="int")
C = TypeVar("C", int, str)
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")
MISSING = object()


class _Sent:
    def __reduce__(self):
        return "SENT"

    def __repr__(self):
        return "SENT"


SENT = _Sent()


class Single:
    _one = None

    def __new__(cls):
        if cls._one is None:
            cls._one = super().__new__(cls)
        return cls._one

    def __reduce__(self):
        return (Single, ())


SINGLE = Single()
Alias = dict[str, "UserId"]
Un = int | str
Opt = Optional[UserId]
Lit = Literal["a", 1]
Ann = Annotated[int, "x"]
Cb = Callable[P, T]


def f_annot(x: UserId, y: T = 1, *a: P.args, **k: P.kwargs) -> Opt:
    return x


def f_default(x=MISSING):
    return x is MISSING


def f_setdef():
    return f_default()


def f_missing(x):
    return x is MISSING


def f_back():
    return MISSING


def f_sent(x=SENT):
    return x is SENT, repr(SENT)


def f_sentback():
    return SENT


def f_single():
    return Single() is SINGLE


def f_alias():
    return Alias, Un, Opt, Lit, Ann


def f_cast(x):
    return UserId(x) + 1


def f_T():
    return T.__bound__, C.__constraints__


class Stack(Generic[T]):
    items: list[T]

    def __init__(self):
        self.items = []

    def push(self, x: T) -> None:
        self.items.append(x)


class Va(Generic[*Ts]):
    pass


def f_generic():
    s = Stack[int]()
    s.push(1)
    return s.items, Stack.__parameters__ == (T,), Va[int, str].__args__


def deco(fn: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(fn)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        return fn(*args, **kwargs)

    return inner


@deco
@deco
def f_wrapped(x):
    return x, f_wrapped.__wrapped__.__name__


@contextlib.contextmanager
def ctx(x):
    yield x + 1


def f_ctx():
    with ctx(1) as y:
        return y


async def coro(x):
    await asyncio.sleep(0)
    return x


def f_async():
    return asyncio.run(coro(3))


def gen(n):
    yield from range(n)


async def agen(n):
    for i in range(n):
        yield i


def f_gen():
    async def main():
        return [i async for i in agen(2)]

    return list(gen(3)), asyncio.run(main())


def counter():
    n = 0

    def even(k):
        return True if k == 0 else odd(k - 1)

    def odd(k):
        return False if k == 0 else even(k - 1)

    return even


f_rec = counter()


class Base:
    def __init__(self):
        self.v = 1

    def go(self):
        return __class__.__name__


class Derived(Base):
    def __init__(self):
        super().__init__()

    def go(self):
        return super().go() + __class__.__name__

    pm = functools.partialmethod(go)
    sm = staticmethod(functools.partial(max, 3))
    cm = classmethod(lambda cls: cls.__name__)
    prop = property(lambda self: self.v)


def f_super():
    d = Derived()
    return d.go(), d.pm(), d.sm(5), d.cm(), d.prop


memo = {}


def make_cached():
    cache = {}

    def f(x):
        cache[x] = cache.get(x, 0) + 1
        return cache[x]

    return f


f_memo = make_cached()


class Memo:
    seen = []

    def add(self, x):
        Memo.seen.append(x)
        return len(Memo.seen)


def f_classmemo(x):
    return Memo().add(x)


def f_kw(a, /, b=MISSING, *, c: "UserId" = SENT):
    return b is MISSING, c is SENT


f_partial = functools.partial(f_kw, 1, c=SENT)
local_sentinel = (lambda s: lambda x=s: x is s)(object())


class HasSent:
    NOT = object()

    def m(self, x=NOT):
        return x is self.NOT


def f_hassent():
    return HasSent().m(), HasSent.NOT is HasSent.NOT


NOTGIVEN = type("NotGiven", (), {"__repr__": lambda s: "NG", "__bool__": lambda s: False})()


def f_ng(x=NOTGIVEN):
    return x is NOTGIVEN


lock = None


class WithWeak:
    cache = weakref.WeakValueDictionary()


def f_weak():
    w = WithWeak()
    WithWeak.cache[1] = w
    return WithWeak.cache[1] is w


dd = dataclasses.field


@dataclasses.dataclass
class D:
    a: UserId
    b: "list[int]" = dataclasses.field(default_factory=list)
    c: dataclasses.InitVar[int] = 3
    d: typing.ClassVar[int] = 4

    def __post_init__(self, c):
        self.e = c


def f_data():
    return (
        repr(D(1)),
        [f.name for f in dataclasses.fields(D)],
        D(2).e,
        dataclasses.replace(D(1), a=5, c=1),
        D.__annotations__,
    )


# Python 3.15's own; before it any object.
sentinel = getattr(builtins, "sentinel", lambda name, repr=None: object())
NAMED = sentinel("NAMED")
SHOWN = sentinel("shown", repr="<shown>")


class HasSentinel:
    NOTHING = sentinel("HasSentinel.NOTHING")


def f_sentinels(x=NAMED, y=SHOWN, z=(lambda one: one)(HasSentinel.NOTHING)):
    return x is NAMED, y is SHOWN, z is HasSentinel.NOTHING


def f_sentinels_back():
    return NAMED, SHOWN, HasSentinel.NOTHING, dataclasses.MISSING, dataclasses.KW_ONLY


def f_hints():
    return typing.get_type_hints(f_annot), f_annot.__annotations__["x"] is UserId


CASES = [
    ("f_annot", (1,)),
    ("f_default", ()),
    ("f_setdef", ()),
    ("f_missing", (MISSING,)),
    ("f_back", ()),
    ("f_sent", ()),
    ("f_sent", (SENT,)),
    ("f_sentback", ()),
    ("f_single", ()),
    ("f_alias", ()),
    ("f_cast", (2,)),
    ("f_T", ()),
    ("f_generic", ()),
    ("f_wrapped", (3,)),
    ("f_ctx", ()),
    ("f_async", ()),
    ("f_gen", ()),
    ("f_rec", (4,)),
    ("f_super", ()),
    ("f_memo", (1,)),
    ("f_classmemo", (1,)),
    ("f_kw", (1,)),
    ("f_partial", ()),
    ("local_sentinel", ()),
    ("f_hassent", ()),
    ("f_ng", ()),
    ("f_weak", ()),
    ("f_data", ()),
    ("f_hints", ()),
    ("f_sentinels", ()),
]


def told(pool):
    for _ in range(2):
        for name, arguments in CASES:
            function = globals()[name]
            there = pool.submit(function, *arguments).result(timeout=60)
            if name not in COUNT:
                here = function(*arguments)
                assert repr(there) == repr(here), (name, there, here)
    assert pool.submit(f_back).result() is MISSING
    assert pool.submit(f_sentback).result() is SENT
    back, here = pool.submit(f_sentinels_back).result(), f_sentinels_back()
    assert all(one is other for one, other in zip(back, here, strict=True)), back
    assert [repr(one) for one in back] == [repr(one) for one in here]
    return "right"


COUNT = {"f_memo", "f_classmemo"}
"""

# Beside what is called after it.
MODULES = {
    "facade.py": """
import sys, types
class Facade(types.ModuleType):
    @property
    def answer(self): return 42
sys.modules[__name__].__class__ = Facade
""",
    "replaced.py": """
import sys, types
class Api(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return name.upper()
sys.modules[__name__] = Api(__name__)
""",
    "no_module.py": """
import sys
class Settings:
    value = 7
sys.modules[__name__] = Settings()
""",
    "late.py": """
raised = 1
""",
}
FACADES = """
import importlib.util, sys, types
import facade, replaced, no_module
import no_module as renamed


class Proxy(types.ModuleType):
    '''Loads what it stands for when it is asked, and is nowhere but here.'''

    def __getattr__(self, name):
        import importlib

        return getattr(importlib.import_module(self.__name__), name)


proxy = Proxy("late")
spec = importlib.util.find_spec("colorsys")
loader = importlib.util.LazyLoader(spec.loader)
spec.loader = loader
lazy = importlib.util.module_from_spec(spec)
sys.modules["colorsys"] = lazy
loader.exec_module(lazy)
own = types.ModuleType("own")
own.x = 5


def ask(x):
    return (
        facade.answer + x,
        replaced.hello,
        no_module.value,
        renamed.value,
        proxy.raised,
        own.x,
    )


def ask_lazy():
    return lazy.rgb_to_hsv(0, 0, 0)


def told(pool):
    seen = pool.submit(ask, 1).result(timeout=60)
    assert seen == (43, "HELLO", 7, 7, 1, 5), seen
    assert pool.submit(ask_lazy).result() == (0.0, 0.0, 0)
    # The program has not loaded it by that.
    assert "rgb_to_hsv" not in object.__getattribute__(lazy, "__dict__")
    return "right"
"""

MODULES |= {
    "plugs/__init__.py": """
from plugs.core import HOOKS, NESTED, Base, app, called, register, run, show

KINDS = set()


def func():
    return "own"


def call():
    return func()


class Model:
    checks = []

    def describe(self):
        return "own"

    def check(self):
        return [one(self) for one in self.checks]


def describe():
    return Model().describe(), Model().check()
""",
    "plugs/core.py": """
import abc, functools

REGISTRY = {"length": len}
HOOKS = [lambda x: ("own", x)]
NESTED = {"io": {}}


class Entry:
    def __init__(self, function):
        self.function = function


class App:
    def __init__(self):
        self.tasks = {}
        self.default = None

    def task(self, function):
        @functools.wraps(function)
        def inner(*arguments):
            return function(*arguments)

        self.tasks[function.__name__] = Entry(inner)
        return inner


app = App()


class Base(abc.ABC):
    @abc.abstractmethod
    def go(self): ...


@functools.singledispatch
def show(x):
    return "other"


def register(function):
    REGISTRY[function.__name__] = function
    return function


def run(name, *arguments):
    return REGISTRY[name](*arguments)


def called(name, *arguments):
    return app.tasks[name].function(*arguments), app.default(*arguments)
""",
}

# What the script puts into modules at its top, and nobody asks it for by a name of its own.
ADDED = """
import copyreg, functools, json, pickle, sqlite3, threading, time, warnings
import plugs
from plugs import app, register

OFFSET = 2
lock = threading.Lock()


@register
def mine(x):
    return x + OFFSET


@register
def locked(x):
    with lock:
        return x


class Adder:
    def __init__(self, n):
        self.n = n

    def __call__(self, x):
        return x + self.n


class C:
    pass


adder = Adder(5)
plugs.core.REGISTRY["adder"] = adder
plugs.core.REGISTRY["bound"] = adder.__call__
plugs.core.REGISTRY["partial"] = functools.partial(mine)
plugs.core.REGISTRY["length"] = lambda x: -len(x)
plugs.HOOKS.insert(0, lambda x: ("first", x))
plugs.HOOKS.append(lambda x: ("last", x))
plugs.NESTED["io"]["inc"] = lambda x: x + 1
plugs.KINDS.add(C)
plugs.Base.register(C)
own = plugs.func


@functools.wraps(own)
def wrapped():
    return "wrapped " + own()


plugs.func = wrapped
plugs.Model.describe = lambda self: "patched"
plugs.Model.checks.append(lambda self: "checked")


@plugs.show.register
def _show(x: C):
    return "C"


@app.task
def double(x):
    return 2 * x


app.default = double
json.JSONEncoder.default = lambda self, o: type(o).__name__
sqlite3.register_adapter(C, lambda c: "adapted")
time.time_ns = lambda: "patched"


class Odd:
    def __init__(self, how):
        self.how = how


copyreg.pickle(Odd, lambda odd: (Odd, ("reduced",)))


def adapted():
    with sqlite3.connect(":memory:") as connection:
        got = connection.execute("select ?", (C(),)).fetchone()
    connection.close()
    return got


def others(c):
    return {
        "identity": plugs.core.REGISTRY["adder"] is adder,
        "hooks": [hook(1) for hook in plugs.HOOKS],
        "nested": plugs.NESTED["io"]["inc"](1),
        "set": len(plugs.KINDS),
        "abstract": isinstance(c, plugs.Base),
        "dispatched": [plugs.show(c), plugs.show(1)],
        "json": json.dumps([c]),
        "sqlite3": adapted(),
        "time": time.time_ns(),
        "copyreg": pickle.loads(pickle.dumps(Odd("made"))).how,
        "missing": sorted(plugs.core.REGISTRY),
    }


def told(pool):
    for function, *arguments in (
        (plugs.run, "mine", 1),  # which names nothing of the script
        (functools.partial(plugs.run, "adder"), 1),
        (plugs.run, "bound", 1),
        (plugs.run, "partial", 1),
        (plugs.run, "length", "abc"),
        (plugs.call,),
        (plugs.describe,),
        (plugs.called, "double", 4),
        (others, C()),
    ):
        here, there = function(*arguments), pool.submit(function, *arguments).result(timeout=60)
        assert here == there, (function, here, there)
    globals()["later"] = later = lambda x: x * 10
    plugs.core.REGISTRY["later"] = later
    plugs.HOOKS.append(lambda x: ("later", x))
    assert pool.submit(plugs.run, "later", 1).result(timeout=60) == 10
    # What was there before is not there twice.
    assert pool.submit(others, C()).result(timeout=60) == others(C())
    return "right"
"""

# What holds its objects weakly, beside what keeps them alive.
WEAK = """
import dataclasses, gc, sys, threading, weakref


class Item:
    alive = weakref.WeakSet()

    def __init__(self, n):
        self.n = n
        Item.alive.add(self)


class Plugin:
    all = weakref.WeakSet()

    def __init_subclass__(cls):
        Plugin.all.add(cls)


class One(Plugin):
    pass


class Fly:
    cache = weakref.WeakValueDictionary()
    table = {}

    def __new__(cls, n):
        known = cls.cache.get(n)
        if known is None:
            known = cls.cache[n] = super().__new__(cls)
            known.n = n
        return known

    def __getnewargs__(self):
        return (self.n,)

    def __hash__(self):
        return hash(self.n)

    def __eq__(self, other):
        return self.n == other.n


@dataclasses.dataclass(frozen=True)
class Key:
    n: str


class Registry(weakref.WeakValueDictionary):
    def names(self):
        return sorted(self)


class Node:
    def __init__(self, name, parent=None):
        self.name, self.children = name, []
        self.parent = parent and weakref.ref(parent)
        if parent:
            parent.children.append(self)

    def call(self):
        return self.name


class Subject:
    def __init__(self):
        self.observers = weakref.WeakSet()


class Local(threading.local):
    n = 0


class Keeper:
    pass


items = [Item(1), Item(2)]
keeper = Keeper()
keeper.state = {"deep": (Item(3),)}
fly = Fly("f")
Fly.table[fly] = "f"
keys = [Key("a"), Key("b")]
meta = weakref.WeakKeyDictionary({key: key.n for key in keys})
registry = Registry({"x": items[0], "y": items[1]})
registry.level = 5
root = Node("root")
leaf = Node("leaf", Node("mid", root))
callbacks = [weakref.WeakMethod(leaf.call), weakref.ref(leaf)]
dead = weakref.ref(Keeper())
local = Local()
answer, table_of_x = 42, {"x": 1}


def alive():
    return sorted(one.n for one in Item.alive)


def same():
    return all(one in Item.alive for one in [*items, *keeper.state["deep"]])


def drop():
    items.pop()
    gc.collect()
    return alive(), registry.names()


def classes():
    return [one.__name__ for one in Plugin.all]


def flies():
    return Fly("f") is fly, len(Fly.cache), Fly.table[Fly("f")]


def others():
    return [meta[Key(n)] for n in "ab"], registry.names(), registry.level, dead()


def refs():
    up = leaf.parent().parent()
    return up is root, up.name, [one() for one in callbacks][0](), callbacks[1]() is leaf


def count():
    local.n += 1
    return local.n


def observers(subject, held):
    return len(subject.observers), all(one in subject.observers for one in held)


def by_name():
    main = sys.modules["__main__"]
    return main.answer, globals()["table_of_x"], callable(getattr(main, "count"))


def back():
    return weakref.WeakValueDictionary(root=root), weakref.WeakSet([root])


def told(pool):
    def ask(function, *args):
        return pool.submit(function, *args).result(timeout=60)

    local_ones = [Item(4)]
    assert ask(alive) == [1, 2, 3, 4], ask(alive)
    assert ask(same)
    items.append(Item(5))
    assert ask(alive) == [1, 2, 3, 4, 5], ask(alive)
    assert ask(same)
    assert ask(drop) == ([1, 2, 3, 4], ["x", "y"])
    assert ask(classes) == ["One"]
    assert ask(flies) == flies(), ask(flies)
    assert ask(others) == others(), ask(others)
    assert ask(refs) == refs(), ask(refs)
    assert [ask(count), ask(count)] == [1, 2]
    subject = Subject()
    subject.observers |= {subject, root, leaf}
    assert ask(observers, subject, [subject]) == (3, True)
    assert ask(by_name) == by_name()
    mapping, group = ask(back)
    assert (mapping["root"].name, len(group)) == ("root", 1)
    return "right"
"""

PROGRAMS = {"classes": CLASSES, "names": NAMES, "modules": FACADES, "weak": WEAK, "added": ADDED}
END = """
from safepool import ProcessPool
with ProcessPool(1) as pool:
    print(told(pool))
"""


@pytest.mark.parametrize("start", ["script.py", "-c"])
@pytest.mark.parametrize("kinds", PROGRAMS)
def test_it_works_in_a_worker_and_comes_back(kinds: str, start: str, tmp_path: Path) -> None:
    (tmp_path / "plugs").mkdir()
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    text = PROGRAMS[kinds] + END
    (tmp_path / "script.py").write_text(text)

    done = run_program(*(["-c", text] if start == "-c" else [start]), cwd=tmp_path)

    assert (done.stdout, done.stderr) == ("right\n", "")
