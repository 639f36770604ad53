"""What engines take in fresh processes, whatever batch sizes and devices they are for."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import msgspec
import pytest

from gate.engines import backend
from gate.latency.measurement import MemoryUse, SessionTimes
from gate.pipeline import CheckOptions, Silence
from gate.sessions.child import read_feeds
from gate.spec import MemorySpec, read_spec
from gate.steps import rivals
from gate.steps.context import Context
from gate.steps.make import make_engine
from gate.steps.rivals import engine_memory, timing_of
from gate.verdict import Evidence
from tests.cli import conftest as tiny

RANGE = "batch = { min = 1, opt = 4, max = 16 }"
HALF = '\n[[engine]]\nname = "half"\nbackend = "onnxruntime"\nprecision = "fp16"\n  [engine.parity]\n'


def opened(root, spec):
    """A run, and how its engine is timed."""
    tiny.write(root, spec)
    run = Context(read_spec(root / "gate.toml"), CheckOptions(cache=root / "cache"), Silence())
    run.open_samples()
    run.open_reference()
    engine = run.file.engine("ort")
    return run, timing_of(run, engine, make_engine(run, engine, backend(engine.backend)), evidence=Evidence.HOST)


@pytest.mark.parametrize(
    "spec",
    [
        (tiny.SPEC + HALF).replace(RANGE, "batch = { min = 2, opt = 4, max = 16 }"),
        (tiny.SPEC + HALF).replace(RANGE, "").replace('["batch", 4]', "[4, 4]"),
    ],
    ids=["profile from 2", "fixed batch of 4"],
)
def test_memory_is_measured_where_an_engine_does_not_take_one_sample(tmp_path, spec):
    run, timing = opened(tmp_path, spec)
    with closing(run):
        found, failures = engine_memory(
            run,
            timing,
            MemorySpec(device_steady_mib=1.0, together_with=("half",), together_host_mib=4000.0),
        )
    assert failures == ()
    assert found.alone.host_steady_mib is not None
    assert found.of("together_host_mib") > 1.0


class Asked:
    """Takes the place of a session: keeps its job and the shapes of its inputs."""

    def __init__(self):
        self.jobs, self.shapes = [], []

    def __call__(self, job, *, timeout_s):
        self.jobs.append(job)
        self.shapes.append(read_feeds(job.usage_feeds)[0]["input"].shape)
        return SessionTimes(cells=(), clock="c", resolution_ns=1, memory=MemoryUse(host_steady_mib=1.0))


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (RANGE, (1, 4)),
        ("batch = { min = 3, opt = 4, max = 16 }", (3, 4)),
    ],
)
def test_the_smallest_batch_of_the_profile_is_run(tmp_path, monkeypatch, axes, shape):
    run, timing = opened(tmp_path, tiny.SPEC.replace(RANGE, axes))
    asked = Asked()
    monkeypatch.setattr(rivals, "run_session", asked)
    with closing(run):
        engine_memory(run, timing, MemorySpec(device_steady_mib=1.0))
    assert asked.shapes == [shape]


@pytest.mark.parametrize("which", ["none", "the engine", "another"])
def test_the_gpu_is_looked_at_where_any_of_the_engines_is_on_it(tmp_path, monkeypatch, which):
    run, timing = opened(tmp_path, tiny.SPEC)
    other = timing.subject
    there = msgspec.structs.replace(
        timing.subject, engine=msgspec.structs.replace(timing.subject.engine, evidence="device")
    )
    asked = Asked()
    monkeypatch.setattr(rivals, "run_session", asked)
    with closing(run):
        pair = {"none": (other, other), "the engine": (there, other), "another": (other, there)}[which]
        rivals._session_memory(run.spec, replace(timing, subject=pair[0]), pair[1:])
    assert [job.on_gpu for job in asked.jobs] == [which != "none"]
