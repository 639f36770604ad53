"""The fingerprint of this machine, and the commit of a folder."""

# ruff: noqa: N802  the simulator has the names of NVML's functions
import os
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest

from gate import device


def test_fingerprint_of_the_cpu_has_what_changes_its_answers():
    found = device.fingerprint(False)
    assert found.kind == "cpu"
    assert found.name
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.compute_capability is None
    assert found.versions["numpy"]
    assert "torch" in found.versions


def test_fingerprint_imports_nothing_heavy():
    code = (
        "import sys; from gate.device import fingerprint; fingerprint(True);"
        "bad = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'modelopt'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_hidden_gpu_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device.gpu.cache_clear()
    try:
        assert device.gpu() is None
        assert device.fingerprint(True).kind == "cpu"
    finally:
        device.gpu.cache_clear()


def test_gpu_is_read_from_nvidia_smi_where_its_bindings_are_missing(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9, 580.1'\necho 'NVIDIA H200, 9.0, 580.1'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(device, "_load_cuda", lambda: None)
    device.gpu.cache_clear()
    try:
        assert device.gpu() == device.Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.1")
        device.gpu.cache_clear()
        monkeypatch.delenv("CUDA_DEVICE_ORDER")
        assert device.gpu() is None
    finally:
        device.gpu.cache_clear()


def test_nvidia_smi_is_asked_for_the_gpu_that_cuda_counts_first(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(
        '#!/bin/sh\ncase "$*" in *--id=0000:02:00.0*) ;; *) echo "NVIDIA L4, 8.9, 580.1" ;; esac\n'
        "echo 'NVIDIA H200, 9.0, 580.1'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(device, "_load_cuda", lambda: CudaSimulator("0000:02:00.0"))
    device.gpu.cache_clear()
    try:
        assert device.gpu() == device.Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.1")
    finally:
        device.gpu.cache_clear()


class CudaSimulator:
    """The CUDA driver as far as it says which GPU it counts first."""

    def __init__(self, bus, identifier=None, *, status=0):
        self.bus, self.identifier, self.status = bus, identifier, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGet(self, device, ordinal):
        assert ordinal == 0
        device._obj.value = 5
        return 0

    def cuDeviceGetPCIBusId(self, text, length, device):
        assert device.value == 5
        assert len(self.bus) < length
        text.value = self.bus.encode()
        return 0

    def cuDeviceGetUuid_v2(self, raw, device):
        if self.identifier is None:
            return 1
        raw.raw = uuid.UUID(self.identifier).bytes
        return 0


INSTANCE = "4d2b1a66-1f0e-5c3a-8f6e-0123456789ab"


class NvmlSimulator:
    """NVML's bindings as far as the gate calls them: one H200, then an L4; MIG instance `MIG-a` on the H200."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        """As NVML's."""

    def __init__(self, **without):
        self.open = 0
        self.lacks = without.get("lacks", ())
        self.reasons = without.get("reasons", 0)
        self.lost = False

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        if index not in (0, 1):
            raise self.NVMLError("Invalid Argument")
        return ("NVIDIA H200", "NVIDIA L4")[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in ("MIG-a", f"MIG-{INSTANCE}"):
            raise self.NVMLError("Not Found")
        return "instance"

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        return {b"0000:01:00.0": "NVIDIA H200", b"0000:02:00.0": "NVIDIA L4"}[bus]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part):
        return "NVIDIA H200"

    def nvmlDeviceGetUUID(self, handle):
        return {"NVIDIA H200": "GPU-11", "NVIDIA L4": "GPU-22"}[handle]

    def nvmlDeviceGetName(self, handle):
        return handle.encode()

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (9, 0) if handle == "NVIDIA H200" else (8, 9)

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 13000

    def nvmlDeviceGetMemoryInfo(self, handle):
        if self.lost:
            raise self.NVMLError("GPU is lost")
        total = 10 if handle == "instance" else 100
        return SimpleNamespace(total=total, free=total - 4, used=4)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 345

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetMigMode(self, handle):
        if "mig" in self.lacks:
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetComputeMode(self, handle):
        return 3


@pytest.fixture
def nvml(monkeypatch):
    """Puts the simulator in the place of the bindings."""

    def put(visible="0", **without):
        simulator = NvmlSimulator(**without)
        monkeypatch.setitem(sys.modules, "pynvml", simulator)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", without.get("order", "PCI_BUS_ID"))
        monkeypatch.setattr(device, "_load_cuda", lambda: without.get("cuda"))
        device.gpu.cache_clear()
        device._memory_reader.cache_clear()
        return simulator

    yield put
    device.gpu.cache_clear()
    device._memory_reader.cache_clear()


def test_state_by_nvml_has_memory_clocks_mig_and_mode(nvml):
    simulator = nvml(reasons=0x1 | 0x2 | 0x40)
    state = device.gpu_state()
    assert state == device.GpuState(
        gpu=device.Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.1", cuda="13.0"),
        source="nvml",
        memory_total_bytes=100,
        memory_free_bytes=96,
        sm_clock_mhz=345,
        max_sm_clock_mhz=1980,
        clocks_set=True,
        slowdowns=("hw_thermal_slowdown",),
        mig=True,
        compute_mode="exclusive_process",
    )
    assert simulator.open == 0


def test_what_a_gpu_does_not_have_is_none(nvml):
    nvml(lacks=("mig",))
    state = device.gpu_state()
    assert state is not None
    assert state.mig is None


@pytest.mark.parametrize(
    ("visible", "name"),
    [("1,0", "NVIDIA L4"), ("GPU-22", "NVIDIA L4"), ("GPU-2", "NVIDIA L4"), ("MIG-a", "NVIDIA H200")],
)
def test_first_visible_gpu_is_found_by_index_or_identifier(nvml, visible, name):
    nvml(visible)
    found = device.gpu()
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("bus", "name"), [("0000:01:00.0", "NVIDIA H200"), ("0000:02:00.0", "NVIDIA L4")], ids=["as NVML", "another order"]
)
@pytest.mark.parametrize("visible", ["0", "1", "0,1"])
def test_of_several_gpus_it_is_the_one_that_cuda_counts_first(nvml, bus, name, visible):
    simulator = nvml(visible, order="FASTEST_FIRST", cuda=CudaSimulator(bus))
    opened = device.open_nvml()
    assert opened == device.Nvml(bindings=simulator, whole=name, part=name)


@pytest.mark.parametrize("cuda", [None, CudaSimulator("0000:01:00.0", status=100), CudaSimulator("")])
def test_of_several_gpus_none_is_guessed_where_cuda_does_not_say_which_is_first(nvml, cuda):
    simulator = nvml("0", order="FASTEST_FIRST", cuda=cuda)
    assert device.open_nvml() is None
    assert simulator.open == 0
    nvml("0", order="PCI_BUS_ID", cuda=cuda)
    opened = device.open_nvml()
    assert opened is not None
    assert opened.whole == "NVIDIA H200"


def test_a_single_gpu_needs_no_word_of_cuda(nvml, monkeypatch):
    nvml("0", order="FASTEST_FIRST")
    monkeypatch.setattr(NvmlSimulator, "nvmlDeviceGetCount", lambda self: 1)
    opened = device.open_nvml()
    assert opened is not None
    assert opened.whole == opened.part == "NVIDIA H200"


def test_a_mig_instance_that_cuda_counts_first_is_the_visible_part(nvml):
    simulator = nvml("0", cuda=CudaSimulator("0000:01:00.0", INSTANCE))
    assert device.open_nvml() == device.Nvml(bindings=simulator, whole="NVIDIA H200", part="instance")
    simulator = nvml("0", cuda=CudaSimulator("0000:01:00.0", str(uuid.UUID(int=7))))
    assert device.open_nvml() == device.Nvml(bindings=simulator, whole="NVIDIA H200", part="NVIDIA H200")


@pytest.mark.parametrize("name", ["GPU-33", "GPU-"], ids=["unknown", "of two"])
def test_an_identifier_of_no_one_gpu_is_no_gpu(nvml, name):
    simulator = nvml(name)
    assert device.open_nvml() is None
    assert simulator.open == 0


def test_memory_of_a_mig_instance_is_its_own(nvml):
    nvml("MIG-a")
    state = device.gpu_state()
    assert state is not None
    assert state.memory_total_bytes == 10


def test_unknown_identifier_is_no_gpu(nvml, monkeypatch, tmp_path):
    nvml("MIG-b")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.gpu() is None
    assert device.gpu_state() is None
    assert device.device_memory_used_bytes() is None


def test_used_memory_is_read_through_a_handle_that_stays_open(nvml):
    simulator = nvml()
    assert [device.device_memory_used_bytes() for _ in range(3)] == [4, 4, 4]
    assert simulator.open == 1


def test_used_memory_of_a_lost_or_hidden_gpu_is_none(nvml):
    simulator = nvml()
    assert device.device_memory_used_bytes() == 4
    simulator.lost = True
    assert device.device_memory_used_bytes() is None
    nvml("-1")
    assert device.device_memory_used_bytes() is None
    assert device.gpu_state() is None


def test_nvml_is_opened_once_with_the_gpu_and_its_visible_part(nvml):
    simulator = nvml("MIG-a")
    opened = device.open_nvml()
    assert opened == device.Nvml(bindings=simulator, whole="NVIDIA H200", part="instance")
    assert simulator.open == 1
    assert opened.ask("nvmlDeviceGetMaxClockInfo", opened.whole, simulator.NVML_CLOCK_SM) == 1980
    assert opened.ask("nvmlDeviceGetPowerUsage", opened.whole) is None
    simulator.lost = True
    assert opened.ask("nvmlDeviceGetMemoryInfo", opened.part) is None


def test_nvml_without_the_visible_gpu_is_closed_again(nvml):
    simulator = nvml("7")
    assert device.open_nvml() is None
    assert simulator.open == 0
    nvml("-1")
    assert device.open_nvml() is None


def test_settings_and_idling_are_no_slowdown():
    assert device.slowdown_names(0x1 | 0x2) == ()
    assert device.slowdown_names(0x4 | 0x20) == ("sw_power_cap", "sw_thermal_slowdown")


SMI = """#!/bin/sh
case "$1" in
  --query-gpu=name,*) echo 'NVIDIA L4, 8.9, 580.1' ;;
  *mig*,*|*,*mig*) [ -n "$OLD" ] && exit 2; echo '23034, 22000, 210, 2040, 0x0000000000000009, Disabled, Exclusive_Process' ;;
  --query-gpu=memory.free) echo 22000 ;;
  --query-gpu=mig.mode.current) exit 2 ;;
  --query-gpu=*) echo '[N/A]' ;;
  *) echo 'CUDA Version: 13.0' ;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(SMI)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.mark.usefixtures("smi")
def test_state_is_read_from_nvidia_smi_where_its_bindings_are_missing():
    assert device.gpu_state() == device.GpuState(
        gpu=device.Gpu(name="NVIDIA L4", compute_capability="8.9", driver="580.1", cuda="13.0"),
        source="nvidia-smi",
        memory_total_bytes=23034 * 2**20,
        memory_free_bytes=22000 * 2**20,
        sm_clock_mhz=210,
        max_sm_clock_mhz=2040,
        clocks_set=False,
        slowdowns=("hw_slowdown",),
        mig=False,
        compute_mode="exclusive_process",
    )


@pytest.mark.usefixtures("smi")
def test_driver_that_lacks_a_field_still_gives_the_others(monkeypatch):
    monkeypatch.setenv("OLD", "1")
    state = device.gpu_state()
    assert state is not None
    assert state.memory_free_bytes == 22000 * 2**20
    assert state.mig is state.sm_clock_mhz is state.clocks_set is state.compute_mode is None


@pytest.mark.gpu
def test_state_of_the_gpu_here_is_complete():
    state = device.gpu_state()
    assert state is not None
    assert state.memory_free_bytes is not None
    assert state.memory_total_bytes is not None
    assert 0 < state.memory_free_bytes <= state.memory_total_bytes
    assert state.sm_clock_mhz is not None
    used = device.device_memory_used_bytes()
    assert used is not None
    assert 0 < used <= state.memory_total_bytes


@pytest.fixture
def checkout(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    return tmp_path


def test_revision_of_a_clean_checkout_is_its_commit(checkout):
    (checkout / "untracked").write_text("1")
    assert len(device.git_revision(checkout) or "") == 40


def test_revision_of_a_changed_checkout_says_so(checkout):
    (checkout / "a").write_text("2")
    assert (device.git_revision(checkout) or "").endswith("-dirty")


def test_folder_outside_a_checkout_has_no_revision(tmp_path):
    assert device.git_revision(tmp_path) is None


@pytest.mark.skipif(device.gpu() is not None, reason="there is a driver here")
def test_without_a_driver_there_is_no_context():
    assert device.open_context() is False


@pytest.mark.gpu
def test_the_context_is_opened_once_and_its_memory_is_not_counted_again():
    assert device.open_context() is True
    before = device.device_memory_used_bytes()
    assert device.open_context() is True
    assert device.device_memory_used_bytes() == before


@pytest.mark.gpu
def test_cuda_and_nvml_agree_on_the_first_gpu_here():
    first = device._first_cuda_device()
    opened = device.open_nvml()
    assert first is not None
    assert opened is not None
    bus, identifier = first
    nvml = opened.bindings
    found = nvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
    assert nvml.nvmlDeviceGetUUID(found) == nvml.nvmlDeviceGetUUID(opened.whole)
    assert nvml.nvmlDeviceGetUUID(opened.part) in (f"GPU-{identifier}", f"MIG-{identifier}")
