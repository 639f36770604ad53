"""A cause is named where there is one, and never for noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.compare import OutputAccumulator
from gate.diagnosis import diagnose


def causes(reference, candidate):
    reference, candidate = reference.astype(np.float32), np.asarray(candidate).astype(np.float32)
    accumulator = OutputAccumulator("logits", np.float32)
    accumulator.add(reference, candidate, first_sample=0)
    return diagnose(accumulator.metrics(), reference, candidate)


def rows(shape=(64, 10), seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2 + 0.5
    return values + noise * rng.standard_normal(shape)


def softmax(values):
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


R = rows()
IMAGES = rows((16, 3, 6, 8))
ORDER = np.roll(np.arange(10), 1)

CASES = {
    "zeros": (R, np.zeros_like(R), "all zeros"),
    "constant": (R, np.full_like(R, 1.5), "the constant 1.5"),
    "same answer": (R, np.broadcast_to(R[0], R.shape), "every sample the same answer, near the reference's sample 0"),
    "same other answer": (R, np.broadcast_to(np.arange(10.0) * 9, R.shape), "every sample the same answer: its input"),
    "columns": (R, R[:, ORDER], "columns are in another order: the engine's column 0 is the reference's 9"),
    "two columns": (R, R[:, [0, 2, 1, *range(3, 10)]], "column 1 is the reference's 2"),
    "next row": (
        R,
        np.roll(R, -1, axis=0),
        "rows are shifted: the engine's answer to a sample is the reference's to the next",
    ),
    "previous row": (R, np.roll(R, 1, axis=0), "to the previous one"),
    "reversed rows": (R, R[::-1], "rows are in another order: the engine's sample 0 is the reference's 63"),
    "half": (R, R * 0.5, "0.5 times the reference's: look at the preprocessing"),
    "negated": (R, -R, "-1 times the reference's"),
    "line": (R, R * 3 + 2, "3 times the reference's +2"),
    "offset": (R, R + 4, "the reference's +4: an offset is added"),
    "softmax": (R, softmax(R), "applies a softmax that the reference does not"),
    "softmax missing": (softmax(R), R, "softmax is missing"),
    "softmax twice": (softmax(R * 3), softmax(softmax(R * 3)), "softmax is applied twice"),
    "log-softmax": (R, np.log(softmax(R)), "log-softmax"),
    "sigmoid": (R, 1 / (1 + np.exp(-R)), "applies a sigmoid"),
    "sigmoid missing": (1 / (1 + np.exp(-R)), R, "sigmoid is missing"),
    "channels last": (IMAGES, IMAGES.transpose(0, 2, 3, 1).reshape(IMAGES.shape), "written in the order [1, 2, 0]"),
    "one column": (R, R + np.eye(10)[3] * rows((64, 1), seed=4), "of the squared error is in element 3"),
    "few samples": (R, np.where(np.arange(64)[:, None] == 17, rows(seed=9), R), "in 3 of 64 samples: 17"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("noise", [0.0, 2e-3])
def test_the_cause_is_named(name, noise):
    reference, candidate, expected = CASES[name]
    if noise and name not in ("zeros", "constant", "same answer", "same other answer"):
        candidate = candidate + noise * np.random.default_rng(1).standard_normal(candidate.shape) * candidate.std()
    elif noise:
        return
    found = causes(reference, candidate)
    assert len(found) == 1, found
    assert found[0].startswith("logits: ")
    assert expected in found[0]


@given(
    noise=st.floats(0, 3).filter(lambda x: x != 1),
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(64, 10), (4, 3), (20, 1), (256, 100), (1, 10), (12, 3, 4, 4)]),
)
def test_noise_has_no_cause(noise, seed, shape):
    reference = rows(shape, seed)
    candidate = reference + noise * np.random.default_rng(seed + 1).standard_normal(shape)
    found = [each for each in causes(reference, candidate) if "of the squared error" not in each]
    assert not found


@given(
    seed=st.integers(0, 300), scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]), kind=st.sampled_from(["raw", "softmax"])
)
def test_another_models_answers_have_no_cause(seed, scale, kind):
    reference, candidate = rows((64, 10), seed), rows((64, 10), seed + 1000) * scale
    if kind == "softmax":
        reference = softmax(reference)
    found = [each for each in causes(reference, candidate) if "of the squared error" not in each]
    assert not found


def test_equal_outputs_have_no_cause():
    assert causes(R, R) == ()
    assert causes(np.zeros((4, 3)), np.zeros((4, 3))) == ()


def test_what_is_not_finite_is_said():
    bad = R.copy()
    bad[[3, 9], 4] = np.nan
    assert causes(R, bad) == ("logits: 2 of the first 64 samples hold NaN or Inf, sample 3 first, only in element 4",)
    assert causes(R, np.full_like(R, np.nan)) == ("logits: every element of the first 64 samples is NaN or Inf",)
    bad[[3, 9], 4] = np.inf
    assert "suggests an overflow, in fp16 above 65504" in causes(R, bad)[0]
    assert "the reference itself holds NaN" in causes(np.where(R > 5, np.nan, R), R)[0]


def test_shapes_that_say_nothing_are_left_alone():
    metrics = OutputAccumulator("logits", np.float32)
    metrics.add(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), first_sample=0)
    ready = metrics.metrics()
    for a, b in ((np.ones((2, 3)), np.ones((3, 2))), (np.ones((0, 3)), np.ones((0, 3))), (np.ones(()), np.ones(()))):
        assert diagnose(ready, a, b) == ()
    assert diagnose(ready, np.ones((2, 3), np.int64), np.zeros((2, 3), np.int64)) == ()
