"""The values of a pickle, read by a machine of our own that calls and imports nothing a pickle names.

Python's and torch's unpicklers look names up in modules and call what they find. Here a name stands in a table of exact
names, and what the table holds is ours: a constant, or a `Maker` that checks its arguments. Every other name is
refused, and so is every operation that `pickle` doesn't write for protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

# What a dict's keys may be, beside tuples of these: their hash asks nothing of what was read.
KEYS = frozenset({str, int, float, bool, bytes, type(None)})
# How deep values may be nested, and how often they may be met on all ways to them: a checkpoint has 8 levels.
MAX_DEPTH, MAX_VALUES = 64, 50_000_000


class PickleError(ValueError):
    """A pickle that is damaged, or holds what it mustn't; the message says what was found."""


class Maker:
    """What a name in a pickle stands for, if it may be called: a function of ours over plain arguments."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class PickleReader:
    """Reads one pickle.

    Args:
        data: The pickle, whole.
        names: What each exact name (`module.name`) stands for: a `Maker`, or any other value, which can't be called.
        states: For each exact type that takes a state (BUILD): the function that checks it and puts it in.
        stored: Gives the value of a persistent id; without it there may be none.
        keys: Further types that keys of a dict may have.
    """

    def __init__(
        self,
        data: bytes,
        names: Mapping[str, Any],
        states: Mapping[type, Callable[[Any, Any], None]],
        stored: Callable[[Any], Any] | None = None,
        keys: frozenset[type] = frozenset(),
    ) -> None:
        self.data, self.at = data, 0
        self.names, self.states, self.stored, self.keys = names, states, stored, KEYS | keys
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The value of the pickle.

        Raises:
            PickleError: It is damaged, names something else, or does what no value needs.
        """
        data, operations = self.data, OPERATIONS
        try:
            while (code := data[self.at]) != STOP:
                self.at += 1
                operations[code](self)
            value = self.stack.pop()
        except PickleError:
            raise
        except KeyError:
            raise PickleError(f"the operation or mark {data[self.at - 1 : self.at]!r} at byte {self.at - 1}") from None
        except DAMAGE as error:
            raise PickleError(f"damage at byte {self.at} ({type(error).__name__})") from None
        if self.stack or self.outer or self.at != len(data) - 1:
            raise PickleError(f"more than one value, the first of which ends at byte {self.at}")
        return value

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise EOFError
        return self.data[start : self.at]

    def number(self, form: str) -> Any:
        """The next number in a form of `struct`."""
        number = FORMS[form]
        value = number.unpack_from(self.data, self.at)[0]
        self.at += number.size
        return value

    def marked(self) -> list[Any]:
        """What lies on the stack since the last mark, taken off."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, module: str, name: str) -> None:
        """Push what a name stands for."""
        full = f"{module}.{name}"
        if full not in self.names:
            raise PickleError(f"the name {full[:200]!r}")
        self.stack.append(self.names[full])

    def line(self) -> str:
        """The next line."""
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def call(self) -> None:
        """Make a value by a `Maker` from a tuple of arguments."""
        arguments, maker = self.stack.pop(), self.stack.pop()
        if type(maker) is not Maker or type(arguments) is not tuple:
            raise PickleError(f"a call of what can't be called, a {type(maker).__name__}")
        self.stack.append(maker.make(*arguments))

    def build(self) -> None:
        """Give the value on top its state."""
        state, value = self.stack.pop(), self.stack[-1]
        if type(value) not in self.states:
            raise PickleError(f"a state for a {type(value).__name__}, which has none")
        self.states[type(value)](value, state)

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into the dict on top."""
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise PickleError(f"items set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            plain = all(type(part) in KEYS for part in key) if type(key) is tuple else type(key) in self.keys
            if not plain:
                raise PickleError(f"a {type(key).__name__} as a key")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        """Put items behind those of the list on top."""
        if type(target := self.stack[-1]) is not list:
            raise PickleError(f"items added to a {type(target).__name__}")
        target.extend(items)

    def add(self, items: list[Any]) -> None:
        """Put items into the set on top."""
        if type(target := self.stack[-1]) is not set or not all(type(item) in KEYS for item in items):
            raise PickleError(f"items added to a {type(target).__name__}, or other than plain values to a set")
        target.update(items)

    def set_one(self) -> None:
        """Put one key and its value into the dict below."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def tuple_of(self, count: int) -> None:
        """Make a tuple of the last values."""
        if len(self.stack) < count:
            raise EOFError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def mark(self) -> None:
        """Begin a stack of its own."""
        self.outer.append(self.stack)
        self.stack = []

    def persistent(self) -> None:
        """Push what is stored beside the pickle."""
        if self.stored is None:
            raise PickleError("a persistent id")
        self.stack.append(self.stored(self.stack.pop()))

    def global_of_stack(self) -> None:
        """Push what the module and name on the stack stand for."""
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("a name that is no text")
        self.name(module, name)

    def protocol(self) -> None:
        """Check the protocol."""
        if not 2 <= (protocol := self.number("B")) <= 5:
            raise PickleError(f"protocol {protocol}")


def _push(value: Callable[[PickleReader], Any]) -> Callable[[PickleReader], None]:
    def push(reader: PickleReader) -> None:
        pushed = value(reader)  # which may change the stack
        reader.stack.append(pushed)

    return push


def _text(form: str) -> Callable[[PickleReader], None]:
    return _push(lambda reader: reader.take(reader.number(form)).decode("utf-8", "surrogatepass"))


def _bytes(form: str) -> Callable[[PickleReader], None]:
    return _push(lambda reader: reader.take(reader.number(form)))


def _integer(form: str) -> Callable[[PickleReader], None]:
    return _push(lambda reader: int.from_bytes(reader.take(reader.number(form)), "little", signed=True))


def _get(form: str) -> Callable[[PickleReader], None]:
    return _push(lambda reader: reader.memo[reader.number(form)])


def _put(form: str) -> Callable[[PickleReader], None]:
    return lambda reader: reader.memo.__setitem__(reader.number(form), reader.stack[-1])


STOP = ord(".")
FORMS = {form: struct.Struct(form) for form in ("B", "<H", "<i", "<I", "<Q", ">d")}
DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, struct.error)
# What each operation does; those that aren't here have no place in a file of values.
OPERATIONS: dict[int, Callable[[PickleReader], Any]] = {
    ord(code): operation
    for code, operation in {
        b"\x80": PickleReader.protocol,
        b"\x95": lambda reader: reader.take(8),  # the length of a frame
        b"(": PickleReader.mark,
        b"N": _push(lambda reader: None),
        b"\x88": _push(lambda reader: True),
        b"\x89": _push(lambda reader: False),
        b"J": _push(lambda reader: reader.number("<i")),
        b"K": _push(lambda reader: reader.number("B")),
        b"M": _push(lambda reader: reader.number("<H")),
        b"\x8a": _integer("B"),
        b"\x8b": _integer("<I"),
        b"G": _push(lambda reader: reader.number(">d")),
        b"X": _text("<I"),
        b"\x8c": _text("B"),
        b"\x8d": _text("<Q"),
        b"B": _bytes("<I"),
        b"C": _bytes("B"),
        b"\x8e": _bytes("<Q"),
        b"\x96": _push(lambda reader: bytearray(reader.take(reader.number("<Q")))),
        b"}": _push(lambda reader: {}),
        b"]": _push(lambda reader: []),
        b")": _push(lambda reader: ()),
        b"\x8f": _push(lambda reader: set()),
        b"t": _push(lambda reader: tuple(reader.marked())),
        b"\x85": lambda reader: reader.tuple_of(1),
        b"\x86": lambda reader: reader.tuple_of(2),
        b"\x87": lambda reader: reader.tuple_of(3),
        b"a": lambda reader: reader.append([reader.stack.pop()]),
        b"e": lambda reader: reader.append(reader.marked()),
        b"\x90": lambda reader: reader.add(reader.marked()),
        b"s": PickleReader.set_one,
        b"u": lambda reader: reader.set_items(reader.marked()),
        b"c": lambda reader: reader.name(reader.line(), reader.line()),
        b"\x93": PickleReader.global_of_stack,
        b"R": PickleReader.call,
        b"\x81": PickleReader.call,
        b"b": PickleReader.build,
        b"Q": PickleReader.persistent,
        b"h": _get("B"),
        b"j": _get("<I"),
        b"q": _put("B"),
        b"r": _put("<I"),
        b"\x94": lambda reader: reader.memo.__setitem__(len(reader.memo), reader.stack[-1]),
    }.items()
}


def check_nesting(value: Any) -> None:
    """Refuse values that hold themselves, or are nested so deep or so often that walking through them has no end."""
    level, depth, seen = {id(value): (value, 1)}, 0, 0
    while level:
        depth, seen = depth + 1, seen + sum(count for _, count in level.values())
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise PickleError(f"values nested more than {MAX_DEPTH} deep, or in themselves")
        below: dict[int, tuple[Any, int]] = {}
        for holder, count in level.values():
            if isinstance(holder, (dict, list, tuple, set)):
                for item in holder.values() if isinstance(holder, dict) else holder:
                    below[id(item)] = item, below.get(id(item), (None, 0))[1] + count
        level = below
