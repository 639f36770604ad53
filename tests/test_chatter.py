"""What third parties print, log and warn about stays inside."""

import logging
import sys
import warnings

import pytest

from gate.chatter import quiet


def test_prints_warnings_and_logs_are_kept_inside(capsys, caplog):
    with quiet() as chatter:
        sys.stdout.write("printed\n")
        sys.stderr.write("complained\n")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("some.tool").error("logged")
    assert chatter.tail() == ("DeprecationWarning: old", "printed", "complained")
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_tail_is_the_last_lines():
    with quiet() as chatter:
        sys.stdout.write("a\n\nb\nc\n")
    assert chatter.tail(2) == ("b", "c")


def test_logging_is_as_before_afterwards():
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable)
    with quiet():
        logging.warning("installs a handler")  # noqa: LOG015 - what a careless library does
        root.addHandler(logging.StreamHandler())
        root.setLevel(1)
    assert (list(root.handlers), root.level, root.manager.disable) == before


def test_exceptions_pass_and_the_rest_is_put_back():
    with pytest.raises(ValueError, match="through"), quiet():
        raise ValueError("through")
    assert logging.getLogger().manager.disable == 0
