"""A pickle is read here as data: a stack machine that builds containers and calls nothing that a file names.

Names in the pickle are looked up in a closed `Vocabulary` and never imported. A name of it either has a
builder of ours (which makes a record of a tensor), or is inert: whatever it would have made becomes
`INERT`, so that the metadata of a training framework neither runs nor stands in the way. Every other name
is refused.

The opcodes are those of the standard library's `pickletools`; time and memory are bounded by
`MAX_PICKLE_BYTES` and `MAX_OPCODES`.
"""

from __future__ import annotations

import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

MAX_PICKLE_BYTES: Final = 64 * 2**20
MAX_OPCODES: Final = 2_000_000
MAX_NAME_LENGTH: Final = 200
LARGEST_KEY_BITS: Final = 63
# Protocols below 3 spell modules as Python 2 did.
RENAMED_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}

Builder = Callable[[tuple[object, ...]], object]


class DamagedPickleError(ValueError):
    """The bytes are not a pickle, or one over the bounds."""


class ForeignObjectError(ValueError):
    """The pickle names something that is not of a tensor; `what` says it in words for a client."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Inert:
    """What stands for an object that is of no use here: it holds nothing and does nothing."""

    __slots__ = ()


INERT: Final = Inert()


class Stateful(ABC):
    """What a builder made and the pickle then gives a state, once; all else has its state dropped."""

    @abstractmethod
    def set_state(self, state: object) -> None:
        """Take the state.

        Raises:
            DamagedPickleError, ForeignObjectError: it is not one of such an object.
        """


@dataclass(frozen=True, slots=True)
class Named:
    """A global as a pickle spells it (`torch.FloatStorage`); only a name, never the thing."""

    path: str


@dataclass(frozen=True)
class Vocabulary:
    """The names that a pickle may mention.

    Attributes:
        builders: what is made when a name is called, from the arguments of the call.
        values: names that are only passed on, such as storage types.
        inert: names whose calls give `INERT`.
        inert_packages: the same for everything below these packages.
        refused: known names that cannot be served, and how to call them to a client.
    """

    builders: Mapping[str, Builder]
    values: frozenset[str]
    inert: frozenset[str]
    inert_packages: frozenset[str]
    refused: Mapping[str, str]

    def named(self, path: str) -> Named:
        """The name itself, if the vocabulary has it.

        Raises:
            ForeignObjectError: it has not.
        """
        if path in self.refused:
            raise ForeignObjectError(f"holds {self.refused[path]}")
        known = path in self.builders or path in self.values or path in self.inert
        if not known and path.partition(".")[0] not in self.inert_packages:
            raise ForeignObjectError(f"holds objects that are not tensors ({path[:MAX_NAME_LENGTH]})")
        return Named(path)

    def call(self, named: object, arguments: object) -> object:
        """What calling a name gives: a record of its builder, or `INERT`."""
        if not isinstance(arguments, tuple):
            raise DamagedPickleError("a call without arguments")
        if isinstance(named, Named) and named.path in self.builders:
            return self.builders[named.path](arguments)
        return INERT


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes:
        """At most `count` bytes."""

    def readline(self, limit: int, /) -> bytes:
        """At most `limit` bytes, to the end of the line."""


class BoundedStream:
    """A stream that gives at most `limit` bytes and then fails."""

    def __init__(self, stream: Stream, limit: int = MAX_PICKLE_BYTES) -> None:
        self._stream = stream
        self._left = limit

    def read(self, count: int) -> bytes:
        """Like a file's `read`, but `DamagedPickleError` past the limit."""
        if count > self._left:
            raise DamagedPickleError("too long")
        return self._spent(self._stream.read(count))

    def readline(self) -> bytes:
        """Like a file's `readline`, but `DamagedPickleError` past the limit."""
        return self._spent(self._stream.readline(self._left + 1))

    def _spent(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise DamagedPickleError("too long")
        return data


Persistent = Callable[[object], object]
# An opcode by the name that `pickletools` has for it, and its argument.
Operation = tuple[str, object]


def load_pickle(stream: BoundedStream, vocabulary: Vocabulary, persistent: Persistent) -> object:
    """The one object that the next pickle of the stream holds; the stream is left right behind it.

    Args and errors are those of `load_operations`.
    """
    # typeshed asks for a whole IO; genops uses read and readline.
    opcodes = pickletools.genops(stream)  # type: ignore[arg-type]
    return load_operations(
        ((opcode.name, argument) for opcode, argument, _ in opcodes), vocabulary, persistent
    )


def load_operations(
    operations: Iterable[Operation], vocabulary: Vocabulary, persistent: Persistent
) -> object:
    """The one object that the operations make, the last of which is STOP.

    Args:
        operations: those of one pickle.
        vocabulary: the names that are known.
        persistent: what a persistent id (a storage) stands for.

    Raises:
        DamagedPickleError: truncated, garbage, over the bounds, or with an opcode that no tensor file needs.
        ForeignObjectError: a name outside the vocabulary.
    """
    machine = _Machine(vocabulary, persistent)
    try:
        return machine.run(operations)
    except (DamagedPickleError, ForeignObjectError):
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
    ) as error:  # all that the decoder and the stack raise
        raise DamagedPickleError("not a whole pickle") from error


class _Machine:
    """The state of one load: a stack, the stacks below its marks, and the memo."""

    def __init__(self, vocabulary: Vocabulary, persistent: Persistent) -> None:
        self.vocabulary = vocabulary
        self.persistent = persistent
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self, operations: Iterable[Operation]) -> object:
        """Execute to STOP and give the top of the stack."""
        for count, (opcode, argument) in enumerate(operations):
            if count > MAX_OPCODES:
                raise DamagedPickleError("too many objects")
            self.execute(opcode, argument)
        return self.stack.pop()

    def execute(self, opcode: str, argument: object) -> None:
        """One step; an opcode that no file of tensors needs is refused."""
        if opcode in _ARGUMENT_STEPS:
            _ARGUMENT_STEPS[opcode](self, argument)
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        else:
            raise DamagedPickleError(f"the opcode {opcode} has no place in a file of tensors")

    def mark(self) -> None:
        """Start a new stack; `pop_mark` gives it back as items."""
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[object]:
        """The items since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items


Step = Callable[[_Machine], None]
ArgumentStep = Callable[[_Machine, object], None]


def _ignore(_machine: _Machine) -> None:
    """PROTO, FRAME and STOP change nothing on the stack."""


def _push(machine: _Machine, argument: object) -> None:
    machine.stack.append(argument)


def _constant(value: object) -> Step:
    return lambda machine: machine.stack.append(value)


def _mark(machine: _Machine) -> None:
    machine.mark()


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _pop_mark(machine: _Machine) -> None:
    machine.pop_mark()


def _duplicate(machine: _Machine) -> None:
    machine.stack.append(machine.stack[-1])


def _empty_list(machine: _Machine) -> None:
    machine.stack.append([])


def _empty_dict(machine: _Machine) -> None:
    machine.stack.append({})


def _list(machine: _Machine) -> None:
    machine.stack.append(machine.pop_mark())


def _marked_tuple(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


def _tuple_of(length: int) -> Step:
    def step(machine: _Machine) -> None:
        if len(machine.stack) < length:
            raise IndexError
        machine.stack[-length:] = [tuple(machine.stack[-length:])]

    return step


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine) -> None:
    items = machine.pop_mark()
    _extend(machine.stack[-1], items)


def _extend(target: object, items: list[object]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Inert):
        raise DamagedPickleError("items for something that is not a list")


def _dict(machine: _Machine) -> None:
    items = machine.pop_mark()
    made: dict[object, object] = {}
    _set(made, items)
    machine.stack.append(made)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine.stack[-1], [key, value])


def _set_items(machine: _Machine) -> None:
    items = machine.pop_mark()
    _set(machine.stack[-1], items)


def _set(target: object, items: list[object]) -> None:
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if _is_key(key))
    elif not isinstance(target, Inert):
        raise DamagedPickleError("entries for something that is not a dict")


def _is_key(key: object) -> bool:
    # Only keys whose hash is cheap: a tuple nested a million deep overflows the C stack when it is hashed.
    # Entries under other keys are metadata and are left out.
    return type(key) is str or (type(key) is int and key.bit_length() <= LARGEST_KEY_BITS)


def _inert_from_mark(machine: _Machine) -> None:
    machine.pop_mark()
    machine.stack.append(INERT)


def _get(machine: _Machine, argument: object) -> None:
    machine.stack.append(machine.memo[_index(argument)])


def _put(machine: _Machine, argument: object) -> None:
    machine.memo[_index(argument)] = machine.stack[-1]


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _index(argument: object) -> int:
    if not isinstance(argument, int):
        raise DamagedPickleError("a memo without a number")
    return argument


def _global(machine: _Machine, argument: object) -> None:
    module, _, name = str(argument).partition(" ")
    machine.stack.append(machine.vocabulary.named(f"{RENAMED_MODULES.get(module, module)}.{name}"))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise DamagedPickleError("a name that is not text")
    machine.stack.append(machine.vocabulary.named(f"{module}.{name}"))


def _call(machine: _Machine) -> None:
    arguments, named = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.vocabulary.call(named, arguments))


def _call_with_keywords(machine: _Machine) -> None:
    machine.stack.pop()
    _call(machine)


def _build(machine: _Machine) -> None:
    """Drop the state of what is metadata, or is the `_metadata` of a state dict."""
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, Stateful):
        target.set_state(state)


def _persistent_id(machine: _Machine) -> None:
    machine.stack.append(machine.persistent(machine.stack.pop()))


# What these push is what the decoder has read.
_VALUES: Final = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
"""

_ARGUMENT_STEPS: Final[Mapping[str, ArgumentStep]] = {
    **dict.fromkeys(_VALUES.split(), _push),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "GLOBAL": _global,
}

_STEPS: Final[Mapping[str, Step]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _ignore),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _call),
    **dict.fromkeys(("ADDITEMS", "POP_MARK"), _pop_mark),  # a set is INERT: its items go
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_SET": _constant(INERT),
    "FROZENSET": _inert_from_mark,
    "EMPTY_LIST": _empty_list,
    "EMPTY_DICT": _empty_dict,
    "MARK": _mark,
    "POP": _pop,
    "DUP": _duplicate,
    "LIST": _list,
    "TUPLE": _marked_tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "DICT": _dict,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "MEMOIZE": _memoize,
    "STACK_GLOBAL": _stack_global,
    "NEWOBJ_EX": _call_with_keywords,
    "BUILD": _build,
    "BINPERSID": _persistent_id,
}
