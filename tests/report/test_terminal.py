from __future__ import annotations

import io
import threading
import time

import pytest

from gate.report.screen import show, terminal_width
from gate.report.terminal import PlainProgress, next_command, progress, render
from gate.verdict import Failure
from tests.report import conftest as runs


def test_the_first_line_names_engine_check_observed_limit_and_next_command():
    first = render(runs.FAILED).splitlines()[0]
    assert first == (
        "FAILED  ort-int8  parity.rel_rmse: 9.7e-03 > 5.0e-03 (gate.toml:41)"
        "   next: gate check examples/digits/gate.toml --engine ort-int8 --verbose"
    )


def test_the_first_line_of_a_pass_counts_engines_and_samples():
    assert render(runs.PASSED).splitlines()[0] == "PASSED  digits-cnn: 2 engines, 797 samples"


def test_a_run_in_which_nothing_ran_is_not_a_pass():
    screen = render(runs.NOT_RUN)
    assert screen.startswith("NOT RUN  digits-cnn: no engine ran, so there is nothing to pass")
    assert screen.endswith("exit 3 (inconclusive)\n")


def test_an_inconclusive_engine_says_what_is_needed():
    screen = render(runs.INCONCLUSIVE)
    assert (
        "INCONCLUSIVE  ort-fp16  latency.p99_ms: 0.11 ms [at least 0.0200 ms], limit <= 2 ms (gate.toml:41)" in screen
    )
    assert "        p99 needs at least 459 samples, has 300; raise samples or max_time_s\n" in screen
    assert screen.endswith("exit 3 (inconclusive)\n")


def test_the_failing_engine_is_explained_with_sample_cause_command_and_page():
    lines = render(runs.FAILED, report="out/report.md").splitlines()
    block = lines[lines.index("FAILED  ort-int8  parity.rel_rmse: 9.7e-03 > 5.0e-03 (gate.toml:41)") :]
    assert [line.strip() for line in block[1:5]] == [
        "likely cause: 2 activations clip",
        "worst sample 512 (label 8, reference 8 by 0.31, engine 3)",
        "also FAILED: task.top1_drop_pp: 0.12 pp [0.110 to 0.130 pp] > 0.10 pp (gate.toml:41)",
        "next: gate check examples/digits/gate.toml --engine ort-int8 --verbose   ·   gate explain parity.rel_rmse",
    ]
    assert lines[-1] == "report: out/report.md          exit 1 (failed)"


def test_every_engine_has_a_line_in_the_table():
    screen = render(runs.ALL)
    table = {line.split()[0]: line for line in screen.splitlines()[4:11]}
    assert "98.49 % (=)" in table["ort-fp32"]
    assert "0.21 / 0.24 ms" in table["ort-fp32"]
    assert "98.37 % (-0.13 pp)" in table["ort-int8"]
    assert table["rtx-fp16"].count("not run here") == 3
    assert table["rtx-fp16"].endswith("PASSED (preflight only)")
    assert table["trt-fp16"].endswith("NOT RUN")
    assert table["trt-int8"].endswith("FAILED")
    assert "NOT RUN  trt-fp16  backend 'tensorrt' is not installed" in screen


def test_a_failure_shows_the_compilers_log_and_the_hint():
    screen = render(runs.ALL)
    assert "FAILED  trt-int8  build: the compiler refused the graph\n        node: /f/Conv\n" in screen
    assert "[E] no implementation" in screen
    assert "Lower it with another opset." in screen


def test_verbose_lists_each_finding_with_limit_source_and_count():
    screen = render(runs.FAILED, verbose=True)
    assert "PASSED        parity.max_abs: 4.1e-07, limit <= 5.0e-03 (gate.toml:41), n = 797, host" in screen


def test_default_limits_say_of_which_precision():
    from gate.verdict import Limit

    run = runs.run_of(runs.engine("ort", runs.finding(estimate=0.0, allowed=Limit("at_most", 1e-5, "default"))))
    assert "default limits of the precision applied to ort" in render(run)
    assert "(default for fp32)" in render(run, verbose=True)


def test_the_table_fits_eighty_columns():
    lines = render(runs.ALL, width=80).splitlines()
    table = lines[4:11]
    assert max(map(len, table)) <= 80
    assert "verdict" in table[0]


def test_nothing_is_wrapped_or_coloured_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    show(render(runs.FAILED), stream)
    assert stream.getvalue() == render(runs.FAILED)
    assert terminal_width(stream) is None


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_a_terminal_gets_colours_unless_no_color_is_set(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured, plain = Terminal(), Terminal()
    show(render(runs.FAILED), coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    show(render(runs.FAILED), plain)
    assert "\x1b[1;31mFAILED" in coloured.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert "FAILED" in plain.getvalue()


def test_a_log_gets_one_line_a_stage():
    stream = io.StringIO()
    with progress(stream) as observer:
        observer.stage("reference", total=3)
        observer.advance(3)
        observer.stage("build", engine="ort-fp16")
        observer.note("rebuilt a cache entry")
        observer.done()
    assert isinstance(observer, PlainProgress)
    assert stream.getvalue() == "reference\nbuild       ort-fp16\nnote        rebuilt a cache entry\n"


def test_a_terminal_gets_bars_that_go_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with progress(stream) as observer:
        observer.stage("compare", engine="ort-fp16", total=4)
        observer.advance(2)
        observer.note("rebuilt a cache entry")
        observer.stage("latency", engine="ort-fp16")
    assert "compare" in stream.getvalue()
    assert "rebuilt a cache entry" in stream.getvalue()


@pytest.mark.parametrize("run", [runs.PASSED, runs.FAILED, runs.INCONCLUSIVE, runs.NOT_RUN, runs.ALL])
def test_every_screen_ends_with_its_exit_code(run):
    assert "exit " in render(run).splitlines()[-1]


def test_the_next_command_is_the_one_that_mends_all_that_is_wrong():
    absent = Failure(
        check="baseline",
        error="BaselineError",
        message="there is no accepted baseline",
        evidence=runs.HOST,
        hint='gate baseline accept --reason "…"',
    )
    only = runs.run_of(runs.engine("ort", runs.finding(estimate=1e-3), absent))
    assert next_command(only) == absent.hint
    assert render(only).count("gate baseline accept") == 2
    both = runs.run_of(runs.engine("ort", runs.finding(), absent))
    assert next_command(both) == "gate check examples/digits/gate.toml --engine ort --verbose"


def test_what_decides_an_inconclusive_finding_is_said_of_each():
    straddling = runs.finding("task.top1", 0.96, 0.95, kind="at_least", interval=(0.94, 0.98), detail="5 more samples")
    run = runs.run_of(runs.engine("ort", runs.finding(), straddling))
    assert "            5 more samples" in render(run).splitlines()
    assert "                docs/findings.md#task-top1" in render(run, verbose=True).splitlines()


def test_a_command_that_ends_with_another_code_does_not_promise_this_one():
    assert "exit " not in render(runs.PASSED, exit_line=False)


def block(run, **options):
    """The lines that explain the first engine that did not pass."""
    _, _, below = render(run, **options).partition("\nFAILED  ")
    return [line.strip() for line in below.partition("\n\n")[0].splitlines()]


def test_warnings_stand_below_the_table_of_a_run_that_passed():
    run = runs.run_of(runs.engine("ort-int8", runs.PASSES, warnings=("calibrated on 4 samples", "1 tensor is dead")))
    lines = render(run).splitlines()
    assert lines[0].startswith("PASSED")
    assert lines[6:9] == ["", "WARNING  ort-int8  calibrated on 4 samples", "WARNING  ort-int8  1 tensor is dead"]
    assert "WARNING" not in render(runs.PASSED)


def test_more_than_two_other_failures_are_named_in_one_line():
    names = ["parity.max_abs", "task.top1", "parity.cosine", "latency.p50_ms", "latency.p99_ms"]
    others = [runs.finding(name, 1.0) for name in names]
    unsure = runs.finding("task.top5", 0.96, 0.95, kind="at_least", interval=(0.94, 0.98))
    run = runs.run_of(runs.engine("ort", runs.finding(), *others, unsure))
    told = [line for line in block(run) if line.startswith("also")]
    assert told == [
        "also FAILED: parity.max_abs, task.top1, parity.cosine and 2 more; --verbose lists them",
        "also INCONCLUSIVE: task.top5; --verbose lists them",
    ]
    two = block(runs.run_of(runs.engine("ort", runs.finding(), *others[:2])))
    assert [line.partition(": 1 ")[0] for line in two if line.startswith("also")] == [
        "also FAILED: parity.max_abs",
        "also FAILED: task.top1",
    ]


def test_the_likely_cause_is_no_note_on_how_the_engine_was_made():
    from gate.engines.interface import LoweringRecord

    made = LoweringRecord(
        precision="fp16", tool="t", tool_version="1", opset=17, layers=(), notes=("opset raised from 17 to 19",)
    )
    notes = ("opset raised from 17 to 19", "logits: the values are 2 times the reference's", "built 2 times: alike")
    lines = block(runs.run_of(runs.engine("ort", runs.finding(), notes=notes, lowering=made)))
    assert lines[1] == "likely cause: logits: the values are 2 times the reference's"
    assert "opset raised from 17 to 19" in lines
    assert "built 2 times: alike" in lines
    assert not any("likely" in line for line in block(runs.run_of(runs.engine("ort", runs.finding(), lowering=made))))


def test_a_note_that_names_no_cause_is_told_as_it_is():
    hint = "likely cause: mean_ap is 0.012; it would be 0.780 if x and y are swapped"
    remark = "boxes differ most in 7.png: 2 of the reference's boxes not found"
    low = runs.finding("task.mean_ap_drop", 0.7, 0.01)
    lines = block(runs.run_of(runs.engine("ort", low, notes=(remark, hint))))
    assert lines[1] == hint
    assert remark in lines
    assert not any("likely" in line for line in block(runs.run_of(runs.engine("ort", low, notes=(remark,)))))


def test_what_is_verbose_already_does_not_propose_it():
    screen = render(runs.FAILED, verbose=True)
    assert "--verbose" not in screen
    assert screen.splitlines()[0].endswith("next: gate explain parity.rel_rmse")
    assert block(runs.FAILED, verbose=True)[-1] == "next: gate explain parity.rel_rmse"


def test_commands_by_hand_say_what_each_does():
    from gate.engines.interface import BuildRecord

    build = BuildRecord(
        backend="tensorrt",
        backend_version="10",
        precision="fp16",
        options={},
        profile={},
        command="trtexec --onnx=a",
        run_command="trtexec --loadEngine=b",
    )
    screen = render(runs.run_of(runs.engine("trt", runs.PASSES, build=build)), verbose=True)
    assert "  build by hand: trtexec --onnx=a\n  time by hand: trtexec --loadEngine=b\n" in screen


def test_a_warning_is_the_likely_cause_of_other_answers_alone():
    warnings = ("calibrated on 4 samples", "calibration input 'x' is 255 x larger")
    notes = ("worst sample 7: label 1",)
    lines = block(runs.run_of(runs.engine("ort", runs.finding(), warnings=warnings, notes=notes)))
    assert lines[1] == "likely cause: calibration input 'x' is 255 x larger"
    assert "worst sample 7: label 1" in lines
    slow = runs.run_of(runs.engine("ort", runs.finding("latency.p50_ms", 9.0), warnings=warnings))
    assert not any("likely" in line for line in block(slow))


def drawn_in(stream, seconds):
    """How much is drawn in so long, while nobody asks for it."""
    before = len(stream.getvalue())
    time.sleep(seconds)
    return len(stream.getvalue()) - before


@pytest.fixture
def moving(monkeypatch):
    """A terminal with bars."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with progress(stream) as bars:
        yield stream, bars


@pytest.mark.parametrize("name", ["latency", "usage", "memory", "stages"])
def test_nothing_is_drawn_while_something_is_timed(moving, name):
    stream, bars = moving
    bars.stage("compare", engine="ort", total=10)
    assert drawn_in(stream, 0.4) > 0
    bars.stage(name, engine="ort", total=5)
    assert f"{name:<11} ort" in stream.getvalue()
    assert drawn_in(stream, 0.4) == 0
    assert not [each.name for each in threading.enumerate() if type(each).__name__ == "_RefreshThread"]


def test_steps_of_what_is_timed_are_drawn_but_not_each_of_many(moving):
    stream, bars = moving
    bars.stage("latency", engine="ort", total=4)
    before = stream.getvalue()
    for _ in range(2):
        bars.advance()
    assert stream.getvalue() == before
    time.sleep(0.6)
    bars.advance()
    assert "75%" in stream.getvalue()[len(before) :]


def test_the_bar_moves_again_after_something_was_timed(moving):
    stream, bars = moving
    bars.stage("latency", engine="ort", total=5)
    bars.stage("build", engine="other")
    assert drawn_in(stream, 0.4) > 0
    assert "build       other" in stream.getvalue()
