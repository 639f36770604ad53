"""What a package says of itself, read without loading it, and held against what is here."""

import json
import sys
import zipfile

import msgspec
import pytest

from gate.device import Gpu
from gate.engines.interface import Layer
from gate.engines.torch.package import (
    Description,
    read_description,
    require_loadable,
    require_loads_alone,
)
from gate.errors import IncompatibleEngine, RunError

HERE = {"version": "2.11.0+cu126", "machine": "x86_64", "isa": ("avx2", "avx512f"), "where": "model.pt2"}
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", driver="580.1")
TABLE = {
    "AOTI_DEVICE_KEY": "cpu",
    "AOTI_MACHINE": "x86_64",
    "AOTI_CPU_ISA": "AVX512 AVX512_VNNI WHAT",
    "AOTI_COMPUTE_CAPABILITY": "",
}


def package(path, *tables):
    with zipfile.ZipFile(path, "w") as archive:
        for index, table in enumerate(tables):
            archive.writestr(f"m/data/aotinductor/model/{index}_metadata.json", table)
        archive.writestr("m/byteorder", "little")
    return path


def load(told, device="cpu", here=None):
    require_loadable(told, device=device, here=here, **HERE)


def test_what_fits_is_let_through():
    load(Description(device="cpu", torch="2.11.0+cpu", machine="x86_64", isa=("avx2",)))
    load(Description(device="cuda", torch="2.11.0+cu128", compute_capability="9.0"), "cuda", H200)
    load(Description(device="cpu"))


@pytest.mark.parametrize(
    ("told", "device", "message"),
    [
        ({"device": "cuda"}, "cpu", "was compiled for cuda, the engine is to run on cpu"),
        ({"device": "cpu"}, "cuda", "was compiled for cpu, the engine is to run on cuda"),
        ({"device": "cpu", "torch": "2.13.0"}, "cpu", r"by PyTorch 2\.13\.0, here is 2\.11\.0\+cu126"),
        ({"device": "cpu", "machine": "aarch64"}, "cpu", "for aarch64, here is x86_64"),
        ({"device": "cpu", "isa": ("avx2", "amx_int8")}, "cpu", "this processor has not: amx_int8"),
        (
            {"device": "cuda", "compute_capability": "8.9"},
            "cuda",
            r"compute capability 8\.9, here is 9\.0 \(NVIDIA H200\)",
        ),
    ],
)
def test_what_was_made_for_another_place_is_refused_with_both_sides_named(told, device, message):
    with pytest.raises(IncompatibleEngine, match=message):
        load(Description(**told), device, H200)


def test_a_package_of_the_teams_own_says_what_aotinductor_wrote(tmp_path):
    told = read_description(package(tmp_path / "m.pt2", json.dumps(TABLE)))
    assert told == Description(device="cpu", machine="x86_64", isa=("avx512f", "avx512_vnni"))
    cuda = {**TABLE, "AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "90"}
    assert read_description(package(tmp_path / "c.pt2", json.dumps(cuda))).compute_capability == "9.0"


def test_a_package_of_the_gate_says_what_the_gate_wrote(tmp_path):
    own = {"device": "cuda", "torch": "2.11.0", "compute_capability": "9.0", "outputs": {"scores": "float32"}}
    told = read_description(package(tmp_path / "m.pt2", json.dumps({**TABLE, "gate": json.dumps(own)})))
    assert told.torch == "2.11.0"
    assert told.outputs == {"scores": "float32"}
    assert (told.precision, told.layers) == (None, ())


def test_the_layers_of_a_package_of_the_gate_are_in_it(tmp_path):
    layers = tuple(Layer(f"blocks.{index}/linear", "Gemm", "fp16") for index in range(20_000))
    own = Description(device="cpu", precision="fp16", layers=layers)
    text = json.dumps({**TABLE, "gate": json.dumps(msgspec.to_builtins(own))})
    assert read_description(package(tmp_path / "m.pt2", text)) == own


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ((), "does not say for which device"),
        (("[]",), "does not say for which device"),
        (("{}",), "does not say for which device"),
        (("{",), "is no AOTInductor package, or a part of one"),
        ((json.dumps({**TABLE, "gate": "{"}),), "its description cannot be read"),
        ((json.dumps({**TABLE, "gate": "{}"}),), "its description cannot be read"),
        ((json.dumps({**TABLE, "gate": 3}),), "its description cannot be read"),
    ],
)
def test_a_zip_that_is_no_package_is_refused(tmp_path, tables, message):
    with pytest.raises(RunError, match=message):
        read_description(package(tmp_path / "m.pt2", *tables))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all", b"\x7fELF" + bytes(100)])
def test_what_is_no_zip_is_refused(tmp_path, content):
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    with pytest.raises(RunError, match="is no AOTInductor package"):
        read_description(path)


def test_a_package_that_another_process_cannot_load_is_refused(tmp_path):
    path = package(tmp_path / "m.pt2", json.dumps(TABLE))
    with pytest.raises(RunError, match="a process of its own could not load it: .+"):
        require_loads_alone(path, device="cpu")


def test_a_package_that_crashes_another_process_is_refused_with_its_signal(tmp_path, monkeypatch):
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(RunError, match="a process of its own was ended by SIGSEGV") as caught:
        require_loads_alone(package(tmp_path / "m.pt2", json.dumps(TABLE)), device="cpu")
    assert "cannot be released" in (caught.value.hint or "")
