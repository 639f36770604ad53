"""What each version of TensorRT has is probed; what it has not is refused before anything is made."""

import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

from gate.engines.tensorrt import api
from gate.engines.tensorrt.log import Log
from gate.errors import BackendUnavailable, BuildError, SpecError
from gate.spec import EngineSpec


def engine(backend="tensorrt", precision="fp32", *, onnx=None, **options):
    return msgspec.convert(
        {"name": "e", "backend": backend, "precision": precision, "onnx": onnx, "options": options}, EngineSpec
    )


def members(name, text):
    return IntEnum(name, {each: index for index, each in enumerate(text.split())})


# Members of the module tensorrt 8.6.0, of tensorrt.pyi 10.13, and of 11, whose API tensorrt_rtx 1.7 has.
FLAGS = {
    "8.6.0": "FP16 INT8 TF32 OBEY_PRECISION_CONSTRAINTS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8",
    "10.13.0": "FP16 BF16 INT8 TF32 OBEY_PRECISION_CONSTRAINTS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8 STRIP_PLAN",
    "11.0.0": "TF32 VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME STRIP_PLAN",
}
SOURCES = "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS"


def simulated(monkeypatch, version):
    trt = ModuleType("tensorrt")
    old, new = version.startswith("8"), version.startswith("11")
    trt.__version__ = version
    trt.Builder = object
    trt.BuilderFlag = members("BuilderFlag", FLAGS[version])
    typed = [] if old else ["STRONGLY_TYPED"]
    trt.NetworkDefinitionCreationFlag = members("N", " ".join(["EXPLICIT_BATCH", *typed]))
    trt.DataType = members("D", "FLOAT HALF INT8 INT32 BOOL FP8" + ("" if old else " BF16"))
    trt.TacticSource = members("T", "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS" if new else SOURCES)
    trt.HardwareCompatibilityLevel = members("H", "NONE AMPERE_PLUS" + ("" if old else " SAME_COMPUTE_CAPABILITY"))
    trt.IBuilderConfig = SimpleNamespace(builder_optimization_level=3)
    if not new:
        trt.IInt8EntropyCalibrator2 = trt.IInt8MinMaxCalibrator = object
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(api, "_DISTRIBUTIONS", {**api._DISTRIBUTIONS, "tensorrt": ()})
    return trt


WEAK_INT8 = {"precision": "int8", "typing": "weak"}


@pytest.mark.parametrize("version", ["8.6.0", "10.13.0"])
@pytest.mark.parametrize(
    "asked",
    [
        {**WEAK_INT8, "calibrator": "minmax", "calibration_cache": "c", "layer_precisions": {"*": "fp16"}},
        {"precision": "fp16", "typing": "weak", "tf32": True, "layer_precisions": {"/head/*": "fp32"}},
        {"timing_cache": "t", "tactic_sources": ["cublas", "jit_convolutions"], "builder_optimization_level": 0},
        {"version_compatible": True, "hardware_compatible": "ampere_plus", "strip_weights": None},
    ],
)
def test_what_a_version_has_is_supported(monkeypatch, version, asked):
    simulated(monkeypatch, version)
    api.require_supported("tensorrt", engine(**asked))


@pytest.mark.parametrize(
    ("version", "asked", "message", "hint"),
    [
        ("8.6.0", {"precision": "bf16"}, "8.6.0 has no BF16", "fp16"),
        ("8.6.0", {"precision": "bf16", "typing": "weak"}, "has no BF16", "fp16"),
        ("8.6.0", {"precision": "fp8"}, "cannot compile fp8", "int8"),
        ("8.6.0", {"typing": "strong"}, "no strongly typed networks", "Leave typing out"),
        ("8.6.0", {"strip_weights": True}, "cannot strip weights", "TensorRT 10"),
        ("8.6.0", {"hardware_compatible": "same_compute_capability"}, "no hardware_compatible", "It has ampere_plus"),
        ("8.6.0", {"precision": "fp16", "typing": "weak", "layer_precisions": {"a": "int8"}}, "not among", "Constrain"),
        ("10.13.0", {"precision": "int8", "calibrator": "entropy"}, 'needs typing = "weak"', "graph"),
        ("11.0.0", WEAK_INT8, "always strongly typed", "explicit Q/DQ"),
        ("11.0.0", {**WEAK_INT8, "calibrator": "minmax"}, "calibrator is not possible", "when it is lowered"),
        ("11.0.0", {**WEAK_INT8, "calibration_cache": "c"}, "calibration_cache is not possible", "when it is lowered"),
        ("11.0.0", {**WEAK_INT8, "layer_precisions": {"a": "fp32"}}, "layer_precisions is not", "exclude_nodes"),
        ("11.0.0", {"tactic_sources": ["cudnn", "cublas"]}, "no tactic source cudnn, cublas", "jit_convolutions"),
    ],
)
def test_what_a_version_has_not_is_refused_with_what_to_use_instead(monkeypatch, version, asked, message, hint):
    simulated(monkeypatch, version)
    with pytest.raises(SpecError, match=message) as caught:
        api.require_supported("tensorrt", engine(**asked))
    assert hint in caught.value.hint
    assert "engine 'e'" in caught.value.message


@pytest.mark.parametrize(
    ("attribute", "asked", "message"),
    [
        ("IInt8MinMaxCalibrator", {**WEAK_INT8, "calibrator": "minmax"}, "no calibrator IInt8MinMaxCalibrator"),
        ("HardwareCompatibilityLevel", {"hardware_compatible": "ampere_plus"}, "no hardware_compatible"),
    ],
)
def test_member_that_is_absent_is_refused(monkeypatch, attribute, asked, message):
    trt = simulated(monkeypatch, "8.6.0")
    delattr(trt, attribute)
    with pytest.raises(SpecError, match=message):
        api.require_supported("tensorrt", engine(**asked))


def test_older_module_without_compatibility_and_levels_is_refused(monkeypatch):
    trt = simulated(monkeypatch, "8.6.0")
    trt.BuilderFlag = members("BuilderFlag", "FP16 INT8 TF32")
    trt.IBuilderConfig = object
    with pytest.raises(SpecError, match="version compatible"):
        api.require_supported("tensorrt", engine(version_compatible=True))
    with pytest.raises(SpecError, match="builder_optimization_level"):
        api.require_supported("tensorrt", engine(builder_optimization_level=0))


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ({"typing": "weak", "precision": "fp16"}, "always strongly typed", "Leave it out"),
        ({**WEAK_INT8, "calibrator": "entropy"}, 'typing = "weak", calibrator is not possible', "explicit Q/DQ"),
        ({"timing_cache": "t"}, "has no timing cache", "Leave timing_cache out"),
        ({"tactic_sources": ["cudnn"]}, "no tactic source cudnn", "edge_mask_convolutions"),
        ({"version_compatible": True}, "has no option version_compatible", 'backend = "tensorrt"'),
        ({"hardware_compatible": "ampere_plus"}, "has no option hardware_compatible", 'backend = "tensorrt"'),
        ({"builder_optimization_level": 3}, "has no option builder_optimization_level", "It has workspace_mib"),
    ],
)
def test_rtx_refuses_what_it_has_not(asked, message, hint):
    with pytest.raises(SpecError, match=message) as caught:
        api.require_supported("tensorrt_rtx", engine("tensorrt_rtx", **asked))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "asked", [{}, {"precision": "bf16"}, {"precision": "fp8"}, {"strip_weights": True}, {"typing": "strong"}]
)
def test_rtx_supports_what_it_has(asked):
    if "typing" in asked:
        with pytest.raises(SpecError, match="has no option typing"):
            api.require_supported("tensorrt_rtx", engine("tensorrt_rtx", **asked))
    else:
        api.require_supported("tensorrt_rtx", engine("tensorrt_rtx", **asked))


def test_engine_without_such_options_is_supported_without_importing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    api.require_supported("tensorrt", engine(precision="fp16", workspace_mib=64))


@pytest.mark.parametrize(
    ("version", "typed", "bits"),
    [("8.6.0", False, 1), ("10.13.0", False, 0), ("10.13.0", True, 2), ("11.0.0", True, 2)],
)
def test_networks_are_created_as_the_version_asks(monkeypatch, version, typed, bits):
    assert api.network_flags(simulated(monkeypatch, version), typed=typed) == bits


def test_rtx_counts_as_11():
    rtx = api.module("tensorrt_rtx")
    assert api.major(rtx) == 11
    assert api.is_strongly_typed(rtx)
    assert not api.is_weakly_typed(rtx)


def test_type_stubs_are_no_installation(monkeypatch, tmp_path):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text("__version__: str = '10.13.0.35'\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(api, "_DISTRIBUTIONS", {**api._DISTRIBUTIONS, "tensorrt": ()})
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    for ask in (api.module, api.version):
        with pytest.raises(BackendUnavailable, match="holds no code, such as type stubs") as caught:
            ask("tensorrt")
        assert caught.value.hint == 'pip install "trt-gate[tensorrt]"'
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def test_module_with_a_missing_library_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libcudnn.so.8: cannot open')\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded: libcudnn\.so\.8"):
        api.module("tensorrt")


def test_module_that_is_absent_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match="not installed"):
        api.module("tensorrt")


def test_plugin_library_is_given_to_the_registry_once(tmp_path):
    library = tmp_path / "p.so"
    library.write_bytes(b"plugins")
    asked = []
    registry = SimpleNamespace(load_library=lambda path: asked.append(path) or object())
    trt = ModuleType("tensorrt")
    trt.get_plugin_registry = lambda: registry
    first, second = (api.load_plugins(trt, [str(library)], Log()) for _ in range(2))
    assert first == second
    assert (first[0].name, first[0].is_static) == ("p.so", False)
    assert asked == [str(library)]


def test_plugin_library_that_neither_takes_is_refused_each_time(tmp_path):
    library = tmp_path / "p.so"
    library.write_bytes(b"no library")
    trt = ModuleType("tensorrt")
    trt.get_plugin_registry = lambda: SimpleNamespace(load_library=lambda path: None)
    for _ in range(2):
        with pytest.raises(BuildError, match=r"p\.so: the plugin library cannot be loaded"):
            api.load_plugins(trt, [str(library)], Log())
