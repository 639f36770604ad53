"""A small real project: the digits model with two outputs, its data, and an engine file that each test may break."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from gate.cli.main import main

DIGITS = Path(__file__).parents[2] / "examples" / "digits"

TWO_OUTPUTS = """
import torch
from model import load as load_digits


class TwoOutputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = load_digits()

    def forward(self, images):
        net = self.net
        features = net.pool(net.body(net.down(net.stem(images)))).flatten(1)
        return {"logits": net.head(features), "features": features}


def load():
    return TwoOutputs().eval()
"""

SPEC = """schema = 1

[model]
id = "digits-two"
factory = "two:load"
weights = "weights.safetensors"
output_names = ["logits", "features"]

[inputs.input]
dtype = "float32"
shape = ["batch", 1, 8, 8]
batch = { min = 1, opt = 8, max = 64 }

[data]
source = "data:evaluation"
samples = 797
calibration = "data:calibration"
calibration_samples = 100

[task]
kind = "classification"
output = "logits"

[[engine]]
name = "candidate"
backend = "onnxruntime"
precision = "fp32"
onnx = "engine.onnx"
  [engine.parity]
  [engine.task]
  top1_drop_at_most_pp = 0.5
"""


@dataclass(frozen=True)
class Outcome:
    """What the command gave."""

    code: int
    text: str
    report: dict[str, Any] | None

    @property
    def failing(self) -> dict[str, dict[str, Any]]:
        """Findings that did not pass, by check, of all engines."""
        assert self.report is not None, self.text
        return {
            finding["check"]: finding
            for engine in self.report["engines"]
            for finding in (engine["verdict"] or {"findings": []})["findings"]
            if finding["status"] != "PASSED"
        }


@dataclass(frozen=True)
class Project:
    """A folder with a spec, and the commands on it."""

    folder: Path
    cache: Path
    capture: pytest.CaptureFixture[str]

    @property
    def spec(self) -> Path:
        """The spec's file."""
        return self.folder / "gate.toml"

    def edit(self, *changes: tuple[str, str]) -> None:
        """Replace text in the spec; each must be there."""
        text = self.spec.read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        self.spec.write_text(text)

    def edit_data(self, old: str, new: str) -> None:
        """Replace text in data.py."""
        path = self.folder / "data.py"
        text = path.read_text()
        assert old in text, old
        path.write_text(text.replace(old, new))

    def break_engine(self, surgery: Callable[[onnx.ModelProto], None]) -> None:
        """Change the engine's graph."""
        path = self.folder / "engine.onnx"
        model = onnx.load(path)
        surgery(model)
        onnx.checker.check_model(model)
        onnx.save(model, path)

    def gate(self, *arguments: str) -> Outcome:
        """Run the command."""
        self.capture.readouterr()
        code = main(list(arguments))
        captured = self.capture.readouterr()
        return Outcome(code, captured.out + captured.err, None)

    def check(self, *arguments: str) -> Outcome:
        """`gate check` on the spec, and its report if it wrote one."""
        reports = self.folder / "report"
        shutil.rmtree(reports, ignore_errors=True)
        outcome = self.gate(
            "check",
            str(self.spec),
            "--cache",
            str(self.cache),
            "--baselines",
            str(self.folder / "baselines"),
            "--report",
            str(reports),
            *arguments,
        )
        path = reports / "report.json"
        return Outcome(outcome.code, outcome.text, json.loads(path.read_bytes()) if path.is_file() else None)


@pytest.fixture(scope="session")
def good_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-output model as FP32 ONNX, exported once."""
    import torch

    from gate.factory import load_callable

    folder = tmp_path_factory.mktemp("good")
    _copy_project(folder)
    model = load_callable("two:load", folder, where="the fixture")()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            str(folder / "engine.onnx"),
            input_names=["input"],
            output_names=["logits", "features"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}, "features": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    return folder / "engine.onnx"


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that the reference is recorded once."""
    return tmp_path_factory.mktemp("cache")


def _copy_project(folder: Path) -> None:
    for name in ("model.py", "data.py", "weights.safetensors"):
        shutil.copyfile(DIGITS / name, folder / name)
    (folder / "two.py").write_text(TWO_OUTPUTS)
    (folder / "gate.toml").write_text(SPEC)


@pytest.fixture
def project(
    tmp_path: Path,
    good_engine: Path,
    shared_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """The project with an engine that passes."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    _copy_project(tmp_path)
    shutil.copyfile(good_engine, tmp_path / "engine.onnx")
    return Project(tmp_path, shared_cache, capsys)
