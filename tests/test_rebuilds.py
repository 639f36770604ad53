"""Several builds of one engine: the spread of what they answer is part of each finding."""

import math

import pytest

from gate.engines.interface import BuildRecord, Layer
from gate.rebuilds import build_differences, with_spread
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Status, Verdict


def finding(value, check="parity.rel_rmse", limit=0.01, **more):
    return Finding(
        check=check,
        estimate=value,
        interval=more.pop("interval", Interval(value, value)),
        limit=Limit("at_most", limit, **more.pop("source", {})),
        n=10,
        evidence=Evidence.DEVICE,
        **more,
    )


def failure(check):
    return Failure(check=check, error="RunError", message="it broke", evidence=Evidence.DEVICE)


def record(*layers, precision="fp16"):
    return BuildRecord(
        backend="tensorrt", backend_version="8.6.0", precision=precision, options={}, profile={}, layers=layers
    )


def test_interval_holds_every_build_and_the_estimate_is_that_of_the_first():
    (merged,) = with_spread([finding(0.002)], [[finding(0.001)], [finding(0.004)]])
    assert merged.interval == Interval(0.001, 0.004)
    assert merged.estimate == 0.002
    assert merged.status is Status.PASSED
    assert merged.detail == "3 builds: 0.001 to 0.004"


def test_one_build_over_the_limit_blocks():
    (merged,) = with_spread([finding(0.002)], [[finding(0.02)]])
    assert merged.status is Status.INCONCLUSIVE


def test_every_build_over_the_limit_fails():
    (merged,) = with_spread([finding(0.03)], [[finding(0.02)]])
    assert merged.status is Status.FAILED


def test_the_place_of_the_limit_is_that_of_the_build_that_broke_it():
    source = {"source": {"source": "spec", "location": "gate.toml:7"}}
    (merged,) = with_spread([finding(0.002)], [[finding(0.02, **source)]])
    assert merged.limit.location == "gate.toml:7"


@pytest.mark.parametrize("values", [(math.nan, 0.001), (0.001, math.nan)])
def test_nan_of_any_build_fails(values):
    (merged,) = with_spread([finding(values[0])], [[finding(values[1])]])
    assert merged.status is Status.FAILED


def test_a_check_that_a_further_build_lacks_is_a_failure():
    (merged,) = with_spread([finding(0.002)], [[finding(0.001)], []])
    assert isinstance(merged, Failure)
    assert "not on build 3" in merged.message


def test_a_check_that_only_a_further_build_has_is_a_failure():
    merged = with_spread([finding(0.002)], [[finding(0.001), finding(0.1, check="task.top1")]])
    assert [each.check for each in merged] == ["parity.rel_rmse", "task.top1"]
    assert isinstance(merged[1], Failure)


def test_a_build_that_fails_is_a_failure_beside_the_checks_that_it_lacks():
    merged = with_spread([finding(0.002)], [[failure("run[rebuild 1]")]])
    assert {each.check for each in merged} == {"parity.rel_rmse", "run[rebuild 1]"}
    assert all(isinstance(each, Failure) for each in merged)


def test_a_check_that_fails_in_two_further_builds_is_one_failure_with_their_numbers():
    alike = with_spread([finding(0.002)], [[failure("parity")], [failure("parity")]])
    assert [each.check for each in alike] == ["parity.rel_rmse", "parity"]
    assert alike[1].message == "builds 2, 3: it broke"
    other = Failure(check="parity", error="RunError", message="it is gone", evidence=Evidence.DEVICE)
    differing = with_spread([finding(0.002)], [[failure("parity")], [other]])
    assert differing[1].message == "build 2: it broke\nbuild 3: it is gone"
    assert Verdict(findings=tuple(differing)).status is Status.FAILED


def test_latency_and_memory_are_those_of_the_first_build():
    latency = finding(1.0, check="latency.p50_ms", limit=2.0)
    assert with_spread([latency, finding(0.002)], [[finding(0.002)]])[0] == latency


def test_intervals_of_statistics_are_joined_too():
    first = finding(0.002, interval=Interval(0.001, 0.003))
    (merged,) = with_spread([first], [[finding(0.004, interval=Interval(0.0035, 0.006))]])
    assert merged.interval == Interval(0.001, 0.006)


def test_builds_that_are_alike_say_so():
    same = record(Layer("a", "CONVOLUTION", "fp16", "t1", "f"))
    assert build_differences([same, same], ["d", "d"]) == (
        "built 2 times: the files are the same, its 1 layer is alike",
    )


def test_files_may_differ_where_the_layers_are_alike():
    same = record(*(Layer(name, "CONVOLUTION", "fp16", "t1", "f") for name in "abcdef"))
    assert build_differences([same, same], ["d", "e"]) == ("built 2 times: the files differ, all 6 layers are alike",)


def test_layers_that_differ_between_builds_are_named():
    first = record(Layer("a", "CONVOLUTION", "fp16", "t1", "f"), Layer("b", "CONVOLUTION", "fp16", "t1", "f"))
    other = record(Layer("a", "CONVOLUTION", "fp32", "t2", "f"), Layer("c", "CONVOLUTION", "fp16", "t1", "f"))
    (told,) = build_differences([first, other], ["d", "e"])
    assert told.startswith("built 2 times: the files differ, 3 of 3 layers differ")
    assert told.endswith(": a, b, c")
