"""Where the spec lets the PyTorch reference run."""

import pytest
import torch

from gate.cache import Cache
from gate.device import gpu
from gate.errors import BackendUnavailable
from gate.reference import ReferenceModel
from gate.spec import spec_from_text

SPEC = """schema = 1
[model]
id = "m"
factory = "model:load"
device = "{device}"
[inputs.x]
dtype = "float32"
shape = ["batch", 4]
batch = {{ min = 1, opt = 4, max = 8 }}
[data]
source = "x.npz"
samples = 10
[[engine]]
name = "a"
backend = "torch"
precision = "fp32"
  [engine.parity]
"""


def reference_on(folder, device):
    (folder / "model.py").write_text("import torch\n\ndef load():\n    return torch.nn.Linear(4, 3).eval()\n")
    file = spec_from_text(SPEC.format(device=device), path=folder / "gate.toml")
    return ReferenceModel(file, Cache(None, on_rebuild=lambda _: None))


def test_a_recording_made_on_another_device_is_not_taken_for_this_one(tmp_path):
    on_cpu = reference_on(tmp_path, "cpu").identity().title
    on_gpu = reference_on(tmp_path, "cuda").identity().title
    found = gpu()
    assert on_cpu == f"torch {torch.__version__} fp32"
    assert on_gpu == f"{on_cpu} on {'cuda' if found is None else found.name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_reference_that_is_to_run_on_a_gpu_is_unavailable_without_one(tmp_path):
    with pytest.raises(BackendUnavailable, match="finds no GPU here"):
        reference_on(tmp_path, "cuda").runner()
