from __future__ import annotations

import json
import math

import pytest
from jsonschema import Draft202012Validator

from gate.errors import MeasurementError
from gate.report.json_report import json_bytes, read_report, write_report
from gate.schemas import report_schema
from tests.report import conftest as runs

WITH_NAN = runs.run_of(runs.engine("ort", runs.finding(estimate=math.nan, interval=(math.nan, math.inf))))


@pytest.mark.parametrize("run", [runs.PASSED, runs.ALL, WITH_NAN])
def test_a_report_is_valid_and_reads_back(run, tmp_path):
    path = tmp_path / "report.json"
    write_report(run, path)
    Draft202012Validator(report_schema()).validate(json.loads(path.read_bytes()))
    back = read_report(path)
    assert [each.status for each in back.engines] == [each.status for each in run.engines]
    assert json_bytes(back) == path.read_bytes()


def test_a_run_in_which_nothing_ran_has_no_status_to_write():
    with pytest.raises(MeasurementError, match="nothing to pass"):
        json_bytes(runs.NOT_RUN)


def test_statuses_are_computed_again_and_not_believed(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(json_bytes(runs.FAILED).replace(b'"FAILED"', b'"PASSED"'))
    assert read_report(path).status.value == "FAILED"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{}", "is not a report"),
        (b"[]", "is not a report"),
        (json_bytes(runs.PASSED)[:-20], "is not JSON"),
        (json_bytes(runs.PASSED).replace(b'"schema_version": 1', b'"schema_version": 2'), "is not a report"),
        (json_bytes(runs.PASSED).replace(b'"samples": 797,', b'"samples": 797, "samples": 1,', 1), "twice"),
    ],
)
def test_what_is_no_report_is_refused(content, message, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(MeasurementError, match=message):
        read_report(path)


def test_a_missing_report_says_how_to_write_one(tmp_path):
    with pytest.raises(MeasurementError, match="no such report") as caught:
        read_report(tmp_path / "report.json")
    assert "gate check" in str(caught.value)
