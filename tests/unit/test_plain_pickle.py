"""Pickles are read without being run: plain data come back, anything else is refused before it happens."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import subprocess
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibri_lightning.errors import UserError
from calibri_lightning.remote.plain_pickle import Limits, PlainPickleError, dumps, loads

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
)  # bytes apart: before protocol 3 they are calls
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=25,
)


def refusal(data: bytes) -> str:
    """Why a pickle is refused; empty if it is read."""
    try:
        loads(data)
    except PlainPickleError as error:
        return str(error)
    return ""


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=150, deadline=None)
def test_plain_data_of_every_protocol_come_back(value: Any, protocol: int) -> None:
    # By their text, which tells 1 from True and 1.0, and calls two NaN the same.
    assert repr(loads(pickle.dumps(value, protocol), Limits(depth=40))) == repr(value)


@given(PLAIN | st.binary(max_size=300) | st.lists(st.binary(max_size=9), max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_what_everyone_reads(value: Any) -> None:
    data = dumps(value)
    assert repr(pickle.loads(data)) == repr(value)
    assert repr(loads(data, Limits(depth=40))) == repr(value)


def test_long_values_and_shared_ones_come_back() -> None:
    shared = [1.5, -2.0]
    value = {
        "text": "é" * 70_000,
        "data": b"\0\xff" * 40_000,
        "short": b"x",
        "a": shared,
        "b": shared,
        "t": (shared, ()),
    }
    for protocol in (3, 4, 5):
        assert loads(pickle.dumps(value, protocol)) == value
    with pytest.raises(PlainPickleError, match="_codecs.encode"):
        loads(pickle.dumps(b"x", 2))


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert refusal(data).isprintable()


@given(PLAIN, st.integers(0, 5), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_pickles_are_read_or_refused(value: Any, protocol: int, draw: st.DataObject) -> None:
    data = bytearray(pickle.dumps(value, protocol))
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, len(data) - 1))
        data[place] = draw.draw(st.integers(0, 255))
    assert refusal(bytes(data[: draw.draw(st.integers(1, len(data)))])).isprintable()


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class StateTrap:
    """An object whose state is set by code of its own."""

    def __setstate__(self, state: Any) -> None:
        os.system(state["command"])


class NewTrap:
    """An object that does something when it is made."""

    def __new__(cls, *arguments: str, **named: str) -> NewTrap:
        os.system(next(iter([*arguments, *named.values()])))
        return super().__new__(cls)


HERE = __name__.encode()
PAYLOADS = {
    "reduce": lambda c: pickle.dumps(Call(os.system, c)),
    "reduce, protocol 0": lambda c: pickle.dumps(Call(os.system, c), 0),
    "reduce, protocol 2": lambda c: pickle.dumps(Call(os.system, c), 2),
    "popen": lambda c: pickle.dumps(Call(subprocess.check_call, ["sh", "-c", c])),
    "eval": lambda c: pickle.dumps(Call(eval, f"__import__('os').system({c!r})")),
    "nested": lambda c: pickle.dumps({"scores": [1.0, {"x": (0.5, [Call(os.system, c)])}]}),
    "after the scores": lambda c: pickle.dumps({"scores": [1.0], "zzz": Call(os.system, c)}),
    "as a key": lambda c: pickle.dumps({"scores": [1.0], Call(os.system, c): 1}, 2),
    "GLOBAL": lambda c: b"cos\nsystem\n(V" + c.encode() + b"\ntR.",
    "STACK_GLOBAL": lambda c: b"\x80\x04\x8c\x02os\x8c\x06system\x93(V" + c.encode() + b"\ntR.",
    "STACK_GLOBAL of dots": lambda c: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x94h\x00(V" + c.encode() + b"\ntR.",
    "INST": lambda c: b"(V" + c.encode() + b"\nios\nsystem\n.",
    "OBJ": lambda c: b"(cos\nsystem\nV" + c.encode() + b"\no.",
    "NEWOBJ": lambda c: b"\x80\x02c" + HERE + b"\nNewTrap\n(V" + c.encode() + b"\nt\x81.",
    "NEWOBJ_EX": lambda c: b"\x80\x04c" + HERE + b"\nNewTrap\n)}Vx\nV" + c.encode() + b"\ns\x92.",
    "BUILD": lambda c: b"c" + HERE + b"\nStateTrap\n)\x81}Vcommand\nV" + c.encode() + b"\nsb.",
    "EXT1": lambda c: b"\x80\x02\x82\xf0(V" + c.encode() + b"\ntR.",
    "EXT2": lambda c: b"\x80\x02\x83\xf0\x00(V" + c.encode() + b"\ntR.",
    "EXT4": lambda c: b"\x80\x02\x84\xf0\x00\x00\x00(V" + c.encode() + b"\ntR.",
    "popped": lambda c: b"cos\nsystem\n(V" + c.encode() + b"\ntR0N.",
}


@pytest.mark.parametrize("kind", PAYLOADS)
def test_exploits_work_elsewhere_and_are_refused_here(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = PAYLOADS[kind](f"echo >> {marker}")
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(PlainPickleError, match="asks for|nothing of it was executed"):
            loads(payload)
        assert not marker.exists()
        # The payload is no dud: this is what `pickle.loads` makes of it.
        pickle.loads(payload)
        assert marker.exists()
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()


NO_CLASS = (b"N)R.", b"N)\x81.", b"N)}\x92.", b"]}b.", b"(N)o.", b"N2.", b"N0N.", b"(1N.", b"\x8f.", b"(\x91.")


@pytest.mark.parametrize(
    "payload", [b"Pmkdir x\n.", b"Vx\nQ.", b"\x80\x05\x97.", b"\x80\x05\x96" + b"\0" * 8 + b".", *NO_CLASS]
)
def test_opcodes_that_plain_data_do_not_need_are_refused(payload: bytes) -> None:
    with pytest.raises(PlainPickleError, match="has the opcode .* nothing of it was executed"):
        loads(payload)


@pytest.mark.parametrize("value", [{1.5}, frozenset({1}), bytearray(b"x"), OrderedDict(a=1), range(3), 1j, Path("x")])
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_the_standard_library_are_refused(value: Any, protocol: int) -> None:
    with pytest.raises(PlainPickleError):
        loads(pickle.dumps({"scores": value}, protocol))
    with pytest.raises(UserError, match=type(value).__name__):
        dumps({"scores": [value]})


@pytest.mark.parametrize("value", [np.float32(1.5), np.float64(1.5), np.ones(3), np.int64(1), np.array(["a"])])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_numpy_is_refused_with_what_to_change(value: Any, protocol: int) -> None:
    for reply in ({"scores": value}, {"scores": [1.0, value]}):
        with pytest.raises(PlainPickleError, match=r"numpy\..*must convert it before.*float\(score\) for score"):
            loads(pickle.dumps(reply, protocol))
    with pytest.raises(UserError, match=r"numpy\.\w+.*x\.tolist"):
        dumps({"meta_datas": [value]})


def doubling(levels: int) -> bytes:
    """[[..], [..]], each level twice the same list: a kilobyte that is 2**levels values to whoever walks it."""
    return b"]q\x00" + b"".join(b"0(h%ch%cl" % (i, i) + b"q" + bytes([i + 1]) for i in range(levels)) + b"."


def shared(levels: int) -> bytes:
    """The same without POP: the first list is kept on the stack inside a tuple."""
    body = b"]q\x00" + b"".join(b"]q" + bytes([i + 1]) + b"(h%ch%ce" % (i, i) for i in range(levels))
    return b"(" + body + b"t."


BOMBS = {
    "bytes of 2**40": b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "bytes of 2**63": b"\x8e" + struct.pack("<Q", 2**63) + b"x.",
    "bytes of 2**32": b"B" + struct.pack("<I", 2**32 - 1) + b"x.",
    "text of 2**40": b"\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "text of 2**32": b"X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "integer of 2**31 bytes": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "integer of -1 bytes": b"\x8b" + struct.pack("<i", -1) + b"x.",
    "integer of 60000 bytes": b"\x8b" + struct.pack("<i", 60_000) + b"\x7f" * 60_000 + b".",
    "integer of 60000 digits": b"I" + b"9" * 60_000 + b"\n.",
    "integer of 4000 digits": b"L" + b"9" * 4000 + b"L\n.",
    "memo of 2**32": b"Nr\xff\xff\xff\xff0N.",
    "memo of 10**18": b"Np" + b"9" * 18 + b"\n0N.",
    "exponential, with POP": doubling(60),
    "exponential": shared(60),
    "a list in itself": b"]q\x00h\x00a.",
    "a dict in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    "100,000 deep": b"]" * 50_000 + b"a" * 49_999 + b".",
    "tuples 90,000 deep": b")" + b"\x85" * 90_000 + b".",
    "many values": b"(" + b"N" * 200_000 + b"l.",
    "many lists": b"(" + b"]" * 200_000 + b"l.",
    "a key whose hash takes years": b"}(" + b"N" + b"2\x86" * 70 + b"Nu.",
    "a key of shared tuples": b"}(Nq\x00"
    + b"".join(b"h%ch%c\x86q" % (i, i) + bytes([i + 1]) for i in range(70))
    + b"Nu.",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_do_not_grow(kind: str) -> None:
    data = BOMBS[kind]
    tracemalloc.start()
    try:
        if kind.startswith("memo"):
            # A large index costs nothing here: but leaving a value behind is a damage.
            loads(data.replace(b"0N.", b".", 1))
        else:
            with pytest.raises(PlainPickleError):
                loads(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # An opcode of one byte makes a list of 56 bytes and a place for it, and so far 100,000 are read.
    assert peak < 12_000_000
    if len(data) < 1000:
        assert peak < 1_000_000


def test_limits_are_exact() -> None:
    value = [0.5] * 8
    data = pickle.dumps(value)
    assert loads(data, Limits(num_bytes=len(data))) == value
    with pytest.raises(PlainPickleError, match=f"has {len(data)} bytes; at most {len(data) - 1} are read"):
        loads(data, Limits(num_bytes=len(data) - 1))
    assert loads(dumps([[[1]]]), Limits(depth=3)) == [[[1]]]
    with pytest.raises(PlainPickleError, match="nested more than 2 deep"):
        loads(dumps([[[1]]]), Limits(depth=2))
    with pytest.raises(PlainPickleError, match="more than 9 opcodes"):
        loads(data, Limits(num_items=9))
    twice = pickle.dumps([value] * 9)
    with pytest.raises(PlainPickleError, match="more than 60 values"):
        loads(twice, Limits(num_items=60))
    with pytest.raises(PlainPickleError, match="more than 100000 values"):
        loads(shared(60), Limits(depth=100))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "exhausted"),
        (pickle.dumps([1.0])[:-1], "exhausted"),
        (pickle.dumps([1.0]) + b"N.", "2 bytes follow"),
        (b"<html>502 Bad Gateway</html>", "damaged"),
        (b'{"scores": [1.0]}', "damaged"),
        (b"NN.", "leaves values behind"),
        (b"(N.", "leaves values behind|does not have"),
        (b".", "does not have"),
        (b"h\x05.", "refers to"),
        (b"NNa.", "appends to a NoneType"),
        (b"}K\x01Ns.", "keys of str"),
        (b"}(X\x01\x00\x00\x00au.", "keys of str"),
        (b"e.", "did not begin"),
        (b"(a.", "does not have"),
    ],
)
def test_damage_is_named(data: bytes, message: str) -> None:
    with pytest.raises(PlainPickleError, match=message):
        loads(data)


def test_what_is_no_plain_data_is_not_written() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value, message in (({1: 2}, "keys that are no strings"), (loop, "nested more than"), (object(), "object")):
        with pytest.raises(UserError, match=message):
            dumps(value)
