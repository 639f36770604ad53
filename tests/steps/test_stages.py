"""Samples through a whole pipeline one by one: which stages there are, what each takes, and what its budget says."""

import itertools
import json
import math

import msgspec
import numpy as np
import pytest

from gate.data.image_spec import Preprocess
from gate.data.images import ImageItem, ImageSet, ImageSource
from gate.engines.fake import FakeRunner
from gate.engines.interface import RegionTimed, RegionTimes
from gate.engines.onnxruntime import OnnxRuntimeBackend
from gate.errors import DataError, MeasurementError, RunError, SpecError
from gate.latency.config import StagesSpec
from gate.spec import read_spec
from gate.steps.context import CheckOptions, Context, Silence
from gate.steps.make import make_engine
from gate.steps.stages import WARM_UP, stages_of
from gate.verdict import Evidence, Status
from tests.withstand.detection_project import IMAGES, changed, new_project

pytest.importorskip("PIL")
pytest.importorskip("onnxruntime")

PLAIN = """schema = 1
[model]
id = "m"
outputs = "outputs.npz"
output_names = ["y"]
[inputs.x]
dtype = "float32"
shape = ["batch", 2]
batch = { min = LEAST, opt = 8, max = 8 }
[data]
source = "SOURCE"
samples = 6
batch = 4
EXTRA
[[engine]]
name = "candidate"
backend = "tensorrt"
precision = "fp32"
plan = "engine.plan"
  [engine.parity]
"""

TRACKED = """
import json
from pathlib import Path

import numpy as np
import gate

def samples():
    frames = [gate.TrackedFrame("a", index, np.array([1]), np.array([[0.0, 0, 5, 5]])) for index in range(6)]
    return gate.Samples({"x": np.ones((6, 2), np.float32)}, targets=frames)

def decode(outputs, frames, state):
    state["frames"] = state.get("frames", 0) + 1
    with Path(__file__).with_name("seen.jsonl").open("a") as file:
        print(json.dumps([frames[0].frame, state["frames"], outputs["y"].shape]), file=file)
    return [gate.TrackedFrame("a", each.frame, np.array([1]), np.array([[0.0, 0, 5, 5]])) for each in frames]
"""


class OnGpu(FakeRunner):
    """A runner that tells its regions apart, as one on a GPU does."""

    copies = (2_000_000, 1_000_000)

    def __init__(self, function, *, spec):
        super().__init__(function, spec=spec)
        self.asked = []

    def region_timed(self, feeds, *, transfers, wait):
        self.asked.append((len(feeds), transfers, wait))
        h2d, d2h = self.copies

        def once(index):
            self.run(feeds[index])
            return lambda: RegionTimes(gpu_compute=7_000_000, enqueue=50_000, h2d=h2d, d2h=d2h)

        return once


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture
def project(tmp_path, shared, capsys, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    return new_project(folder, capture=capsys, patch=monkeypatch, shared=shared)


def opened(path, **settings):
    """The run of a spec, and its first engine with these settings as `[engine.stages]`."""
    run = Context(read_spec(path), CheckOptions(cache=None), Silence())
    run.open_samples()
    return run, msgspec.structs.replace(run.spec.engines[0], stages=StagesSpec(**settings))


def measured(path, runner_of=None, *, evidence=Evidence.HOST, clock=None, **settings):
    """The stages of the first engine, on ONNX Runtime unless a runner is given."""
    run, engine = opened(path, **settings)
    backend = OnnxRuntimeBackend()
    options = {} if clock is None else {"clock": clock}
    if runner_of is None:
        made = make_engine(run, engine, backend)
        runner = backend.open(made.path, spec=run.spec, engine=engine)
    else:
        runner = runner_of(run)
    with runner:
        return stages_of(run, engine, runner, evidence=evidence, **options)


def plain(folder, *, extra="", least=1, source="samples.npz"):
    np.savez(folder / "samples.npz", x=np.arange(12, dtype=np.float32).reshape(6, 2))
    path = folder / "gate.toml"
    path.write_text(PLAIN.replace("EXTRA", extra).replace("LEAST", str(least)).replace("SOURCE", source))
    return path


def doubled(run, kind=FakeRunner):
    return kind(lambda feed: {"y": feed["x"] * 2}, spec=run.spec)


def ticking(steps_ns):
    """A clock that goes on by these steps, one for each time that it is asked, again and again."""
    now = itertools.accumulate(itertools.cycle(steps_ns))
    return lambda: next(now)


def names(found):
    return [each.stage for each in found.stages]


def test_a_detector_on_images_has_every_stage_of_a_cpu(project):
    found = measured(project.spec, samples=IMAGES)
    *stages, total = found.stages
    assert names(found) == ["decode", "preprocess", "inference", "postprocess", "total"]
    assert {each.n for each in found.stages} == {IMAGES}
    assert math.fsum(each.share for each in stages) == pytest.approx(1.0)
    assert math.fsum(each.mean_ms for each in stages) == pytest.approx(total.mean_ms)
    assert all(0.0 < each.p50_ms <= each.p95_ms <= each.p99_ms for each in stages)
    assert found.findings == ()
    assert ["in the process of the check" in note for note in found.notes] == [True]


def test_each_stage_is_what_the_clock_says_of_it(project):
    # Of an image: begin, decoded, preprocessed; begin and end of inference; begin and end of postprocess.
    clock = ticking([1_000, 3_000_000, 1_000_000, 500, 4_000_000, 700, 2_000_000])
    found = measured(project.spec, samples=5, clock=clock)
    assert {each.stage: (each.mean_ms, each.sd_ms, each.share) for each in found.stages} == {
        "decode": (3.0, 0.0, 0.3),
        "preprocess": (1.0, 0.0, 0.1),
        "inference": (4.0, 0.0, 0.4),
        "postprocess": (2.0, 0.0, 0.2),
        "total": (10.0, 0.0, 1.0),
    }


def test_budgets_pass_and_fail_stage_by_stage(project):
    found = measured(project.spec, samples=100, p95_ms={"total": 1e6, "decode": 1e-6}, p99_ms={"inference": 1e6})
    by_check = {each.check: each for each in found.findings}
    assert {check: each.status for check, each in by_check.items()} == {
        "stages.p95_ms[total]": Status.PASSED,
        "stages.p95_ms[decode]": Status.FAILED,
        "stages.p99_ms[inference]": Status.INCONCLUSIVE,
    }
    assert by_check["stages.p95_ms[decode]"].detail.startswith("decode of 100 of 100 samples is over the budget")
    assert "p99 needs at least 459 samples, has 100" in by_check["stages.p99_ms[inference]"].detail
    assert {each.evidence for each in found.findings} == {Evidence.HOST}
    assert f"stages: 100 samples were asked for and there are {IMAGES}, so they took turns" in found.notes


@pytest.mark.parametrize("stage", ["transfer", "resize"])
def test_a_budget_for_a_stage_that_is_not_there_is_an_error_before_anything_runs(project, stage):
    def closed(run):
        runner = doubled(run)
        runner.close()
        return runner

    named = f"budget for '{stage}'; this engine's pipeline has decode, preprocess, inference, postprocess, total"
    with pytest.raises(SpecError, match=named):
        measured(project.spec, closed, p95_ms={stage: 1.0})
    with pytest.raises(RunError, match="closed"):
        measured(project.spec, closed, p95_ms={"decode": 1.0})


def test_detections_of_a_graph_with_nms_inside_are_converted(project):
    project.edit(('onnx = "engine.onnx"\n', 'nms = "onnx"\n'))
    found = measured(project.spec, samples=4)
    assert names(found) == ["decode", "preprocess", "inference", "postprocess", "total"]


def test_images_without_postprocess_have_no_such_stage(project):
    text = project.spec.read_text()
    start, stop = text.index("[postprocess]"), text.index("[[engine]]")
    limit = "[engine.task]\n  mean_ap_drop_at_most = 0.01"
    project.spec.write_text((text[:start] + text[stop:]).replace(limit, "[engine.parity]"))
    assert names(measured(project.spec, samples=4)) == ["decode", "preprocess", "inference", "total"]


def test_outputs_that_cannot_be_read_name_the_sample(project):
    project.break_engine(changed("boxes", lambda boxes: boxes * np.nan))
    with pytest.raises(MeasurementError, match="stages: sample 0: "):
        measured(project.spec, samples=4)


def test_an_image_that_changed_meanwhile_is_an_error(project):
    from PIL import Image

    run, engine = opened(project.spec, samples=4)
    Image.new("RGB", (7, 7)).save(project.folder / "images" / "001.png")
    backend = OnnxRuntimeBackend()
    with (
        backend.open(project.folder / "engine.onnx", spec=run.spec, engine=engine) as runner,
        pytest.raises(DataError, match="is 7 x 7 pixels and was"),
    ):
        stages_of(run, engine, runner, evidence=Evidence.HOST)


def test_samples_that_are_no_images_have_inference_alone(tmp_path):
    found = measured(plain(tmp_path), doubled, samples=20)
    assert names(found) == ["inference", "total"]
    assert [each.share for each in found.stages] == [1.0, 1.0]
    assert "stages: 20 samples were asked for and there are 6, so they took turns" in found.notes
    with pytest.raises(SpecError, match="budget for 'decode'; this engine's pipeline has inference, total"):
        measured(plain(tmp_path), doubled, p50_ms={"decode": 1.0})


def test_each_sample_is_taken_once_after_those_that_do_not_count(tmp_path):
    seen = []

    def run_of(run):
        return FakeRunner(lambda feed: seen.append(feed["x"].tolist()) or {"y": feed["x"]}, spec=run.spec)

    measured(plain(tmp_path), run_of, samples=6)
    rows = [[[2.0 * index, 2.0 * index + 1]] for index in range(6)]
    assert seen == rows[:WARM_UP] + rows


def test_an_engine_that_takes_several_at_a_time_is_given_as_many(tmp_path):
    sizes = set()

    def run_of(run):
        return FakeRunner(lambda feed: sizes.add(len(feed["x"])) or {"y": feed["x"]}, spec=run.spec)

    found = measured(plain(tmp_path, least=3), run_of, samples=6)
    assert sizes == {3}
    assert any("no fewer than 3 samples at a time" in note for note in found.notes)


def test_on_a_gpu_transfer_and_inference_are_the_regions(tmp_path):
    runners = []

    def run_of(run):
        runners.append(doubled(run, OnGpu))
        return runners[0]

    found = measured(plain(tmp_path), run_of, samples=6, evidence=Evidence.DEVICE, p95_ms={"transfer": 5.0})
    assert isinstance(runners[0], RegionTimed)
    assert {each.stage: (each.mean_ms, each.share) for each in found.stages} == {
        "transfer": (3.0, 0.3),
        "inference": (7.0, 0.7),
        "total": (10.0, 1.0),
    }
    assert set(runners[0].asked) == {(1, True, "spin")}
    assert any("between CUDA events" in note for note in found.notes)
    assert [(each.check, each.status, each.evidence) for each in found.findings] == [
        ("stages.p95_ms[transfer]", Status.INCONCLUSIVE, Evidence.DEVICE)
    ]


def test_a_gpu_that_does_not_say_what_copies_took_is_an_error(tmp_path):
    class Silent(OnGpu):
        copies = (2_000_000, None)

    with pytest.raises(MeasurementError, match="does not say what its copies to the GPU and back took"):
        measured(plain(tmp_path), lambda run: doubled(run, Silent), samples=6, evidence=Evidence.DEVICE)


def test_a_gpu_engine_that_cannot_tell_its_regions_apart_says_so(tmp_path):
    found = measured(plain(tmp_path), doubled, samples=6, evidence=Evidence.DEVICE)
    assert names(found) == ["inference", "total"]
    assert "stages: inference holds the transfers; this engine does not tell them apart" in found.notes


@pytest.mark.parametrize("step", [0, -5])
def test_a_clock_that_stands_still_or_goes_back_is_an_error(tmp_path, step):
    with pytest.raises(MeasurementError, match=f"stage inference: inference 0 took {step} ns"):
        measured(plain(tmp_path), doubled, samples=6, clock=ticking([100, step]))


def test_a_function_that_follows_objects_is_given_frames_in_order(tmp_path):
    (tmp_path / "frames.py").write_text(TRACKED)
    extra = '[postprocess]\nhead = "function"\nfunction = "frames:decode"\n[task]\nkind = "tracking"'
    path = plain(tmp_path, extra=extra, source="frames:samples")
    path.write_text(path.read_text().replace("[engine.parity]", "[engine.task]\n  idf1_at_least = 0.5"))
    run, engine = opened(path, samples=8)
    found = stages_of(run, engine, doubled(run), evidence=Evidence.HOST)
    assert names(found) == ["inference", "postprocess", "total"]
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    frames = [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1]
    assert seen == [[frame, frame + 1, [1, 2]] for frame in frames]
    assert run.decoder_state == {}


def test_postprocess_without_a_record_of_the_image_is_an_error(tmp_path):
    extra = '[postprocess]\nhead = "boxes"\nboxes = "b"\nscores = "s"\ncategory_ids = [1]\nformat = "xyxy"\n'
    extra += 'coordinates = "pixels"\nactivation = "none"'
    with pytest.raises(DataError, match="sample 0 does not say how it became the input"):
        measured(plain(tmp_path, extra=extra), doubled, samples=6)


@pytest.mark.parametrize(
    ("preprocess", "dtype"),
    [
        (Preprocess(size=(48, 64), mean=(0.4, 0.5, 0.6), std=(0.2,)), "float32"),
        (Preprocess(size=(48, 64), channels="gray"), "float16"),
        (Preprocess(size=(32, 32), resize="stretch", channels="bgr", layout="nhwc", scale=1.0), "uint8"),
    ],
)
def test_what_is_timed_makes_the_input_that_a_batch_has(tmp_path, preprocess, dtype):
    from PIL import Image

    rng = np.random.default_rng(0)
    for index, shape in enumerate([(40, 70, 3), (30, 20), (48, 64, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{index}.png")
    items = tuple(ImageItem(str(tmp_path / f"{each}.png"), each, f"{each}.png", label=each) for each in range(3))
    images = ImageSet(items, where="test")
    with ImageSource(images, preprocess=preprocess, input_name="x", dtype=dtype, workers=0) as source:
        whole = np.concatenate([batch.inputs["x"] for batch in source.batches(2)])
        parts = np.concatenate([source.preprocessed(index, source.decoded(index)) for index in range(3)])
    assert parts.dtype == whole.dtype
    assert np.array_equal(parts, whole)
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match="there is no such file") as caught:
        source.decoded(1)
    assert caught.value.where == "1.png"
