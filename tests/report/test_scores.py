import math

import pytest

from gate.report.markdown import markdown
from gate.report.scores import box_lines, first_score_text, score_table
from gate.report.terminal import render
from gate.results import TaskValues
from tests.report import conftest as runs

BOXES = {
    "reference": 40.0,
    "candidate": 41.0,
    "matched": 39.0,
    "mean_iou": 0.98123,
    "least_iou": 0.6,
    "mean_score_difference": 0.01,
    "max_score_difference": 0.2,
    "class_changes": 2.0,
    "reference_only": 1.0,
    "candidate_only": 3.0,
}


def scores(values, reference, kind="detection", **more):
    return TaskValues(kind=kind, samples=512, values=values, reference=reference, **more)


def of_categories(*drops):
    reference = {"mean_ap": 0.8} | {f"ap_of.c{index}": 0.8 for index in range(len(drops))}
    values = {"mean_ap": 0.7} | {f"ap_of.c{index}": 0.8 - drop for index, drop in enumerate(drops)}
    return scores(values, reference)


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        (0.7774, 0.7818, "mean_ap 0.777 (-0.004)"),
        (0.7819, 0.7819, "mean_ap 0.782 (=)"),
        (0.78191, 0.78193, "mean_ap 0.782 (=)"),
        (0.7823, 0.7819, "mean_ap 0.782 (+0.0004)"),
        (0.0008, 0.9, "mean_ap 0.001 (-0.899)"),
        (math.nan, 0.9, "mean_ap NaN (reference 0.900)"),
        (math.nan, math.nan, "mean_ap NaN (=)"),
        (0.0, 0.0, "mean_ap 0.000 (=)"),
    ],
)
def test_the_table_has_the_first_value_and_its_change(ours, theirs, text):
    assert first_score_text(scores({"mean_ap": ours}, {"mean_ap": theirs})) == text


def test_the_first_value_is_the_kinds_whatever_the_order():
    given = scores({"mean_ap_50": 0.9, "mean_ap": 0.8}, {"mean_ap_50": 0.9, "mean_ap": 0.8})
    assert first_score_text(given) == "mean_ap 0.800 (=)"


def test_values_that_are_no_fractions_keep_digits_and_unit():
    assert first_score_text(scores({"rmse": 123.456}, {"rmse": 120.0}, "regression")) == "rmse 123.5 (+3.5)"
    given = scores({"perplexity": 9.0, "kl_divergence": 3.2e-8}, {"perplexity": 9.0, "kl_divergence": 0.0}, "tokens")
    assert score_table(given).rows == (
        ("perplexity", "9.0000", "9.0000", "="),
        ("kl_divergence (nats)", "3.20e-08", "0", "+3.20e-08"),
    )


def test_nothing_scored_is_an_empty_cell():
    assert first_score_text(scores({}, {})) == ""
    assert first_score_text(TaskValues(kind="detection", samples=0, values={"mean_ap": 1.0}, reference={})) == ""


def test_of_the_categories_the_five_that_fell_most_are_listed():
    table = score_table(of_categories(0.01, -0.02, 0.3, 0.0, 0.04, 0.05, 0.06))
    assert [row[0] for row in table.rows] == ["mean_ap", "ap_of.c2", "ap_of.c6", "ap_of.c5", "ap_of.c4", "ap_of.c0"]
    assert table.rows[1] == ("ap_of.c2", "0.5000", "0.8000", "-0.3000")
    assert table.remarks == ("ap_of.*: 6 of 7 changed, the 5 worst are listed",)


def test_a_category_that_is_not_defined_for_the_engine_alone_is_the_worst():
    table = score_table(of_categories(0.1, math.nan, 0.2))
    assert table.rows[1] == ("ap_of.c1", "NaN", "0.8000", "NaN")


def test_categories_that_are_all_equal_take_one_line():
    table = score_table(of_categories(0.0, 0.0, 0.0))
    assert [row[0] for row in table.rows] == ["mean_ap"]
    assert table.remarks == ("ap_of.*: all 3 are the reference's",)


def test_what_neither_defines_is_named_and_not_listed():
    table = score_table(
        scores({"mean_ap": 0.5, "mean_ap_large": math.nan}, {"mean_ap": 0.5, "mean_ap_large": math.nan})
    )
    assert [row[0] for row in table.rows] == ["mean_ap"]
    assert table.remarks == ("not defined on these samples: mean_ap_large",)


def test_a_change_too_small_for_the_digits_is_no_equality():
    table = score_table(scores({"mean_ap": 0.78191}, {"mean_ap": 0.78193}))
    assert table.rows == (("mean_ap", "0.7819", "0.7819", "-2e-05"),)


def test_a_value_that_the_reference_has_not_stands_alone():
    table = score_table(scores({"mean_ap": 0.5, "tiled_mean_ap": 0.6}, {"mean_ap": 0.5}))
    assert table.rows[1] == ("tiled_mean_ap", "0.6000", "-", "-")


def test_a_kind_that_is_not_installed_here_is_still_shown():
    given = scores({"loss": 0.5, "loss_of.a": 0.6}, {"loss": 0.4, "loss_of.a": 0.6}, "of_another_package")
    assert first_score_text(given) == "loss 0.500 (+0.100)"
    assert score_table(given).remarks == ("loss_of.*: all 1 are the reference's",)


def test_boxes_are_told_in_two_sentences():
    assert [*box_lines(scores({}, {}, boxes=BOXES))] == [
        "boxes that count: 41, the reference's 40; 39 pairs with one or two of them, 2 of another category; "
        "1 not found, 3 new",
        "paired boxes: IoU 0.9812 in the mean, 0.6000 the least; scores differ by 0.0100 in the mean, 0.2000 at most",
    ]
    assert [*box_lines(scores({}, {}))] == []
    without = BOXES | {"matched": 0.0, "mean_iou": math.nan}
    assert len([*box_lines(scores({}, {}, boxes=without))]) == 1


def test_the_screen_and_the_report_show_both_models_values():
    run = runs.run_of(
        runs.engine(
            "ort-int8",
            runs.PASSES,
            task=None,
            scores=scores({"mean_ap": 0.7774}, {"mean_ap": 0.7819}, boxes=BOXES),
        )
    )
    assert "mean_ap 0.777 (-0.005)" in render(run)
    assert "0.7819" not in render(run)
    screen = render(run, verbose=True)
    assert "  detection, 512 samples  engine  reference   change\n" in screen
    assert "    mean_ap               0.7774     0.7819  -0.0045\n" in screen
    assert "  boxes that count: 41, the reference's 40;" in screen
    text = markdown(run)
    assert "| detection, 512 samples | engine | reference | change |" in text
    assert "| mean_ap | 0.7774 | 0.7819 | -0.0045 |" in text
    assert "paired boxes: IoU 0.9812 in the mean" in text
