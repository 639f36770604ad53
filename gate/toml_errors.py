"""What is wrong in a TOML file, in its own words: file and line, table, key, nearest valid name, got and expected. Pure.

The words that the spec and the trust policy share; what each of them means is theirs.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from gate.errors import SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]
_PARSES = 400
"""How often a text is parsed to find a line; after that the line of what stands before it has to do."""
_SHOWN = 80
_SOME = -1
"""In a key, for the name in a table of free names, which the decoder does not say."""
_LONG_BITS = 256


def tables_from_text(text: str, *, path: Path) -> dict[str, Any]:
    """The raw tables of a TOML text.

    Raises:
        SpecError: It is not TOML, nests too deep or holds a number that is too long; with the line where the parser says.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SpecError("is not TOML that can be read: it nests too deep", where=str(path)) from None
    except ValueError as err:
        line = re.search(r"line (\d+)", str(err))
        where = f"{path}:{line.group(1)}" if line else str(path)
        raise SpecError(f"is not TOML: {err}", where=where) from err


def line_of(text: str, key: KeyPath) -> int:
    """The line, from 1, on which a key of a TOML text is set; its nearest parent's where it is absent.

    The prefixes of the text are parsed by the TOML parser itself: a key stands in the first line after the longest
    prefix without it. So strings, inline tables and arrays over several lines need no grammar here. What a prefix has,
    each longer one has too, so that halving finds it.
    """
    lines = text.split("\n")
    whole = _reached(text, key)
    if whole is None or whole == 0:
        return 1
    without, bound, parses = 0, len(lines), 0
    while bound - without > 1 and parses < _PARSES:
        middle = (without + bound) // 2
        reached = None
        for number in range(middle, bound):
            parses += 1
            reached = _reached("\n".join(lines[:number]) + "\n", key)
            if reached is not None or parses >= _PARSES:
                break
        if reached is not None and reached < whole:
            without = number
        else:
            bound = middle
    return without + 1


def _reached(text: str, key: KeyPath) -> int | None:
    """How many parts of a key a text has; None where it is not TOML."""
    try:
        raw: Any = tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
    for count, part in enumerate(key):
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return count
    return len(key)


def did_you_mean(name: str, valid: list[str]) -> str:
    """`; did you mean 'x'?`, or the valid names where none is near."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.55)
    if near:
        return f"; did you mean {near[0]!r}?"
    starts = [each for each in valid if name.startswith(each)]
    if starts:
        return f"; did you mean {max(starts, key=len)!r}?"
    return f"; it takes {', '.join(valid)}" if valid else ""


def conversion_error(
    err: msgspec.ValidationError,
    *,
    kind: type[msgspec.Struct],
    raw: dict[str, Any],
    text: str,
    path: Path,
    whole: str,
    in_file: Callable[[KeyPath], KeyPath] = lambda key: key,
    elsewhere: Callable[[KeyPath, str], str | None] = lambda _, __: None,
    distinct: frozenset[str] = frozenset(),
) -> SpecError:
    """The decoder's message about `msgspec.convert(raw, kind)`, as one who wrote the file needs it.

    Args:
        err: What the decoder raised.
        kind: What it should have become.
        raw: What was converted.
        text: Of the file.
        path: Of the file, for the message.
        whole: What the file is called, such as `the spec`.
        in_file: Where the file has a key of `raw`, if elsewhere.
        elsewhere: The table that has a key of this name, if it was put into the wrong one.
        distinct: Keys whose values look alike and mean something else: no nearest one is offered.
    """
    message, _, at = str(err).partition(" - at ")
    typed = _named_key(_key_path(at), message, kind=kind, raw=raw)
    key = in_file(typed)
    where = f"{path}:{line_of(text, key)}"
    unknown = re.search(r"unknown field `(.*)`", message, re.DOTALL)
    if unknown:
        name = unknown.group(1)
        belongs = elsewhere(typed, name)
        meant = f"; it belongs into {belongs}" if belongs else did_you_mean(name, sorted(_valid_keys(kind, typed)))
        return SpecError(
            f"{heading(key, whole)} has no key {shown(name)}{meant}", where=f"{path}:{line_of(text, (*key, name))}"
        )
    missing = re.search(r"missing required field `(.*?)`", message)
    if missing:
        return SpecError(f"{heading(key, whole)} needs {missing.group(1)!r}", where=where)
    got = _value_at(raw, typed)
    if at.startswith("`key`") and typed:
        got = typed[-1]
    if isinstance(got, dict) and message.startswith("Expected `array"):
        name = ".".join(_name(part) for part in key if isinstance(part, str))
        return SpecError(f"there may be several: write [[{name}]] in place of [{name}]", where=where)
    message = (
        re.sub(r", got `[^`]*`$", "", message).replace(" | null", "").replace("`", "").replace("Expected", "expected")
    )
    if "matching regex" in message:
        message = "takes letters, digits, '.', '_' and '-', and begins with a letter or digit"
    value = f", got {shown(got)}" if isinstance(got, (str, int, float, bool)) else ""
    if "Invalid enum value" in message and key:
        choices = sorted(str(choice) for choice in _choices_at(kind, typed))
        message = f"must be {choices[0]}" if len(choices) == 1 else f"must be one of {', '.join(choices)}"
        if _takes_list(kind, typed):
            message = f'must be "{choices[0]}" or a list' if len(choices) == 1 else f"{message}, or a list"
        near = [] if key[-1] in distinct else difflib.get_close_matches(str(got)[:_SHOWN], choices, n=1, cutoff=0.55)
        value += f"; did you mean {near[0]!r}?" if near else ""
    owner, name = key[:-1], _name(key[-1]) if key else ""
    if len(key) > 1 and isinstance(key[-1], int):
        owner, name = key[:-2], f"{_name(key[-2])}[{key[-1]}]"
    return SpecError(f"{heading(owner, whole)} {name}: {message}{value}", where=where)


def shown(value: object) -> str:
    """A value of a file in a message: on one line, printable, and not longer than a reader needs."""
    if isinstance(value, int) and value.bit_length() > _LONG_BITS:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _key_path(at: str) -> KeyPath:
    """`$.engine[0].parity` as `("engine", 0, "parity")`; a dict's key is written `[...]` and left out by msgspec."""
    found: list[str | int] = [
        name or (int(index) if index.isdigit() else _SOME)
        for name, index in re.findall(r"\.([A-Za-z0-9_]+)|\[(\d+|\.\.\.)\]", at)
    ]
    return (*found, _SOME) if at.startswith("`key`") else tuple(found)


def heading(key: KeyPath, whole: str) -> str:
    """`[engine.parity]` for the key of a table, `[[engine]]` for one of several; `whole` for the file itself."""
    names = ".".join(_name(part) for part in key if isinstance(part, str))
    if not names:
        return whole
    return f"[[{names}]]" if isinstance(key[-1], int) else f"[{names}]"


def _name(part: str | int) -> str:
    """A part of a key in a message; quoted where it could be taken for something else."""
    text = str(part)
    plain = len(text) <= _SHOWN and re.fullmatch(r"[!-~]+", text)
    return text if plain else shown(part)


def _value_at(raw: Any, key: KeyPath) -> Any:
    """The raw value at a key, or None."""
    for part in key:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _valid_keys(kind: type[msgspec.Struct], key: KeyPath) -> Iterator[str]:
    """The keys that the table at `key` takes."""
    for each in _types_at(kind, key):
        for field in getattr(each, "fields", ()):
            yield field.encode_name


def _choices_at(kind: type[msgspec.Struct], key: KeyPath) -> tuple[object, ...]:
    """The literal values that are allowed at a key."""
    return tuple(value for each in _types_at(kind, key) for value in getattr(each, "values", ()))


def _takes_list(kind: type[msgspec.Struct], key: KeyPath) -> bool:
    """Whether a list may stand at a key, whatever else may."""
    from msgspec import inspect as types

    return any(isinstance(each, types.VarTupleType) for each in _types_at(kind, key))


def _types_at(kind: type[msgspec.Struct], key: KeyPath) -> list[Any]:
    """The types that may stand at a key, without null; none where there is no such key."""
    from msgspec import inspect as types

    def members(node: Any) -> list[Any]:
        inside = node.types if isinstance(node, types.UnionType) else (node,)
        return [each for each in inside if not isinstance(each, types.NoneType)]

    nodes = members(types.type_info(kind))
    for part in key:
        inner: list[Any] = []
        for node in nodes:
            if isinstance(node, types.StructType):
                inner.extend(field.type for field in node.fields if field.encode_name == part)
            elif isinstance(node, types.VarTupleType):
                inner.append(node.item_type)
            elif isinstance(node, types.DictType):
                inner.append(node.value_type)
        nodes = [each for node in inner for each in members(node)]
    return nodes


def _named_key(key: KeyPath, message: str, *, kind: type[msgspec.Struct], raw: dict[str, Any]) -> KeyPath:
    """The key with the name of each table that the decoder left out: the first that alone gives the same message."""
    while _SOME in key:
        at = key.index(_SOME)
        entries = _value_at(raw, key[:at])
        if not isinstance(entries, dict):
            return key[:at]
        for name, value in entries.items():
            try:
                msgspec.convert(_with(raw, key[:at], {name: value}), kind)
            except msgspec.ValidationError as err:
                if str(err).partition(" - at ")[0] == message:
                    key = (*key[:at], name, *key[at + 1 :])
                    break
        else:
            return key[:at]
    return key


def _with(raw: Any, key: KeyPath, value: Any) -> Any:
    """A copy of raw tables with another value at a key."""
    if not key:
        return value
    first, *rest = key
    if isinstance(raw, dict):
        return {**raw, first: _with(raw[first], tuple(rest), value)}
    return [_with(each, tuple(rest), value) if index == first else each for index, each in enumerate(raw)]
