"""Tracking against its definitions, written out here with scipy, and what must not be scored."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from gate.errors import BackendUnavailable, DataError, MeasurementError, SpecError
from gate.metrics.tracking import KIND
from gate.targets import TrackedFrame

pytest.importorskip("motmetrics")


def frame(sequence, number, objects):
    """A frame with a 10 x 10 box at (x, 0) for each id."""
    boxes = np.asarray([[x, 0, x + 10, 10] for x in objects.values()], np.float64).reshape(-1, 4)
    return TrackedFrame(sequence, number, np.asarray(list(objects), np.int64), boxes)


def scored(answers, targets, batch=None, **options):
    metric = KIND.make(options, None)
    step = batch or max(1, len(targets))
    for first in range(0, len(targets), step):
        part = slice(first, first + step)
        metric.add(answers[part], reference=answers[part], targets=targets[part], first_sample=first)
    return metric.statistics()


def example(seed, sequences=3, frames=6):
    """Objects that drift, some of them missed, with jitter, false alarms, and ids that change now and then."""
    rng = np.random.default_rng(seed)
    answers, targets = [], []
    for sequence in range(sequences):
        starts = np.arange(4) * 14.0 + rng.random(4)
        names = {each: 100 + each for each in range(4)}
        for number in range(frames):
            there = {each: float(starts[each] + number) for each in range(4) if rng.random() < 0.9}
            seen = {}
            for each, x in there.items():
                if rng.random() < 0.2:
                    names[each] = int(rng.integers(100, 110))
                if rng.random() < 0.85 and names[each] not in seen:
                    seen[names[each]] = x + rng.normal(0, 1.5)
            if rng.random() < 0.4:
                seen[500 + number] = float(rng.uniform(0, 60))
            targets.append(frame(f"video {sequence}", number, there))
            answers.append(frame(f"video {sequence}", number, seen))
    return answers, targets


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (a, b)]
    return width * height / (sum(areas) - width * height)


def by_definition(answers, targets):
    """CLEAR MOT and identity counts of one sequence: misses, false positives, switches, idtp, objects, predictions."""
    matched, together = {}, {}
    misses = false_positives = switches = 0
    for answer, target in zip(answers, targets, strict=True):
        near = {
            (o, h): overlap(box, other)
            for o, box in zip(target.ids.tolist(), target.boxes.tolist(), strict=True)
            for h, other in zip(answer.ids.tolist(), answer.boxes.tolist(), strict=True)
            if overlap(box, other) >= 0.5
        }
        for pair in near:
            together[pair] = together.get(pair, 0) + 1
        pairs = {o: matched[o] for o in target.ids.tolist() if (o, matched.get(o)) in near}
        objects = [o for o in target.ids.tolist() if o not in pairs]
        tracks = [h for h in answer.ids.tolist() if h not in pairs.values()]
        cost = np.asarray([[1 - near[o, h] if (o, h) in near else 1e6 for h in tracks] for o in objects])
        if cost.size:
            for row, column in zip(*linear_sum_assignment(cost), strict=True):
                if cost[row, column] < 1e6:
                    o, h = objects[row], tracks[column]
                    switches += o in matched and matched[o] != h
                    pairs[o] = h
        matched |= pairs
        misses += len(target.ids) - len(pairs)
        false_positives += len(answer.ids) - len(pairs)
    objects, tracks = sorted({o for o, _ in together}), sorted({h for _, h in together})
    frames = np.asarray([[together.get((o, h), 0) for h in tracks] for o in objects]).reshape(len(objects), len(tracks))
    idtp = int(frames[linear_sum_assignment(-frames)].sum())
    return np.asarray(
        [misses, false_positives, switches, idtp, sum(len(f.ids) for f in targets), sum(len(f.ids) for f in answers)]
    )


def test_values_of_an_example_that_can_be_counted():
    targets = [frame("a", number, {1: 0.0, 2: 50.0}) for number in range(4)]
    answers = [
        frame("a", 0, {7: 0.0, 8: 50.0}),
        frame("a", 1, {7: 0.0, 9: 50.0}),
        frame("a", 2, {7: 0.0}),
        frame("a", 3, {7: 0.0, 9: 50.0, 10: 200.0}),
    ]
    values = scored(answers, targets).values()
    assert values == {"idf1": 12 / 16, "mota": 1 - 3 / 8, "idp": 6 / 8, "idr": 6 / 8, "num_switches": 1.0}


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_their_definitions_in_any_batches(seed):
    answers, targets = example(seed)
    statistics = scored(answers, targets, batch=1 + seed)
    expected = [by_definition(answers[first : first + 6], targets[first : first + 6]) for first in (0, 6, 12)]
    found = statistics.counts[:, [2, 3, 4, 5, 0, 1]]
    assert np.array_equal(found, expected)
    misses, false_positives, switches, idtp, objects, predictions = np.sum(expected, axis=0)
    assert statistics.values() == pytest.approx(
        {
            "idf1": 2 * idtp / (objects + predictions),
            "mota": 1 - (misses + false_positives + switches) / objects,
            "idp": idtp / predictions,
            "idr": idtp / objects,
            "num_switches": switches,
        }
    )


def test_values_are_those_of_motmetrics_over_all_sequences():
    import motmetrics

    answers, targets = example(40)
    accumulators = {}
    for answer, target in zip(answers, targets, strict=True):
        events = accumulators.setdefault(target.sequence, motmetrics.MOTAccumulator(auto_id=True))
        near = np.asarray([[overlap(a, b) for b in answer.boxes] for a in target.boxes])
        events.update(target.ids, answer.ids, np.where(near >= 0.5, 1 - near, np.nan))
    values = scored(answers, targets).values()
    summary = motmetrics.metrics.create().compute_many(
        list(accumulators.values()), metrics=list(values), names=list(accumulators), generate_overall=True
    )
    assert values == pytest.approx(summary.loc["OVERALL"].to_dict(), abs=1e-12)


@given(weights=st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any))
def test_weights_are_the_same_as_repeating_sequences(weights):
    answers, targets = example(2)
    statistics = scored(answers, targets)
    repeated_answers, repeated_targets = [], []
    for copy, sequence in enumerate(np.repeat(np.arange(3), weights)):
        for each in range(6 * sequence, 6 * sequence + 6):
            for frames, kept in ((answers, repeated_answers), (targets, repeated_targets)):
                one = frames[each]
                kept.append(TrackedFrame(f"copy {copy}", one.frame, one.ids, one.boxes))
    assert statistics.values(np.asarray(weights)) == pytest.approx(scored(repeated_answers, repeated_targets).values())


def test_samples_are_sequences_and_weights_are_of_them():
    statistics = scored(*example(0))
    assert (statistics.samples, statistics.sequences) == (3, ("video 0", "video 1", "video 2"))
    assert statistics.values(np.ones(3, np.int64)) == statistics.values()
    with pytest.raises(MeasurementError, match="one for each of 3 samples"):
        statistics.values(np.ones(18, np.int64))


def test_weights_of_zero_leave_the_fractions_undefined():
    values = scored(*example(0)).values(np.zeros(3, np.int64))
    assert all(math.isnan(values[name]) for name in ("idf1", "mota", "idp", "idr"))


def test_frames_without_a_prediction_are_missed():
    targets = [frame("a", number, {1: 0.0}) for number in range(3)]
    values = scored([frame("a", number, {}) for number in range(3)], targets).values()
    assert (values["idf1"], values["mota"], values["idr"]) == (0.0, 0.0, 0.0)
    assert math.isnan(values["idp"])


def test_ids_that_float64_does_not_tell_apart_are_told_apart():
    targets = [frame("a", number, {2**60 + 1: 0.0, 2**60 + 2: 50.0}) for number in range(3)]
    assert scored(targets, targets).values()["idf1"] == 1.0


def test_overlap_of_a_pair_may_be_asked_for():
    targets, answers = [frame("a", 0, {1: 0.0})], [frame("a", 0, {1: 4.0})]
    assert scored(answers, targets).values()["idf1"] == 0.0
    assert scored(answers, targets, iou_threshold=0.4).values()["idf1"] == 1.0


def test_exactly_the_threshold_is_a_pair():
    targets = [TrackedFrame("a", 0, np.asarray([1]), np.asarray([[0.0, 0.0, 10.0, 10.0]]))]
    answers = [TrackedFrame("a", 0, np.asarray([1]), np.asarray([[0.0, 0.0, 10.0, 5.0]]))]
    assert scored(answers, targets).values()["mota"] == 1.0


def test_statistics_may_be_asked_for_in_between():
    answers, targets = example(0)
    metric = KIND.make({}, None)
    metric.add(answers[:9], reference=None, targets=targets[:9], first_sample=0)
    assert metric.statistics().samples == 2
    metric.add(answers[9:], reference=None, targets=targets[9:], first_sample=9)
    assert np.array_equal(metric.statistics().counts, scored(answers, targets).counts)


def test_arrays_give_back_the_statistics():
    statistics = scored(*example(3))
    again = KIND.read(statistics.to_arrays())
    weights = np.asarray([2, 0, 1])
    assert again.values(weights) == statistics.values(weights)
    assert again.sequences == statistics.sequences


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("sequences"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        lambda arrays: arrays.update(counts=arrays["counts"][:-1]),
        lambda arrays: arrays.update(counts=arrays["counts"] + 1),
        lambda arrays: arrays.update(counts=arrays["counts"] * 0),
        lambda arrays: arrays.update(counts=arrays["counts"].astype(np.float64)),
        lambda arrays: arrays.update(counts=arrays["counts"][:0], sequences=np.frombuffer(b"[]", np.uint8)),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change):
    arrays = scored(*example(0)).to_arrays()
    change(arrays)
    with pytest.raises(MeasurementError, match="statistics of tracking"):
        KIND.read(arrays)


def test_nothing_added_is_an_error():
    with pytest.raises(MeasurementError, match="no object was looked for"):
        KIND.make({}, None).statistics()


def test_frames_without_any_ground_truth_are_an_error():
    with pytest.raises(MeasurementError, match="no object was looked for"):
        scored([frame("a", 0, {1: 0.0})], [frame("a", 0, {})])


def test_empty_batch_is_an_error():
    with pytest.raises(MeasurementError, match="the batch from sample 0 is empty"):
        KIND.make({}, None).add([], reference=[], targets=[], first_sample=0)


def test_batch_out_of_order_is_an_error():
    answers, targets = example(0)
    with pytest.raises(MeasurementError, match="expected the batch from sample 0, got that from 6"):
        KIND.make({}, None).add(answers[6:], reference=None, targets=targets[6:], first_sample=6)


GOOD = frame("a", 0, {1: 0.0})


@pytest.mark.parametrize(
    ("answers", "targets", "error", "message"),
    [
        ([GOOD], [], DataError, "the samples have none"),
        ([GOOD], None, DataError, "the samples have none"),
        ([GOOD], [None], DataError, "sample 0 has no target"),
        ([GOOD], [GOOD, GOOD], MeasurementError, "1 predictions for 2 targets"),
        ([GOOD], [3], DataError, "target of sample 0 is a int"),
        ([{"ids": []}], [GOOD], MeasurementError, "answer to sample 0 is a dict"),
        ({"boxes": 1}, [GOOD], MeasurementError, "answer is a dict, expected tracked frames"),
        (
            [frame("b", 0, {})],
            [GOOD],
            MeasurementError,
            "is of frame 0 of sequence 'b', the target of frame 0 of .*'a'",
        ),
        ([frame("a", 1, {})], [GOOD], MeasurementError, "is of frame 1 of sequence 'a'"),
        ([GOOD, GOOD], [GOOD, GOOD], DataError, "frame 0 after frame 0; frames must ascend"),
        (
            [GOOD, frame("b", 0, {}), frame("a", 1, {})],
            [GOOD, frame("b", 0, {}), frame("a", 1, {})],
            DataError,
            "frames of sequence 'a' do not follow each other",
        ),
    ],
)
def test_frames_that_do_not_fit_are_an_error(answers, targets, error, message):
    with pytest.raises(error, match=message):
        KIND.make({}, None).add(answers, reference=None, targets=targets, first_sample=0)


@pytest.mark.parametrize(
    ("ids", "boxes", "message"),
    [
        ([1], [[0.0, 0.0, np.nan, 1.0]], "NaN or Inf"),
        ([1], [[0.0, 0.0, np.inf, 1.0]], "NaN or Inf"),
        ([1, 1], [[0.0, 0.0, 1.0, 1.0]] * 2, "an id more than once in one frame"),
        ([1, 2], [[0.0, 0.0, 1.0, 1.0]], r"ids int64 \[2\] and boxes \[1, 4\]"),
        ([1.0], [[0.0, 0.0, 1.0, 1.0]], r"ids float64 \[1\]"),
        ([1], [[20.0, 0.0, 10.0, 1.0]], r"right or lower edge(.|\n)*xywh"),
    ],
)
def test_malformed_objects_are_an_error_on_either_side(ids, boxes, message):
    bad = TrackedFrame("a", 0, np.asarray(ids), np.asarray(boxes))
    with pytest.raises(MeasurementError, match=f"frame 0 of sequence 'a': the model has .*{message}"):
        KIND.make({}, None).add([bad], reference=None, targets=[GOOD], first_sample=0)
    with pytest.raises(DataError, match=f"frame 0 of sequence 'a': the ground truth has .*{message}"):
        KIND.make({}, None).add([GOOD], reference=None, targets=[bad], first_sample=0)


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "motmetrics", None)
    with pytest.raises(BackendUnavailable, match=r"needs motmetrics(.|\n)*pip install 'trt-gate\[tracking\]'"):
        KIND.make({}, None)


@pytest.mark.parametrize("given", [0, 1.5, "0.5", True])
def test_overlap_is_a_fraction(given):
    with pytest.raises(SpecError, match="fraction above 0, at most 1"):
        KIND.make({"iou_threshold": given}, None)


def test_options_that_it_does_not_have_are_refused():
    with pytest.raises(SpecError, match="no option 'iou'; did you mean 'iou_threshold'|no option 'iou'; it has"):
        KIND.make({"iou": 0.5}, None)
