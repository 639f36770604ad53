"""The reference: recorded once, reused only while nothing that its answers depend on has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gate.cache import Cache
from gate.data.samples import ArraySource, DataDigest, Samples, digest_of
from gate.errors import DataError, RunError, SpecError
from gate.reference import (
    RECORDING,
    ModelIdentity,
    Recording,
    ReferenceModel,
    _recording_digest,
    onnx_digest,
    read_recording,
    record,
    write_recording,
)
from gate.spec import SpecFile, read_spec

SPEC = """schema = 1
[model]
id = "m"
factory = "model:load"
weights = "weights.npy"
[inputs.x]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 4, max = 8 }
[data]
source = "x.npz"
samples = 10
batch = 4
[[engine]]
name = "a"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
"""
MODEL = """
import numpy as np
import torch
from pathlib import Path
from layers import scale

def load():
    net = torch.nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.copy_(scale() * torch.from_numpy(np.load(Path(__file__).with_name("weights.npy"))))
        net.bias.zero_()
    return net.eval()
"""
VALUES = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> SpecFile:
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "gate.toml").write_text(SPEC)
    (folder / "model.py").write_text(MODEL)
    (folder / "layers.py").write_text("def scale():\n    return 1.0\n")
    np.save(folder / "weights.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    return read_spec(folder / "gate.toml")


def recorded(file: SpecFile, cache: Cache, values: np.ndarray = VALUES) -> Recording:
    source = ArraySource(Samples({"x": values}), len(values))
    digest = digest_of(source, inputs=file.spec.inputs, batch=4, where="")
    model = ReferenceModel(file, cache)
    return record(model, file=file, source=source, digest=digest, cache=cache, advance=lambda: None)


def test_the_recording_is_what_torch_computes(file: SpecFile, tmp_path: Path) -> None:
    recording = recorded(file, Cache(tmp_path / "cache"))
    outputs = np.concatenate([batch["output"] for batch in recording.batches()])
    expected = VALUES @ np.load(file.folder / "weights.npy").T
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    scale = recording.outputs["output"]
    assert scale.rms == pytest.approx(float(np.sqrt(np.mean(expected.astype(float) ** 2))), rel=1e-6)
    np.testing.assert_allclose(scale.center, expected.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert scale.batch_axis


def test_the_second_run_reuses_it(file: SpecFile, tmp_path: Path) -> None:
    first = recorded(file, Cache(tmp_path / "cache"))
    second = recorded(file, Cache(tmp_path / "cache"))
    assert (first.reused, second.reused) == (False, True)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("change", ["weights", "model", "layers", "inputs"])
def test_a_change_of_weights_code_imported_code_or_inputs_is_noticed(
    file: SpecFile, tmp_path: Path, change: str
) -> None:
    cache = Cache(tmp_path / "cache")
    first = recorded(file, cache)
    values = VALUES
    if change == "weights":
        np.save(file.folder / "weights.npy", np.ones((3, 4), np.float32))
    elif change == "model":
        path = file.folder / "model.py"
        path.write_text(path.read_text().replace("net.bias.zero_()", "net.bias.fill_(1)"))
    elif change == "layers":
        (file.folder / "layers.py").write_text("def scale():\n    return 2.0\n")
    else:
        values = VALUES + 1
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import numpy as np
from pathlib import Path
from gate.cache import Cache
from gate.spec import read_spec
from tests.test_reference import recorded, VALUES
again = recorded(read_spec(Path({str(file.path)!r})), Cache(Path({str(cache.root)!r})), VALUES + {float((values - VALUES)[0, 0]) > 0:d})
print(again.reused, again.sha256)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reused, sha256 = done.stdout.split()
    assert reused == "False"
    assert sha256 != first.sha256


def test_another_factory_of_the_same_module_is_another_model(file: SpecFile, tmp_path: Path) -> None:
    (file.folder / "model.py").write_text(
        MODEL
        + "\n\nclass Doubled(torch.nn.Linear):\n    def forward(self, x):\n        return 2 * super().forward(x)\n"
        "\ndef doubled():\n    net = load()\n    net.__class__ = Doubled\n    return net\n"
    )
    cache = Cache(tmp_path / "cache")
    first = recorded(file, cache)
    file.path.write_text(file.text.replace("model:load", "model:doubled"))
    second = recorded(read_spec(file.path), cache)
    assert not second.reused
    assert second.sha256 != first.sha256
    one, two = (np.concatenate([each["output"] for each in found.batches()]) for found in (first, second))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


class Installed:
    """A library in a folder of installed packages, whose class the project's model is, and runs in new processes."""

    def __init__(self, file: SpecFile, folder: Path) -> None:
        self.file = file
        self.cache = folder / "cache"
        self.site = folder / "site"
        (self.site / "netlib").mkdir(parents=True)
        (self.site / "netlib/__init__.py").touch()
        (self.site / "netlib-1.0.dist-info").mkdir()
        self.write(1.0)
        (file.folder / "model.py").write_text("from netlib.nets import make as load\n")

    def write(self, factor: float) -> None:
        (self.site / "netlib/nets.py").write_text(
            "import torch\n\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n"
            f"        return {factor} * super().forward(x)\n\ndef make():\n    torch.manual_seed(0)\n    return Net(4, 3).eval()\n"
        )

    def recorded(self) -> tuple[bool, str, str]:
        """Whether a check in a new process reuses the recording, the recording's key, and the model's identity."""
        script = f"""
import site, sys
before = site.getsitepackages()
site.getsitepackages = lambda: [*before, {str(self.site)!r}]
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(self.site)!r}]
from pathlib import Path
from gate.cache import Cache
from gate.reference import ReferenceModel
from gate.spec import read_spec
from tests.test_reference import recorded
file, cache = read_spec(Path({str(self.file.path)!r})), Cache(Path({str(self.cache)!r}))
found = recorded(file, cache)
print(found.reused, found.sha256, ReferenceModel(file, cache).identity().sha256)
"""
        done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=True)
        reused, key, identity = done.stdout.split()
        return reused == "True", key, identity


def test_a_change_of_an_installed_library_that_defines_the_model_is_noticed(file: SpecFile, tmp_path: Path) -> None:
    library = Installed(file, tmp_path)
    first = library.recorded()
    assert library.recorded() == (True, *first[1:])
    library.write(2.0)
    in_place = library.recorded()
    assert not in_place[0]
    (library.site / "netlib-1.0.dist-info").rename(library.site / "netlib-1.1.dist-info")
    upgraded = library.recorded()
    assert not upgraded[0]
    assert len({each[1] for each in (first, in_place, upgraded)}) == 3
    assert len({each[2] for each in (first, in_place, upgraded)}) == 3


def test_a_second_run_does_not_import_torch(file: SpecFile, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    recorded(file, cache)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from gate.cache import Cache
from gate.reference import ReferenceModel
from gate.spec import read_spec
ReferenceModel(read_spec(Path({str(file.path)!r})), Cache(Path({str(cache.root)!r}))).identity()
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_flipped_byte_in_the_recording_is_found_and_it_is_made_again(file: SpecFile, tmp_path: Path) -> None:
    cache_folder = tmp_path / "cache"
    first = recorded(file, Cache(cache_folder))
    path = first.folder / first.files[1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    notes: list[str] = []
    again = recorded(file, Cache(cache_folder, on_rebuild=notes.append))
    assert not again.reused
    assert "digest differs" in notes[0]


def test_a_nan_in_the_reference_is_an_error(file: SpecFile, tmp_path: Path) -> None:
    np.save(file.folder / "weights.npy", np.full((3, 4), np.nan, np.float32))
    with pytest.raises(RunError, match="the reference itself gives NaN or Inf in output 'output' in samples 0 to 3"):
        recorded(file, Cache(tmp_path / "cache"))


def test_a_missing_weight_file_is_named_with_its_line(file: SpecFile, tmp_path: Path) -> None:
    (file.folder / "weights.npy").unlink()
    with pytest.raises(SpecError, match=r"gate\.toml:5: \[model\] weights: there is no .*weights\.npy"):
        recorded(file, Cache(tmp_path / "cache"))


def stored(file: SpecFile, **arrays: np.ndarray) -> SpecFile:
    np.savez(file.folder / "outputs.npz", **arrays)
    text = file.text.replace('factory = "model:load"\nweights = "weights.npy"', 'outputs = "outputs.npz"')
    text = text.replace('precision = "fp32"', 'precision = "fp32"\nonnx = "x.onnx"')
    file.path.write_text(text)
    return read_spec(file.path)


def test_stored_outputs_are_a_reference(file: SpecFile, tmp_path: Path) -> None:
    scores = np.arange(30, dtype=np.float32).reshape(10, 3)
    recording = recorded(stored(file, scores=scores), Cache(tmp_path / "cache"))
    np.testing.assert_array_equal(np.concatenate([batch["scores"] for batch in recording.batches()]), scores)


def test_stored_outputs_of_another_number_of_samples_are_an_error(file: SpecFile, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"output 'scores' has shape \[9, 3\], there are 10 samples"):
        recorded(stored(file, scores=np.zeros((9, 3), np.float32)), Cache(tmp_path / "cache"))


def test_a_folder_that_is_no_recording_is_an_error(file: SpecFile, tmp_path: Path) -> None:
    digest = digest_of(ArraySource(Samples({"x": VALUES}), 10), inputs=file.spec.inputs, batch=4, where="")
    with pytest.raises(DataError, match="is no recording"):
        read_recording(tmp_path, file=file, digest=digest)


def written(file: SpecFile, tmp_path: Path, folder: Path) -> DataDigest:
    """A recording of a project in a folder, as `gate record` writes it, and the digest of its samples."""
    digest = digest_of(ArraySource(Samples({"x": VALUES}), 10), inputs=file.spec.inputs, batch=4, where="")
    cache = Cache(tmp_path / "cache")
    identity = ReferenceModel(file, cache).identity()
    folder.mkdir()
    write_recording(recorded(file, cache), folder, file=file, identity=identity, digest=digest, graphs={})
    return digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("opset = 17", "recorded with opset 18, the spec says 17"),
        ("simplify = true", "recorded with simplify false, the spec says true"),
        (
            'exporter = ["torchscript"]',
            r'recorded with exporter \["dynamo", "torchscript"\], the spec says \["torchscript"\]',
        ),
        ('device = "cuda"', 'recorded without its device, the spec says "cuda"'),
    ],
)
def test_a_recording_of_another_export_than_the_spec_asks_for_is_refused(
    file: SpecFile, tmp_path: Path, line: str, message: str
) -> None:
    digest = written(file, tmp_path, tmp_path / "recorded")
    assert read_recording(tmp_path / "recorded", file=file, digest=digest)[0].reused
    file.path.write_text(file.text.replace("[inputs.x]", f"{line}\n[inputs.x]"))
    with pytest.raises(DataError, match=f"(?s)another \\[model\\] than the spec's: {message}.*gate record"):
        read_recording(tmp_path / "recorded", file=read_spec(file.path), digest=digest)


def test_a_recording_that_does_not_say_how_it_was_exported_is_refused(file: SpecFile, tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    digest = written(file, tmp_path, folder)
    raw = json.loads((folder / RECORDING).read_text())
    del raw["meta"]["spec_model"]["opset"]
    raw["digest"] = _recording_digest(raw)
    (folder / RECORDING).write_text(json.dumps(raw))
    with pytest.raises(DataError, match="(?s)recorded without its opset, the spec says 18.*gate record"):
        read_recording(folder, file=file, digest=digest)


def test_a_recording_is_read_where_the_library_of_its_model_is_not_installed(file: SpecFile, tmp_path: Path) -> None:
    library = Installed(file, tmp_path)
    script = f"""
import site, sys
before = site.getsitepackages()
site.getsitepackages = lambda: [*before, {str(library.site)!r}]
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(library.site)!r}]
from pathlib import Path
from gate.spec import read_spec
from tests.test_reference import written
written(read_spec(Path({str(file.path)!r})), Path({str(tmp_path)!r}), Path({str(tmp_path / "recorded")!r}))
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    library.write(2.0)  # as another machine may have another one
    digest = digest_of(ArraySource(Samples({"x": VALUES}), 10), inputs=file.spec.inputs, batch=4, where="")
    recording, identity = read_recording(tmp_path / "recorded", file=file, digest=digest)
    assert len(recording.files) == 3
    assert isinstance(identity, ModelIdentity)


def test_a_file_that_is_no_onnx_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(DataError, match="is no ONNX file"):
        onnx_digest(tmp_path / "x.onnx")


def _with_external_constant(folder: Path) -> Path:
    """A graph whose only weight is a Constant node's attribute, kept in another file."""
    import onnx
    from onnx import TensorProto, helper

    values = np.arange(4, dtype=np.float32)
    (folder / "weight.bin").write_bytes(values.tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weight.bin"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert onnx.load(path, load_external_data=False).graph.node[0].op_type == "Constant"
    return path


def test_a_weight_in_another_file_is_part_of_the_digest_wherever_the_graph_keeps_it(tmp_path: Path) -> None:
    path = _with_external_constant(tmp_path)
    before = onnx_digest(path)
    (tmp_path / "weight.bin").write_bytes(np.ones(4, np.float32).tobytes())
    assert onnx_digest(path) != before


def test_external_data_that_is_a_link_or_missing_is_refused(tmp_path: Path) -> None:
    path = _with_external_constant(tmp_path)
    weight = tmp_path / "weight.bin"
    weight.rename(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match=r"external data 'weight\.bin' is missing"):
        onnx_digest(path)
    weight.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match="not a regular file"):
        onnx_digest(path)
