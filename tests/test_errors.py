import re
from pathlib import Path

import pytest

from gate import errors
from gate.errors import BuildError, ExitCode, GateError

ROOT = Path(__file__).parents[1]


def _subclasses(base):
    return [each for each in base.__subclasses__() if each.__module__ == "gate.errors"]


def _all_errors():
    found, todo = [], [GateError]
    while todo:
        each = todo.pop()
        found.append(each)
        todo.extend(_subclasses(each))
    return found


def _documented_tree():
    """Name of each error of the docstring -> name of its parent, by the column that its name stands in."""
    parents, open_at = {}, []
    for line in errors.__doc__.splitlines():
        named = re.match(r"^(\s{4}[│├└─ ]*)([A-Z]\w+)(\s{2,}\S|$)", line)
        if named is None:
            continue
        column, name = named.start(2), named.group(2)
        while open_at and open_at[-1][0] >= column:
            open_at.pop()
        parents[name] = open_at[-1][1] if open_at else None
        open_at.append((column, name))
    return parents


def test_documented_tree_is_the_real_one():
    real = {each.__name__: each.__base__.__name__ for each in _all_errors() if each is not GateError}
    assert _documented_tree() == {"GateError": None, **real}


@pytest.mark.parametrize("error", _all_errors(), ids=lambda error: error.__name__)
def test_error_has_an_exit_code_that_is_not_passed(error):
    assert isinstance(error.exit_code, ExitCode)
    assert error.exit_code is not ExitCode.PASSED


@pytest.mark.parametrize("error", _all_errors(), ids=lambda error: error.__name__)
def test_error_says_where_what_and_what_next(error):
    shown = str(error("has no key 'max_abs_diff'", where="gate.toml:23", hint="did you mean 'max_abs'?"))
    assert shown == "gate.toml:23: has no key 'max_abs_diff'\ndid you mean 'max_abs'?"


def test_error_without_place_or_hint_is_its_message():
    assert str(GateError("nothing was checked")) == "nothing was checked"


def test_build_error_ends_with_the_node_and_the_log():
    shown = str(BuildError("refused", hint="look", node="/conv", log=("a", "b")))
    assert shown == "refused\nlook\nnode: /conv\n  | a\n  | b"


def test_exit_codes_are_distinct_and_only_passed_is_zero():
    codes = [code.value for code in ExitCode]
    assert len(set(codes)) == len(codes)
    assert [code for code in ExitCode if code == 0] == [ExitCode.PASSED]


def test_readme_documents_every_exit_code_and_no_other():
    rows = re.findall(
        r"^\|\s*(\d+)\s*\|\s*([^|]+?)\s*\|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(int(number) for number, _ in rows) == sorted(code.value for code in ExitCode)
    meaning = {int(number): text.lower() for number, text in rows}
    assert meaning[ExitCode.PASSED].startswith("passed")
    assert meaning[ExitCode.FAILED].startswith("failed")
    assert "inconclusive" in meaning[ExitCode.INCONCLUSIVE]
