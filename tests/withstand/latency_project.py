"""A small project on ONNX Runtime alone: a chain of matrix products, and copies of it that do more of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.withstand.conftest import Outcome, Project

WIDTH, LAYERS = 64, 3
HOOK = Path(__file__).parent / "session_faults.py"
BUNDLE = Path("sealed", "chain", "candidate")

SPEC = """schema = 1

[model]
id = "chain"
onnx = "reference.onnx"

[inputs.x]
dtype = "float32"
shape = ["batch", 64]
batch = { min = 1, opt = 8, max = 512 }

[data]
source = "samples:evaluation"
samples = 16

[[engine]]
name = "candidate"
backend = "onnxruntime"
precision = "fp32"
onnx = "engine.onnx"
  [engine.parity]
  [engine.options]
  threads = 1
"""

RIVAL = """
[[engine]]
name = "rival"
backend = "onnxruntime"
precision = "fp32"
onnx = "rival.onnx"
  [engine.parity]
  [engine.options]
  threads = 1
"""

SAMPLES = """
import numpy as np


def evaluation():
    return {"x": np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)}
"""


def chain(path: Path, *, extra: int = 0) -> None:
    """Write the graph; so many more products of the same input, made negligible, are added to its output."""
    random = np.random.default_rng(1)
    values: dict[str, np.ndarray] = {}
    nodes = []
    for index in range(LAYERS):
        values[f"w{index}"] = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / np.float32(WIDTH**0.5)
        into = f"h{index}" if extra or index < LAYERS - 1 else "y"
        nodes.append(helper.make_node("MatMul", ["x" if index == 0 else f"h{index - 1}", f"w{index}"], [into]))
    if extra:
        wide = 16 * WIDTH
        values["tiny"] = np.asarray(1e-30, np.float32)
        values["first"] = random.standard_normal((WIDTH, wide)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["x", "first"], ["more0"]))
        for index in range(extra):
            values[f"more_w{index}"] = random.standard_normal((wide, wide)).astype(np.float32) / np.float32(wide)
            nodes.append(helper.make_node("MatMul", [f"more{index}", f"more_w{index}"], [f"more{index + 1}"]))
        nodes += [
            helper.make_node("ReduceMean", [f"more{extra}"], ["mean"], axes=[1], keepdims=1),
            helper.make_node("Mul", ["mean", "tiny"], ["small"]),
            helper.make_node("Add", [f"h{LAYERS - 1}", "small"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class LatencyProject(Project):
    """The project, with tables of the engine and a fault in some processes."""

    def write(self, tables: str, *, rival: bool = False, extra: int = 0) -> None:
        """The spec with the engine's tables; how many products more its graph has; whether there is another engine."""
        self.spec.write_text(SPEC + tables + (RIVAL if rival else ""))
        (self.folder / "samples.py").write_text(SAMPLES)
        for name, more in (("reference", 0), ("rival", 0), ("engine", extra)):
            chain(self.folder / f"{name}.onnx", extra=more)

    def fault(self, monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
        """From now on processes have a fault; as FAULT and FAULT_IN of session_faults."""
        hook = self.folder / "hook"
        hook.mkdir()
        shutil.copyfile(HOOK, hook / "sitecustomize.py")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")])))
        for key, value in {"FAULT": name, "FAULT_IN": where, "FAULT_FOLDER": str(hook)}.items():
            monkeypatch.setenv(key, value)

    def sealing(self, *arguments: str) -> Outcome:
        """`gate check --seal` of the engine alone."""
        return self.check("--engine", "candidate", "--seal", str(self.folder / "sealed"), *arguments)

    def sealing_in_a_process(self) -> subprocess.CompletedProcess[str]:
        """The same in a process of its own, which can have a fault itself."""
        command = [sys.executable, "-m", "gate", "check", str(self.spec), "--engine", "candidate"]
        command += ["--seal", str(self.folder / "sealed"), "--report", str(self.folder / "report")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)

    @property
    def sealed(self) -> bool:
        """Whether there is a bundle."""
        return (self.folder / BUNDLE).exists()

    def sessions(self) -> int:
        """How many sessions began since there is a fault."""
        return len(list((self.folder / "hook").glob("session-*")))
