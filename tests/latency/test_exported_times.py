import json
import math

import numpy as np
import pytest

from gate.errors import MeasurementError
from gate.latency.exported_times import MOST_CHARACTERS, exported_times


def _six(value):
    """As C++ prints a float."""
    return f"{np.float32(value):g}"


def trtexec(computes_ms, *, h2d=0.125, d2h=0.0625, begin=200.5, gap=0.01, old=False, streams=1):
    """The text that exportJSONTrace writes of a trace whose points in time are float32 milliseconds."""
    into, out = ("In", "Out") if old else ("H2d", "D2h")
    lines, at = [], begin
    for compute in computes_ms:
        points = [np.float32(each) for each in np.cumsum([at, h2d, compute, d2h])]
        took = [points[1] - points[0], points[2] - points[1], points[3] - points[2]]
        times = {
            "startEnqMs": points[0],
            "endEnqMs": points[0],
            f"start{into}Ms": points[0],
            f"end{into}Ms": points[1],
            "startComputeMs": points[1],
            "endComputeMs": points[2],
            f"start{out}Ms": points[2],
            f"end{out}Ms": points[3],
            f"{into[0].lower()}{into[1:]}Ms": took[0],
            "computeMs": took[1],
            f"{out[0].lower()}{out[1:]}Ms": took[2],
            "latencyMs": np.float32(np.float32(took[0] + took[1]) + took[2]),
        }
        if old:
            times["endToEndMs"] = points[3] - points[0]
        lines.append("{ " + ", ".join(f'"{name}" : {_six(value)}' for name, value in times.items()) + " }\n")
        at += (h2d + compute + d2h + gap) / streams
    return "[\n  " + ", ".join(lines) + "]\n"


def changed(text, index, **values):
    """The text with some fields of one record replaced; None takes a field away."""
    records = json.loads(text)
    records[index] = {name: value for name, value in {**records[index], **values}.items() if value is not None}
    return json.dumps(records)


def test_a_file_becomes_nanoseconds_by_region():
    times = exported_times({"times.json": trtexec([0.5, 0.75, 0.5])})
    (subject,) = times.subjects
    assert subject.regions["gpu_compute"] == (500_000, 750_000, 500_000)
    assert subject.regions["h2d"] == (125_000,) * 3
    assert subject.regions["d2h"] == (62_500,) * 3
    assert subject.regions["latency"] == (687_500, 937_500, 687_500)
    assert set(subject.regions) == {"latency", "h2d", "gpu_compute", "d2h"}
    assert subject.leg == 3
    assert subject.warm_up == 0
    assert subject.span_ns == pytest.approx(2_332_500, abs=2_000)


def test_older_names_give_the_same_numbers():
    new, old = (exported_times({"t": trtexec([0.5, 0.75], old=old)}).subjects for old in (False, True))
    assert new == old


def test_one_file_is_one_session_and_says_how_many_are_missing():
    times = exported_times({"times.json": trtexec([0.5, 0.75])})
    assert times.sessions == 1
    assert times.notes[0].startswith("sessions=1:")
    assert "run trtexec 4 times more" in times.notes[1]


def test_several_files_are_several_sessions_in_their_order():
    texts = {f"{index}.json": trtexec([0.5 + index / 8, 0.5]) for index in range(5)}
    times = exported_times(texts)
    assert [each.regions["gpu_compute"][0] for each in times.subjects] == [500_000 + 125_000 * i for i in range(5)]
    assert times.notes[0].startswith("sessions=5:")
    assert not any("more, a file each" in note for note in times.notes)


def test_the_same_measurement_twice_is_not_two_sessions():
    text = trtexec([0.5, 0.75])
    with pytest.raises(MeasurementError, match="same times as a.json: one measurement is not two sessions") as caught:
        exported_times({"a.json": text, "b.json": text + "\n"})
    assert caught.value.where == "b.json"


def test_a_warm_up_that_an_older_version_wrote_is_left_out():
    times = exported_times({"t.json": trtexec([50.0] * 4 + [0.5] * 3, begin=0.0, old=True)})
    assert times.subjects[0].warm_up == 4
    assert times.subjects[0].regions["gpu_compute"] == pytest.approx((500_000,) * 3, abs=20)
    assert any("4 inferences of the first 200 ms are left out" in note for note in times.notes)


def test_all_warm_up_is_no_measurement():
    text = trtexec([0.5, 0.5], begin=0.0)
    with pytest.raises(MeasurementError, match="all 2 inferences began within the first 200 ms"):
        exported_times({"t.json": text})
    assert exported_times({"t.json": text}, warm_up_ms=0.0).subjects[0].leg == 2


@pytest.mark.parametrize("warm_up_ms", [-1.0, math.nan, math.inf])
def test_a_warm_up_is_a_length_of_time(warm_up_ms):
    with pytest.raises(MeasurementError, match="a warm-up is 0 ms or more"):
        exported_times({"t.json": trtexec([0.5])}, warm_up_ms=warm_up_ms)


def test_real_rounding_of_long_runs_is_no_contradiction():
    rng = np.random.default_rng(0)
    computes = np.exp(rng.normal(np.log(0.7), 0.4, 2000))
    for begin in (200.0, 3_000.0, 60_000.0):
        times = exported_times({"t.json": trtexec(computes, h2d=0.0137, d2h=0.0021, begin=begin)})
        got = np.array(times.subjects[0].regions["gpu_compute"])
        assert np.abs(got - computes * 1e6).max() <= times.resolution_ns + 10
    assert times.resolution_ns == round(2.0**-8 * 1e6)


def test_copies_that_took_no_time_are_allowed():
    regions = exported_times({"t.json": trtexec([0.5], h2d=0.0, d2h=0.0)}).subjects[0].regions
    assert regions["h2d"] == regions["d2h"] == (0,)


def test_a_file_without_copies_has_two_regions():
    gone = dict.fromkeys(("startH2dMs", "endH2dMs", "h2dMs", "startD2hMs", "endD2hMs", "d2hMs"))
    (subject,) = exported_times({"t.json": changed(trtexec([0.5]), 0, **gone)}).subjects
    assert set(subject.regions) == {"latency", "gpu_compute"}
    assert subject.span_ns == pytest.approx(500_000, abs=10_000)


def test_several_streams_are_told():
    alone, shared = (exported_times({"t": trtexec([2.0] * 9, streams=streams)}).notes for streams in (1, 3))
    assert not any("overlap" in note for note in alone)
    assert any("inferences overlap on the GPU" in note for note in shared)


@pytest.mark.parametrize(
    "name", ["latencyMs", "computeMs", "h2dMs", "d2hMs", "startComputeMs", "endComputeMs", "startH2dMs", "endD2hMs"]
)
@pytest.mark.parametrize("index", [0, 2])
def test_a_missing_time_is_an_error(name, index):
    with pytest.raises(MeasurementError, match=rf"record {index} has no '{name}' \(has "):
        exported_times({"t.json": changed(trtexec([0.5] * 4), index, **{name: None})})


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", True, [0.5], {}, 10**400])
def test_what_is_no_number_is_an_error(value):
    with pytest.raises(MeasurementError, match="record 1: computeMs is .*expected milliseconds"):
        exported_times({"t.json": changed(trtexec([0.5] * 3), 1, computeMs=value)})


@pytest.mark.parametrize("written", ["nan", "-nan", "inf", "-inf", "nan(ind)"])
def test_what_cpp_writes_for_no_number_is_named(written):
    text = trtexec([0.5, 0.625, 0.75]).replace('"computeMs" : 0.625', f'"computeMs" : {written}')
    with pytest.raises(MeasurementError, match=f"record 1: a time is {written[:3]}.*expected milliseconds"):
        exported_times({"t.json": text})


@pytest.mark.parametrize("name", ["latencyMs", "computeMs", "h2dMs", "startComputeMs"])
def test_a_negative_time_is_an_error(name):
    with pytest.raises(MeasurementError, match=f"record 1: {name} is -0.25 ms"):
        exported_times({"t.json": changed(trtexec([0.5] * 3), 1, **{name: -0.25})})


@pytest.mark.parametrize("name", ["latencyMs", "computeMs"])
def test_an_inference_that_took_no_time_is_an_error(name):
    with pytest.raises(MeasurementError, match=f"record 0: {name} is 0 ms, expected more than 0"):
        exported_times({"t.json": changed(trtexec([0.5]), 0, **{name: 0})})


@pytest.mark.parametrize("latency", [0.68, 0.6876, 5.0])
def test_a_latency_that_is_not_its_parts_is_an_error(latency):
    with pytest.raises(
        MeasurementError, match=r"record 1: latencyMs is .*, expected h2dMs \+ computeMs \+ d2hMs = 0.687"
    ):
        exported_times({"t.json": changed(trtexec([0.5] * 3), 1, latencyMs=latency)})


def test_two_names_of_one_time_are_an_error():
    with pytest.raises(MeasurementError, match="record 0 has both 'h2dMs' and 'inMs'"):
        exported_times({"t.json": changed(trtexec([0.5]), 0, inMs=0.125)})


def test_a_time_that_stands_twice_is_an_error():
    text = trtexec([0.5]).replace('"computeMs"', '"computeMs" : 0.25, "computeMs"')
    with pytest.raises(MeasurementError, match="computeMs twice"):
        exported_times({"t.json": text})


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error(share):
    text = trtexec([0.5] * 20)
    with pytest.raises(MeasurementError, match=r"cut off|not JSON"):
        exported_times({"t.json": text[: int(share * len(text))]})


def test_a_file_cut_between_two_records_says_so():
    text = trtexec([0.5] * 3)
    with pytest.raises(MeasurementError, match="it is cut off in record 1") as caught:
        exported_times({"t.json": text[: text.rindex("\n, {")]})
    assert "let it end" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("[]", "empty list: trtexec timed no inference"),
        ("{}", "expected trtexec's list of times, got an object"),
        ("null", "got null"),
        ("3", "got a number"),
        ('"a"', "got a text"),
        ("[1]", "record 0: expected an object .* got a number"),
        ("[{}]", r"record 0 has no 'latencyMs' \(has nothing\)"),
        ("[" * 100_000, "not trtexec's list|cut off"),
        ("nothing", "it is not JSON"),
        ('[ { "latencyMs" : ' + "9" * 5000 + " } ]", "not trtexec's list|latencyMs"),
    ],
)
def test_what_is_not_a_list_of_times_is_an_error(text, message):
    with pytest.raises(MeasurementError, match=message) as caught:
        exported_times({"t.json": text})
    assert caught.value.where == "t.json"
    assert caught.value.hint


def test_a_file_of_another_option_is_named():
    with pytest.raises(MeasurementError, match="file of --exportProfile"):
        exported_times({"t.json": '[ { "count" : 3 }, { "name" : "a", "timeMs" : 1.0, "averageMs" : 0.3 } ]'})


def test_a_file_that_is_too_large_is_not_parsed():
    class Long(str):
        __slots__ = ()

        def __len__(self):
            return MOST_CHARACTERS + 1

    with pytest.raises(MeasurementError, match=f"at most {MOST_CHARACTERS} are read"):
        exported_times({"t.json": Long("[]")})


def test_no_file_is_no_measurement():
    with pytest.raises(MeasurementError, match="there is no file"):
        exported_times({})


def test_a_later_bad_file_is_the_one_that_is_named():
    with pytest.raises(MeasurementError, match="it is empty") as caught:
        exported_times({"good.json": trtexec([0.5]), "bad.json": ""})
    assert caught.value.where == "bad.json"
