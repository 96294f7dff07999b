"""Reads pickles that hold plain values, by a machine of our own that runs nothing and imports nothing.

Geneformer's dictionaries are pickles, and so is the outer part of a torch file. A pickle is a program, and the
unpickler of Python does what it says. The one here knows containers, numbers and text, and turns a name in the file
(`module.name`) into a `Name`, which is not looked up anywhere. A call of a name is answered by a function of a table
that the reader gives (a numpy scalar becomes a number, a path its text); every other call is refused, with the name.

Memory and time follow the size of the file, because opcodes and the items that calls copy are counted, integers have
at most 32 bytes, and keys of dictionaries are text and numbers (the hash of a nested tuple can take for ever). Reading
takes .4 us an opcode, .3 s for the largest official dictionary.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

import numpy as np

MAX_OPCODES = 5_000_000
MAX_INTEGER_BYTES = 32
MAX_SCALAR_BYTES = 4096
_CLOSED = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}
"""Packages of which a reader's table names all that is allowed."""
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_Key = str | int | float | bytes | None


class UnpicklingError(ValueError):
    """The pickle is malformed, or it holds what is not allowed."""


class Name(NamedTuple):
    """A name that a pickle holds, such as `torch.FloatStorage`; nothing is imported."""

    path: str


class Record(dict[Any, Any]):
    """Items and attributes of an object of an unknown class, such as a config of some library; it has no behaviour."""

    def add_state(self, state: Any) -> None:
        """Add the attributes in an object's state that are not private, unless an item has their name."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                items = {k: v for k, v in part.items() if not (isinstance(k, str) and k.startswith("_"))}
                self.update({k: v for k, v in items.items() if k not in self})


Table = Mapping[str, Callable[..., Any]]
"""What to return for a call of a name, given the call's arguments."""


class Unpickled(NamedTuple):
    """Value of a pickle, and the place in the data where it ended."""

    value: Any
    end: int


def unpickle(
    data: bytes,
    calls: Table,
    *,
    start: int = 0,
    with_records: bool = False,
    persistent: Callable[[Any], Any] | None = None,
) -> Unpickled:
    """Value of the pickle in `data` from `start`.

    Args:
        data: the pickle, and possibly more after it.
        calls: what to return for calls of names.
        start: where the pickle begins.
        with_records: whether objects of unknown classes, except those of Python's library, become `Record`s.
        persistent: what a persistent id stands for; None refuses them.

    Raises:
        UnpicklingError: the pickle is malformed, or it holds what is not allowed.
        EOFError: it ends too early.
    """
    return _Machine(data, start, calls, with_records, persistent).run()


class _Mark:
    pass


_MARK = _Mark()


@no_type_check  # a check of each call under test would take 100 times as long as the call
class _Machine:
    def __init__(
        self, data: bytes, start: int, calls: Table, with_records: bool, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.data, self.at, self.calls = data, start, calls
        self.with_records, self.persistent = with_records, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.n_copied = 0

    def run(self) -> Unpickled:
        # the four opcodes of which a dictionary of names mostly consists are decoded here, the others by `_OPCODES`
        data, stack, memo, n_opcodes = self.data, self.stack, self.memo, 0
        try:
            while True:
                code = data[self.at]
                self.at += 1
                n_opcodes += 1
                if code == 0x8C:  # SHORT_BINUNICODE
                    end = self.at + 1 + data[self.at]
                    stack.append(self._text(data[self.at + 1 : end], end))
                    self.at = end
                elif code == 0x94:  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                elif code == 0x71:  # BINPUT
                    memo[data[self.at]] = stack[-1]
                    self.at += 1
                elif code == 0x72:  # LONG_BINPUT
                    memo[self._number("<I")] = stack[-1]
                elif code == 0x2E:  # STOP
                    return Unpickled(stack.pop(), self.at)
                elif code in _OPCODES:
                    _OPCODES[code](self)
                else:
                    raise UnpicklingError(f"it has opcode {bytes([code])!r}, which is not allowed")
                if n_opcodes > MAX_OPCODES:
                    raise UnpicklingError(f"it has more than {MAX_OPCODES:,} opcodes")
        except IndexError:
            if self.at >= len(data):
                raise EOFError("it is truncated") from None
            raise UnpicklingError("it is malformed: an opcode lacks its operand") from None
        except UnpicklingError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, OverflowError) as error:
            raise UnpicklingError(f"it is malformed ({type(error).__name__})") from error

    def _take(self, n_bytes: int) -> bytes:
        end = self.at + n_bytes
        if n_bytes < 0 or end > len(self.data):
            raise EOFError("it is truncated")
        taken, self.at = self.data[self.at : end], end
        return taken

    def _text(self, raw: bytes, end: int) -> str:
        if end > len(self.data):
            raise EOFError("it is truncated")
        return raw.decode("utf-8", "surrogatepass")

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise EOFError("it is truncated")
        taken, self.at = self.data[self.at : end], end + 1
        return taken

    def _since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise UnpicklingError("it is malformed: a mark is missing")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise UnpicklingError("it is malformed: a mark is where a value should be")
        return value

    def _push_number(self, layout: str) -> None:
        self.stack.append(self._number(layout))

    def _push_text(self, layout: str) -> None:
        length = self._number(layout)
        self.stack.append(self._take(length).decode("utf-8", "surrogatepass"))

    def _push_bytes(self, layout: str) -> None:
        self.stack.append(self._take(self._number(layout)))

    def _push_latin1(self, layout: str) -> None:
        self.stack.append(self._take(self._number(layout)).decode("latin-1"))

    def _long(self, layout: str) -> None:
        length = self._number(layout)
        if not 0 <= length <= MAX_INTEGER_BYTES:
            raise UnpicklingError(f"it has an integer of {length} bytes; allowed: {MAX_INTEGER_BYTES}")
        self.stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _decimal(self) -> None:
        digits = self._line()
        if len(digits) > 2 * MAX_INTEGER_BYTES:
            raise UnpicklingError(f"it has an integer of {len(digits)} digits")
        self.stack.append(digits == b"01" if digits in (b"00", b"01") else int(digits.rstrip(b"L")))

    def _quoted(self) -> None:
        raw = self._line()
        if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
            raise UnpicklingError("it is malformed: a text has no quotes")
        self.stack.append(raw[1:-1].decode("unicode_escape"))

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def _append(self, values: Sequence[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise UnpicklingError("it appends to what is no list")
        target.extend(values)

    def _set(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnpicklingError("it gives items to what is no dictionary")
        target.update(_pairs(items))

    def _tuple(self, n: int) -> None:
        values = [self._pop() for _ in range(n)]
        self.stack.append(tuple(reversed(values)))

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnpicklingError("it is malformed: a name is no text")
        path = f"{_OLD_MODULES.get(module, module)}.{name}"
        is_open = self.with_records and path.partition(".")[0] not in _CLOSED
        if path not in self.calls and not is_open:
            raise UnpicklingError(f"it names {path}, which is not allowed")
        self.stack.append(Name(path))

    def _name_on_stack(self) -> None:
        name = self._pop()
        self._name(self._pop(), name)

    def _call(self, *, is_new: bool) -> None:
        args, named = self._pop(), self._pop()
        if type(named) is not Name or type(args) is not tuple:
            raise UnpicklingError("it calls what is no name")
        self._count_copied(args)
        if named.path in self.calls:
            self.stack.append(self.calls[named.path](*args))
            return
        # objects of a class are made without arguments, or (mmengine) with their items; anything else may be a function
        if not (is_new or args == () or (len(args) == 1 and isinstance(args[0], dict))):
            raise UnpicklingError(f"it calls {named.path}, which is not allowed")
        self.stack.append(Record(args[0] if len(args) == 1 and isinstance(args[0], dict) else {}))

    def _build(self) -> None:
        state, target = self._pop(), self.stack[-1]
        self._count_copied(state if isinstance(state, tuple) else (state,))
        if isinstance(target, Record | Dtype):
            target.add_state(state)
        elif not isinstance(target, dict):
            raise UnpicklingError("it sets the state of what has none")

    def _count_copied(self, values: tuple[Any, ...]) -> None:
        self.n_copied += sum(len(value) for value in values if hasattr(value, "__len__"))
        if self.n_copied > MAX_OPCODES:
            raise UnpicklingError(f"its calls copy more than {MAX_OPCODES:,} items")

    def _persistent(self) -> None:
        if self.persistent is None:
            raise UnpicklingError("it has a persistent id, which is not allowed")
        self.stack.append(self.persistent(self._pop()))


@no_type_check  # as above
def _pairs(items: Sequence[Any]) -> Iterator[tuple[_Key, Any]]:
    for i in range(0, len(items), 2):
        key = items[i]
        if not isinstance(key, _Key):
            raise UnpicklingError(f"a key is a {type(key).__name__}; allowed: text and numbers")
        yield key, items[i + 1]


_OPCODES: dict[int, Callable[[_Machine], object]] = {
    ord(b"\x80"): lambda m: m._take(1),  # PROTO
    ord(b"\x95"): lambda m: m._take(8),  # FRAME
    ord(b"("): lambda m: m.stack.append(_MARK),
    ord(b"0"): lambda m: m.stack.pop(),  # POP
    ord(b"1"): lambda m: m._since_mark(),  # POP_MARK
    ord(b"N"): lambda m: m.stack.append(None),
    ord(b"\x88"): lambda m: m.stack.append(True),
    ord(b"\x89"): lambda m: m.stack.append(False),
    ord(b"J"): lambda m: m._push_number("<i"),
    ord(b"K"): lambda m: m._push_number("<B"),
    ord(b"M"): lambda m: m._push_number("<H"),
    ord(b"G"): lambda m: m._push_number(">d"),
    ord(b"\x8a"): lambda m: m._long("<B"),
    ord(b"\x8b"): lambda m: m._long("<i"),
    ord(b"I"): lambda m: m._decimal(),
    ord(b"L"): lambda m: m._decimal(),
    ord(b"F"): lambda m: m.stack.append(float(m._line())),
    ord(b"V"): lambda m: m.stack.append(m._line().decode("raw_unicode_escape")),
    ord(b"X"): lambda m: m._push_text("<I"),
    ord(b"\x8d"): lambda m: m._push_text("<Q"),
    ord(b"S"): lambda m: m._quoted(),
    ord(b"U"): lambda m: m._push_latin1("<B"),
    ord(b"T"): lambda m: m._push_latin1("<i"),
    ord(b"C"): lambda m: m._push_bytes("<B"),
    ord(b"B"): lambda m: m._push_bytes("<I"),
    ord(b"\x8e"): lambda m: m._push_bytes("<Q"),
    ord(b"p"): lambda m: m.memo.__setitem__(int(m._line()[:20]), m.stack[-1]),
    ord(b"g"): lambda m: m._get(int(m._line()[:20])),
    ord(b"h"): lambda m: m._get(m._number("<B")),
    ord(b"j"): lambda m: m._get(m._number("<I")),
    ord(b"]"): lambda m: m.stack.append([]),
    ord(b"}"): lambda m: m.stack.append({}),
    ord(b")"): lambda m: m.stack.append(()),
    ord(b"\x8f"): lambda m: m.stack.append([]),  # EMPTY_SET: a list will do
    ord(b"l"): lambda m: m.stack.append(m._since_mark()),
    ord(b"d"): lambda m: m.stack.append(dict(_pairs(m._since_mark()))),
    ord(b"t"): lambda m: m.stack.append(tuple(m._since_mark())),
    ord(b"\x91"): lambda m: m.stack.append(m._since_mark()),  # FROZENSET
    ord(b"\x85"): lambda m: m._tuple(1),
    ord(b"\x86"): lambda m: m._tuple(2),
    ord(b"\x87"): lambda m: m._tuple(3),
    ord(b"a"): lambda m: m._append([m._pop()]),
    ord(b"e"): lambda m: m._append(m._since_mark()),
    ord(b"\x90"): lambda m: m._append(m._since_mark()),  # ADDITEMS
    ord(b"s"): lambda m: m._set([m._pop(), m._pop()][::-1]),
    ord(b"u"): lambda m: m._set(m._since_mark()),
    ord(b"c"): lambda m: m._name(m._line().decode(), m._line().decode()),
    ord(b"\x93"): lambda m: m._name_on_stack(),
    ord(b"R"): lambda m: m._call(is_new=False),
    ord(b"\x81"): lambda m: m._call(is_new=True),
    ord(b"b"): lambda m: m._build(),
    ord(b"Q"): lambda m: m._persistent(),
}


@no_type_check  # as above
class Dtype:
    """A numpy type in a pickle: a type code and a byte order, with no other behaviour."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or len(code) > 16:
            raise UnpicklingError("a numpy type has no code")
        self.code, self.order = code, "="

    def add_state(self, state: Any) -> None:
        """Take the byte order."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("the state of a numpy type is malformed")
        self.order = state[1]


@no_type_check  # as above
def _scalar(dtype: Any, raw: Any) -> int | float | str | bytes:
    if type(dtype) is not Dtype or not isinstance(raw, bytes) or len(raw) > MAX_SCALAR_BYTES:
        raise UnpicklingError("a numpy scalar is malformed")
    try:
        kind = np.dtype(dtype.code)
    except (TypeError, ValueError) as error:
        raise UnpicklingError(f"{dtype.code!r} is no numpy type") from error
    if kind.kind not in "iufbUS" or kind.itemsize != len(raw):
        raise UnpicklingError(f"a numpy scalar of type {dtype.code!r} is no number or text of {len(raw)} bytes")
    order = kind.newbyteorder(">") if dtype.order == ">" else kind
    value: int | float | str | bytes = np.frombuffer(raw, dtype=order, count=1)[0].item()
    return value


def _latin1(text: Any, encoding: Any) -> bytes:
    """Bytes of a scalar, which pickle protocol 2 writes as text."""
    if encoding != "latin1" or not isinstance(text, str) or len(text) > MAX_SCALAR_BYTES:
        raise UnpicklingError("it encodes what is no numpy scalar")
    return text.encode("latin1")


def _ordered() -> dict[Any, Any]:
    return {}


NUMBERS: Table = {
    "numpy.dtype": Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _latin1,
    "collections.OrderedDict": _ordered,
}
"""Calls that make numpy scalars and ordered dictionaries."""
