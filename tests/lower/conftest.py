"""A network wide enough for every tool, and what runs and compiles its graphs."""

import msgspec
import numpy as np
import pytest

from gate.engines import backend
from gate.export import onnx_from_torch
from gate.spec import EngineSpec, GateSpec

IMAGES = np.random.default_rng(1).standard_normal((48, 1, 8, 8)).astype(np.float32)
SPEC = msgspec.convert(
    {
        "schema": 1,
        "model": {"id": "m", "factory": "model:load", "exporter": ["torchscript"], "opset": 17},
        "inputs": {
            "image": {
                "dtype": "float32",
                "shape": ["batch", 1, 8, 8],
                "axes": {"batch": {"min": 1, "opt": 4, "max": 48}},
            }
        },
        "data": {"source": "a:b", "samples": 1},
        "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}}],
    },
    GateSpec,
)


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Three convolutions and a linear layer, each but the first with at least 32 channels, as FP32 ONNX."""
    import torch
    from torch import nn

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(1, 32, 3, padding=1)
            self.two = nn.Conv2d(32, 32, 3, padding=1)
            self.three = nn.Conv2d(32, 32, 3)
            self.head = nn.Linear(32, 16)

        def forward(self, image):
            x = nn.functional.silu(self.one(image))
            x = torch.relu(self.two(x)) + x
            return {"logits": self.head(torch.relu(self.three(x)).mean((2, 3)))}

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("wide") / "model.onnx"
    onnx_from_torch(Wide().eval(), spec=SPEC, out=out, feeds=[{"image": IMAGES[:4]}])
    return out


@pytest.fixture(scope="session")
def images():
    """48 samples."""
    return IMAGES


@pytest.fixture(scope="session")
def batches():
    """The samples in batches, the last one shorter."""
    return tuple({"image": IMAGES[start : start + 20]} for start in (0, 20, 40))


def engine(name, precision):
    return msgspec.convert({"name": "e", "backend": name, "precision": precision, "parity": {}}, EngineSpec)


@pytest.fixture(scope="session")
def run():
    """Runs a graph on ONNX Runtime's CPU provider."""

    def outputs(path, precision):
        with backend("onnxruntime").open(path, spec=SPEC, engine=engine("onnxruntime", precision)) as runner:
            return runner.run({"image": IMAGES})["logits"]

    return outputs


@pytest.fixture(scope="session")
def compile_by_rtx():
    """Compiles a graph with TensorRT-RTX; its build record."""

    def build(path, out, precision):
        return backend("tensorrt_rtx").build(onnx=path, out=out, spec=SPEC, engine=engine("tensorrt_rtx", precision))

    return build
