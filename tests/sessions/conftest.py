"""A small project: an ONNX graph on ONNX Runtime, and models in PyTorch that run, die, hang and exit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.latency.config import Cell
from gate.sessions.job import CellJob, Job, Subject
from gate.sessions.run import write_feeds
from gate.spec import EngineSpec, read_spec

MODEL = """
import os, signal, sys, time
import torch


class Faulty(torch.nn.Module):
    def __init__(self, fault, after):
        super().__init__()
        self.fault, self.after, self.calls = fault, after, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.after:
            self.fault()
        return x + 1.0


def hang():
    if "TEST_PID_FILE" in os.environ:
        with open(os.environ["TEST_PID_FILE"] + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(os.environ["TEST_PID_FILE"] + ".part", os.environ["TEST_PID_FILE"])
    time.sleep(60)


def fail():
    raise ValueError("no such luck")


def sound():
    return Faulty(lambda: None, 0).eval()


def killed():
    return Faulty(lambda: os.kill(os.getpid(), signal.SIGKILL), 12).eval()


def crashing():
    print("the driver said something", file=sys.stderr, flush=True)
    return Faulty(lambda: os.kill(os.getpid(), signal.SIGSEGV), 12).eval()


def ending():
    return Faulty(lambda: os._exit(3), 12).eval()


def ending_well():
    return Faulty(lambda: os._exit(0), 12).eval()


def hanging():
    return Faulty(hang, 12).eval()


def exiting():
    return Faulty(lambda: sys.exit(5), 12).eval()


def failing():
    return Faulty(fail, 12).eval()


def exiting_when_made():
    sys.exit(6)


def littering(fault=lambda: None):
    import atexit, shutil, tempfile

    folder = tempfile.mkdtemp(prefix="litter-")
    open(os.path.join(folder, "engine"), "w").close()
    atexit.register(shutil.rmtree, folder)
    return Faulty(fault, 12).eval()


def littering_hang():
    return littering(hang)


def crashing_when_closed():
    from gate.engines.torch.engine import TorchEngineRunner

    TorchEngineRunner.close = lambda self: os.kill(os.getpid(), signal.SIGSEGV)
    return sound()
"""

SPEC = """schema = 1

[model]
id = "m"
{model}

[inputs.x]
dtype = "float32"
shape = ["n", 3]
n = {{ min = 1, opt = 2, max = 8 }}

[data]
source = "data:samples"
samples = 1

[[engine]]
name = "ort"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
  [engine.options]
  threads = 1
"""


class Project:
    """Makes jobs of the engines in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "faulty.py").write_text(MODEL)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
            [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
        )
        self.engine_file = folder / "model.onnx"
        onnx.save_model(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), self.engine_file
        )

    def spec(self, model: str = 'onnx = "model.onnx"') -> Path:
        path = self.folder / f"gate-{hashlib.sha256(model.encode()).hexdigest()[:8]}.toml"
        path.write_text(SPEC.format(model=model))
        return path

    def spec_of_stored_outputs(self) -> Path:
        path = self.spec('outputs = "stored.npz"')
        path.write_text(path.read_text().replace('name = "ort"', 'name = "ort"\nonnx = "model.onnx"'))
        return path

    @property
    def engine(self) -> EngineSpec:
        return read_spec(self.spec()).spec.engines[0]

    def ort(self, name: str = "ort", **changes: object) -> Subject:
        sha256 = hashlib.sha256(self.engine_file.read_bytes()).hexdigest()
        given = {"engine": self.engine, "file": self.engine_file, "sha256": sha256, **changes}
        return Subject(name=name, spec=self.spec(), **given)

    def torch(self, function: str = "sound") -> Subject:
        return Subject(name=function, spec=self.spec(f'factory = "faulty:{function}"'))

    def torch_on_gpu(self) -> Subject:
        return Subject(name="gpu", spec=self.spec('factory = "faulty:sound"\ndevice = "cuda"'))

    def feeds(self, *, batch: int = 2, count: int = 3) -> Path:
        path = self.folder / f"feeds-{batch}-{count}.safetensors"
        write_feeds(path, [{"x": np.full((batch, 3), index, np.float32)} for index in range(count)])
        return path

    def cell(self, *, batch: int = 2, **changes: object) -> CellJob:
        given = {"feeds": self.feeds(batch=batch), "kept": 20, "subjects": (0,), **changes}
        return CellJob(cell=Cell(batch=batch), **given)

    def job(self, *subjects: Subject, **changes: object) -> Job:
        both = tuple(range(len(subjects)))
        given = {"cells": (self.cell(subjects=both),), "warm_up_s": 0.05, "warm_up_calls": 5, **changes}
        return Job(subjects=subjects, **given)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)
