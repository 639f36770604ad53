"""Reasons why latencies must not decide."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.latency.guards import BudgetDoubts, budget_doubts, missing_readings, ratio_doubts, usage_doubts
from gate.latency.measurement import CellTimes, MemoryUse, Reading, SessionTimes, SubjectTimes, Usage

LEG, LEGS = 8, 12
CALM = {"sm_clock_mhz": 1980, "slowdowns": (), "others": 0}


def durations(seed, *, ns=1_000_000, sd=0.01, legs=LEGS):
    noise = np.random.default_rng(seed).normal(0.0, sd, LEG * legs)
    return tuple(int(value) for value in ns * np.exp(noise))


def subject(wall, *, leg=LEG, span_ns=None, **regions):
    return SubjectTimes(
        regions={"host_wall": wall, **regions}, leg=leg, warm_up=200, span_ns=sum(wall) if span_ns is None else span_ns
    )


def session(*subjects, readings=(), busy=None):
    return SessionTimes(
        cells=(CellTimes(subjects=subjects, readings=tuple(readings)),),
        clock="perf_counter_ns",
        resolution_ns=1,
        memory=MemoryUse(),
        busy_percent=busy,
    )


def pairs(count=5, *, sd=0.01, legs=LEGS, **session_words):
    """Sessions of two engines of the same speed."""
    return [
        session(
            subject(durations(2 * s, sd=sd, legs=legs)),
            subject(durations(2 * s + 1, sd=sd, legs=legs)),
            **session_words,
        )
        for s in range(count)
    ]


def readings(a, b, legs=LEGS):
    """The same reading after each leg of A, and after each of B."""
    return [Reading(subject=s, **{**CALM, **each}) for _ in range(legs) for s, each in enumerate((a, b))]


def ratio(sessions, *, tolerance_percent=3.0, p=0.5, **words):
    return ratio_doubts(sessions, 0, tolerance_percent=tolerance_percent, p=p, **words)


def test_quiet_sessions_are_not_doubted():
    assert ratio(pairs(readings=readings({}, {}), busy=3)) == ()
    assert budget_doubts(pairs(readings=readings({}, {}), busy=3), 0) == BudgetDoubts()


def test_sessions_on_a_cpu_have_no_readings_and_no_doubt():
    assert ratio(pairs()) == ()
    assert budget_doubts(pairs(), 0) == BudgetDoubts()


def test_clocks_that_differ_between_the_engines_are_a_doubt():
    sessions = pairs(readings=readings({}, {"sm_clock_mhz": 1740}))
    assert ratio(sessions) == ("clocks differed by 12 % between legs (A 1980 MHz, B 1740 MHz)",)


def test_clocks_two_percent_apart_are_no_doubt():
    assert ratio(pairs(readings=readings({"sm_clock_mhz": 1000}, {"sm_clock_mhz": 980}))) == ()
    assert len(ratio(pairs(readings=readings({"sm_clock_mhz": 1000}, {"sm_clock_mhz": 979})))) == 1


@pytest.mark.parametrize(("distance", "doubted"), [(0.2, True), (0.25, True), (0.27, False), (3.0, False)])
def test_clocks_do_not_hide_a_ratio_that_lies_twice_as_far_from_its_limit(distance, doubted):
    sessions = pairs(readings=readings({}, {"sm_clock_mhz": 1740}))
    assert bool(ratio(sessions, distance=distance)) is doubted
    assert bool(ratio(sessions, distance=-distance)) is doubted


@pytest.mark.parametrize(("factor", "doubted"), [(1.9, True), (2.1, False)])
def test_slowdowns_do_not_hide_a_ratio_that_lies_far_from_its_limit(factor, doubted):
    sessions = pairs(readings=readings({}, {"slowdowns": ("sw_power_cap",)}))
    assert bool(ratio(sessions, distance=math.log(factor))) is doubted


def test_clocks_that_differ_between_sessions_are_no_doubt_even_where_a_reading_is_missing():
    sessions = pairs(readings=readings({}, {}))
    slow = session(*sessions[0].cells[0].subjects, readings=readings({"sm_clock_mhz": 1000}, {"sm_clock_mhz": None}))
    assert ratio([slow, *sessions]) == ()


def test_clock_that_is_not_a_number_is_a_doubt():
    assert "clocks differed by nan %" in ratio(pairs(readings=readings({}, {"sm_clock_mhz": math.nan})))[0]


def test_slowdown_of_one_engine_alone_is_a_doubt():
    sessions = pairs(readings=readings({}, {"slowdowns": ("sw_power_cap",)}))
    assert ratio(sessions) == ("the GPU slowed down (sw_power_cap) in 0 % of A's legs and 100 % of B's",)


def test_slowdown_of_both_engines_alike_is_no_doubt_of_their_ratio():
    slow = {"slowdowns": ("sw_power_cap",)}
    assert ratio(pairs(readings=readings(slow, slow))) == ()


def test_different_slowdowns_are_told_apart():
    sessions = pairs(readings=readings({"slowdowns": ("sw_power_cap",)}, {"slowdowns": ("hw_thermal_slowdown",)}))
    assert len(ratio(sessions)) == 2


def test_another_process_on_the_gpu_is_a_doubt_and_blocks_either_way():
    sessions = pairs(readings=readings({}, {}), busy=3)
    sessions[1] = session(
        *sessions[1].cells[0].subjects,
        readings=[Reading(subject=s, **{**CALM, "others": 1 - s}) for s in (0, 1)],
        busy=3,
    )
    doubt = ("another process came to the GPU in 1 of 5 sessions",)
    assert ratio(sessions) == doubt
    assert budget_doubts(sessions, 0) == BudgetDoubts(blocks_pass=doubt, blocks_fail=doubt)


@pytest.mark.parametrize(("percent", "doubted"), [(10, False), (11, True), (math.nan, True)])
def test_gpu_that_was_busy_before_is_a_doubt_and_blocks_either_way(percent, doubted):
    sessions = pairs(readings=readings({}, {}), busy=percent)
    assert (len(ratio(sessions)) == 1) is doubted
    found = budget_doubts(sessions, 0)
    assert found.blocks_pass == found.blocks_fail
    assert bool(found.blocks_fail) is doubted
    if doubted:
        assert "the GPU was busy before 5 of 5 sessions" in found.blocks_fail[0]


def test_noise_above_the_tolerance_is_a_doubt_of_each_engine():
    doubts = ratio(pairs(sd=1.0), tolerance_percent=1.0, p=0.5)
    spread = [doubt for doubt in doubts if "varies" in doubt]
    assert [doubt[:24] for doubt in spread] == ["A against itself varies ", "B against itself varies "]
    assert all("more than the 1 % that are to be told apart" in doubt for doubt in spread)


def test_noise_does_not_hide_a_ratio_that_lies_far_from_its_limit():
    noisy = pairs(sd=1.0)
    assert any("varies" in doubt for doubt in ratio(noisy, tolerance_percent=1.0, p=0.5))
    assert ratio(noisy, tolerance_percent=1.0, p=0.5, distance=5.0) == ()


def test_spread_of_the_halves_is_divided_by_the_square_root_of_two():
    """Half-width of five sessions with the thetas -x, 0, 0, 0, x at the first look: 5.597568 * sd / sqrt(5)."""
    x = 0.02
    found = []
    for theta in (-x, 0.0, 0.0, 0.0, x):
        odd = int(1e9 * math.exp(theta))
        # A step of 1 ns, so that the clock is not the doubt.
        one = subject((10**9,) * (2 * LEG - 1) + (10**9 - 1,) + (odd,) * 2 * LEG)
        found.append(session(one, one))
    half = 5.597568 * x * math.sqrt(0.5) / math.sqrt(5) / math.sqrt(2.0)
    above, below = (100.0 * math.expm1(half * scale) for scale in (1.001, 0.999))
    assert ratio(found, tolerance_percent=above) == ()
    assert [doubt[0] for doubt in ratio(found, tolerance_percent=below)] == ["A", "B"]


@pytest.mark.parametrize("factor", [1.05, 1 / 1.05])
def test_engine_that_differs_from_itself_is_a_doubt(factor):
    sessions = []
    for each in pairs(sd=0.001):
        a, b = each.cells[0].subjects
        wall = [int(ns * factor) if i // (2 * LEG) % 2 else ns for i, ns in enumerate(b.regions["host_wall"])]
        sessions.append(session(a, subject(tuple(wall))))
    assert ratio(sessions) == ("B differs from itself by 5 %, more than 3 %: the machine drifts",)


def test_engine_that_drifts_within_the_tolerance_is_no_doubt():
    sessions = []
    for each in pairs(sd=0.001):
        a, b = each.cells[0].subjects
        wall = [int(ns * 1.02) if i // (2 * LEG) % 2 else ns for i, ns in enumerate(b.regions["host_wall"])]
        sessions.append(session(a, subject(tuple(wall))))
    assert ratio(sessions) == ()


def test_one_leg_cannot_be_split_and_is_a_doubt():
    for legs in (1, 2):
        said = tuple(
            f"{x} against itself takes 5 sessions of 3 legs or more, 0 have them; raise max_time_s" for x in "AB"
        )
        assert ratio(pairs(legs=legs)) == said


def test_a_first_session_that_had_no_time_is_left_out_of_the_comparison_with_itself():
    short = pairs(1, legs=2)
    assert ratio([*short, *pairs(5)]) == ()
    assert len(ratio([*short, *pairs(4)])) == 2


@pytest.mark.parametrize("factor", [1.05, 1.5])
def test_what_a_switch_of_engines_costs_is_in_both_halves_alike(factor):
    """Of A B B A, A B B A ... every other leg of an engine comes right after the other engine's."""
    sessions = []
    for number, each in enumerate(pairs(sd=0.001)):
        walls = [
            tuple(
                int(ns * (factor if (i // LEG + number) % 2 else 1.0)) for i, ns in enumerate(each.regions["host_wall"])
            )
            for each in each.cells[0].subjects
        ]
        sessions.append(session(*map(subject, walls)))
    assert ratio(sessions) == ()


@pytest.mark.parametrize(("step", "doubted"), [(1, False), (64, False), (512, True), (1024, True)])
def test_steps_of_the_clock_that_are_too_coarse_are_a_doubt(step, doubted):
    """An engine of 20 us, to be held to 3 %: 600 ns."""
    sessions = []
    for number in range(5):
        walls = [tuple(step * round(ns / step) for ns in durations(2 * number + each, ns=20_000)) for each in (0, 1)]
        sessions.append(session(*map(subject, walls)))
    found = [doubt for doubt in ratio(sessions) if doubt.startswith(f"the clock steps by {step} ns, ")]
    assert bool(found) is doubted
    assert all(doubt.endswith("too coarse to tell 3 %; time a larger batch") for doubt in found)
    assert ratio(sessions, distance=1.0) == ()


def test_durations_that_are_all_the_same_have_the_step_of_the_clock():
    same = subject((1000,) * LEG * LEGS)
    found = [msgspec.structs.replace(session(same, same), resolution_ns=resolution) for resolution in (1, 1, 1, 1, 30)]
    assert ratio(found)[0].startswith("the clock steps by 30 ns, 3 % of the shorter one")
    assert ratio(found[:4] + found[:1]) == ()


def test_fewer_than_five_sessions_are_a_doubt():
    assert ratio(pairs(4)) == tuple(f"{x} against itself takes at least 5 sessions, got 4" for x in "AB")


def test_region_that_was_not_timed_is_a_doubt():
    doubts = ratio(pairs(), region="gpu_compute")
    assert doubts[0] == "A against itself cannot be judged: session 1 has no gpu_compute"


@given(st.integers(1, 4), st.sampled_from([0.5, 0.95]), st.integers(0, 10**6))
def test_naming_the_engines_the_other_way_round_finds_the_same(scale, p, seed):
    noise = np.random.default_rng(seed)
    sessions = []
    for s in range(5):
        a, b = (durations(seed + 2 * s + i, sd=0.02 * scale) for i in (0, 1))
        clocks = [{"sm_clock_mhz": int(noise.integers(1700, 1990))} for _ in range(2)]
        sessions.append(session(subject(a), subject(b), readings=readings(*clocks)))
    swapped = [
        session(
            *reversed(each.cells[0].subjects),
            readings=[msgspec.structs.replace(r, subject=1 - r.subject) for r in each.cells[0].readings],
        )
        for each in sessions
    ]
    assert len(ratio(sessions, p=p)) == len(ratio(swapped, p=p))


@given(st.lists(st.booleans(), min_size=5, max_size=40))
def test_throttling_blocks_a_fail_above_a_tenth_of_the_legs_and_never_a_pass(slowed):
    looks = [Reading(subject=0, **{**CALM, "slowdowns": ("hw_slowdown",) if each else ()}) for each in slowed]
    other = [Reading(subject=1, **{**CALM, "slowdowns": ("hw_slowdown",)})] * 50
    found = budget_doubts(pairs(1, readings=[*looks, *other]), 0)
    assert found.blocks_pass == ()
    assert bool(found.blocks_fail) is (sum(slowed) > 0.1 * len(slowed))


def test_throttling_is_told_in_words():
    slow = {"slowdowns": ("hw_slowdown", "sw_power_cap")}
    found = budget_doubts(pairs(readings=readings(slow, {}), busy=3), 0)
    assert found.blocks_fail == ("the GPU slowed down in 100 % of the legs (hw_slowdown, sw_power_cap)",)
    assert budget_doubts(pairs(readings=readings(slow, {}), busy=3), 0, subject=1) == BudgetDoubts()


WALL = (100,) * LEG * 2


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        (subject(WALL, enqueue=WALL[1:]), r"differ in number \(host_wall 16, enqueue 15\)"),
        (SubjectTimes(regions={}, leg=LEG, warm_up=0, span_ns=1), "no inference was timed"),
        (subject(WALL, leg=0), "a leg of 0 inferences"),
        (subject((*WALL[1:], -3)), "host_wall: inference 15 took -3 ns"),
        (subject((*WALL[1:], 0)), "host_wall: inference 15 took 0 ns"),
        (subject((*WALL[1:], math.nan), span_ns=9999), "host_wall: durations are whole nanoseconds, got float64"),
        (
            subject(WALL, latency=WALL, gpu_compute=(*WALL[2:], 101, 99)),
            "inference 14 took 100 ns with its copies and 101 ns without",
        ),
        (subject(WALL, h2d=(*WALL[1:], -1)), "h2d: inference 15 took -1 ns; a duration is at least 0"),
        (
            subject(WALL, gpu_compute=(*WALL[1:], 5_103)),
            "inference 15 took 5103 ns on the GPU and 100 ns by the host's clock: the host did not wait for it",
        ),
        (
            subject(WALL, latency=WALL, gpu_compute=(90,) * 16, h2d=(5,) * 16, d2h=(*(5,) * 15, 4)),
            "the copies and the compute time of inference 15 do not add up to its latency",
        ),
        (subject(WALL, span_ns=1599), "inferences of 1600 ns together were done in 1599 ns on 1 stream"),
    ],
)
def test_numbers_that_contradict_each_other_decide_nothing(times, reason):
    good = subject(WALL)
    found = budget_doubts([session(good), session(times)], 0)
    assert found.blocks_pass == found.blocks_fail
    assert len(found.blocks_pass) == 1
    with pytest.raises(MeasurementError, match=r"session 2: .*" + reason):
        raise MeasurementError(found.blocks_pass[0])
    doubts = ratio([session(good, times)] * 5)
    assert [doubt[:14] for doubt in doubts if doubt[0] == "B"] == [f"B: session {number}: " for number in range(1, 6)]


def test_copies_that_took_no_time_are_no_contradiction():
    times = subject(WALL, latency=(90,) * 16, gpu_compute=(90,) * 16, h2d=(0,) * 16, d2h=(0,) * 16, enqueue=(0,) * 16)
    assert budget_doubts([session(times)], 0).blocks_pass == ()


def test_no_inference_at_all_decides_nothing():
    found = budget_doubts([session(subject(()))], 0)
    assert (
        found.blocks_pass
        == found.blocks_fail
        == ("session 1: host_wall: no inference was timed, so there is no latency",)
    )


def test_streams_share_the_time():
    sessions = [session(subject(WALL, span_ns=400))]
    assert budget_doubts(sessions, 0, streams=4) == BudgetDoubts()
    assert "on 3 streams" in budget_doubts(sessions, 0, streams=3).blocks_pass[0]


def test_gpu_of_which_the_driver_says_nothing_is_noted_and_not_doubted():
    silent = {"sm_clock_mhz": None, "slowdowns": None, "others": None}
    sessions = pairs(readings=readings(silent, silent))
    note = (
        "the driver did not say, so nothing was held against it: the SM clock, slowdowns, other processes on the GPU, "
        "how busy the GPU was before",
    )
    assert ratio(sessions) == ()
    assert budget_doubts(sessions, 0) == BudgetDoubts()
    assert missing_readings(sessions, 0) == note


def test_gpu_engine_without_any_reading_is_noted():
    wall = durations(0)
    assert missing_readings([session(subject(wall, gpu_compute=wall))], 0) != ()


def test_note_names_only_what_is_missing():
    for ours, others in (({"others": None}, {"others": None}), ({"others": None}, {}), ({}, {"others": None})):
        sessions = pairs(readings=readings(ours, others), busy=3)
        assert missing_readings(sessions, 0) == (
            "the driver did not say, so nothing was held against it: other processes on the GPU",
        )


def test_usage_of_a_gpu_that_another_process_came_to_is_doubted():
    alone, shared = (
        msgspec.structs.replace(session(busy=3), usage=(Usage(seconds=1.0, inferences=9, others=others),))
        for others in (0, 2)
    )
    assert usage_doubts([alone] * 5) == ()
    assert usage_doubts([alone, shared, alone, alone, alone]) == ("another process came to the GPU in 1 of 5 sessions",)


def test_nothing_measured_is_an_error():
    for judged in (ratio, lambda none: budget_doubts(none, 0), lambda none: missing_readings(none, 0)):
        with pytest.raises(MeasurementError, match="no session was measured"):
            judged([])


def test_cell_or_engine_that_was_not_measured_is_an_error():
    alone = [session(subject(WALL))]
    with pytest.raises(MeasurementError, match="session 1 timed 1 of 2 engines in cell 0"):
        ratio(alone)
    with pytest.raises(MeasurementError, match="session 1 timed 1 of 2 engines in cell 0"):
        budget_doubts(alone, 0, subject=1)
    with pytest.raises(MeasurementError, match="session 1 has 1 cells, so none with index 1"):
        budget_doubts(alone, 1)
    with pytest.raises(MeasurementError, match="at least one stream, got 0"):
        budget_doubts(alone, 0, streams=0)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf])
def test_tolerance_that_is_none_is_an_error(tolerance):
    with pytest.raises(MeasurementError, match="a tolerance is above 0 %"):
        ratio(pairs(), tolerance_percent=tolerance)
