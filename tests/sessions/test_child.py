"""What the fresh process does, with engines that say what happened on a GPU that is not here."""

from __future__ import annotations

import time
from contextlib import ExitStack

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from gate.engines.interface import RegionTimes
from gate.engines.onnxruntime import runner
from gate.errors import BackendUnavailable, MeasurementError
from gate.latency.config import Cell
from gate.latency.measurement import Reading
from gate.sessions import child
from gate.sessions.child import main, measure, read_feeds
from gate.sessions.job import FAILED, JOB, PHASE, TIMES, bytes_from_job
from gate.spec import read_spec
from gate.tensors import TensorMeta


class PlainRunner:
    """An engine on a GPU that does not tell its regions."""

    def __init__(self, calls, name):
        self.inputs = {"x": TensorMeta("x", "float32", ("n", 3))}
        self.outputs = {"y": TensorMeta("y", "float32", ("n", 3))}
        self.calls, self.name, self.asked, self.closed = calls, name, [], False

    def run(self, feed_dict):
        self.calls.append((self.name, "run"))
        return dict(feed_dict)

    def timed(self, feed_dict):
        return lambda: self.calls.append((self.name, "timed"))

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class SimulatedRunner(PlainRunner):
    """One that does, and that can be renewed."""

    def region_timed(self, feeds, *, transfers, wait):
        self.asked.append((len(feeds), transfers, wait))

        def once(index):
            self.calls.append((self.name, index))
            copies = {"h2d": 10 + index, "d2h": 20} if transfers else {}
            return lambda: RegionTimes(gpu_compute=100 + index, enqueue=7, **copies)

        return once

    def fresh(self):
        self.calls.append((self.name, "fresh"))
        return SimulatedRunner(self.calls, self.name)


class Watch:
    """A GPU that is idle."""

    def read(self, subject):
        return Reading(subject=subject, sm_clock_mhz=1500)

    def busy_percent(self, *, settle_s=0.0):
        return 3

    def power_w(self):
        return 50.0

    def energy_mj(self):
        return None

    def used_bytes(self):
        return 1 << 20


@pytest.fixture
def simulated(project, monkeypatch):
    """Engines of the job are simulated; returns what was called on them, and they."""

    class Simulated:
        def __init__(self):
            self.calls, self.runners, self.kind = [], [], SimulatedRunner

        def open(self, path, *, spec, engine, resources=None):
            self.runners.append(self.kind(self.calls, engine.name))
            return self.runners[-1]

    found = Simulated()
    monkeypatch.setattr(child, "backend_named", lambda name: found)
    monkeypatch.setattr(child, "open_watch", Watch)
    return found


def named(project, name):
    return project.ort(name, engine=msgspec.structs.replace(project.engine, name=name))


def done(job, project):
    told = []
    with ExitStack() as stack:
        return measure(job, folder=project.folder, tell=told.append, stack=stack), told


def test_every_region_is_recorded_and_latency_is_copies_and_compute(project, simulated):
    times, _ = done(project.job(named(project, "a"), on_gpu=True, wait="block"), project)
    (cell,) = times.cells
    regions = cell.subjects[0].regions
    assert set(regions) == {"host_wall", "latency", "h2d", "enqueue", "gpu_compute", "d2h"}
    assert {len(values) for values in regions.values()} == {20}
    assert regions["latency"] == tuple(c + h + 20 for c, h in zip(regions["gpu_compute"], regions["h2d"], strict=True))
    assert simulated.runners[0].asked == [(3, True, "block")]
    assert simulated.runners[0].closed


def test_without_transfers_there_is_no_latency_region(project, simulated):
    times, _ = done(project.job(named(project, "a"), transfers=False), project)
    assert set(times.cells[0].subjects[0].regions) == {"host_wall", "enqueue", "gpu_compute"}


def test_batches_take_turns(project, simulated):
    done(project.job(named(project, "a")), project)
    indices = [index for _, index in simulated.calls if isinstance(index, int)]
    warm, timed = indices[:5], indices[5:]
    assert warm == [0, 1, 2, 0, 1]
    assert timed == [index % 3 for index in range(20 + 3 * 2)]


def test_the_gpu_is_read_after_each_leg_and_before_the_session(project, simulated):
    times, _ = done(project.job(named(project, "a"), named(project, "b"), on_gpu=True), project)
    assert [each.subject for each in times.cells[0].readings] == [0, 1, 1, 0, 0, 1]
    assert times.busy_percent == 3
    assert times.memory.device_steady_mib == 0.0


def test_the_gpu_is_not_looked_at_where_nobody_asked(project, simulated):
    times, _ = done(project.job(named(project, "a")), project)
    assert times.cells[0].readings == ()
    assert times.busy_percent is None


@pytest.mark.parametrize(("order", "turns"), [(0, "abbaab"), (1, "baabba")])
def test_legs_of_two_engines_alternate_and_each_is_told(project, simulated, order, turns):
    _, told = done(project.job(named(project, "a"), named(project, "b"), order=order), project)
    assert [each for each in told if "timing" in each] == [f"timing '{name}' at batch=2" for name in turns]
    assert [each for each in told if "loading" in each] == ["loading 'a'", "loading 'b'"]


def test_all_engines_are_loaded_and_run_before_the_first_is_timed(project, simulated):
    cells = (project.cell(subjects=(0,)), project.cell(subjects=(1,)))
    done(project.job(named(project, "a"), named(project, "b"), cells=cells), project)
    assert simulated.calls[:3] == [("a", "run"), ("b", "run"), ("a", 0)]


def test_streams_are_renewed_runners_of_one_loaded_engine(project, simulated):
    job = project.job(named(project, "a"), cells=(project.cell(kept=11),), streams=2)
    times, _ = done(job, project)
    assert len(simulated.runners) == 1
    assert simulated.calls.count(("a", "fresh")) == 1
    assert list(times.cells[0].subjects[0].regions) == ["host_wall"]
    assert times.cells[0].subjects[0].leg == 11
    assert len(times.cells[0].subjects[0].regions["host_wall"]) == 11


def test_engine_on_the_gpu_without_regions_is_not_timed_without_its_copies(project, simulated):
    simulated.kind = PlainRunner
    engine = msgspec.structs.replace(project.engine, name="a", evidence="device")
    job = project.job(project.ort("a", engine=engine), transfers=False)
    with pytest.raises(MeasurementError, match="cannot be timed with transfers = false"):
        done(job, project)
    times, _ = done(msgspec.structs.replace(job, transfers=True), project)
    assert list(times.cells[0].subjects[0].regions) == ["host_wall"]


@pytest.mark.parametrize("streams", [1, 2])
def test_a_second_compiled_engine_in_pytorch_is_refused(project, simulated, streams):
    raw = {"name": "c", "backend": "torch", "precision": "fp32", "parity": {}, "options": {"mode": "compile"}}
    engine = msgspec.convert(raw, type(project.engine))
    subjects = [project.ort(name, engine=engine) for name in ("c", "d")][: 3 - streams]
    with pytest.raises(MeasurementError, match="keeps one engine a process, and 'c'.* would need 2"):
        done(project.job(*subjects, streams=streams), project)


def test_switches_of_pytorch_follow_the_engine_whose_turn_it_is(project):
    import torch

    raw = {"name": "t", "backend": "torch", "precision": "tf32", "parity": {}, "evidence": "device"}
    engine = msgspec.convert(raw, type(project.engine))
    job = project.job(project.ort("t", engine=engine), project.torch(), project.ort())
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        switches = child._switches(job)
        assert sorted(switches) == [0, 1]
        for index, precision in ((0, "high"), (1, "highest"), (0, "high")):
            switches[index]()
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert child._switches(project.job(project.torch(), project.ort())) == {}


class SlowRunner(SimulatedRunner):
    """One that takes its time, by the batch size, and longer at its first inference."""

    seconds, first = 0.0, 0.0

    def run(self, feed_dict):
        is_first = (self.name, "run") not in self.calls
        time.sleep(max(self.first * is_first, self.seconds * len(feed_dict["x"])))
        return super().run(feed_dict)


def batches_bound(job, project, simulated, **seconds):
    """How many batches each engine was bound to, call by call."""
    simulated.kind = type("Slow", (SlowRunner,), seconds)
    done(job, project)
    return {each.name: [count for count, *_ in each.asked] for each in simulated.runners}


def many(project, **changes):
    return project.cell(feeds=project.feeds(count=40, batch=changes.get("batch", 2)), **changes)


def test_no_more_batches_are_bound_than_a_tenth_of_the_time_allows(project, simulated):
    both = (named(project, "a"), named(project, "b"))
    job = project.job(*both, cells=(many(project, subjects=(0, 1)),), max_s=4.0)
    found = batches_bound(job, project, simulated, seconds=0.005)
    assert found["a"] == found["b"]
    assert 2 <= found["a"][0] <= 20


def test_two_batches_take_turns_however_slow_the_engine_is(project, simulated):
    job = project.job(named(project, "a"), cells=(many(project),), max_s=1e-3)
    assert batches_bound(job, project, simulated, seconds=0.01) == {"a": [2]}


def test_a_first_inference_that_loads_does_not_cost_the_other_batches(project, simulated):
    job = project.job(named(project, "a"), cells=(many(project),), max_s=30.0)
    assert batches_bound(job, project, simulated, first=0.3) == {"a": [40]}


def test_each_batch_size_is_bound_by_what_its_own_inferences_take(project, simulated):
    cells = (many(project, batch=1), many(project, batch=8))
    job = project.job(named(project, "a"), cells=cells, max_s=5.0)
    small, large = batches_bound(job, project, simulated, seconds=0.003)["a"]
    assert small == 40
    assert large < 20


def test_without_a_limit_of_time_binding_has_one(project, simulated, monkeypatch):
    monkeypatch.setattr(child, "_BINDING_S", 0.1)
    job = project.job(named(project, "a"), cells=(many(project),), usage_s=0.01, usage_feeds=project.feeds(count=30))
    cell, usage = batches_bound(job, project, simulated, seconds=0.01)["a"]
    assert 2 <= cell < 10
    assert 2 <= usage < 10


class EventlessRunner(SimulatedRunner):
    """One on a GPU where nothing gives events."""

    def region_timed(self, feeds, *, transfers, wait):
        raise BackendUnavailable("timing on the device needs CUDA events")


def test_engine_on_a_gpu_without_events_is_timed_as_a_whole(project, simulated):
    simulated.kind = EventlessRunner
    times, _ = done(project.job(named(project, "a")), project)
    assert list(times.cells[0].subjects[0].regions) == ["host_wall"]
    assert ("a", "timed") in simulated.calls


@pytest.mark.parametrize("changes", [{"transfers": False}, {"wait": "block"}])
def test_engine_on_a_gpu_without_events_is_not_timed_in_part(project, simulated, changes):
    simulated.kind = EventlessRunner
    with pytest.raises(BackendUnavailable, match="needs CUDA events"):
        done(project.job(named(project, "a"), **changes), project)


def test_times_are_written_before_an_engine_is_closed(project, simulated):
    (project.folder / JOB).write_bytes(bytes_from_job(project.job(named(project, "a"))))
    with ExitStack() as stack:
        assert main(project.folder, stack) == 0
        assert (project.folder / TIMES).is_file()
        assert not simulated.runners[0].closed
    assert simulated.runners[0].closed


def test_reference_in_onnx_is_timed_with_every_optimisation(project, monkeypatch):
    opened = []
    opened_there = runner.open_session

    def open_session(path, options):
        opened.append((path, options))
        return opened_there(path, options)

    monkeypatch.setattr(runner, "open_session", open_session)
    subject = msgspec.structs.replace(project.ort(), engine=None, file=None, sha256=None)
    times, _ = done(project.job(subject), project)
    assert len(times.cells[0].subjects[0].regions["host_wall"]) == 20
    assert [(path.name, options.optimization) for path, options in opened] == [("model.onnx", None)]


TWO_AXES = """schema = 1

[model]
id = "m"
onnx = "model.onnx"

[inputs.x]
dtype = "float32"
shape = ["n", 3, "w"]
n = { min = 1, opt = 2, max = 8 }
w = { min = 1, opt = 2, max = 8 }

[inputs.y]
dtype = "float32"
shape = ["n", "w"]
n = { min = 1, opt = 2, max = 8 }
w = { min = 1, opt = 2, max = 8 }

[data]
source = "data:samples"
samples = 1

[[engine]]
name = "ort"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
"""


@pytest.mark.parametrize(
    ("shapes", "axes", "message"),
    [
        ({"x": (2, 3, 4), "y": (2, 4)}, {"w": 4}, None),
        ({"x": (2, 3, 5), "y": (2, 5)}, {}, None),
        ({"x": (3, 3, 4), "y": (3, 4)}, {}, r"'x' has shape \[3, 3, 4\], the batch is to be 2"),
        ({"x": (), "y": (2, 4)}, {}, r"'x' has shape \[\], the batch is to be 2"),
        ({"x": (2, 3, 5), "y": (2, 4)}, {"w": 4}, r"'x' has shape \[2, 3, 5\], axis 'w' is to be 4"),
        ({"x": (2, 3, 4), "y": (2, 5)}, {"w": 4}, r"'y' has shape \[2, 5\], axis 'w' is to be 4"),
        ({"x": (2, 3, 4)}, {"w": 4}, "there is no input 'y'"),
    ],
)
def test_batches_have_the_sizes_of_their_cell(tmp_path, shapes, axes, message):
    (tmp_path / "gate.toml").write_text(TWO_AXES)
    file = read_spec(tmp_path / "gate.toml")
    feeds = [{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}]
    cell = Cell(batch=2, axes=axes)
    if message is None:
        child._require_batch(feeds, cell, file=file, where="feeds")
        return
    with pytest.raises(MeasurementError, match=message):
        child._require_batch(feeds, cell, file=file, where="feeds")


def test_a_fixed_first_axis_is_held_against_the_batch_too(tmp_path):
    (tmp_path / "gate.toml").write_text(
        TWO_AXES.replace('["n", 3, "w"]\nn = { min = 1, opt = 2, max = 8 }', '[4, 3, "w"]').replace(
            '["n", "w"]\nn = { min = 1, opt = 2, max = 8 }', '[4, "w"]'
        )
    )
    file = read_spec(tmp_path / "gate.toml")
    feeds = [{"x": np.zeros((4, 3, 2), np.float32), "y": np.zeros((4, 2), np.float32)}]
    child._require_batch(feeds, Cell(batch=4), file=file, where="feeds")
    with pytest.raises(MeasurementError, match=r"has shape \[4, 3, 2\], the batch is to be 1"):
        child._require_batch(feeds, Cell(batch=1), file=file, where="feeds")


def test_stored_outputs_have_no_latency(project):
    subject = msgspec.structs.replace(project.torch(), spec=project.spec_of_stored_outputs())
    with pytest.raises(MeasurementError, match="stored outputs, so it has no latency"):
        done(project.job(subject), project)


def test_main_writes_times_and_what_it_did_last(project):
    (project.folder / JOB).write_bytes(bytes_from_job(project.job(project.ort())))
    with ExitStack() as stack:
        assert main(project.folder, stack) == 0
    assert (project.folder / TIMES).is_file()
    assert not (project.folder / FAILED).exists()
    assert (project.folder / PHASE).read_text().strip() == "timing 'ort' at batch=2"


def test_main_writes_why_it_failed(project, capfd):
    (project.folder / JOB).write_bytes(b"{}")
    with ExitStack() as stack:
        assert main(project.folder, stack) == 1
    assert "MeasurementError" in (project.folder / FAILED).read_text()
    assert not (project.folder / TIMES).exists()


def test_feeds_come_back_by_index_and_name(tmp_path):
    path = tmp_path / "feeds"
    arrays = {f"{index}/in/put": np.full((2, 1), index, np.int64) for index in range(12)}
    save_file({**arrays, **{f"{index}/scalar": np.full((), index, np.float32) for index in range(12)}}, path)
    batches = read_feeds(path)
    assert [int(each["in/put"][0, 0]) for each in batches] == list(range(12))
    assert batches[3]["scalar"].shape == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x"], "is called `<index>/<input>`, got 'x'"),
        (["a/x"], "is called `<index>/<input>`"),
        (["0/"], "is called `<index>/<input>`"),
        (["1/x"], "has 1 batches and none with index 0"),
        (["0/x", "2/x"], "has 2 batches and none with index 1"),
        (["0/x", "1/y"], "batch 1 has other inputs"),
    ],
)
def test_feeds_with_other_names_are_an_error(tmp_path, names, message):
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / "feeds")
    with pytest.raises(MeasurementError, match=message):
        read_feeds(tmp_path / "feeds")


def test_batches_that_differ_in_shape_are_an_error(tmp_path):
    save_file({"0/x": np.ones(2, np.float32), "1/x": np.ones(3, np.float32)}, tmp_path / "feeds")
    with pytest.raises(MeasurementError, match="batch 1 has other inputs or shapes"):
        read_feeds(tmp_path / "feeds")
