"""Faults of data, labels, reference and spec, met through the command: each is a clear error and none may pass."""

from __future__ import annotations

import pytest

from tests.withstand.conftest import Project


def test_an_empty_data_set_is_an_error(project: Project) -> None:
    project.edit_data("digits = held_out()", "digits = held_out().part(0, 0)")
    outcome = project.check()
    assert outcome.code == 2
    assert "gives no samples, [data] asks for 797" in outcome.text


def test_fewer_samples_than_required_is_an_error(project: Project) -> None:
    project.edit_data("digits = held_out()", "digits = held_out().part(0, 796)")
    outcome = project.check()
    assert outcome.code == 2
    assert "gives 796 samples, [data] asks for 797" in outcome.text


def test_fewer_labels_than_samples_is_an_error(project: Project) -> None:
    project.edit_data(
        'digits = held_out()\n    return Samples(inputs={"input": digits.images}, labels=digits.labels)',
        'digits = held_out()\n    return Samples(inputs={"input": digits.images}, labels=digits.labels[:-1])',
    )
    outcome = project.check()
    assert outcome.code == 2
    assert "has 797 samples but 796 labels" in outcome.text


def test_a_nan_in_the_inputs_is_an_error(project: Project) -> None:
    project.edit_data("digits = held_out()", "digits = held_out()\n    digits.images[5] = float('nan')")
    outcome = project.check()
    assert outcome.code == 2
    assert "NaN or Inf at sample 5" in outcome.text


def test_calibration_samples_that_are_evaluated_on_are_an_error(project: Project) -> None:
    project.edit_data("training().part(0, CALIBRATION_SAMPLES)", "held_out().part(0, CALIBRATION_SAMPLES)")
    outcome = project.check()
    assert outcome.code == 2
    assert "calibration samples are evaluation samples" in outcome.text


def test_a_reference_that_misses_what_training_said_is_an_error_of_its_own(project: Project) -> None:
    project.edit(('id = "digits-two"', 'id = "digits-two"\nmetrics = { top1 = 0.9925 }'))
    assert project.check().code == 0
    project.edit_data("np.float32(16), table", "np.float32(1600), table")
    outcome = project.check()
    assert outcome.code == 1
    assert "the reference itself is wrong: top1" in outcome.text
    assert outcome.report is None


def test_labels_in_another_order_are_noticed_by_the_reference_check(project: Project) -> None:
    project.edit(('id = "digits-two"', 'id = "digits-two"\nmetrics = { top1 = 0.9925 }'))
    project.edit_data("labels=digits.labels)", "labels=digits.labels[::-1].copy())")
    outcome = project.check()
    assert outcome.code == 1
    assert "the reference itself is wrong" in outcome.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "  [engine.parity]\n",
            "  [engine.parity]\n  max_abs_diff = 1e-3\n",
            "has no key 'max_abs_diff'; did you mean 'max_abs'",
        ),
        ("  [engine.parity]\n", "  [engine.parrity]\n", "has no key 'parrity'; did you mean 'parity'"),
        (
            "  [engine.parity]\n  [engine.task]\n  top1_drop_at_most_pp = 0.5\n",
            "",
            "has no check",
        ),
        ("  [engine.parity]\n", "  [engine.parity]\n  defaults = false\n", "no limit of its own"),
        ("samples = 797", "samples = 0", "samples: expected int >= 1, got 0"),
        ("top1_drop_at_most_pp = 0.5", "top1_drop_at_most_pp = nan", "top1_drop_at_most_pp"),
        ('backend = "onnxruntime"', 'backend = "onnxrumtime"', "did you mean 'onnxruntime'"),
    ],
)
def test_a_spec_that_asks_for_nothing_or_the_wrong_thing_is_refused(
    project: Project, old: str, new: str, message: str
) -> None:
    project.edit((old, new))
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert message in outcome.text
    assert "gate.toml:" in outcome.text


def test_an_optional_engine_whose_backend_is_missing_is_not_run_and_does_not_pass_alone(project: Project) -> None:
    project.edit(('backend = "onnxruntime"', 'backend = "tensorrt"\noptional = true'))
    outcome = project.check()
    assert outcome.code == 3, outcome.text
    assert "no engine can run here" in outcome.text


def test_a_backend_that_is_missing_is_an_error(project: Project) -> None:
    project.edit(('backend = "onnxruntime"', 'backend = "tensorrt"'))
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert "tensorrt" in outcome.text
