import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gate.factory import load_callable

EXAMPLE = Path(__file__).parents[1] / "examples" / "digit-segmentation"


def call(name, *arguments, **options):
    return load_callable(name, EXAMPLE, where="test")(*arguments, **options)


@pytest.fixture(scope="module")
def evaluation():
    return call("data:evaluation")


def test_samples_are_images_and_label_maps_of_their_size(evaluation):
    images = evaluation.inputs["images"]
    assert (images.shape, images.dtype) == ((256, 3, 96, 96), np.float32)
    assert 0 <= images.min() < images.max() <= 1
    assert len(evaluation.targets) == 256
    assert {(target.shape, target.dtype.name) for target in evaluation.targets} == {((96, 96), "int64")}


def test_every_class_is_there_and_only_what_is_outside_a_canvas_is_ignored(evaluation):
    labels, counts = np.unique(np.stack(evaluation.targets), return_counts=True)
    assert labels.tolist() == [*range(11), 255]
    assert counts.min() > 1000
    for image, target in zip(evaluation.inputs["images"], evaluation.targets, strict=True):
        outside = image[:, target == 255]
        assert (outside == np.float32(114) / np.float32(255)).all()


def test_calibration_has_no_image_of_the_evaluation(evaluation):
    known = {image.tobytes() for image in evaluation.inputs["images"]}
    calibration = call("data:calibration").inputs["images"]
    assert len(calibration) == 128
    assert not known & {image.tobytes() for image in calibration}


def test_the_canvases_are_those_of_the_detector_example_and_do_not_clash_with_it(evaluation):
    pytest.importorskip("PIL")
    detector = EXAMPLE.with_name("digit-detector")
    drawn = load_callable("canvases:canvas", detector, where="test")(
        "evaluation", 0, seed=2, sides=(72, 96), heights=(28, 56)
    )
    height, width = drawn.label_map.shape
    np.testing.assert_array_equal(evaluation.targets[0][:height, :width], drawn.label_map)
    assert len(call("data:labelled", "evaluation", 0, 2).targets) == 2


def test_committed_weights_reach_the_committed_metrics():
    pytest.importorskip("torch")
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "import json, model, train\n"
        "print(json.dumps(train.scores(model.load())))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stated = json.loads((EXAMPLE / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == pytest.approx(stated, abs=2e-3)
    assert 0.6 < stated["mean_iou"] < 0.97


def test_the_model_computes_in_float32():
    torch = pytest.importorskip("torch")
    model = call("model:load")
    assert not model.training
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits = model(torch.rand(2, 3, 96, 96))
    assert (logits.shape, logits.dtype) == ((2, 11, 96, 96), torch.float32)


def test_weights_are_small_enough_to_commit():
    assert (EXAMPLE / "weights.safetensors").stat().st_size < 200_000
