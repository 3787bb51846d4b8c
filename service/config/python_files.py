"""OpenMMLab's config files in Python syntax, read as data: the syntax tree is walked, no code is ever run.

What such files are made of is evaluated here, with bounds: literals, `dict(...)`, names of the same file, `_base_.x`
and `{{_base_.x}}`, subscripts and attributes, arithmetic, formatting, and assignments to all of these. Anything else
as a statement (an import, `if`, `for`, `def`) is refused with its line. Anything else as a value (a call, a lambda,
a comprehension) becomes a `Refused` that stands in its place: it matters only to who needs that value, so that a
learning rate's schedule does not keep a backbone from being read.

The rules are those of mmengine's Config: keys that begin with `__` are dropped, and `_base_` is written as literals.
"""

from __future__ import annotations

import ast
import copy
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidConfig

MAX_SOURCE_BYTES = 128 * 1024
MAX_NODES = 50_000
MAX_DEPTH = 60
# Items and characters that all expressions of a file may make together, and the digits of `{x:.3f}`.
MAX_MADE = 2_000_000
MAX_INTEGER = 2**63 - 1
BASE = "_base_"
UNREADABLE = "only data is read here, no code is run"
CONVERSION = re.compile(r"%(?:%|s|[0-9]{0,2}(?:\.[0-9]{1,2})?[dfeg])", re.ASCII)
FORMAT = re.compile(r"[<>^]?[0-9]{0,2}(?:\.[0-9]{1,2})?[dfegs]?", re.ASCII)
STATEMENT_START = re.compile(r"^(?=[^\W\d])", re.MULTILINE)

Scalar = (str, int, float, bool, type(None))
Number = (int, float)


@dataclass(frozen=True)
class Refused:
    """Stands where a file has something that is not data: where, and why it was not read."""

    place: str
    reason: str

    def error(self, pointer: str) -> InvalidConfig:
        """The error for who needs the value; `pointer` is the part that does."""
        return InvalidConfig(pointer, f"{self.place}: {self.reason}")


class _Refusal(Exception):
    """An expression that cannot be read; carries what stands in its place, perhaps since an earlier statement."""

    def __init__(self, refused: Refused, *, is_known: bool = False) -> None:
        super().__init__(refused.reason)
        self.refused = refused
        self.is_known = is_known


class PythonFile:
    """One parsed file: the names of its bases, and its values over theirs."""

    def __init__(self, source: bytes, shown: str) -> None:
        """Parse.

        Args:
            source: the file, UTF-8.
            shown: what errors call it.

        Raises:
            InvalidConfig: not Python, or over a bound.
        """
        self._shown = shown
        self._tree = _parsed(source, shown)

    def bases(self) -> list[str]:
        """The file names of `_base_`.

        Raises:
            InvalidConfig: it is not a string or a list of strings, or is there twice.
        """
        found = [statement for statement in self._tree.body if _is_base(statement)]
        if not found:
            return []
        if len(found) > 1:
            raise _fault(self._shown, found[1], "_base_ is assigned twice")
        statement = found[0]
        assert isinstance(statement, ast.Assign)
        value = _Reader(self._shown, {}).held(statement.value)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise _fault(self._shown, statement, "_base_ is a file name or a list of file names")
        return list(names)

    def values(self, base: dict[str, Any]) -> dict[str, Any]:
        """What the file assigns, by name; `base` are the values of its bases, which it may change in place.

        Raises:
            InvalidConfig: a statement that is not data, with its line.
        """
        reader = _Reader(self._shown, base)
        for statement in self._tree.body:
            if not _is_base(statement):
                reader.run(statement)
        return {name: value for name, value in reader.names.items() if not name.startswith("__")}


def _parsed(source: bytes, shown: str) -> ast.Module:
    if len(source) > MAX_SOURCE_BYTES:
        raise InvalidConfig("#", f"{shown} is larger than {MAX_SOURCE_BYTES:,} bytes")
    text = _text(source, shown)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InvalidConfig("#", f"{shown}, line {line}: not Python syntax") from error
    except (RecursionError, MemoryError) as error:
        line = _deepest(text)
        raise InvalidConfig("#", f"{shown}, line {line}: nests too deeply to be read") from error
    _bound(tree, shown)
    return tree


def _text(source: bytes, shown: str) -> str:
    """The file as text: UTF-8, whatever a comment in it says of its encoding."""
    nothing = source.find(b"\0")
    if nothing >= 0:
        raise InvalidConfig("#", f"{shown}, line {_line(source, nothing)}: a null byte")
    try:
        return source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidConfig("#", f"{shown}, line {_line(source, error.start)}: not UTF-8") from error


def _line(source: bytes, position: int) -> int:
    return source.count(b"\n", 0, position) + 1


def _deepest(text: str) -> int:
    """The line of the statement that is too deep for the parser, which does not say it itself.

    A line that begins with a name begins a statement, or else a part that has no fault of this kind.
    """
    starts = [match.start() for match in STATEMENT_START.finditer(text)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        try:
            ast.parse(text[start:end])
        except (RecursionError, MemoryError):
            return text.count("\n", 0, start) + 1
        except (SyntaxError, ValueError):
            continue
    return 1


def _bound(tree: ast.Module, shown: str) -> None:
    """Refuse a tree too large or too deep to walk; an expression costs a few of our own frames a level."""
    stack: list[tuple[ast.AST, int, int]] = [(statement, 1, statement.lineno) for statement in tree.body]
    nodes = 0
    while stack:
        node, depth, line = stack.pop()
        line = getattr(node, "lineno", line)
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            limit = f"{MAX_NODES:,} parts" if nodes > MAX_NODES else f"{MAX_DEPTH} levels"
            raise InvalidConfig("#", f"{shown}, line {line}: an expression of more than {limit}")
        stack += [(child, depth + 1, line) for child in ast.iter_child_nodes(node)]


def _is_base(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == BASE for target in statement.targets
    )


def _place(shown: str, node: ast.AST) -> str:
    return f"{shown}, line {getattr(node, 'lineno', 1)}"


def _fault(shown: str, node: ast.AST, reason: str) -> InvalidConfig:
    return InvalidConfig("#", f"{_place(shown, node)}: {reason}")


# What statements and expressions that are not read are called.
STATEMENTS: Mapping[type[ast.stmt], str] = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.If: "an if",
    ast.For: "a for loop",
    ast.While: "a while loop",
    ast.FunctionDef: "a function",
    ast.AsyncFunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.With: "a with block",
    ast.Try: "a try block",
}
EXPRESSIONS: Mapping[type[ast.expr], str] = {
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.IfExp: "a conditional",
    ast.Compare: "a comparison",
    ast.BoolOp: "a logical operation",
    ast.NamedExpr: "an assignment inside an expression",
}


class _Reader:
    """Walks one file; `names` are its variables so far."""

    def __init__(self, shown: str, base: dict[str, Any]) -> None:
        self.names: dict[str, Any] = {}
        self._shown = shown
        self._base = base
        self._left = MAX_MADE

    # --- statements ---------------------------------------------------------------------------------

    def run(self, statement: ast.stmt) -> None:
        """One statement of the file."""
        run = RUNNERS.get(type(statement))
        if run is None:
            raise _fault(self._shown, statement, self._why_not(statement))
        try:
            run(self, statement)
        except _Refusal as refusal:
            raise refusal.refused.error("#") from refusal

    def _why_not(self, statement: ast.stmt) -> str:
        if isinstance(statement, ast.With) and "read_base" in ast.dump(statement.items[0].context_expr):
            return "configs of read_base() import code; write _base_ = [...] and types as strings"
        return f"{STATEMENTS.get(type(statement), 'a statement')} is not read; {UNREADABLE}"

    def assign(self, statement: ast.Assign) -> None:
        """`a = b = value`, `a, b = values`, `a.b['c'] = value`."""
        value = self.held(statement.value)
        for target in statement.targets:
            self._bind(target, value)

    def annotated(self, statement: ast.AnnAssign) -> None:
        """`a: int = value`; the annotation is not read."""
        if statement.value is not None:
            self._bind(statement.target, self.held(statement.value))

    def _bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target, value)
        else:
            self._put(target, value)

    def _unpack(self, target: ast.Tuple | ast.List, value: Any) -> None:
        count = len(target.elts)
        values = [value] * count if isinstance(value, Refused) else value
        if not isinstance(values, (list, tuple)) or len(values) != count:
            raise self._no(target, f"there are not {count} values to unpack")
        for one, item in zip(target.elts, values, strict=True):
            self._bind(one, item)

    def _put(self, target: ast.expr, value: Any) -> None:
        """Into an object or a list that is there already."""
        if not isinstance(target, (ast.Attribute, ast.Subscript)):
            raise self._no(target, f"this cannot be assigned to; {UNREADABLE}")
        owner = self._owner_at(target.value)
        if isinstance(owner, Refused):
            return
        key = self._key_of(target)
        fits = isinstance(key, Scalar) if isinstance(owner, dict) else _is_index(key, owner)
        if not fits or not isinstance(owner, (dict, list)):
            raise self._no(target, "nothing can be assigned here")
        owner[key] = value

    def _owner_at(self, node: ast.expr) -> Any:
        """What a statement changes; a change to what an earlier one could not read changes nothing."""
        try:
            return self.value(node)
        except _Refusal as refusal:
            if refusal.is_known:
                return refusal.refused
            raise

    def _key_of(self, target: ast.Attribute | ast.Subscript) -> Any:
        return target.attr if isinstance(target, ast.Attribute) else self.value(target.slice)

    def augmented(self, statement: ast.AugAssign) -> None:
        """`a += value`; a list grows in place, as it does in Python."""
        target = statement.target
        held, value = self._owner_at(target), self.held(statement.value)
        if isinstance(held, list) and isinstance(statement.op, ast.Add):
            more = value if isinstance(value, (list, tuple)) else [self._not_a_list(statement, value)]
            self._spend(statement, len(held) + len(more))
            held += more
            return
        try:
            self._bind(target, self._combined(statement, statement.op, held, value))
        except _Refusal as refusal:
            self._bind(target, refusal.refused)

    def _not_a_list(self, statement: ast.AST, value: Any) -> Refused:
        """What goes to the end of a list that others may hold, too, so that none of them is read as whole."""
        if isinstance(value, Refused):
            return value
        return Refused(_place(self._shown, statement), "only a list can be added to a list")

    def delete(self, statement: ast.Delete) -> None:
        """`del a`, `del a['b']`."""
        for target in statement.targets:
            owner, key = self._owner(target)
            if (isinstance(owner, dict) and isinstance(key, Scalar) and key in owner) or _is_index(
                key, owner
            ):
                del owner[key]
            elif not isinstance(owner, Refused):
                raise self._no(target, "there is nothing here to delete")

    def _owner(self, target: ast.expr) -> tuple[Any, Any]:
        if isinstance(target, ast.Name):
            return self.names, target.id
        if isinstance(target, (ast.Attribute, ast.Subscript)):
            return self._owner_at(target.value), self._key_of(target)
        raise self._no(target, f"this cannot be deleted; {UNREADABLE}")

    def expression(self, statement: ast.Expr) -> None:
        """A comment in quotes, or `a.update(b)` and `a.pop('b')`; any other call would do what is not known."""
        node = statement.value
        if isinstance(node, ast.Constant):
            return
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            raise self._no(node, f"this is not an assignment; {UNREADABLE}")
        change = CHANGES.get(node.func.attr)
        if change is None:
            raise self._no(node, f"a call is not read; {UNREADABLE}")
        owner = self._owner_at(node.func.value)
        if isinstance(owner, Refused):
            return
        if not isinstance(owner, dict):
            raise self._no(node, f"{node.func.attr} is only of a dict")
        change(self, node, owner)

    def update(self, node: ast.Call, owner: dict[Any, Any]) -> None:
        """`owner.update(other, key=value)`; where `other` cannot be read, nor can the owner from then on."""
        try:
            owner.update(self._dict_of(node))
        except _Refusal as refusal:
            owner[refusal.refused] = refusal.refused

    def pop(self, node: ast.Call, owner: dict[Any, Any]) -> None:
        """`owner.pop(key)`, `owner.pop(key, default)`."""
        if not 1 <= len(node.args) <= 2 or node.keywords:
            raise self._no(node, "pop takes a key and perhaps a default")
        key = self.value(node.args[0])
        if len(node.args) == 1 and not (isinstance(key, Scalar) and key in owner):
            raise self._no(node, "there is nothing here to pop")
        owner.pop(key, None)

    # --- expressions --------------------------------------------------------------------------------

    def held(self, node: ast.expr) -> Any:
        """The value of an expression, or the `Refused` that stands in its place."""
        try:
            return self.value(node)
        except _Refusal as refusal:
            return refusal.refused

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; raises where it cannot be read."""
        read = READERS.get(type(node))
        if read is None:
            raise self._no(node, f"{EXPRESSIONS.get(type(node), 'this')} is not read; {UNREADABLE}")
        value = read(self, node)
        if isinstance(value, Refused):
            raise _Refusal(value, is_known=True)
        return value

    def _no(self, node: ast.AST, reason: str) -> _Refusal:
        return _Refusal(Refused(_place(self._shown, node), reason))

    def _spend(self, node: ast.AST, made: int) -> None:
        self._left -= made
        if self._left < 0:
            raise _fault(self._shown, node, f"the file makes more than {MAX_MADE:,} values and characters")

    def constant(self, node: ast.Constant) -> Any:
        """A string, a number, True, False or None."""
        if not isinstance(node.value, Scalar):
            raise self._no(node, f"{type(node.value).__name__} is not a type of a config's values")
        if isinstance(node.value, str):
            self._spend(node, len(node.value))
        return self._bounded(node, node.value)

    def _bounded(self, node: ast.AST, value: Any) -> Any:
        """The value, if it is no number that JSON cannot carry."""
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise self._no(node, "an integer of more than 63 bits")
        if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
            raise self._no(node, "a number that is not finite or not real")
        return value

    def name(self, node: ast.Name) -> Any:
        """A variable of the file, or `_base_`."""
        if node.id == BASE:
            return self._base
        if node.id not in self.names:
            raise self._no(node, f"no {node.id[:64]!r} is defined before it")
        return self.names[node.id]

    def sequence(self, node: ast.List | ast.Tuple) -> Any:
        """`[a, *b]`, `(a, b)`."""
        items = self._items(node)
        return items if isinstance(node, ast.List) else tuple(items)

    def _items(self, owner: ast.List | ast.Tuple | ast.Set) -> list[Any]:
        items: list[Any] = []
        for node in owner.elts:
            if isinstance(node, ast.Starred):
                more = self.value(node.value)
                if not isinstance(more, (list, tuple)):
                    raise self._no(node, "only lists and tuples can be spread here")
                self._spend(node, len(more))
                items += more
            else:
                items.append(self.held(node))
        self._spend(owner, len(items))
        return items

    def braces(self, node: ast.Set) -> Any:
        """`{{_base_.x}}`, mmengine's template, which Python takes for a set of a set; or a set, as a list."""
        inner = node.elts[0]
        if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
            return self._template(inner.elts[0])
        items = self._items(node)
        if not all(isinstance(item, Scalar) for item in items):
            raise self._no(node, "a set of other things than strings and numbers")
        return list(dict.fromkeys(items))

    def _template(self, node: ast.expr) -> Any:
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name) or root.id != BASE or root is node:
            raise self._no(node, "of the variables in double braces only _base_.… is known here")
        return copy.deepcopy(self.value(node))

    def mapping(self, node: ast.Dict) -> dict[Any, Any]:
        """`{'a': b, **c}`."""
        made: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                made.update(self._spread(value))
                continue
            name = self.value(key)
            if not isinstance(name, Scalar):
                raise self._no(key, "a key that is neither a string nor a number")
            made[name] = self.held(value)
        self._spend(node, len(made))
        return made

    def _spread(self, node: ast.expr) -> dict[Any, Any]:
        value = self.value(node)
        if not isinstance(value, dict):
            raise self._no(node, "only a dict can be spread here")
        self._spend(node, len(value))
        return value

    def call(self, node: ast.Call) -> Any:
        """`dict(...)` and `a.copy()`; no other call is read."""
        if isinstance(node.func, ast.Name) and node.func.id == "dict" and "dict" not in self.names:
            return self._dict_of(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "copy" and not node.args:
            owner = self.value(node.func.value)
            if isinstance(owner, (dict, list)) and not node.keywords:
                self._spend(node, len(owner))
                return owner.copy()
        raise self._no(node, f"a call is not read; {UNREADABLE}")

    def _dict_of(self, node: ast.Call) -> dict[Any, Any]:
        """The dict of `dict(other, key=value, **more)`."""
        if len(node.args) > 1:
            raise self._no(node, "dict takes one dict and keywords")
        made = dict(self._spread(node.args[0])) if node.args else {}
        given: set[Any] = set()
        for keyword in node.keywords:
            more = self._spread(keyword.value) if keyword.arg is None else {keyword.arg: keyword.value}
            if twice := given & more.keys():
                raise self._no(node, f"{min(map(str, twice))[:64]} is given twice")
            given |= more.keys()
            made.update(more if keyword.arg is None else {keyword.arg: self.held(keyword.value)})
        self._spend(node, len(made))
        return made

    def attribute(self, node: ast.Attribute) -> Any:
        """`a.b`, which is `a['b']`."""
        owner = self.value(node.value)
        if not isinstance(owner, dict) or node.attr not in owner:
            raise self._no(node, f"there is no {node.attr[:64]!r} in it")
        return owner[node.attr]

    def subscript(self, node: ast.Subscript) -> Any:
        """`a['b']`, `a[0]`, `a[1:]`."""
        owner = self.value(node.value)
        if isinstance(node.slice, ast.Slice):
            return self._sliced(node, owner, node.slice)
        key = self.value(node.slice)
        if isinstance(owner, dict) and isinstance(key, Scalar) and key in owner:
            return owner[key]
        if isinstance(owner, (list, tuple, str)) and _is_index(key, owner):
            return owner[key]
        raise self._no(node, "there is no such key or position in it")

    def _sliced(self, node: ast.AST, owner: Any, part: ast.Slice) -> Any:
        bounds = [
            None if bound is None else self.value(bound) for bound in (part.lower, part.upper, part.step)
        ]
        integers = all(bound is None or type(bound) is int for bound in bounds)
        if not isinstance(owner, (list, tuple, str)) or not integers or bounds[2] == 0:
            raise self._no(node, "a slice is of a list, by integers")
        made = owner[slice(*bounds)]
        self._spend(node, len(made))
        return made

    def signed(self, node: ast.UnaryOp) -> Any:
        """`-a`, `+a`."""
        value = self.value(node.operand)
        if not isinstance(node.op, (ast.USub, ast.UAdd)) or not isinstance(value, Number):
            raise self._no(node, f"this is not read; {UNREADABLE}")
        return -value if isinstance(node.op, ast.USub) else +value

    def arithmetic(self, node: ast.BinOp) -> Any:
        """`a + b` and its like."""
        return self._combined(node, node.op, self.value(node.left), self.value(node.right))

    def _combined(self, node: ast.AST, sign: ast.operator, left: Any, right: Any) -> Any:
        for value in (left, right):
            if isinstance(value, Refused):
                raise _Refusal(value, is_known=True)
        if isinstance(left, Number) and isinstance(right, Number):
            return self._number(node, sign, left, right)
        if isinstance(sign, ast.Add) and type(left) is type(right) and isinstance(left, (str, list, tuple)):
            self._spend(node, len(left) + len(right))
            return operator.add(left, right)
        if isinstance(sign, ast.Mult):
            return self._repeated(node, left, right)
        if isinstance(sign, ast.Mod) and isinstance(left, str):
            return self._percent(node, left, right)
        raise self._no(node, "these cannot be combined")

    def _number(self, node: ast.AST, sign: ast.operator, left: float, right: float) -> Any:
        compute = NUMBERS.get(type(sign))
        if compute is None:
            raise self._no(node, f"this is not read; {UNREADABLE}")
        if isinstance(sign, ast.Pow) and _is_huge_power(left, right):
            raise self._no(node, "an integer of more than 63 bits")
        try:
            return self._bounded(node, compute(left, right))
        except (ZeroDivisionError, OverflowError) as error:
            raise self._no(node, "a number that is not finite") from error

    def _repeated(self, node: ast.AST, left: Any, right: Any) -> Any:
        items, times = (right, left) if isinstance(left, int) else (left, right)
        if not isinstance(items, (str, list, tuple)) or not isinstance(times, int):
            raise self._no(node, "these cannot be multiplied")
        self._spend(node, len(items) * max(times, 0))
        return items * times

    def _percent(self, node: ast.AST, text: str, values: Any) -> str:
        """`'x%d' % y`, without widths that could make much of little."""
        given = values if isinstance(values, tuple) else (values,)
        if CONVERSION.sub("", text).count("%") or not all(isinstance(value, Scalar) for value in given):
            raise self._no(node, "a format that is not read")
        self._spend(node, len(text) + sum(len(str(value)) + 100 for value in given))
        try:
            return text % given
        except (TypeError, ValueError) as error:
            raise self._no(node, "a format that does not fit its values") from error

    def formatted(self, node: ast.JoinedStr) -> str:
        """`f'{a}-{b:.3f}'` of strings and numbers."""
        text = "".join(self._piece(part) for part in node.values)
        self._spend(node, len(text))
        return text

    def _piece(self, part: ast.expr) -> str:
        if isinstance(part, ast.Constant):
            return str(self.constant(part))
        assert isinstance(part, ast.FormattedValue)
        value = self.value(part.value)
        layout = "" if part.format_spec is None else self.value(part.format_spec)
        if not isinstance(value, Scalar) or not FORMAT.fullmatch(layout) or part.conversion not in (-1, 115):
            raise self._no(part, "a format that is not read")
        self._spend(part, 100)
        try:
            return format(value, layout)
        except (TypeError, ValueError) as error:
            raise self._no(part, "a format that does not fit its value") from error


def _is_huge_power(base: float, exponent: float) -> bool:
    """Whether base ** exponent has certainly more than 64 bits; it is not computed to find out."""
    if not isinstance(base, int) or not isinstance(exponent, int):
        return False
    return exponent > 0 and (abs(base).bit_length() - 1) * exponent > 64


def _is_index(key: Any, owner: Any) -> bool:
    return isinstance(owner, (list, tuple, str)) and type(key) is int and -len(owner) <= key < len(owner)


NUMBERS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
RUNNERS: Mapping[type[ast.stmt], Callable[[_Reader, Any], None]] = {
    ast.Assign: _Reader.assign,
    ast.AnnAssign: _Reader.annotated,
    ast.AugAssign: _Reader.augmented,
    ast.Delete: _Reader.delete,
    ast.Expr: _Reader.expression,
}
READERS: Mapping[type[ast.expr], Callable[[_Reader, Any], Any]] = {
    ast.Constant: _Reader.constant,
    ast.Name: _Reader.name,
    ast.List: _Reader.sequence,
    ast.Tuple: _Reader.sequence,
    ast.Set: _Reader.braces,
    ast.Dict: _Reader.mapping,
    ast.Call: _Reader.call,
    ast.Attribute: _Reader.attribute,
    ast.Subscript: _Reader.subscript,
    ast.UnaryOp: _Reader.signed,
    ast.BinOp: _Reader.arithmetic,
    ast.JoinedStr: _Reader.formatted,
}
CHANGES: Mapping[str, Callable[[_Reader, ast.Call, dict[Any, Any]], None]] = {
    "update": _Reader.update,
    "pop": _Reader.pop,
}
