import subprocess
import sys

import numpy as np
import pytest

from gate.data.image_spec import Preprocess
from gate.data.preprocess import preprocessed
from gate.metrics.detection import BoxComparison, DetectionMetric
from gate.metrics.segmentation import SegmentationMetric
from gate.report.markdown import markdown
from gate.report.pictures import Drawn, Pictures, pixels_from_input
from gate.results import TaskValues
from gate.steps.answers import Answers, ComparedImage
from gate.targets import Categories, Detections, ImageRecord, ImageTarget
from gate.verdict import Status
from tests.report import conftest as runs

pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")
Image = pytest.importorskip("PIL.Image")

NAMES = Categories({1: "one", 2: "two"})
TRUE = (5.0, 5.0, 30.0, 40.0)


def found(*boxes, score=0.9, label=1):
    return Detections(
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        scores=np.full(len(boxes), score),
        labels=np.full(len(boxes), label, np.int64),
    )


def target(image_id, name):
    annotation = {"id": image_id, "category_id": 1, "bbox": [5, 5, 25, 35], "area": 875, "iscrowd": 0}
    return ImageTarget(ImageRecord(image_id, 80, 60, file_name=name), (annotation,))


def answers(folder, candidate, *, engine="ort-int8", reference=(TRUE,), kept=None):
    """Of two images of which the first is a file that the engine answers by `candidate`, the second alike."""
    targets = [target(1, "a.png"), target(2, "b.png")]
    Image.new("RGB", (80, 60), (90, 120, 90)).save(folder / "a.png")
    theirs, ours = [found(*reference), found(TRUE)], [candidate, found(TRUE)]
    statistics = []
    for each in (ours, theirs):
        metric = DetectionMetric(NAMES)
        metric.add(each, reference=theirs, targets=targets, first_sample=0)
        statistics.append(metric.statistics())
    boxes = BoxComparison()
    boxes.add(theirs, ours, [each.image for each in targets])
    agreement = boxes.result()
    path = str(folder / "a.png")
    images = tuple(ComparedImage(worst, targets[0], path, None) for worst in agreement.worst)
    return Answers(engine, *statistics, agreement, images if kept is None else kept, NAMES, None)


def result_of(given, status=Status.PASSED, **more):
    values, reference = given.candidate.values(), given.reference.values()
    scores = TaskValues(kind="detection", samples=2, values=values, reference=reference)
    wrong = {Status.PASSED: runs.PASSES, Status.FAILED: runs.finding()}[status]
    return runs.engine(given.engine, wrong, task=None, scores=scores, **more)


def written(folder, given, status=Status.PASSED):
    pictures = Pictures()
    pictures.take(given)
    run = runs.run_of(result_of(given, status))
    return run, pictures.write(run, folder / "report")


def test_an_engine_that_loses_a_box_gets_the_image_and_the_curve(tmp_path):
    run, drawn = written(tmp_path, answers(tmp_path, found((40, 10, 70, 50))))
    assert [each.path for each in drawn.pictures] == [
        "pictures/boxes-ort-int8-1.png",
        "pictures/precision-recall-ort-int8.png",
    ]
    assert drawn.remarks == ()
    for each in drawn.pictures:
        with Image.open(tmp_path / "report" / each.path) as image:
            assert image.format == "PNG"
    text = markdown(run, drawn)
    assert "![boxes-ort-int8-1](pictures/boxes-ort-int8-1.png)" in text
    assert "a.png: 1 of the reference's boxes not found" in text
    assert "pictures/" not in markdown(run)


def test_an_engine_that_passed_with_the_references_answers_gets_none(tmp_path):
    _, drawn = written(tmp_path, answers(tmp_path, found(TRUE)))
    assert drawn == Drawn()
    assert not (tmp_path / "report").exists()


def test_a_difference_that_cannot_be_seen_is_not_drawn(tmp_path):
    moved = found((5.0, 5.0, 30.001, 40.0), score=0.9001)
    given = answers(tmp_path, moved)
    assert given.images
    _, drawn = written(tmp_path, given, Status.FAILED)
    assert [each.path for each in drawn.pictures] == ["pictures/precision-recall-ort-int8.png"]


def test_scores_that_are_seen_to_differ_are_drawn(tmp_path):
    _, drawn = written(tmp_path, answers(tmp_path, found(TRUE, score=0.5)), Status.FAILED)
    assert drawn.pictures[0].path == "pictures/boxes-ort-int8-1.png"


def test_of_several_builds_the_first_is_drawn(tmp_path):
    pictures = Pictures()
    pictures.take(answers(tmp_path, found(TRUE)))
    lost = answers(tmp_path, found((40, 10, 70, 50)))
    pictures.take(lost)
    drawn = pictures.write(runs.run_of(result_of(lost, Status.FAILED)), tmp_path / "report")
    assert [each.path for each in drawn.pictures] == ["pictures/precision-recall-ort-int8.png"]


def test_pictures_of_an_earlier_run_are_removed_and_other_files_are_not(tmp_path):
    folder = tmp_path / "report" / "pictures"
    folder.mkdir(parents=True)
    for name in ("boxes-old-1.png", "precision-recall-old.png", "confusion-old.png", "reference-confusion.png"):
        (folder / name).write_bytes(b"old")
    (folder / "mine.png").write_bytes(b"mine")
    written(tmp_path, answers(tmp_path, found(TRUE)))
    assert [each.name for each in folder.iterdir()] == ["mine.png"]


def test_an_image_that_is_gone_is_a_remark_and_the_others_are_drawn(tmp_path):
    given = answers(tmp_path, found((40, 10, 70, 50)))
    (tmp_path / "a.png").unlink()
    run, drawn = written(tmp_path, given)
    assert [each.path for each in drawn.pictures] == ["pictures/precision-recall-ort-int8.png"]
    assert drawn.remarks[0].startswith("no picture boxes-ort-int8-1.png: the image cannot be read again")
    assert "no picture boxes-ort-int8-1.png" in markdown(run, drawn)


def test_a_folder_that_cannot_be_written_is_a_remark(tmp_path):
    (tmp_path / "report").write_text("a file")
    _, drawn = written(tmp_path, answers(tmp_path, found((40, 10, 70, 50))))
    assert drawn.pictures == ()
    assert len(drawn.remarks) == 2


def test_an_image_that_came_from_no_file_is_drawn_from_the_models_input(tmp_path):
    given = answers(tmp_path, found((40, 10, 70, 50)))
    values = np.full((3, 60, 80), 0.5, np.float32)
    kept = tuple(ComparedImage(each.worst, each.target, None, values) for each in given.images)
    _, drawn = written(tmp_path, answers(tmp_path, found((40, 10, 70, 50)), kept=kept))
    assert drawn.remarks == ()
    assert len(drawn.pictures) == 2


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_preprocessing_is_undone(layout, channels):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = (200, 100, 50)
    config = Preprocess(
        size=(80, 80),
        layout=layout,
        channels=channels,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.1),
        interpolation="nearest",
    )
    values, record = preprocessed(image, config, image_id=1)
    back = pixels_from_input(values, record, config)
    assert back.shape == image.shape
    inside = np.r_[0:28, 32:60]
    assert np.abs(back[:, inside].astype(int) - image[:, inside]).max() <= 1


def test_what_was_cropped_away_is_grey():
    image = np.full((40, 80, 3), 200, np.uint8)
    config = Preprocess(resize="center_crop", size=(40, 40))
    values, record = preprocessed(image, config, image_id=1)
    back = pixels_from_input(values, record, config)
    assert back.shape == image.shape
    assert (back[:, :20] == 128).all()
    assert (back[:, 20:60] == 200).all()


@pytest.mark.parametrize(
    ("values", "expected"), [((0.0, 1.0), (0, 255)), ((0, 200), (0, 200)), ((-2.0, 2.0), (0, 255))]
)
def test_without_a_word_on_preprocessing_the_range_tells(values, expected):
    plane = np.zeros((1, 4, 4), np.float32) + values[0]
    plane[:, 2:] = values[1]
    back = pixels_from_input(plane, ImageRecord(1, 4, 4), None)
    assert (int(back.min()), int(back.max())) == expected


def test_the_confusion_of_classes_is_drawn_for_engine_and_reference(tmp_path):
    statistics = []
    for answer in (1, 0):
        metric = SegmentationMetric(output=None, ignore_label=None, names=("sky", "sea"), classes=2)
        metric.add(
            {"map": np.full((1, 4, 4), answer)}, reference=None, targets=[np.eye(4, dtype=np.int64)], first_sample=0
        )
        statistics.append(metric.statistics())
    given = Answers("ort-int8", *statistics, None, (), None, None)
    pictures = Pictures()
    pictures.take(given)
    drawn = pictures.write(runs.run_of(result_of(given)), tmp_path)
    assert [each.path for each in drawn.pictures] == [
        "pictures/confusion-ort-int8.png",
        "pictures/reference-confusion.png",
    ]
    assert (tmp_path / "pictures" / "reference-confusion.png").stat().st_size > 1000


def test_without_matplotlib_the_report_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run, drawn = written(tmp_path, answers(tmp_path, found((40, 10, 70, 50))))
    assert drawn.pictures == ()
    assert len(drawn.remarks) == 1
    assert drawn.remarks[0].startswith("no pictures: pictures need matplotlib, which cannot be imported")
    assert markdown(run, drawn).count("no pictures") == 1


def test_a_check_reads_no_drawing_library_before_it_draws():
    code = "import sys, gate.report.pictures; print([each for each in ('matplotlib', 'PIL', 'torch') if each in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
