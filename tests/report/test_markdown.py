from __future__ import annotations

from gate.errors import SpecError
from gate.report.markdown import github_annotations, github_error, markdown
from tests.report import conftest as runs


def test_the_first_line_is_the_verdict_with_its_reason():
    first, _, following, *_ = markdown(runs.FAILED).splitlines()
    assert first == "**FAILED ort-int8 parity.rel_rmse: 9.7e-03 > 5.0e-03 (gate.toml:41)**"
    assert following == "Next: `gate check examples/digits/gate.toml --engine ort-int8 --verbose`"


def test_every_finding_stands_in_a_fold_with_its_interval_limit_and_source():
    text = markdown(runs.FAILED)
    assert "<details><summary>ort-int8: FAILED, 3 findings</summary>" in text
    assert (
        "| task.top1_drop_pp | FAILED | 0.12 pp | 0.110 to 0.130 pp | &lt;= 0.10 pp | gate.toml:41 | 797 | host |"
        in text
    )
    assert text.count("<details>") == text.count("</details>") == 3


def test_digests_and_provenance_are_there():
    text = markdown(runs.PASSED)
    assert "| data sha256 | " + "2" * 64 + " |" in text
    assert "| engine ort-fp32 sha256 | " + "ab" * 32 in text


def test_an_engine_that_was_not_run_says_why():
    assert "**NOT RUN** `trt-fp16`: backend 'tensorrt' is not installed" in markdown(runs.ALL)


def test_text_cannot_break_the_table():
    run = runs.run_of(runs.engine("ort", runs.finding(detail="a | b <script>\n`x`")))
    text = markdown(run)
    assert "<script>" not in text
    assert "a \\| b &lt;script>" in text


def test_annotations_point_at_the_limit_and_escape_lines():
    lines = github_annotations(runs.ALL)
    assert "::error file=gate.toml,line=41,title=FAILED ort-int8 parity.rel_rmse::parity.rel_rmse: 9.7e-03" in lines[1]
    assert any("%0Anode: /f/Conv" in line for line in lines)
    assert not any("\n" in line for line in lines)
    assert github_annotations(runs.PASSED) == ()


def test_an_error_without_a_verdict_is_an_annotation_too():
    err = SpecError("needs a limit", where="a.toml:7", hint="add one")
    expected = "::error file=a.toml,line=7,title=gate%3A no verdict on a.toml::a.toml:7: needs a limit%0Aadd one"
    assert github_error(err, spec="a.toml") == expected
    assert github_error(SpecError("wrong"), spec="a.toml").startswith("::error file=a.toml,line=1,title=")


def test_warnings_stand_in_the_first_lines():
    engine = runs.engine("ort-int8", runs.PASSES, warnings=("calibrated on 4 samples | few",))
    assert markdown(runs.run_of(engine)).splitlines()[2] == "**WARNING** `ort-int8`: calibrated on 4 samples \\| few"


def test_ranges_of_a_calibrated_engine_are_a_folded_table():
    from tests.report.test_making import LOWERING

    text = markdown(runs.run_of(runs.engine("ort-int8", runs.PASSES, lowering=LOWERING)))
    assert "<details><summary>ranges of 3 calibrated tensors</summary>" in text
    assert "| tensor | low | high | largest seen | 99.9 % within | clipped | state |" in text
    assert "| /stem/out | -1 | 1 | - | - | 0.03 % | ok |" in text
    assert "ranges of" not in markdown(runs.PASSED)
