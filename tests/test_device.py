"""The fingerprint of this machine, and the commit of a folder."""

import os
import subprocess
import sys

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
    monkeypatch.setitem(sys.modules, "pynvml", None)
    device.gpu.cache_clear()
    try:
        assert device.gpu() == device.Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.1")
    finally:
        device.gpu.cache_clear()


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
