from __future__ import annotations

import re
from pathlib import Path

import pytest

from gate.cli.explain import explanations

FINDINGS = Path(__file__).parents[2] / "docs" / "findings.md"


def test_every_heading_of_the_page_is_explained():
    headings = re.findall(r"^### (.+)$", FINDINGS.read_text(), re.MULTILINE)
    assert headings
    assert list(explanations()) == headings
    assert all(len(text) > 20 for text in explanations().values())


@pytest.mark.parametrize("check", ["parity.rel_rmse", "parity.rel_rmse[boxes]", "latency.p99_ms", "build", "task.top5"])
def test_a_check_is_explained_by_the_name_that_a_report_gives_it(gate_command, check):
    outcome = gate_command("explain", check)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{check}\n\n")


def test_without_a_check_all_are_listed(gate_command):
    outcome = gate_command("explain")
    assert outcome.code == 0
    assert "parity.rel_rmse\n" in outcome.out


def test_a_check_that_there_is_not_names_the_nearest(gate_command):
    outcome = gate_command("explain", "parity.rel_rsme")
    assert outcome.code == 2
    assert "did you mean 'parity.rel_rmse'?" in outcome.err
