"""The doctor's judgement, from facts of machines that are not here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gate.device import Gpu, GpuState
from gate.doctor import Examination, Needs, examine, needs_of
from gate.probe import NO_GPU, PROBES, Answer, Facts
from gate.spec import spec_from_text

MIB = 2**20
H200 = GpuState(
    gpu=Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.159.03", cuda="13.0"),
    source="nvml",
    memory_total_bytes=143771 * MIB,
    memory_free_bytes=143000 * MIB,
    sm_clock_mhz=345,
    max_sm_clock_mhz=1980,
    clocks_set=False,
    mig=False,
    compute_mode="default",
)
ABSENT = Answer(installed=False, error="is not installed")
DISTRIBUTIONS = {"torch": "2.11.0", "onnxruntime-gpu": "1.31.1", "tensorrt": "8.6.0", "tensorrt-rtx-cu13": "1.7.1"}


def on_h200(**answers):
    """An H200 where all works but TensorRT-RTX, which does not know this GPU."""
    providers = {"CUDAExecutionProvider": "", "TensorrtExecutionProvider": "", "CPUExecutionProvider": ""}
    refused = "engine is not valid for compute capability 9.0"
    found = {
        "driver": Answer(version="13.0", cuda="13.0", device_error=None),
        "nvml": Answer(version="13.0", device_error=None),
        "cuda_python": Answer(version="13.0.1", cuda="13.0.1", device_error=None),
        "torch": Answer(version="2.11.0", cuda="13.0", device_error=None),
        "tensorrt": Answer(version="8.6.0", cuda="12", device_error=None),
        "tensorrt_rtx": Answer(version="1.7.1.116", cuda="13", device_error=refused),
        "onnxruntime": Answer(version="1.31.1", cuda="13.0", providers=providers),
        "onnx": Answer(version="1.23.2"),
        "modelopt": Answer(version="0.47.0"),
    }
    return facts(gpu=H200, answers=found | answers)


def without_gpu(**answers):
    """A machine for pull requests: no driver, ONNX Runtime for CPUs, TensorRT-RTX to compile."""
    found = {
        "driver": Answer(installed=False, error="no NVIDIA driver: libcuda.so.1 is not found"),
        "nvml": Answer(version="13.0", device_error="NVML Shared Library Not Found"),
        "cuda_python": ABSENT,
        "torch": Answer(version="2.13.0+cpu", device_error="it is built without CUDA"),
        "tensorrt": ABSENT,
        "tensorrt_rtx": Answer(version="1.7.1.116", cuda="13"),
        "onnxruntime": Answer(version="1.31.1", providers={"CPUExecutionProvider": ""}),
        "onnx": Answer(version="1.23.2"),
        "modelopt": Answer(version="0.47.0"),
    }
    return facts(gpu=None, answers=found | answers)


def facts(**changes):
    return Facts(
        **{
            "python": (3, 10),
            "platform": "Linux x86_64",
            "distributions": DISTRIBUTIONS,
            "gpu_hidden": False,
            "cuda_libraries": {},
            "compiler": "/usr/bin/g++",
            **changes,
        }
    )


def changed(found, **state):
    return msgspec.structs.replace(found, gpu=msgspec.structs.replace(found.gpu, **state))


def line(found, name, needs=None):
    lines = found.lines if isinstance(found, Examination) else examine(found, needs).lines
    return next(each for each in lines if each.name == name)


def status(found, name):
    return line(found, name).status


SPEC = """schema = 1
[model]
id = "tiny"
factory = "model:load"
[inputs.input]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 4, max = 16 }
[data]
source = "data:evaluation"
samples = 32
calibration = "data:calibration"
"""


def needs(*engines, recorded=False):
    text = SPEC + "".join(
        f"[[engine]]\n{engine}\n[engine.parity]\ntop1_agreement_at_least = 0.9\n" for engine in engines
    )
    return needs_of(spec_from_text(text, path=Path("gate.toml")).spec, recorded=recorded)


TRT = 'name = "trt"\nbackend = "tensorrt"\nprecision = "fp16"'
ORT = 'name = "ort"\nbackend = "onnxruntime"\nprecision = "fp32"'


def test_facts_name_every_probe():
    assert set(on_h200().answers) == set(without_gpu().answers) == set(PROBES)


def test_all_of_an_h200_is_ok_but_what_does_not_know_it():
    found = examine(on_h200())
    assert [each.name for each in found.lines if each.status != "OK"] == ["cuda_libraries", "tensorrt_rtx.device"]
    assert line(found, "gpu").detail == "NVIDIA H200, compute capability 9.0"
    assert line(found, "driver").version == "580.159.03"
    assert found.usable == {
        "onnxruntime": "device",
        "tensorrt": "device",
        "tensorrt_rtx": "preflight",
        "torch": "device",
    }
    refused = line(found, "tensorrt_rtx.device")
    assert refused.status == "unusable"
    assert 'backend = "tensorrt"' in refused.fix
    assert found.ok


def test_without_a_gpu_each_of_its_lines_is_missing_and_backends_on_the_cpu_are_usable():
    found = examine(without_gpu())
    for name in ("gpu", "driver", "cuda", "mig", "compute_mode", "memory", "clocks", "nvml", "tensorrt_rtx.device"):
        assert status(found, name) == "missing", name
    assert found.ok
    assert found.usable == {"onnxruntime": "host", "tensorrt_rtx": "preflight", "torch": "host"}


def test_nothing_usable_is_not_ok():
    broken = Answer(error="crashed with SIGSEGV when it was tried")
    found = examine(without_gpu(onnxruntime=broken, tensorrt_rtx=ABSENT, torch=broken))
    assert not found.ok
    assert found.usable == {}
    assert found.summary == "no backend can be used here"
    assert line(found, "torch").detail == "crashed with SIGSEGV when it was tried"
    assert status(found, "torch") == "unusable"


def test_needs_of_nothing_do_not_make_nothing_ok():
    found = examine(without_gpu(onnxruntime=ABSENT, tensorrt_rtx=ABSENT, torch=ABSENT), Needs(lines={}))
    assert not found.ok


def test_what_is_not_ok_says_why():
    for each in (*examine(without_gpu()).lines, *examine(on_h200()).lines):
        assert each.status == "OK" or each.detail, each


def test_driver_older_than_the_cuda_of_a_framework_is_said_with_both_versions():
    old = changed(on_h200(), gpu=Gpu(name="NVIDIA L4", compute_capability="8.9", driver="550.54.15", cuda="12.4"))
    found = examine(old)
    assert status(found, "tensorrt.device") == "OK"
    for name in ("torch.cuda", "onnxruntime.cuda", "tensorrt_rtx.device", "cuda_python"):
        assert status(found, name) == "unusable", name
    said = line(found, "torch.cuda").detail
    assert "built for CUDA 13.0" in said
    assert "driver 550.54.15 has CUDA 12; it takes driver 580 or newer" in said
    assert line(found, "tensorrt_rtx.device").fix.startswith("pip install tensorrt-rtx-cu12")
    assert line(found, "cuda_python").fix.startswith("pip install 'cuda-python==12.*'")


@pytest.mark.parametrize(
    ("driver", "gap"), [("580.65.06", False), ("579.9", True), ("470.1", True), ("unknown", False)]
)
def test_cuda_of_a_driver_that_does_not_say_is_known_by_its_version(driver, gap):
    gpu = Gpu(name="NVIDIA L4", compute_capability="8.9", driver=driver)
    found = changed(on_h200(driver=Answer(device_error=None)), gpu=gpu)
    assert (status(found, "torch.cuda") == "unusable") is gap


def test_hidden_gpu_is_missing_with_the_variable_that_hides_it():
    found = line(msgspec.structs.replace(without_gpu(), gpu_hidden=True), "gpu")
    assert found.status == "missing"
    assert found.fix == "unset CUDA_VISIBLE_DEVICES"


def test_driver_that_shows_no_gpu_says_what_cuda_says():
    driver = Answer(version="13.0", cuda="13.0", device_error="cuInit: CUDA_ERROR_NO_DEVICE")
    found = examine(without_gpu(driver=driver))
    assert "CUDA_ERROR_NO_DEVICE" in line(found, "gpu").detail
    assert line(found, "driver").status == "OK"


def test_gpu_that_nothing_names_is_unusable():
    found = line(without_gpu(driver=Answer(version="13.0", cuda="13.0", device_error=None)), "gpu")
    assert found.status == "unusable"
    assert found.fix == 'pip install "trt-gate[gpu]"'


def test_mig_without_a_visible_instance_is_unusable():
    found = on_h200(driver=Answer(version="13.0", cuda="13.0", device_error="cuDeviceGet: CUDA_ERROR_NO_DEVICE"))
    found = changed(found, mig=True)
    assert status(found, "mig") == "unusable"
    assert "MIG-" in line(found, "mig").fix
    assert status(found, "torch.cuda") == "missing"
    assert "tensorrt" not in examine(found).usable


def test_mig_with_a_visible_instance_is_ok():
    assert line(changed(on_h200(), mig=True), "mig").detail == "on; one instance is visible"


def test_gpu_without_mig_is_ok():
    assert status(changed(on_h200(), mig=None), "mig") == "OK"


def test_exclusive_mode_is_ok_while_a_context_opens():
    found = changed(on_h200(), compute_mode="exclusive_process")
    assert line(found, "compute_mode").detail == "exclusive process: one process at a time"
    assert status(found, "compute_mode") == "OK"


def test_exclusive_mode_that_another_process_holds_is_unusable():
    held = Answer(version="13.0", cuda="13.0", device_error="cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE")
    found = changed(on_h200(driver=held), compute_mode="exclusive_process")
    assert status(found, "compute_mode") == "unusable"
    assert "--query-compute-apps" in line(found, "cuda").fix


def test_prohibited_mode_is_unusable_with_the_command_that_ends_it():
    held = Answer(version="13.0", cuda="13.0", device_error="cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE")
    found = changed(on_h200(driver=held), compute_mode="prohibited")
    assert line(found, "compute_mode").fix == line(found, "cuda").fix == "sudo nvidia-smi --compute-mode=DEFAULT"


@pytest.mark.parametrize(
    ("free_mib", "wanted"), [(143000, "OK"), (1023, "unusable"), (0, "unusable"), (None, "missing")]
)
def test_free_memory_is_enough_too_little_or_not_known(free_mib, wanted):
    free = None if free_mib is None else free_mib * MIB
    assert status(changed(on_h200(), memory_free_bytes=free), "memory") == wanted


def test_free_memory_below_the_budget_of_the_spec_is_unusable():
    found = line(changed(on_h200(), memory_free_bytes=4000 * MIB), "memory", Needs(lines={}, device_peak_mib=8000))
    assert found.status == "unusable"
    assert "device_peak_mib of the spec takes 8000" in found.detail


def test_clocks_slowed_by_heat_are_unusable():
    found = line(changed(on_h200(), slowdowns=("hw_thermal_slowdown",)), "clocks")
    assert found.status == "unusable"
    assert "hw_thermal_slowdown" in found.detail


def test_clocks_say_whether_a_setting_holds_them():
    assert "--lock-gpu-clocks=1980" in line(on_h200(), "clocks").detail
    assert line(changed(on_h200(), clocks_set=True), "clocks").detail == "SM 345 of 1980 MHz, held by a setting"
    assert "sw_power_cap" in line(changed(on_h200(), slowdowns=("sw_power_cap",)), "clocks").detail
    assert status(changed(on_h200(), sm_clock_mhz=None), "clocks") == "missing"


def test_two_packages_of_onnx_runtime_of_which_the_one_without_gpu_won_are_named():
    answer = Answer(version="1.31.1", providers={"CPUExecutionProvider": None})
    both = msgspec.structs.replace(
        on_h200(onnxruntime=answer), distributions={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    )
    found = line(both, "onnxruntime.packages")
    assert found.status == "unusable"
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0" in found.detail
    assert found.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def test_two_packages_of_onnx_runtime_of_which_the_one_for_gpus_is_found_are_well():
    both = msgspec.structs.replace(on_h200(), distributions={"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"})
    found = line(both, "onnxruntime.packages")
    assert (found.status, found.fix) == ("OK", None)


def test_provider_whose_library_does_not_load_is_unusable_with_the_packages_that_mend_it():
    error = "libcublasLt.so.13: cannot open shared object file: No such file or directory"
    answer = Answer(version="1.31.1", cuda="13.0", providers={"CUDAExecutionProvider": error})
    found = line(on_h200(onnxruntime=answer), "onnxruntime.cuda")
    assert found.status == "unusable"
    assert found.fix == 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    assert status(on_h200(onnxruntime=answer), "onnxruntime.tensorrt") == "missing"


def test_provider_that_loads_without_a_gpu_is_missing_it():
    answer = Answer(version="1.31.1", cuda="13.0", providers={"CUDAExecutionProvider": NO_GPU})
    assert line(without_gpu(onnxruntime=answer), "onnxruntime.cuda").detail == f"its library loads; {NO_GPU}"


def test_library_that_tensorrt_misses_is_named_with_its_wheel():
    error = "libcudnn.so.8: cannot open shared object file: No such file or directory"
    found = line(on_h200(tensorrt=Answer(error=error)), "tensorrt")
    assert found.status == "unusable"
    assert "nvidia-cudnn-cu12==8.9.7.29" in found.fix
    assert "LD_LIBRARY_PATH" in found.fix


def test_tensorrt_8_6_on_a_newer_python_says_so():
    newer = msgspec.structs.replace(on_h200(tensorrt=ABSENT), python=(3, 12))
    found = line(newer, "tensorrt")
    assert found.status == "unusable"
    assert found.detail == "TensorRT 8.6.0 has wheels up to Python 3.10; here is 3.12"
    assert found.fix == "pip install tensorrt-cu13"


def test_tensorrt_that_is_not_installed_has_the_package_for_the_driver():
    bare = msgspec.structs.replace(without_gpu(), distributions={})
    assert line(bare, "tensorrt").fix == 'pip install "trt-gate[tensorrt]"'


def test_needed_line_that_is_missing_fails_with_the_engine_that_needs_it():
    found = examine(without_gpu(), needs(TRT), spec="gate.toml")
    assert not found.ok
    assert line(found, "tensorrt").needed_by == ("trt",)
    assert not line(found, "tensorrt_rtx").needed
    assert found.summary == "driver missing, cuda_python missing, tensorrt missing and 6 more; needed by trt"
    assert examine(on_h200(), needs(TRT)).ok


def test_optional_engine_needs_nothing():
    found = examine(without_gpu(), needs(ORT, f"{TRT}\noptional = true"))
    assert found.ok
    assert not line(found, "tensorrt").needed


def test_device_memory_comes_from_cuda_python_or_torch():
    assert examine(on_h200(cuda_python=ABSENT), needs(TRT)).ok
    cpu_torch = Answer(version="2.13.0+cpu", device_error="it is built without CUDA")
    found = examine(on_h200(cuda_python=ABSENT, torch=cpu_torch), needs(TRT))
    assert not found.ok
    assert line(found, "cuda_python").needed_by == ("trt",)


@pytest.mark.parametrize(
    ("engine", "needed"),
    [
        (ORT, {"onnxruntime", "onnx", "torch"}),
        (ORT.replace("fp32", "fp16"), {"modelopt"}),
        (ORT.replace("fp32", "int8"), {"onnxruntime"}),
        (ORT.replace("fp32", "fp8"), {"modelopt"}),
        (f'{ORT}\noptions = {{ provider = "cuda" }}', {"onnxruntime.cuda", "gpu", "driver", "cuda", "memory"}),
        (f'{ORT}\noptions = {{ provider = "tensorrt" }}', {"onnxruntime.tensorrt", "mig", "compute_mode"}),
        (TRT, {"tensorrt", "tensorrt.device", "device_memory", "modelopt"}),
        (f'{TRT}\noptions = {{ typing = "weak" }}', {"tensorrt.device"}),
        ('name = "rtx"\nbackend = "tensorrt_rtx"\nprecision = "fp32"', {"tensorrt_rtx", "tensorrt_rtx.device"}),
        (
            'name = "t"\nbackend = "torch"\nprecision = "fp16"\noptions = { mode = "aotinductor" }',
            {"torch", "compiler"},
        ),
        ('name = "t"\nbackend = "torch"\nprecision = "fp16"\nevidence = "device"', {"torch.cuda", "gpu"}),
    ],
)
def test_engine_needs_its_backend_its_lowering_and_its_device(engine, needed):
    assert needed <= needs(engine).lines.keys()


def test_weak_typing_needs_no_lowering():
    assert "modelopt" not in needs(f'{TRT}\noptions = {{ typing = "weak" }}').lines


def test_recording_takes_the_place_of_torch_and_of_lowering():
    assert not {"torch", "modelopt"} & needs(TRT, recorded=True).lines.keys()


def test_compiling_with_tensorrt_rtx_needs_no_gpu():
    text = SPEC + '[[engine]]\nname = "rtx"\nbackend = "tensorrt_rtx"\nprecision = "fp16"\nevidence = "preflight"\n'
    found = needs_of(spec_from_text(text, path=Path("gate.toml")).spec)
    assert found.lines.keys() == {"tensorrt_rtx", "torch", "onnx", "modelopt"}
    assert examine(without_gpu(), found).ok


def test_latency_on_the_device_needs_clocks_and_its_memory_budget_needs_nvml():
    engine = f"{TRT}\n[engine.latency]\np50_ms = 1.0\n[engine.memory]\ndevice_peak_mib = 512.0"
    found = needs(engine)
    assert {"clocks", "nvml"} <= found.lines.keys()
    assert found.device_peak_mib == 512


def test_engines_that_are_all_optional_and_cannot_run_are_not_well():
    asked = needs(TRT + "\noptional = true")
    assert asked.lines == {}
    found = examine(without_gpu(), asked)
    assert not found.ok
    assert found.summary.startswith("none of the spec's engines can run here, all of them optional: trt lacks ")
    assert examine(on_h200(), asked).ok


def test_one_optional_engine_that_can_run_is_enough():
    asked = needs(TRT + "\noptional = true", ORT + "\noptional = true")
    assert examine(without_gpu(), asked).ok


def test_a_reference_on_the_gpu_needs_pytorch_for_cuda():
    text = SPEC.replace('factory = "', 'device = "cuda"\nfactory = "')
    text += f"[[engine]]\n{ORT}\n[engine.parity]\n"
    spec = spec_from_text(text, path=Path("gate.toml")).spec
    assert "torch.cuda" in needs_of(spec).lines
    assert "torch.cuda" not in needs_of(spec, recorded=True).lines
    assert not examine(without_gpu(), needs_of(spec)).ok
