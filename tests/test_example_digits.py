import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gate.data.samples import digest_of, open_source, require_disjoint
from gate.spec import read_spec

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture(scope="module")
def spec():
    return read_spec(EXAMPLE / "gate.toml")


def test_spec_has_the_four_engines_each_with_a_budget(spec):
    assert [(each.name, each.required_evidence) for each in spec.spec.engines] == [
        ("ort-fp32", "host"),
        ("ort-fp16", "host"),
        ("ort-int8", "host"),
        ("rtx-fp16", "preflight"),
    ]
    assert all(each.memory is not None for each in spec.spec.engines)


def test_calibration_is_disjoint_from_evaluation(spec):
    data = spec.spec.data
    evaluation = open_source(spec, data.source, needed=data.samples, key="source")
    calibration = open_source(spec, data.calibration, needed=data.calibration_samples, key="calibration")
    assert (len(evaluation), len(calibration)) == (797, 200)
    digests = [
        digest_of(source, inputs=spec.spec.inputs, batch=64, where="gate.toml") for source in (evaluation, calibration)
    ]
    require_disjoint(*digests)


def test_data_is_read_without_importing_scikit_learn():
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE)!r}); import data; data.evaluation(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "torch"} & {name.split(".")[0] for name in done.stdout.split()}


def test_data_is_what_scikit_learn_loads():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    spec = read_spec(EXAMPLE / "gate.toml")
    source = open_source(spec, "data:evaluation", needed=797, key="source")
    known = {(image.tobytes(), label) for image, label in zip(np.float32(digits.data), digits.target, strict=True)}
    for batch in source.batches(100):
        images = batch.inputs["input"].reshape(-1, 64) * np.float32(16)
        for image, label in zip(images, batch.labels, strict=True):
            assert (image.tobytes(), label) in known


def test_committed_weights_reach_the_committed_metric():
    torch = pytest.importorskip("torch")
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "import data, model, torch\n"
        "digits = data.evaluation()\n"
        "with torch.inference_mode():\n"
        "    answers = model.load()(torch.from_numpy(digits.inputs['input'])).argmax(1).numpy()\n"
        "print((answers == digits.labels).sum())\n"
    )
    assert torch.__version__
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stated = json.loads((EXAMPLE / "metrics.json").read_text(encoding="utf-8"))
    assert int(done.stdout) == round(stated["top1"] * 797)
    assert stated["top1"] >= 0.98


def test_weights_are_small_enough_to_commit():
    assert (EXAMPLE / "weights.safetensors").stat().st_size < 300_000
