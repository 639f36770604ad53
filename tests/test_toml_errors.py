"""Lines of keys in a TOML text, and what a message shows of a value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import SpecError
from gate.toml_errors import did_you_mean, heading, line_of, shown, tables_from_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = '''a = [
  1,
  2,
]
b = """
c = 1

"""
[t]
c = { d = 1, e = 2 }
[[u]]
[[u]]
x = 1
  [u.v]
  y = 1
'''


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("a",), 1),
        (("a", 1), 1),
        (("b",), 5),
        (("t",), 9),
        (("t", "c"), 10),
        (("t", "c", "e"), 10),
        (("t", "absent"), 9),
        (("u",), 11),
        (("u", 1), 12),
        (("u", 1, "x"), 13),
        (("u", 1, "v", "y"), 15),
        (("u", 5), 11),
        (("absent",), 1),
        ((), 1),
    ],
)
def test_a_key_s_line_is_where_it_is_set_and_an_absent_one_s_its_parent_s(key, line):
    assert line_of(TEXT, key) == line
    assert line_of(TEXT.replace("\n", "\r\n"), key) == line


def by_every_prefix(text, key):
    """The line of a key, found by reading each prefix of the text."""
    lines = text.split("\n")
    depth, line, complete = 0, 1, 0
    for number in range(1, len(lines) + 1):
        try:
            raw = tomllib.loads("\n".join(lines[:number]) + "\n")
        except tomllib.TOMLDecodeError:
            continue
        reached = 0
        for part in key:
            try:
                raw = raw[part]
            except (KeyError, IndexError, TypeError):
                break
            reached += 1
        if reached > depth:
            depth, line = reached, complete + 1
        complete = number
    return line


PARTS = [
    "a = 1\n",
    "b = [\n1,\n\n2]\n",
    "[t]\n",
    "c = 1\n",
    "[t.c]\n",
    "[[u]]\n",
    'd = """\n[t]\nc = 1\n"""\n',
    "\n",
    "# x\n",
]
KEYS = st.lists(st.sampled_from(["a", "b", "c", "d", "t", "u", 0, 1]), max_size=4).map(tuple)


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), KEYS)
def test_halving_finds_the_line_that_reading_every_prefix_finds(text, key):
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert line_of(text, key) == 1
    else:
        assert line_of(text, key) == by_every_prefix(text, key)


def test_a_text_of_one_endless_string_does_not_take_for_ever():
    text = "a = 1\nb = '''" + "x\n" * 20_000 + "'''\nc = 1\n"
    assert 1 <= line_of(text, ("c",)) <= text.count("\n")


def test_what_is_no_toml_says_so_with_its_line():
    with pytest.raises(SpecError, match=r"f\.toml:2: is not TOML: "):
        tables_from_text("a = 1\nb = \n", path=Path("f.toml"))
    with pytest.raises(SpecError, match=r"f\.toml: is not TOML: Exceeds the limit"):
        tables_from_text("a = " + "9" * 5000, path=Path("f.toml"))
    with pytest.raises(SpecError, match="is not TOML"):
        tables_from_text("a = " + "[" * 100_000, path=Path("f.toml"))


def test_a_shown_value_is_short_printable_and_on_one_line():
    assert shown("a") == "'a'"
    assert shown("\x1b[2J\n") == r"'\x1b[2J\n'"
    assert len(shown("x" * 10_000)) < 100
    assert shown(1 << 100_000) == "a number of 100001 bits"
    assert shown(12) == "12"


def test_headings_are_written_as_in_the_file():
    assert heading((), "the spec") == "the spec"
    assert heading(("engine", 0), "the spec") == "[[engine]]"
    assert heading(("engine", 0, "parity"), "the spec") == "[engine.parity]"
    assert heading(("model", "\x1b"), "the spec") == r"[model.'\x1b']"


def test_the_nearest_name_is_offered_or_all_of_them():
    assert did_you_mean("role", ["roles", "owner"]) == "; did you mean 'roles'?"
    assert did_you_mean("zzz", ["roles", "owner"]) == "; it takes roles, owner"
    assert did_you_mean("zzz", []) == ""
