"""The step that scores a task: what it needs, whose answers an error is about, and metrics of another package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gate.errors import RunError
from gate.steps.task import NMS_OUTPUTS, nms_outputs
from tests.withstand.conftest import Project
from tests.withstand.detection_project import break_both, break_reference, changed, edit_annotations, new_project

pytest.importorskip("PIL")
pytest.importorskip("pycocotools")

OWN_METRIC = """
import numpy as np
from dataclasses import dataclass

from gate.errors import MeasurementError, SpecError
from gate.metrics.interface import MetricKind, MetricValue


@dataclass(frozen=True)
class Statistics:
    hits: np.ndarray

    @property
    def samples(self):
        return len(self.hits)

    def values(self, weights=None):
        weights = np.ones(len(self.hits)) if weights is None else weights
        return {"found_count": float(weights @ self.hits / weights.sum())}

    def to_arrays(self):
        return {"hits": self.hits}


class Metric:
    def __init__(self, least):
        self.least = least
        self.hits = []

    def add(self, predictions, *, reference, targets, first_sample):
        if first_sample != len(self.hits):
            raise MeasurementError("a batch is missing")
        for scores, target in zip(predictions["scores"], targets, strict=True):
            found = int((scores > self.least).sum())
            self.hits.append(float(abs(found - len(target.annotations)) <= 1))

    def statistics(self):
        return Statistics(np.array(self.hits))


def make(options, categories):
    if set(options) - {"least"}:
        raise SpecError(f"no option {sorted(options)[0]!r}")
    return Metric(options.get("least", 0.25))


KIND = MetricKind(
    name="counting",
    values={"found_count": MetricValue(what="Images in which about as much is found as there is.")},
    make=make,
    read=lambda arrays: Statistics(arrays["hits"]),
    options=("least",),
    default_drop={"fp32": 0.05},
)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detection")


@pytest.fixture
def project(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    return new_project(folder, capture=capsys, patch=monkeypatch, shared=shared)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution that brings a metric of its own."""
    site = tmp_path / "site"
    folder = site / "counting-0.3.dist-info"
    folder.mkdir(parents=True)
    (site / "counting_metric.py").write_text(OWN_METRIC)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 0.3\n")
    (folder / "entry_points.txt").write_text("[trt_gate.metrics]\ncounting = counting_metric:KIND\n")
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("counting_metric", None)


def counting(project: Project, limit: str = "") -> None:
    project.edit(('kind = "detection"', 'kind = "counting"'), ("mean_ap_drop_at_most = 0.01", limit))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("limit", "check"),
    [("", "task.found_count_drop"), ("found_count_at_least = 0.5", "task.found_count")],
)
def test_a_metric_of_another_package_takes_part_in_the_verdict(project: Project, limit: str, check: str) -> None:
    counting(project, limit)
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    engine = outcome.report["engines"][0]
    assert check in [each["check"] for each in engine["verdict"]["findings"]]
    assert check in engine["verdict"]["required"]
    assert engine["scores"]["kind"] == "counting"
    assert engine["scores"]["values"]["found_count"] > 0.5

    project.break_engine(changed("scores", lambda scores: scores * (np.arange(48) % 3 == 0)[:, None, None]))
    broken = project.check()
    assert broken.code == 1, broken.text
    assert broken.failing[check]["status"] == "FAILED"


@pytest.mark.usefixtures("installed")
def test_a_metric_of_another_package_is_given_its_options(project: Project) -> None:
    counting(project)
    project.edit(("resamples = 200", "resamples = 200\noptions = { least = 0.99 }"))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "so no engine could fail, and none can pass" in outcome.text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("resamples = 200", "resamples = 200\noptions = { most = 1 }"), "no option 'most'"),
        (
            ("  [engine.task]\n  ", "  [engine.task]\n  found_cont_at_least = 0.5\n"),
            "did you mean 'found_count_at_least'?",
        ),
    ],
)
def test_what_a_metric_of_another_package_does_not_have_is_refused(
    project: Project, edit: tuple[str, str], words: str
) -> None:
    counting(project)
    project.edit(edit)
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert words in outcome.text


def test_a_kind_of_a_package_that_is_not_installed_is_refused(project: Project) -> None:
    counting(project)
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert "there is no kind of task 'counting'" in outcome.text


def test_a_task_that_takes_detections_needs_postprocess(project: Project) -> None:
    text = project.spec.read_text()
    start, end = text.index("[postprocess]"), text.index("[task]")
    project.spec.write_text(text[:start] + text[end:])
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert "detection needs [postprocess], which says how the outputs become detections" in outcome.text


def test_a_task_needs_ground_truth(project: Project) -> None:
    (project.folder / "data.py").write_text(
        "import numpy as np\n\n\ndef evaluation():\n"
        "    grey = (5 * np.arange(48, dtype=np.float32) + 2) / 255\n"
        "    return {'images': np.tile(grey[:, None, None, None], (1, 3, 64, 64))}\n"
    )
    text = project.spec.read_text()
    for first, last in (("[data.images]", "[preprocess]"), ("[preprocess]", "[postprocess]")):
        text = text[: text.index(first)] + text[text.index(last) :]
    project.spec.write_text(text.replace("samples = 48", 'source = "data:evaluation"\nsamples = 48'))
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert "[task] kind = 'detection' needs ground truth, and the samples have none" in outcome.text


def test_an_engine_that_is_better_than_its_reference_is_noted(project: Project) -> None:
    break_reference(project, changed("scores", lambda scores: scores * np.array([1, 0, 1, 1])))
    outcome = project.check()
    assert outcome.report is not None
    notes = " ".join(outcome.report["engines"][0]["notes"])
    assert "implausible: mean_ap is" in notes
    assert "an engine is not that much better than the model that it was made of" in notes


def test_a_poor_reference_that_no_other_reading_explains_is_still_compared(project: Project) -> None:
    """Objects that a model does not find are no sign of a wrong convention."""
    break_both(project, changed("scores", lambda scores: scores * (np.arange(48) % 6 == 0)[:, None, None]))
    project.edit(("mean_ap_drop_at_most = 0.01", "mean_ap_drop_at_most = 0.01\n  mean_ap_at_least = 0.01"))
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    assert outcome.report["engines"][0]["scores"]["reference"]["mean_ap"] < 0.25


def test_images_without_an_object_are_samples_too(project: Project) -> None:
    def emptied(content: dict) -> None:
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] % 4]

    edit_annotations(project, emptied)
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    assert outcome.report["engines"][0]["scores"]["samples"] == 48


def test_what_nms_adds_is_taken_out_of_the_outputs() -> None:
    given = {name: np.zeros(1) for name in ("boxes", *NMS_OUTPUTS)}
    inside = nms_outputs(given)
    assert list(given) == ["boxes"]
    assert tuple(inside) == NMS_OUTPUTS


@pytest.mark.parametrize("missing", NMS_OUTPUTS)
def test_an_engine_without_what_nms_adds_is_an_error(missing: str) -> None:
    given = {name: np.zeros(1) for name in NMS_OUTPUTS if name != missing}
    with pytest.raises(RunError, match=f"the engine has no output '{missing}', which nms puts into its graph"):
        nms_outputs(given)


def accept(project: Project, *, value: str) -> None:
    """Store what the engine scores as its baseline, and ask for it from now on."""
    project.edit(("\n  [engine.task]", "\n  [engine.baseline]\n  task_drop_at_most = 0.02\n  [engine.task]"))
    assert project.check().code != 0, "without a baseline"
    done = project.gate(
        "baseline",
        "accept",
        str(project.folder / "report"),
        "--reason",
        "first",
        "--by",
        "a tester",
        "--baselines",
        str(project.folder / "baselines"),
    )
    assert done.code == 0, done.text
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    checks = [each["check"] for each in outcome.report["engines"][0]["verdict"]["findings"]]
    assert f"baseline.{value}_drop" in checks


def fewer_found(project: Project) -> None:
    """Both models find nothing in a third of the images, so that they agree and only the baseline knows better."""
    break_both(project, changed("scores", lambda scores: scores * (np.arange(48) % 3 > 0)[:, None, None]))


@pytest.mark.usefixtures("installed")
def test_a_metric_of_another_package_is_held_against_its_baseline(project: Project) -> None:
    counting(project)
    accept(project, value="found_count")
    fewer_found(project)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "task.found_count_drop" not in outcome.failing
    assert outcome.failing["baseline.found_count_drop"]["status"] == "FAILED"


def test_a_detector_is_held_against_its_baseline_image_by_image(project: Project) -> None:
    accept(project, value="mean_ap")
    fewer_found(project)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "task.mean_ap_drop" not in outcome.failing
    assert outcome.failing["baseline.mean_ap_drop"]["status"] == "FAILED"


def test_a_category_that_the_reference_never_finds_is_warned_of_even_where_it_passes(project: Project) -> None:
    project.edit(("category_ids = [1, 2, 3, 4]", "category_ids = [2, 1, 3, 4]"))
    outcome = project.check()
    assert outcome.report is not None
    (warning,) = outcome.report["engines"][0]["warnings"]
    assert "the reference itself finds next to nothing of" in warning
    assert "are the categories in the model's order?" in warning
    assert "WARNING" in outcome.text


def test_no_warning_where_every_category_is_found(project: Project) -> None:
    outcome = project.check()
    assert outcome.report is not None
    assert outcome.report["engines"][0]["warnings"] == []
