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


@pytest.mark.parametrize(
    ("check", "about", "section"),
    [
        ("task.mean_ap", "detection: mean_ap: Average precision over categories", "task-value"),
        ("task.mean_ap_drop", "keypoints: mean_ap: Average precision over categories", "task-drop"),
        ("task.mean_ap_75_ratio", "detection: mean_ap_75: ", "task-ratio"),
        ("task.rmse_rise", "regression: rmse: Root of the mean squared error", "task-rise"),
        ("task.top1_agreement", "tokens: top1_agreement: ", "task-value"),
        ("task.iou_of.road", "semantic_segmentation: iou_of.road: ", "task-value"),
        ("task.ap_of.traffic light [red]_drop", "detection: ap_of.traffic light [red]: ", "task-drop"),
        ("task.recall_at_10_drop", "embedding: recall_at_10: ", "task-drop"),
        ("task.tiled_mean_ap_gain", "detection: mean_ap: ", "task-gain"),
        ("baseline.mean_iou_drop", "semantic_segmentation: mean_iou: ", "baseline-drop"),
        ("baseline.perplexity_rise", "tokens: perplexity: ", "baseline-rise"),
    ],
)
def test_a_check_of_a_tasks_value_says_what_the_value_is(gate_command, check, about, section):
    outcome = gate_command("explain", check)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{check}\n\n")
    assert about in outcome.out
    assert outcome.out.endswith(f"{explanations()[section]}\n")


@pytest.mark.parametrize(
    ("limit", "section"),
    [
        ("task.iou_of.road_at_least", "task-value"),
        ("task.mean_ap_drop_at_most", "task-drop"),
        ("task.rmse_at_most", "task-value"),
        ("task.rmse_ratio_at_most", "task-ratio"),
        ("task.top1_drop_at_most_pp", "task-top1_drop_pp"),
        ("task.top1_at_least", "task-top1"),
        ("parity.top1_agreement_at_least", "parity-top1_agreement"),
    ],
)
def test_a_limit_is_explained_as_its_check(gate_command, limit, section):
    outcome = gate_command("explain", limit)
    assert outcome.code == 0
    assert outcome.out.endswith(f"{explanations()[section]}\n")


def test_without_a_check_all_are_listed(gate_command):
    outcome = gate_command("explain")
    assert outcome.code == 0
    assert "parity.rel_rmse\n" in outcome.out
    assert "task.<value>_drop\n" in outcome.out


def test_all_that_is_listed_is_explained(gate_command):
    for listed in gate_command("explain").out.splitlines():
        outcome = gate_command("explain", listed)
        assert outcome.code == 0, listed
        assert outcome.out.startswith(f"{listed}\n\n")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("parity.rel_rsme", "parity.rel_rmse"),
        ("task.tpo1", "task.top1"),
        ("task.mean_ap_drp", "task.mean_ap_drop"),
        ("baseline.mean_iuo_drop", "baseline.mean_iou_drop"),
    ],
)
def test_a_check_that_there_is_not_names_the_nearest(gate_command, given, meant):
    outcome = gate_command("explain", given)
    assert outcome.code == 2
    assert f"did you mean '{meant}'?" in outcome.err


@pytest.mark.parametrize("given", ["task.", "task.iou_of.", "baseline.xyz", "nothing", "task.zzz_drop"])
def test_what_no_kind_measures_is_not_explained(gate_command, given):
    outcome = gate_command("explain", given)
    assert outcome.code == 2
    assert f"there is no check '{given}'" in outcome.err
