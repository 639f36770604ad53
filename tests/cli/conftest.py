"""A real project that checks in a second: a linear layer, 32 samples, one engine on ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from gate.cli.main import main

MODEL = """
import torch


def load():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3).eval()


def trained():
    return torch.nn.Linear(4, 3).train()


class Pair(torch.nn.Module):
    def forward(self, left, right):
        return {"total": left + right, "difference": left - right}


def pair():
    return Pair().eval()
"""

DATA = """
import numpy as np


def evaluation():
    return {"input": np.random.default_rng(0).standard_normal((32, 4), dtype=np.float32)}
"""

SPEC = """schema = 1

[model]
id = "tiny"
factory = "model:load"
exporter = ["torchscript"]

[inputs.input]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 4, max = 16 }

[data]
source = "data:evaluation"
samples = 32

[[engine]]
name = "ort"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
"""

FAILING = SPEC.replace("[engine.parity]", "[engine.parity]\n  sqnr_db_at_least = 900.0")
INCONCLUSIVE = SPEC + "  [engine.latency]\n  max_time_s = 0.01\n  samples = 20\n  warm_up_s = 0.0\n  p99_ms = 1000.0\n"
BROKEN = SPEC.replace('precision = "fp32"', 'precision = "fp32"\nonnx = "missing.onnx"')
WITH_ABSENT = (
    SPEC
    + """
[[engine]]
name = "trt"
backend = "tensorrt"
precision = "fp16"
optional = true
  [engine.parity]
"""
)


def write(folder: Path, spec: str = SPEC) -> Path:
    """Write the project; returns the spec's path."""
    (folder / "model.py").write_text(MODEL)
    (folder / "data.py").write_text(DATA)
    path = folder / "gate.toml"
    path.write_text(spec)
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder, with the project in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    write(tmp_path)
    return tmp_path


@pytest.fixture
def gate_command(project, capsys):
    """Runs the command in the working folder."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
