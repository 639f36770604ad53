"""PyTorch's engines: eager, torch.compile, AOTInductor, in every precision that the CPU has."""

import json
import zipfile

import msgspec
import numpy as np
import pytest
import torch

from gate.cli.main import main
from gate.compare_on_device import host_array
from gate.engines import backend as backend_named
from gate.engines.interface import OutputsOnDevice, RegionTimed, Resources
from gate.engines.torch.backend import TorchBackend, require_tf32
from gate.engines.torch.engine import TorchEngineRunner
from gate.engines.torch.package import require_loads_alone
from gate.engines.torch.runner import TorchRunner
from gate.errors import BackendUnavailable, BuildError, IncompatibleEngine, RunError, SpecError
from gate.precision import check_delivered_precision
from gate.spec import GateSpec
from gate.verdict import Evidence, Status


def engine_alone(runner, feed):
    """A call that gives the nanoseconds of the engine alone, its inputs on the device."""
    once = runner.region_timed([feed], transfers=False, wait="spin")
    return lambda: once(0)().gpu_compute


RNG = np.random.default_rng(3)


class Small(torch.nn.Module):
    """A convolution and a product, whose outputs come as a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.fc = torch.nn.Linear(64, 5)

    def forward(self, image):
        features = torch.relu(self.conv(image)).flatten(1)
        scores = self.fc(features)
        return {"scores": scores, "best": scores.argmax(1)}


class Pair(torch.nn.Module):
    """Two inputs, one of them an index."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(7, 3)
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, index, scale):
        return self.fc(self.table(index).mean(1) * scale)


class Fixed(torch.nn.Module):
    """Cannot change its batch."""

    def forward(self, image):
        return image * 2 if image.shape[0] == 4 else image * 3


IMAGE = {"image": {"dtype": "float32", "shape": ["batch", 1, 4, 4], "axes": {"batch": {"min": 1, "opt": 4, "max": 8}}}}
BATCH = {"min": 1, "opt": 2, "max": 4}
PAIR = {
    "index": {"dtype": "int64", "shape": ["batch", "words"], "axes": {"batch": BATCH, "words": BATCH}},
    "scale": {"dtype": "float32", "shape": ["batch", 1], "axes": {"batch": BATCH}},
}


def make_spec(inputs=IMAGE, *, precision="fp32", mode="eager", cast=None, evidence="host", names=()):
    options = {"mode": mode, "cast": cast}
    engine = {"name": "e", "backend": "torch", "precision": precision, "evidence": evidence, "parity": {}}
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b", "output_names": list(names)},
            "inputs": inputs,
            "data": {"source": "a:b", "samples": 1},
            "engine": [{**engine, "options": {key: value for key, value in options.items() if value}}],
        },
        GateSpec,
    )


def images(batch):
    return {"image": RNG.standard_normal((batch, 1, 4, 4)).astype(np.float32)}


def resources_of(module, feeds=()):
    return Resources(model=module.eval, feeds=lambda: tuple(feeds))


def build(folder, spec, module, feeds=()):
    """The engine's file, its record, and what it was made from."""
    backend, engine = TorchBackend(), spec.engines[0]
    resources = resources_of(module, feeds)
    out = folder / backend.file_name(engine)
    record = backend.build(onnx=None, out=out, spec=spec, engine=engine, resources=resources)
    return out, record, resources


def reopened(path, spec, resources=None):
    return TorchBackend().open(path, spec=spec, engine=spec.engines[0], resources=resources)


def relative(want, got):
    return float(np.sqrt(np.mean((want - got) ** 2)) / np.sqrt(np.mean(want**2)))


def test_the_registry_gives_it():
    assert isinstance(backend_named("torch"), TorchBackend)


@pytest.mark.parametrize(
    ("precision", "cast", "limit"),
    [("fp32", None, 1e-6), ("bf16", None, 2e-2), ("bf16", "weights", 2e-2), ("fp16", None, 2e-3)],
)
def test_an_eager_engine_answers_as_the_reference_within_its_precision(tmp_path, precision, cast, limit):
    spec = make_spec(precision=precision, cast=cast)
    module = Small().eval()
    path, record, resources = build(tmp_path, spec, module, [images(4)])
    assert record.options["mode"] == "eager"
    assert record.options["cast"] == (None if precision == "fp32" else cast or "autocast")
    finding = check_delivered_precision(record, evidence=Evidence.PREFLIGHT)
    assert finding.status is Status.PASSED
    assert (finding.estimate, finding.n) == (1.0, 2)
    feed = images(3)
    with reopened(path, spec, resources) as runner:
        found = runner.run(feed)
    with TorchRunner(module, spec=spec) as reference:
        wanted = reference.run(feed)
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        name: (each.dtype, each.shape) for name, each in wanted.items()
    }
    difference = relative(wanted["scores"], found["scores"])
    assert difference <= limit
    assert (difference > 0) == (precision != "fp32")
    assert module.fc.weight.dtype == torch.float32


def test_layers_are_those_that_ran_with_their_modules(tmp_path):
    _, record, _ = build(tmp_path, make_spec(precision="bf16"), Small(), [images(4)])
    assert record.layers_source == "dispatch"
    layers = {layer.name: (layer.type, layer.precision) for layer in record.layers}
    assert layers["conv/convolution"] == ("Conv", "bf16")
    assert layers["fc/addmm"] == ("Gemm", "bf16")
    assert not any(layer.name.endswith(("/view", "/t")) for layer in record.layers)


def test_a_model_that_autocast_does_not_reach_is_not_delivered(tmp_path):
    class Stubborn(Small):
        def forward(self, image):
            with torch.autocast("cpu", enabled=False):
                return super().forward(image)

    _, record, _ = build(tmp_path, make_spec(precision="bf16"), Stubborn(), [images(4)])
    finding = check_delivered_precision(record, evidence=Evidence.PREFLIGHT)
    assert finding.status is Status.FAILED
    assert "conv/convolution" in finding.detail


def test_an_eager_engines_file_holds_nothing_to_execute(tmp_path):
    spec = make_spec(precision="fp16")
    path, _, _ = build(tmp_path, spec, Small())
    said = json.loads(path.read_bytes())
    assert path.name == "model.json"
    assert {"mode": "eager", "cast": "autocast", "precision": "fp16", "device": "cpu"}.items() <= said.items()
    assert len(said["weights_sha256"]) == 64
    assert 'mode = "aotinductor" makes one' in TorchBackend().unsealable(spec.engines[0])


def test_the_same_engine_writes_the_same_file(tmp_path):
    spec = make_spec()
    (tmp_path / "again").mkdir()
    first, _, _ = build(tmp_path, spec, Small())
    again, _, _ = build(tmp_path / "again", spec, Small())
    assert first.read_bytes() == again.read_bytes()


def test_an_engine_of_other_weights_is_refused(tmp_path):
    spec = make_spec()
    path, _, _ = build(tmp_path, spec, Small())
    other = Small()
    with torch.no_grad():
        other.fc.bias += 1
    with pytest.raises(RunError, match="was made of something else: weights_sha256"):
        reopened(path, spec, resources_of(other))


def test_an_engine_of_another_mode_is_refused(tmp_path):
    path, _, resources = build(tmp_path, make_spec(), Small())
    with pytest.raises(RunError, match="precision is fp32, here bf16"):
        reopened(path, make_spec(precision="bf16"), resources)


def test_an_engine_of_another_pytorch_is_incompatible(tmp_path):
    path, _, resources = build(tmp_path, make_spec(), Small())
    said = json.loads(path.read_bytes())
    path.write_text(json.dumps({**said, "torch": "1.0.0"}))
    with pytest.raises(IncompatibleEngine, match=r"torch is 1\.0\.0, here"):
        reopened(path, make_spec(), resources)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path, _, resources = build(tmp_path, make_spec(), Small())
    path.write_bytes(content)
    with pytest.raises(RunError, match="is not what backend 'torch' writes"):
        reopened(path, make_spec(), resources)


def test_a_missing_file_is_refused(tmp_path):
    for mode in ("eager", "aotinductor"):
        with pytest.raises(RunError, match="there is no such file"):
            reopened(tmp_path / "none", make_spec(mode=mode), resources_of(Small()))


@pytest.mark.parametrize("resources", [None, Resources()])
def test_a_recording_in_place_of_the_model_is_said(tmp_path, resources):
    spec = make_spec()
    engine = spec.engines[0]
    with pytest.raises(BackendUnavailable, match="a recording has only its answers"):
        TorchBackend().build(onnx=None, out=tmp_path / "model.json", spec=spec, engine=engine, resources=resources)
    path, _, _ = build(tmp_path, spec, Small())
    with pytest.raises(BackendUnavailable, match="a recording has only its answers"):
        reopened(path, spec, resources)


def test_a_model_that_fails_shows_the_users_line(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, image):
            return image @ image.flatten()

    with pytest.raises(BuildError, match=r"(?s)the model in FP32: its forward failed.*return image @ image"):
        build(tmp_path, make_spec(), Broken())


def test_a_model_that_fails_in_its_precision_shows_the_users_line(tmp_path):
    class Only32(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, image):
            return image.float() @ self.weight

    with pytest.raises(BuildError, match=r"(?s)the model in its precision: its forward failed.*self.weight"):
        build(tmp_path, make_spec(precision="bf16", cast="weights"), Only32())


def test_train_mode_is_refused(tmp_path):
    spec = make_spec()
    resources = Resources(model=lambda: Small().train())
    with pytest.raises(BuildError, match="train mode"):
        TorchBackend().build(
            onnx=None, out=tmp_path / "model.json", spec=spec, engine=spec.engines[0], resources=resources
        )


def test_what_does_not_fit_is_refused_and_a_closed_runner_does_not_run(tmp_path):
    path, _, resources = build(tmp_path, make_spec(), Small())
    runner = reopened(path, make_spec(), resources)
    with pytest.raises(RunError, match=r"axis 0 \(batch\) is 9, outside the profile's 1 to 8"):
        runner.run(images(9))
    with pytest.raises(RunError, match="input 'image' is missing"):
        runner.run({})
    with pytest.raises(RunError, match="float64, the spec has float32"):
        runner.run({"image": np.zeros((1, 1, 4, 4))})
    runner.close()
    runner.close()
    with pytest.raises(RunError, match="closed"):
        runner.run(images(1))
    with pytest.raises(RunError, match="closed"):
        runner.timed(images(1))


def test_a_run_that_fails_is_a_run_error():
    def fail(*_):
        raise ValueError("no")

    spec = make_spec()
    with (
        TorchEngineRunner(fail, spec=spec, mode="eager", dtypes={}, tf32=False, where="x.json") as runner,
        pytest.raises(RunError, match=r"x\.json: PyTorch \(eager\) failed with ValueError: no"),
    ):
        runner.run(images(1))


def test_switches_are_as_deployed_while_it_is_open(tmp_path):
    path, _, resources = build(tmp_path, make_spec(), Small())
    torch.use_deterministic_algorithms(True)
    try:
        with reopened(path, make_spec(), resources):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_outputs_are_known_before_the_first_run_and_the_call_can_be_timed(tmp_path):
    path, _, resources = build(tmp_path, make_spec(), Small())
    with reopened(path, make_spec(), resources) as runner:
        assert {name: (meta.dtype, meta.shape) for name, meta in runner.outputs.items()} == {
            "scores": ("float32", ("batch", None)),
            "best": ("int64", ("batch",)),
        }
        assert runner.timed(images(2))() is None
        assert not isinstance(runner, RegionTimed)


def test_inputs_keep_their_types_and_order(tmp_path):
    spec = make_spec(PAIR, precision="bf16", cast="weights", names=["sum"])
    module = Pair().eval()
    path, _, resources = build(tmp_path, spec, module)
    feed = {"scale": np.full((2, 1), 2, np.float32), "index": np.array([[1, 2, 3], [4, 5, 6]])}
    with reopened(path, spec, resources) as runner:
        found = runner.run(feed)["sum"]
    with torch.no_grad():
        wanted = module(torch.from_numpy(feed["index"]), torch.from_numpy(feed["scale"])).numpy()
    assert relative(wanted, found) < 2e-2


def test_what_runs_where_is_said_without_importing_pytorch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    backend = TorchBackend()
    assert backend.runs_here(make_spec().engines[0]) is Evidence.HOST
    assert backend.runs_here(make_spec(evidence="device").engines[0]) is Evidence.HOST
    assert backend.origin(make_spec().engines[0]) == "model"
    assert backend.file_name(make_spec(mode="compile").engines[0]) == "model.json"
    assert backend.file_name(make_spec(mode="aotinductor").engines[0]) == "model.pt2"
    assert backend.unsealable(make_spec(mode="aotinductor").engines[0]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mode", ["eager", "aotinductor"])
def test_without_a_gpu_an_engine_on_it_is_unavailable(tmp_path, mode):
    with pytest.raises(BackendUnavailable, match="finds no GPU here"):
        build(tmp_path, make_spec(evidence="device", mode=mode), Small())


def test_packages_need_a_pytorch_that_has_them():
    class Old(TorchBackend):
        def version(self):
            return "2.5.1+cu121"

    with pytest.raises(SpecError, match=r"needs PyTorch 2\.6 or later, here is 2\.5\.1"):
        Old().require_supported(make_spec(mode="aotinductor").engines[0])
    Old().require_supported(make_spec(mode="compile").engines[0])
    TorchBackend().require_supported(make_spec(mode="aotinductor").engines[0])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_compile_compiles_at_open_and_never_in_a_run(tmp_path, precision):
    from torch._dynamo.utils import counters

    spec = make_spec(precision=precision, mode="compile")
    module = Small().eval()
    path, record, resources = build(tmp_path, spec, module, [images(4)])
    assert check_delivered_precision(record, evidence=Evidence.PREFLIGHT).status is Status.PASSED
    feeds = [images(batch) for batch in (1, 2, 5, 8)]
    with TorchRunner(module, spec=make_spec()) as reference:
        answers = [reference.run(feed) for feed in feeds]
    counters.clear()
    with reopened(path, spec, resources) as runner:
        compiled = counters["stats"]["unique_graphs"]
        assert compiled == 2
        for feed, wanted in zip(feeds, answers, strict=True):
            found = runner.run(feed)
            assert found["scores"].dtype == np.float32
            assert relative(wanted["scores"], found["scores"]) < (1e-6 if precision == "fp32" else 2e-2)
        assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
def test_torch_compile_of_a_model_that_bakes_an_axis_in_is_an_error(tmp_path):
    spec = make_spec(mode="compile")
    path, _, resources = build(tmp_path, spec, Fixed(), [images(4)])
    with pytest.raises(RunError, match=r"PyTorch \(compile\) failed with ConstraintViolationError"):
        reopened(path, spec, resources)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A package in bf16 of the small model, and its record."""
    spec = make_spec(precision="bf16", mode="aotinductor")
    path, record, _ = build(tmp_path_factory.mktemp("package"), spec, Small(), [images(4)])
    return path, record, spec


@pytest.mark.slow
def test_a_package_answers_as_the_reference_at_every_batch(packaged):
    path, record, spec = packaged
    assert record.layers_source == "export"
    finding = check_delivered_precision(record, evidence=Evidence.PREFLIGHT)
    assert (finding.estimate, finding.n) == (1.0, 2)
    assert {layer.name for layer in record.layers} >= {"conv/conv2d", "fc/linear"}
    with TorchBackend().open(path, spec=spec, engine=spec.engines[0]) as runner:
        found = {batch: (feed := images(batch), runner.run(feed)) for batch in (1, 2, 7, 8)}
    with TorchRunner(Small().eval(), spec=spec) as reference:
        for feed, outputs in found.values():
            wanted = reference.run(feed)
            assert list(outputs) == list(wanted)
            assert outputs["scores"].dtype == np.float32
            assert 0 < relative(wanted["scores"], outputs["scores"]) < 2e-2


@pytest.mark.slow
def test_a_package_says_what_it_was_made_for(packaged):
    from gate.engines.torch.package import read_description

    path, record, _ = packaged
    told = read_description(path)
    assert (told.device, told.torch, told.compute_capability) == ("cpu", record.backend_version, None)
    assert told.outputs == {"scores": "float32", "best": "int64"}
    assert record.backend_version == TorchBackend().version()


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_truncated_package_is_refused_before_it_is_loaded(packaged, tmp_path, size):
    path, _, spec = packaged
    part = tmp_path / "model.pt2"
    part.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunError, match="is no AOTInductor package"):
        reopened(part, spec)


@pytest.mark.slow
def test_a_flipped_byte_in_a_package_is_refused_before_it_is_loaded(packaged, tmp_path):
    path, _, spec = packaged
    with zipfile.ZipFile(path) as archive:
        library = next(each for each in archive.infolist() if each.filename.endswith(".so"))
    content = bytearray(path.read_bytes())
    content[library.header_offset + library.file_size // 2] ^= 1
    damaged = tmp_path / "model.pt2"
    damaged.write_bytes(content)
    with pytest.raises(RunError, match=r"the checksum of .*\.so does not hold"):
        reopened(damaged, spec)


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_a_build_error_with_its_cause(tmp_path):
    with pytest.raises(BuildError, match="torch.export cannot export the model") as caught:
        build(tmp_path, make_spec(mode="aotinductor"), Fixed(), [images(4)])
    assert caught.value.log


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "status"), [("bf16", Status.PASSED), ("fp16", Status.FAILED)])
def test_a_package_of_the_gate_is_held_against_the_precision_that_the_spec_says(packaged, precision, status):
    path, record, _ = packaged
    spec = make_spec(precision=precision, mode="aotinductor")
    told = TorchBackend().describe(path, spec=spec, engine=spec.engines[0])
    assert (told.layers, told.layers_source, told.options["made_in"]) == (record.layers, "package", "bf16")
    assert check_delivered_precision(told, evidence=Evidence.PREFLIGHT).status is status


def foreign(path, out):
    """The package without what the gate says in it."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as copy:
        for each in archive.infolist():
            data = archive.read(each)
            if each.filename.endswith("_metadata.json"):
                data = json.dumps({key: value for key, value in json.loads(data).items() if key != "gate"}).encode()
            copy.writestr(each, data)
    return out


PROJECT = """
import numpy as np
import torch


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fc = torch.nn.Linear(16, 5)

    def forward(self, image):
        return {"scores": self.fc(image.flatten(1))}


def load():
    return Small().eval()


def evaluation():
    return {"image": np.random.default_rng(0).standard_normal((32, 1, 4, 4), dtype=np.float32)}
"""

PROJECT_SPEC = """schema = 1

[model]
id = "small"
factory = "small:load"

[inputs.image]
dtype = "float32"
shape = ["batch", 1, 4, 4]
batch = { min = 1, opt = 4, max = 8 }

[data]
source = "small:evaluation"
samples = 32

[[engine]]
name = "candidate"
backend = "torch"
precision = "PRECISION"
"""


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Runs `gate check --json` on a small project and returns its code and its engine's part of the report."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(PROJECT)

    def run(precision, more):
        text = PROJECT_SPEC.replace("PRECISION", precision) + more + "  [engine.parity]\n"
        (tmp_path / "gate.toml").write_text(text)
        capsys.readouterr()
        code = main(["check", "gate.toml", "--json"])
        return code, json.loads(capsys.readouterr().out)["engines"][0]

    return run


@pytest.mark.slow
def test_a_check_of_a_package_finds_a_wrong_label_and_notes_what_it_cannot_see(tmp_path, checked):
    options = 'options = { mode = "aotinductor" }\n'
    code, built = checked("bf16", options)
    assert code == 0, built
    (path,) = (tmp_path / ".gate" / "cache" / "engine").glob("*/model.pt2")
    (tmp_path / "own.pt2").write_bytes(path.read_bytes())
    code, found = checked("bf16", options + 'plan = "own.pt2"\n')
    assert code == 0, found
    assert "build.delivered_precision" in found["verdict"]["required"]
    code, found = checked("fp16", options + 'plan = "own.pt2"\n')
    assert code == 1
    failing = {each["check"]: each for each in found["verdict"]["findings"] if each["status"] != "PASSED"}
    assert "not fp16: fc/linear (Gemm, bf16)" in failing["build.delivered_precision"]["detail"]
    foreign(tmp_path / "own.pt2", tmp_path / "foreign.pt2")
    code, found = checked("bf16", options + 'plan = "foreign.pt2"\n')
    assert code == 0, found
    assert "build.delivered_precision" not in found["verdict"]["required"]
    assert any("its layers were not listed" in note for note in found["notes"])


def test_an_eager_engine_has_no_size_and_none_to_limit(checked):
    code, found = checked("fp32", "")
    assert (code, found["size_bytes"]) == (0, None)
    code, found = checked("fp32", "  [engine.memory]\n  engine_mib = 1.0\n")
    failing = {each["check"]: each for each in found["verdict"]["findings"] if each["status"] != "PASSED"}
    assert code == 1
    assert "keeps no engine file in mode = 'eager'" in failing["memory.engine_mib"]["message"]


@pytest.mark.slow
def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path):
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    hint = 'sudo apt-get install g++, or mode = "eager"'
    spec = make_spec(mode="compile")
    path, _, resources = build(tmp_path, spec, Small(), [images(4)])
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        cpp_compiler_search.cache_clear()
        with pytest.raises(RunError) as run_error:
            reopened(path, spec, resources)
        with pytest.raises(BuildError) as build_error:
            build(tmp_path, make_spec(mode="aotinductor"), Small(), [images(4)])
    cpp_compiler_search.cache_clear()
    assert str(run_error.value) == f"torch.compile needs a C++ compiler, and finds none here\n{hint}"
    assert str(build_error.value) == f"AOTInductor needs a C++ compiler, and finds none here\n{hint}"


@pytest.mark.parametrize(("precision", "value", "word"), [("tf32", "0", "off"), ("fp32", "1", "on")])
def test_a_precision_that_the_environment_overrides_is_refused(monkeypatch, precision, value, word):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    engine = make_spec(precision=precision, evidence="device").engines[0]
    with pytest.raises(SpecError, match=f"NVIDIA_TF32_OVERRIDE={value} turns TF32 {word}, and the precision is"):
        TorchBackend().require_supported(engine)
    for other in ({}, {"NVIDIA_TF32_OVERRIDE": "1" if value == "0" else "0"}):
        require_tf32(engine, other)
    require_tf32(make_spec(precision="fp32").engines[0], {"NVIDIA_TF32_OVERRIDE": "1"})


GPU_PRECISIONS = [("fp32", None), ("tf32", None), ("fp16", None), ("fp16", "weights"), ("bf16", None)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "aotinductor"])
@pytest.mark.parametrize(("precision", "cast"), GPU_PRECISIONS)
def test_an_engine_on_the_gpu_answers_as_the_reference_there(tmp_path, mode, precision, cast):
    spec = make_spec(precision=precision, cast=cast, mode=mode, evidence="device")
    assert TorchBackend().runs_here(spec.engines[0]) is Evidence.DEVICE
    module = Small().eval()
    path, record, resources = build(tmp_path, spec, module, [images(4)])
    assert record.options["device"] == "cuda"
    assert check_delivered_precision(record, evidence=Evidence.PREFLIGHT).status is Status.PASSED
    feed = images(3)
    with TorchRunner(module, spec=spec, device="cuda") as reference:
        wanted = reference.run(feed)
    assert next(module.parameters()).device.type == "cpu"
    with reopened(path, spec, resources) as runner:
        found = runner.run(feed)
        single = runner.run(images(1))
        assert single["scores"].shape == (1, 5)
        assert isinstance(runner, RegionTimed)
        call = engine_alone(runner, feed)
        assert call() > 0
        assert isinstance(runner, RegionTimed)
        once = runner.region_timed([images(3), images(3)], transfers=False, wait="spin")
        pairs = np.array([(call(), once(turn % 2)().gpu_compute) for turn in range(300)])
        alone, turns = np.median(pairs, axis=0)
        assert turns == pytest.approx(alone, rel=0.1)
        for wait in ("spin", "block"):
            once = runner.region_timed([images(3), images(3)], transfers=True, wait=wait)
            times = once(1)()
            assert min(times.h2d, times.gpu_compute, times.d2h, times.enqueue) > 0
        assert runner.timed(feed)() is None
        assert isinstance(runner, OutputsOnDevice)
        left = runner.run_to_device(feed)
        assert {each.device.type for each in left.values()} == {"cuda"}
        for name, values in runner.run(feed).items():
            assert host_array(left[name]).dtype == values.dtype
            assert relative(values + 1.0, host_array(left[name]) + 1.0) <= 1e-2
    limit = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}[precision]
    assert relative(wanted["scores"], found["scores"]) <= limit


@pytest.mark.gpu
def test_the_reference_on_the_gpu_gives_the_same_bits_twice():
    module = Small().eval()
    feed = images(8)
    with TorchRunner(module, spec=make_spec(), device="cuda") as runner:
        first, again = runner.run(feed), runner.run(feed)
    assert first["scores"].tobytes() == again["scores"].tobytes()
    with TorchRunner(module, spec=make_spec()) as host:
        assert relative(host.run(feed)["scores"], first["scores"]) < 1e-5


@pytest.mark.slow
def test_a_compiler_that_puts_a_cpp_library_into_the_package_is_refused(tmp_path, monkeypatch):
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase " $* " in *" -shared "*) exec /usr/bin/g++ -static-libstdc++ -static-libgcc "$@";; esac\n'
        'exec /usr/bin/g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cpp_compiler_search.cache_clear()
    own = r"\(CXX=.*g\+\+\) put a C\+\+ library of its own into the package"
    with config.patch({"cpp.cxx": (str(compiler),)}), pytest.raises(BuildError, match=own) as caught:
        build(tmp_path, make_spec(mode="aotinductor"), Small(), [images(4)])
    cpp_compiler_search.cache_clear()
    assert "CXX=/usr/bin/g++" in (caught.value.hint or "")
    with pytest.raises(RunError, match="a process of its own could not load it") as refused:
        require_loads_alone(tmp_path / "model.pt2", device="cpu")
    assert "brings a C++ library of its own" in (refused.value.hint or "")


@pytest.mark.gpu
def test_a_package_for_the_gpu_is_loaded_by_another_process(tmp_path):
    spec = make_spec(mode="aotinductor", evidence="device")
    path, _, _ = build(tmp_path, spec, Small(), [images(4)])
    require_loads_alone(path, device="cuda")


@pytest.mark.gpu
def test_a_package_for_the_gpu_is_refused_on_the_cpu(tmp_path):
    spec = make_spec(mode="aotinductor", evidence="device")
    path, _, _ = build(tmp_path, spec, Small(), [images(4)])
    with pytest.raises(IncompatibleEngine, match="compiled for cuda, the engine is to run on cpu"):
        reopened(path, make_spec(mode="aotinductor"))
