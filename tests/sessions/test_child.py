"""What the fresh process does, with engines that say what happened on a GPU that is not here."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from gate.engines.interface import RegionTimes
from gate.errors import MeasurementError
from gate.latency.measurement import Reading
from gate.sessions import child
from gate.sessions.child import main, measure, read_feeds
from gate.sessions.job import FAILED, JOB, PHASE, TIMES, bytes_from_job
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
            return RegionTimes(gpu_compute=100 + index, enqueue=7, **copies)

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
    return measure(job, folder=project.folder, tell=told.append), told


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


def test_stored_outputs_have_no_latency(project):
    subject = msgspec.structs.replace(project.torch(), spec=project.spec_of_stored_outputs())
    with pytest.raises(MeasurementError, match="stored outputs, so it has no latency"):
        done(project.job(subject), project)


def test_main_writes_times_and_what_it_did_last(project):
    (project.folder / JOB).write_bytes(bytes_from_job(project.job(project.ort())))
    assert main(project.folder) == 0
    assert (project.folder / TIMES).is_file()
    assert not (project.folder / FAILED).exists()
    assert (project.folder / PHASE).read_text().strip() == "timing 'ort' at batch=2"


def test_main_writes_why_it_failed(project, capfd):
    (project.folder / JOB).write_bytes(b"{}")
    assert main(project.folder) == 1
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
