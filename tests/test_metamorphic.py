"""Checks that need no reference, against runners that break one property each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from gate.errors import RunError
from gate.metamorphic import applicable_checks, metamorphic_findings
from gate.spec import EngineSpec, InputSpec, MetamorphicSpec, spec_from_text
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.verdict import Evidence, Failure, Limit, Status

Function = Callable[[Array], Array]
SPEC = """schema = 1
[model]
id = "m"
factory = "model:load"
[inputs.x]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 4, max = 16 }
[data]
source = "data:evaluation"
samples = 6
[[engine]]
name = "a"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
"""
FILE = spec_from_text(SPEC, path=Path("gate.toml"))
SAMPLES = {"x": np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32)}


class Runner:
    """A runner made of one function over the batch."""

    inputs: Mapping[str, TensorMeta] = {}
    outputs: Mapping[str, TensorMeta] = {}

    def __init__(self, function: Function) -> None:
        self.function = function
        self.calls = 0

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        self.calls += 1
        return {"y": self.function(np.asarray(feed_dict["x"]))}

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        pass

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def judged(function: Function, engine: EngineSpec = FILE.spec.engines[0]) -> dict[str, Status]:
    findings = metamorphic_findings(
        Runner(function),
        SAMPLES,
        engine=engine,
        inputs=FILE.spec.inputs,
        limit=Limit("at_most", 1e-5, "default"),
        evidence=Evidence.HOST,
    )
    return {finding.check.removeprefix("metamorphic."): finding.status for finding in findings}


ALL_PASS = dict.fromkeys(("repeatability", "batch_independence", "profile_edges"), Status.PASSED)


def test_a_function_of_the_row_alone_passes_everything() -> None:
    assert judged(np.tanh) == ALL_PASS


def test_a_function_of_the_whole_batch_is_caught() -> None:
    result = judged(lambda x: x - x.mean(axis=0))
    assert result["batch_independence"] is Status.FAILED
    assert result["profile_edges"] is Status.FAILED


def test_an_answer_that_depends_on_the_place_in_the_batch_is_caught() -> None:
    assert judged(lambda x: x + np.arange(len(x))[:, None])["batch_independence"] is Status.FAILED


def test_an_engine_that_does_not_repeat_itself_is_caught() -> None:
    state = iter(range(1000))
    assert judged(lambda x: x + next(state))["repeatability"] is Status.FAILED


def test_an_edge_that_goes_wrong_is_caught() -> None:
    assert judged(lambda x: x * (2 if len(x) == 16 else 1)) == {**ALL_PASS, "profile_edges": Status.FAILED}


def test_nan_never_passes() -> None:
    assert set(judged(lambda x: np.full_like(x, np.nan)).values()) == {Status.FAILED}


def test_a_runner_that_refuses_an_edge_is_a_failure_with_its_reason() -> None:
    def refuse(x: Array) -> Array:
        if len(x) == 16:
            raise RunError("axis 0 of 'x' is 16, the engine takes 1 to 8")
        return x

    findings = metamorphic_findings(
        Runner(refuse),
        SAMPLES,
        engine=FILE.spec.engines[0],
        inputs=FILE.spec.inputs,
        limit=Limit("at_most", 1e-5, "default"),
        evidence=Evidence.HOST,
    )
    (failed,) = [finding for finding in findings if isinstance(finding, Failure)]
    assert failed.check == "metamorphic.profile_edges"
    assert "the engine takes 1 to 8" in failed.message


@pytest.mark.parametrize("name", ["repeatability", "batch_independence", "profile_edges"])
def test_what_is_switched_off_is_not_made_and_not_required(name: str) -> None:
    import msgspec

    engine = msgspec.structs.replace(FILE.spec.engines[0], metamorphic=MetamorphicSpec(**{name: False}))
    assert name not in judged(np.tanh, engine)
    assert f"metamorphic.{name}" not in applicable_checks(engine, FILE.spec.inputs)


def test_a_fixed_batch_of_one_leaves_repeatability_alone() -> None:
    fixed = {"x": InputSpec(dtype="float32", shape=(1, 4))}
    assert applicable_checks(FILE.spec.engines[0], fixed) == ("metamorphic.repeatability",)


class WithContexts(Runner):
    """A runner whose contexts remember the largest batch that they ran."""

    def __init__(self, leak: float, closed: list[str] | None = None) -> None:
        super().__init__(self._leaking)
        self.leak = leak
        self.largest = 0
        self.closed: list[str] = [] if closed is None else closed

    def _leaking(self, x: Array) -> Array:
        self.largest = max(self.largest, len(x))
        return x + np.float32(self.leak * (self.largest >= 16))

    def fresh(self) -> WithContexts:
        return WithContexts(self.leak, self.closed)

    def __exit__(self, *_: object) -> None:
        self.closed.append("closed")


TENSORRT = EngineSpec(name="a", backend="tensorrt", precision="fp32", parity=FILE.spec.engines[0].parity)


def fresh_context_status(runner: Runner) -> Status | None:
    found = metamorphic_findings(
        runner,
        SAMPLES,
        engine=TENSORRT,
        inputs=FILE.spec.inputs,
        limit=Limit("at_most", 1e-5),
        evidence=Evidence.DEVICE,
    )
    return next((each.status for each in found if each.check == "metamorphic.fresh_context"), None)


def test_a_context_that_keeps_what_it_ran_before_is_caught() -> None:
    assert fresh_context_status(WithContexts(leak=1.0)) is Status.FAILED


def test_a_context_that_keeps_nothing_passes_and_fresh_ones_are_closed() -> None:
    runner = WithContexts(leak=0.0)
    assert fresh_context_status(runner) is Status.PASSED
    assert runner.closed == ["closed", "closed"]


def test_fresh_contexts_are_required_of_tensorrt_alone() -> None:
    assert "metamorphic.fresh_context" in applicable_checks(TENSORRT, FILE.spec.inputs)
    assert "metamorphic.fresh_context" not in applicable_checks(FILE.spec.engines[0], FILE.spec.inputs)
    assert fresh_context_status(Runner(lambda x: x)) is None
