"""Pickles of plain data, without unpickling: for servers that know no other format.

A pickle is a program, and `pickle.loads` runs it: whoever answers runs code here (CVE-2026-25873 is one reward server
of many). Replies of reward servers need none of that. They are None, numbers, strings, bytes, lists, tuples and dicts,
which a few opcodes build. `loads` reads those opcodes with a stack of its own and knows no other: nothing is imported,
called, instantiated or looked up, and no `Unpickler` is involved, so there is no list of forbidden names to get around.
It also bounds what a small pickle may grow to; the standard library's reader allocates what a pickle claims to need.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calibri_lightning.errors import UserError
from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.wire import WireError

_PROTOCOL = 4
"""Read by every Python from 3.4 on."""


class PlainPickleError(WireError):
    """A pickle is damaged, too large, or more than plain data."""


class _NotPlainError(Exception):
    """Why values are no plain data."""


@dataclass(frozen=True)
class Limits:
    """What a pickle may be.

    Attributes:
        num_bytes: Its size.
        num_items: Opcodes, and values in the result; a value that is in it twice counts twice.
        depth: Containers inside each other.
    """

    num_bytes: int = 4 << 20
    num_items: int = 100_000
    depth: int = 16


def dumps(value: object) -> bytes:
    """Pickles plain data.

    Args:
        value: None, bool, int, float, str, bytes, or a list, tuple or dict (with keys of str) of such values; not
            their subclasses, such as NumPy's floats, which a pickle names by their classes.

    Returns:
        The pickle.

    Raises:
        UserError: If it is anything else.
    """
    try:
        _check(value, Limits(num_items=10_000_000, depth=64))
    except _NotPlainError as error:
        raise UserError(
            f"What is to be sent cannot be pickled: {error}. The rule is plain data alone: None, bool, int, float, "
            "str, bytes, and lists, tuples and dicts of them. Convert it, for instance with float(x) or x.tolist()."
        ) from error
    return pickle.dumps(value, protocol=_PROTOCOL)


def loads(data: bytes, limits: Limits | None = None) -> object:
    """Reads a pickle of plain data; safe for any bytes.

    Args:
        data: The pickle.
        limits: What it may be.

    Returns:
        None, bool, int (of 64 bits), float, str, bytes, or a list, tuple or dict (with keys of str) of such values.

    Raises:
        PlainPickleError: If it is anything else.
    """
    limits = limits or Limits()
    if len(data) > limits.num_bytes:
        raise PlainPickleError(f"a pickle has {len(data)} bytes; at most {limits.num_bytes} are read")
    reader, end = _Reader(limits), 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            reader.step(opcode.name, argument)
            end = (position or 0) + 1
    except (ValueError, OverflowError) as error:
        raise PlainPickleError(f"a pickle is damaged: {sanitised(str(error))}") from error
    if end != len(data):
        raise PlainPickleError(f"a pickle is damaged: {len(data) - end} bytes follow its end")
    try:
        _check(reader.result, limits)
    except _NotPlainError as error:
        raise PlainPickleError(f"a pickle is not read: {error}") from error
    return reader.result


class _Reader:
    """A stack machine for the opcodes of plain data (their meanings: `pickletools.opcodes`)."""

    def __init__(self, limits: Limits) -> None:
        self.result: object = None
        self._limits = limits
        self._steps = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        # A dict, where the standard library's reader has an array as long as the largest index that a pickle names.
        self._memo: dict[int, object] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        self._steps += 1
        if self._steps > self._limits.num_items:
            raise PlainPickleError(f"a pickle has more than {self._limits.num_items} opcodes")
        if name in _VALUES:
            self._push_value(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name not in _IGNORED:
            raise PlainPickleError(self._refusal(name, argument))

    def stop(self, _: Any) -> None:
        self.result = self._pop()
        if self._stack or self._marks:
            raise PlainPickleError("a pickle is damaged: it leaves values behind")

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise PlainPickleError("a pickle is damaged: it refers to a value that it does not have")
        self._stack.append(self._memo[index])

    def append(self, _: Any) -> None:
        self._extend([self._pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def setitem(self, _: Any) -> None:
        value = self._pop()
        self._update([self._pop(), value])

    def setitems(self, _: Any) -> None:
        self._update(self._to_mark())

    def empty_list(self, _: Any) -> None:
        self._stack.append([])

    def empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def list_of_mark(self, _: Any) -> None:
        self._stack.append(self._to_mark())

    def tuple_of_mark(self, _: Any) -> None:
        self._stack.append(tuple(self._to_mark()))

    def dict_of_mark(self, _: Any) -> None:
        items = self._to_mark()
        self._stack.append({})
        self._update(items)

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _push_value(self, value: object) -> None:
        # A longer one cannot be a score, and printing it takes time quadratic in its length.
        if type(value) is int and not -(2**63) <= value < 2**64:
            raise PlainPickleError("a pickle has an integer of more than 64 bits")
        self._stack.append(value)

    def _top(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise PlainPickleError("a pickle is damaged: it uses a value that it does not have")
        return self._stack[-1]

    def _pop(self) -> object:
        self._top()
        return self._stack.pop()

    def _to_mark(self) -> list[object]:
        if not self._marks:
            raise PlainPickleError("a pickle is damaged: it ends what it did not begin")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not list:
            raise PlainPickleError(f"a pickle is damaged: it appends to a {type(target).__name__}")
        target.extend(items)

    def _update(self, items: list[object]) -> None:
        target = self._top()
        # Keys of other types could be made to collide, or be nests of shared tuples whose hash takes hours.
        if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise PlainPickleError("a pickle is damaged or no plain data: only dicts with keys of str are read")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _refusal(self, name: str, argument: Any) -> str:
        """Says what was refused; the opcodes that import something say its name first."""
        words = (
            argument.split(" ") if name in ("GLOBAL", "INST") else self._stack[-2:] if name == "STACK_GLOBAL" else []
        )
        what = ".".join(word for word in words if isinstance(word, str))
        if not what:
            return f"a pickle has the opcode {name}, which plain data do not need; nothing of it was executed"
        if what.partition(".")[0] in ("numpy", "torch"):
            return (
                f"a pickle holds {sanitised(what)}, a NumPy or torch object, which is not read. What writes "
                "the pickle must convert it before: [float(score) for score in scores]"
            )
        return f"a pickle asks for {sanitised(what)}, which is more than plain data; nothing of it was executed"


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Opcodes that push their argument; `pickletools` has read it, and no more than is there."""
_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = {"PROTO", "FRAME"}
_OPERATIONS: Mapping[str, Callable[[_Reader, Any], None]] = {
    "STOP": _Reader.stop,
    "MARK": _Reader.mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    "APPEND": _Reader.append,
    "APPENDS": _Reader.appends,
    "SETITEM": _Reader.setitem,
    "SETITEMS": _Reader.setitems,
    "EMPTY_LIST": _Reader.empty_list,
    "EMPTY_DICT": _Reader.empty_dict,
    "LIST": _Reader.list_of_mark,
    "TUPLE": _Reader.tuple_of_mark,
    "DICT": _Reader.dict_of_mark,
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
}


def _check(value: object, limits: Limits) -> None:
    """Refuses anything that is no plain data; counts as a walk does, so that values that share parts cannot explode."""
    pending = [(value, 0)]
    for count in range(limits.num_items):
        if not pending:
            return
        found, depth = pending.pop()
        if type(found) in (list, tuple, dict):
            if depth >= limits.depth:
                raise _NotPlainError(f"its values are nested more than {limits.depth} deep")
            inside = found.values() if isinstance(found, dict) else found
            if isinstance(found, dict) and not all(type(key) is str for key in found):
                raise _NotPlainError("a dict has keys that are no strings")
            # What cannot be visited any more need not be remembered.
            if len(found) + len(pending) > limits.num_items - count:  # type: ignore[arg-type]
                break
            pending += [(part, depth + 1) for part in inside]  # type: ignore[attr-defined]
        elif found is not None and type(found) not in (bool, int, float, str, bytes):
            raise _NotPlainError(f"it holds a {type(found).__module__}.{type(found).__qualname__}")
    raise _NotPlainError(f"it has more than {limits.num_items} values")
