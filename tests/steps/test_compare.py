"""An engine's outputs compared where it left them: a runner whose device is PyTorch's CPU, beside the same on the host."""

import dataclasses
import math
import re

import msgspec
import numpy as np
import pytest
import torch

from gate import compare_on_device, device
from gate.engines.fake import FakeBackend, FakeRunner
from gate.engines.interface import OutputsOnDevice
from gate.errors import MeasurementError, RunError
from gate.spec import read_spec
from gate.steps.compare import DIAGNOSED_ROWS, compare_outputs
from gate.steps.context import CheckOptions, Context, Silence
from gate.steps.judge import check_engine
from gate.verdict import Evidence, Failure

SAMPLES, BATCH, CLASSES = 20, 8, 512

SPEC = f"""schema = 1
[model]
id = "m"
outputs = "outputs.npz"
output_names = ["scores", "best"]
[inputs.index]
dtype = "float32"
shape = ["batch", 1]
batch = {{ min = 5, opt = 8, max = 8 }}
[data]
source = "data:evaluation"
samples = {SAMPLES}
batch = {BATCH}
[task]
kind = "classification"
output = "scores"
[[engine]]
name = "e"
backend = "tensorrt"
precision = "fp16"
plan = "engine.plan"
  [engine.parity]
  top1_agreement_at_least = 0.5
  allclose_at_least = 0.99
  [engine.task]
  top1_drop_at_most_pp = 50.0
"""
DATA = f"""
import numpy as np


def evaluation():
    index = np.arange({SAMPLES}, dtype=np.float32)[:, None]
    return [(each, number % 10) for number, each in enumerate(index)]
"""


class OnDevice(FakeRunner):
    """A runner that can leave its outputs as tensors, and overwrites those when it runs again, as an engine does."""

    def __init__(self, function, *, spec):
        super().__init__(function, spec=spec)
        self.calls = []
        self._left = {}

    def run(self, feed_dict):
        self._overwrite()
        self.calls.append("host")
        return super().run(feed_dict)

    def run_to_device(self, feed_dict):
        self._overwrite()
        self.calls.append("device")
        found = super().run(feed_dict)
        with torch.inference_mode():
            self._left = {name: torch.from_numpy(values) for name, values in found.items()}
        return dict(self._left)

    def _overwrite(self):
        with torch.inference_mode():
            for each in self._left.values():
                each.fill_(77)


class OnGpu(OnDevice):
    """The same on a GPU."""

    def run_to_device(self, feed_dict):
        left = super().run_to_device(feed_dict)
        with torch.inference_mode():
            self._left = {name: values.to("cuda") for name, values in left.items()}
        torch.cuda.synchronize()
        return dict(self._left)


class Case:
    """A recorded reference, and an engine that looks its answers up."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        scores = rng.standard_normal((SAMPLES, CLASSES), dtype=np.float32)
        self.reference = {"scores": scores, "best": scores.argmax(axis=1)}
        noise = np.float32(1e-4) * rng.standard_normal(scores.shape, dtype=np.float32)
        self.answers = {"scores": scores + noise, "best": self.reference["best"].copy()}
        np.savez(folder / "outputs.npz", **self.reference)
        (folder / "data.py").write_text(DATA)
        self.folder = folder
        self.text = SPEC

    def changed(self, old, new):
        assert old in self.text
        self.text = self.text.replace(old, new)

    def answer(self, feed):
        rows = feed["index"][:, 0].astype(int)
        return {name: values[rows] for name, values in self.answers.items()}

    def opened(self):
        """The run, its samples and reference opened."""
        path = self.folder / "gate.toml"
        path.write_text(self.text)
        run = Context(read_spec(path), CheckOptions(cache=None, baselines=self.folder), Silence())
        run.open_samples()
        run.open_reference()
        return run

    def compare(self, *, function=None, runner=OnDevice, **options):
        """What came of it, the findings, and the runner."""
        run = self.run = self.opened()
        findings = []
        opened = runner(function or self.answer, spec=run.spec)
        engine = run.spec.engines[0]
        return compare_outputs(run, engine, opened, Evidence.DEVICE, findings, **options), findings, opened

    def both(self, function=None):
        """Of the device and of the host; that either was used is held."""
        there = self.compare(function=function, device_is_usable=lambda: True)
        here = self.compare(function=function, device_is_usable=lambda: False)
        assert "device" in there[2].calls
        assert "device" not in here[2].calls
        return there, here


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_on_device, "LEAST_ELEMENTS", BATCH * CLASSES)
    return Case(tmp_path)


def require_alike(there, here):
    """The same checks with the same outcome, and estimates within the rounding of float32."""
    assert [each.check for each in there] == [each.check for each in here]
    assert [each.status for each in there] == [each.status for each in here]
    for a, b in zip(there, here, strict=True):
        if isinstance(a, Failure):
            assert a == b
            continue
        assert (a.n, a.evidence, a.hint, a.limit.kind) == (b.n, b.evidence, b.hint, b.limit.kind)
        assert a.limit.value == pytest.approx(b.limit.value, rel=1e-5, nan_ok=True)
        assert a.estimate == pytest.approx(b.estimate, rel=1e-5, abs=1e-7, nan_ok=True)


def metrics_of(compared, name):
    return next(each for each in compared.outputs if each.output == name)


def require_same_metrics(there, here):
    """Counts and places are equal, sums within the rounding of float32."""
    assert there.task == here.task
    for a, b in zip(there.outputs, here.outputs, strict=True):
        for name, mine in msgspec.structs.asdict(a).items():
            its = getattr(b, name)
            if isinstance(mine, float):
                assert mine == pytest.approx(its, rel=1e-4, abs=1e-7, nan_ok=True), name
            elif name == "worst_samples":
                assert [each[0] for each in mine] == [each[0] for each in its]
            elif name == "quantiles":
                assert mine == pytest.approx(its, nan_ok=True)
            else:
                assert mine == its, name


def test_the_findings_are_those_of_the_host(case):
    (there, findings, runner), (here, others, _) = case.both()
    assert {each.check.partition("[")[0] for each in findings} >= {"parity.nonfinite", "parity.rel_rmse"}
    assert any(each.check.startswith("task.") for each in findings)
    require_alike(findings, others)
    require_same_metrics(there, here)
    assert all(each.samples == SAMPLES for each in there.outputs)
    assert (there.on_device, here.on_device) == (True, False)
    assert isinstance(runner, OnDevice)


def test_the_first_batch_and_one_that_is_filled_up_are_run_to_the_host(case):
    (_, _, runner), _ = case.both()
    assert runner.calls == ["host", "device", "host"]
    assert case.run.seconds["inside_engines"] > 0


def test_the_device_is_used_once_it_is_known_that_it_pays(case):
    seen = []
    found, _, runner = case.compare(
        device_is_usable=lambda: seen.append("asked") or True, before_device=lambda: seen.append("before")
    )
    assert seen == ["asked", "before"]
    assert found.on_device
    assert runner.calls.count("device") == 1


def test_a_single_batch_does_not_use_the_device(case):
    case.changed(f"samples = {SAMPLES}", "samples = 8")
    (case.folder / "data.py").write_text(DATA.replace(str(SAMPLES), "8"))
    np.savez(case.folder / "outputs.npz", **{name: each[:8] for name, each in case.reference.items()})
    before = []
    found, _, runner = case.compare(device_is_usable=lambda: True, before_device=lambda: before.append(1))
    assert runner.calls == ["host"]
    assert not found.on_device
    assert not before


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sample", [1, 9, 18])
def test_what_is_not_finite_fails_as_on_the_host(case, value, sample):
    case.answers["scores"][sample, 5] = value
    (there, findings, _), (here, others, _) = case.both()
    require_alike(findings, others)
    require_same_metrics(there, here)
    bad = next(each for each in findings if each.check == "parity.nonfinite[scores]")
    assert bad.status == "FAILED"
    scores = metrics_of(there, "scores")
    assert scores.nonfinite_candidate == 1
    assert math.isnan(scores.rel_rmse)
    assert there.notes == here.notes
    assert any(note.startswith(f"worst sample {sample}: ") for note in there.notes)


def test_a_wrong_answer_is_diagnosed_from_copies_that_stay(case):
    case.answers["scores"] *= np.float32(1.5)
    (there, findings, _), (here, others, _) = case.both()
    assert SAMPLES < DIAGNOSED_ROWS
    require_alike(findings, others)
    assert any(each.status == "FAILED" for each in findings)
    assert there.notes == here.notes
    assert there.notes


def test_wrong_integers_beside_a_large_output_fail_as_on_the_host(case):
    case.answers["best"][10] += 1
    (there, findings, _), (here, others, _) = case.both()
    require_alike(findings, others)
    require_same_metrics(there, here)
    assert metrics_of(there, "best").mismatch_fraction == 1 / SAMPLES


def from_second_batch(case, change):
    """Answers that are changed from sample 8 on."""

    def function(feed):
        found = case.answer(feed)
        return change(found) if feed["index"][0, 0] >= BATCH else found

    return function


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {"best": found["best"]}, r"the engine has no 'scores'"),
        (lambda found: {**found, "more": found["best"]}, r"the engine has an extra 'more'"),
        (lambda found: {**found, "scores": found["scores"][:, :-1]}, rf"has shape \[8, {CLASSES - 1}\]"),
        (lambda found: {**found, "scores": found["scores"][:-1]}, rf"has shape \[7, {CLASSES}\]"),
        (lambda found: {**found, "scores": found["scores"].astype(np.float16)}, "is float16, the reference's is"),
        (lambda found: {**found, "best": found["best"].astype(np.int32)}, "is int32, the reference's is int64"),
    ],
)
def test_outputs_that_cannot_be_paired_fail_as_on_the_host(case, change, message):
    (there, findings, _), (here, others, _) = case.both(from_second_batch(case, change))
    assert there is here is None
    assert findings == others
    assert [each.check for each in findings] == ["parity.outputs"]
    assert re.search(message, findings[0].message)


def test_another_floating_dtype_is_compared_where_the_spec_allows_it(case):
    case.changed('precision = "fp16"', 'precision = "fp16"\ncast_io = true')
    case.answers["scores"] = case.answers["scores"].astype(np.float16)
    (there, findings, _), (here, others, _) = case.both()
    require_alike(findings, others)
    require_same_metrics(there, here)


def test_outputs_are_renamed_as_on_the_host(case):
    case.changed('precision = "fp16"', 'precision = "fp16"\noutputs = { scores = "theirs" }')
    case.answers = {"theirs": case.answers["scores"], "best": case.answers["best"]}
    (there, findings, _), (here, others, _) = case.both()
    require_alike(findings, others)
    require_same_metrics(there, here)


def test_a_name_that_the_engine_loses_on_the_way_is_an_error(case):
    case.changed('precision = "fp16"', 'precision = "fp16"\noutputs = { scores = "theirs" }')
    case.answers = {"theirs": case.answers["scores"], "best": case.answers["best"]}
    function = from_second_batch(case, lambda found: {"best": found["best"]})
    for usable in (True, False):
        with pytest.raises(RunError, match=r"outputs = \{ scores = 'theirs' \}: the engine has 'best'"):
            case.compare(function=function, device_is_usable=lambda usable=usable: usable)


def never():
    raise AssertionError("the device is not to be asked for")


def test_small_outputs_stay_on_the_host(case):
    case.reference["scores"] = case.reference["scores"][:, :100]
    case.answers["scores"] = case.answers["scores"][:, :100]
    np.savez(case.folder / "outputs.npz", **case.reference)
    found, _, runner = case.compare(device_is_usable=never)
    assert set(runner.calls) == {"host"}
    assert not found.on_device


def test_a_runner_that_cannot_leave_its_outputs_is_compared_on_the_host(case):
    found, _, runner = case.compare(runner=FakeRunner, device_is_usable=never)
    assert not isinstance(runner, OutputsOnDevice)
    assert not found.on_device


@pytest.mark.parametrize("key", ["device_peak_mib", "host_peak_mib"])
def test_an_engine_with_a_budget_of_memory_is_compared_on_the_host(case, key):
    case.text += f"  [engine.memory]\n  {key} = 1000.0\n"
    found, _, runner = case.compare(device_is_usable=never)
    assert set(runner.calls) == {"host"}
    assert not found.on_device


def test_a_device_without_memory_to_compare_hands_over_to_the_host(case, monkeypatch):
    _, (here, others, _) = case.both()

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    case.changed("min = 5", "min = 1")
    monkeypatch.setattr(torch, "isfinite", fails)
    found, findings, runner = case.compare(device_is_usable=lambda: True)
    assert runner.calls == ["host", "device", "host"]
    require_alike(findings, others)
    assert dataclasses.replace(found, notes=(), on_device=False) == dataclasses.replace(here, notes=())
    assert "compared on the host from sample 8 on: " in found.notes[0]
    assert "CUDA out of memory" in found.notes[0]


def test_an_output_that_cannot_be_read_anywhere_is_an_error(case):
    class Unreadable(OnDevice):
        def run_to_device(self, feed_dict):
            return {**super().run_to_device(feed_dict), "scores": [[0.0]]}

    with pytest.raises(MeasurementError, match="'scores' is a list, which cannot be compared"):
        case.compare(runner=Unreadable, device_is_usable=lambda: True)


def test_an_engine_that_fails_on_the_way_is_an_error(case):
    class Failing(OnDevice):
        def run_to_device(self, feed_dict):
            raise RunError("CUDA failed: cudaErrorIllegalAddress")

    with pytest.raises(RunError, match="cudaErrorIllegalAddress"):
        case.compare(runner=Failing, device_is_usable=lambda: True)


class Backend(FakeBackend):
    """Opens runners that can leave their outputs on a device."""

    opened = None

    def open(self, path, *, spec, engine, resources=None):
        self.opened = OnDevice(self._function, spec=spec)
        return self.opened


def test_device_memory_is_not_watched_any_more_when_outputs_are_compared_there(case, monkeypatch):
    (case.folder / "engine.plan").write_bytes(b"plan")
    run = case.opened()
    backend = Backend(case.answer, evidence=Evidence.DEVICE)
    used = []

    def used_bytes():
        calls = backend.opened.calls if backend.opened else []
        used.append(2**30 if "device" in calls else 2**20 if calls else 0)
        return used[-1]

    monkeypatch.setattr(device, "device_memory_used_bytes", used_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = check_engine(run, run.spec.engines[0], backend)
    assert "device" in backend.opened.calls
    assert result.device_peak_mib == 1
    assert max(used) == 2**20


@pytest.mark.gpu
def test_the_findings_of_a_gpu_are_those_of_the_host(case):
    case.answers["scores"][13, 5] += 1
    there, findings, runner = case.compare(runner=OnGpu)
    here, others, _ = case.compare(device_is_usable=lambda: False)
    assert runner.calls[:2] == ["host", "device"]
    assert there.on_device
    require_alike(findings, others)
    require_same_metrics(there, here)
    assert there.notes == here.notes
