"""What an engine's file is told to be by its content alone, and what is refused."""

import contextlib
import io
import pickle
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gate.engines import containers
from gate.engines.containers import require_engine
from gate.errors import VerificationError

ONNX, PLAN, PT2 = "artifacts/model.onnx", "artifacts/model.plan", "artifacts/model.pt2"
FALLBACK = "artifacts/fallback.onnx"


def looked(data, name):
    stream = io.BytesIO(data)
    found = require_engine(stream, name)
    assert stream.tell() == 0
    return found


def refused(data, name, message):
    with pytest.raises(VerificationError, match=message) as caught:
        looked(data, name)
    assert caught.value.where == name
    return caught.value


def tensor(name="w", outside=None):
    made = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), name)
    if outside is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", outside), ("offset", "0"), ("length", "24")):
            made.external_data.add(key=key, value=value)
    return made


def graph(*nodes, tensors=()):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    return helper.make_graph([*nodes, helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor(), *tensors])


def model(*nodes, tensors=(), functions=()):
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph(*nodes, tensors=tensors), functions=list(functions), opset_imports=opsets)


def constant(value):
    return helper.make_node("Constant", [], ["c"], value=value)


def nested(levels):
    inner = graph(constant(tensor("deep", "../../etc/passwd")))
    for level in range(levels):
        branch = helper.make_node("If", ["x"], [f"o{level}"], then_branch=inner, else_branch=graph())
        inner = graph(branch)
    return helper.make_model(inner)


def plan(version=(8, 6, 0, 12), tag=b"ftrt", size=128):
    return (tag + struct.pack("<IQQ", 0, 2, size) + bytes(version)).ljust(size, b"\1")


def package(*extra, so=b"\x7fELF" + b"\0" * 400, packed=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr("m/data/aotinductor/model/c.wrapper_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
        if so is not None:
            archive.writestr("m/data/aotinductor/model/c.wrapper.so", so)
        archive.writestr("m/byteorder", "little")
        for name, content in extra:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    """A package that AOTInductor wrote."""
    torch = pytest.importorskip("torch")
    from torch import _inductor as inductor

    path = tmp_path_factory.mktemp("package") / "model.pt2"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),))
        inductor.aoti_compile_and_package(program, package_path=str(path))
    return path.read_bytes()


def test_onnx_with_its_weights_inside_is_let_through():
    function = helper.make_function(
        "own", "F", ["a"], ["c"], [constant(tensor("f"))], opset_imports=[helper.make_opsetid("", 21)]
    )
    data = model(constant(tensor("k")), tensors=[tensor("b")], functions=[function]).SerializeToString()
    assert looked(data, ONNX) == "ONNX, of its own"
    assert looked(data, FALLBACK) == "ONNX, of its own"


def test_weights_are_skipped_and_not_read():
    class Counted(io.BytesIO):
        got = 0

        def read(self, size=-1):
            found = super().read(size)
            self.got += len(found)
            return found

    made = model(tensors=[numpy_helper.from_array(np.zeros(5_000_000, np.float32), "large")])
    stream = Counted(made.SerializeToString())
    assert require_engine(stream, ONNX) == "ONNX, of its own"
    assert stream.got < 500_000


def in_initializer():
    return model(tensors=[tensor("bad", "../../etc/passwd")])


def in_attribute():
    return model(constant(tensor("bad", "../../etc/passwd")))


def in_tensors():
    node = helper.make_node("F", [], ["c"], domain="own")
    node.attribute.add(name="all", type=onnx.AttributeProto.TENSORS).tensors.append(tensor("bad", "../../etc/passwd"))
    return model(node)


def in_sparse():
    made = model()
    made.graph.sparse_initializer.add().indices.CopyFrom(tensor("bad", "../../etc/passwd"))
    return made


def in_sparse_attribute():
    node = helper.make_node("F", [], ["c"], domain="own")
    node.attribute.add(name="s").sparse_tensors.add().values.CopyFrom(tensor("bad", "../../etc/passwd"))
    return model(node)


def in_function():
    nodes = [constant(tensor("bad", "../../etc/passwd"))]
    return model(functions=[helper.make_function("own", "F", ["a"], ["c"], nodes, [helper.make_opsetid("", 21)])])


def in_default_of_function():
    made = model(functions=[helper.make_function("own", "F", ["a"], ["c"], [], [helper.make_opsetid("", 21)])])
    made.functions[0].attribute_proto.add(name="d").t.CopyFrom(tensor("bad", "../../etc/passwd"))
    return made


def in_training():
    made = model()
    made.training_info.add().algorithm.CopyFrom(graph(tensors=[tensor("bad", "../../etc/passwd")]))
    return made


@pytest.mark.parametrize(
    "make",
    [
        in_initializer,
        in_attribute,
        in_tensors,
        in_sparse,
        in_sparse_attribute,
        in_function,
        in_default_of_function,
        in_training,
    ],
)
def test_tensor_outside_the_bundle_is_refused_wherever_it_is(make):
    refused(
        make().SerializeToString(), ONNX, r"weights lie outside the bundle: '\.\./\.\./etc/passwd' \(tensor 'bad'\)"
    )


def test_tensor_outside_the_bundle_is_refused_in_graphs_within_graphs():
    refused(nested(5).SerializeToString(), ONNX, r"outside the bundle: '\.\./\.\./etc/passwd' \(tensor 'deep'\)")
    inner = b""
    for level in range(40):
        for tag in (b"\x32", b"\x2a", b"\x0a") if level else (b"\x0a",):
            size = len(inner)
            inner = tag + bytes([size & 0x7F | 0x80, size >> 7]) + inner
    size = len(inner)
    deep = b"\x08\x08\x3a" + bytes([size & 0x7F | 0x80, size >> 7]) + inner + b"\x42\x02\x10\x15"
    refused(deep, ONNX, "more than 100 deep")


def test_tensor_that_is_outside_by_one_sign_alone_is_refused():
    only_place = tensor("bad", "weights.bin")
    only_place.ClearField("data_location")
    refused(model(tensors=[only_place]).SerializeToString(), ONNX, r"outside the bundle: 'weights\.bin'")
    only_flag = tensor("bad", "weights.bin")
    only_flag.ClearField("external_data")
    refused(model(tensors=[only_flag]).SerializeToString(), ONNX, "outside the bundle: it does not say where")


def test_flag_that_another_parser_cuts_to_external_is_refused():
    made = tensor("bad").SerializeToString() + b"\x70\x81\x80\x80\x80\x10"
    body = b"\x2a" + bytes([len(made)]) + made
    data = b"\x08\x08" + b"\x3a" + bytes([len(body)]) + body + b"\x42\x02\x10\x15"
    refused(data, ONNX, "outside the bundle")


def test_tag_that_parsers_read_differently_is_refused():
    refused(b"\xba\x80\x00\x00" + model().SerializeToString(), ONNX, "there is no field at byte 0")
    refused(b"\xba\x80\x80\x80\x90\x01\x00" + model().SerializeToString(), ONNX, "there is no field at byte 0")


def test_every_way_from_a_model_to_a_tensor_is_walked():
    def holds(kind, seen=frozenset()):
        if kind.name == "TensorProto":
            return True
        inner = [each.message_type for each in kind.fields if each.message_type is not None]
        return any(holds(each, seen | {kind.name}) for each in inner if each.name not in seen | {kind.name})

    known, waiting, found = set(), [onnx.ModelProto.DESCRIPTOR], {}
    while waiting:
        kind = waiting.pop()
        if kind.name in known or kind.name == "TensorProto":
            continue
        known.add(kind.name)
        reaching = {
            f.number: f.message_type for f in kind.fields if f.message_type is not None and holds(f.message_type)
        }
        found[kind.name] = {number: each.name for number, each in reaching.items()}
        waiting += reaching.values()
    walked = {name: dict(fields) for name, fields in containers._NESTED.items() if name != "TensorProto"}
    assert found == walked
    fields = TensorProto.DESCRIPTOR.fields_by_name
    assert {name: fields[name].number for name in ("external_data", "data_location", "name")} == {
        "external_data": 13,
        "data_location": 14,
        "name": 8,
    }


@pytest.mark.parametrize("operator", ["EPContext", "PythonOp"])
def test_node_that_is_an_engine_of_its_own_is_refused(operator):
    node = helper.make_node(operator, ["x"], ["z"], name="n", domain="com.microsoft", ep_cache_context="../evil.engine")
    refused(model(node).SerializeToString(), ONNX, f"node 'n' is an {operator}")


def test_every_cut_of_a_graph_is_refused():
    data = helper.make_model(graph(constant(tensor("k")))).SerializeToString()
    for size in range(len(data)):
        refused(data[:size], ONNX, "is empty|cut off|no ONNX")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x08\x08", "it has no graph"),
        (b"hello, this is no graph", "is no ONNX"),
        (b"\x08\x08\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends [0-9]+ bytes past"),
        (b"\x08\x08\x38\x01", "field 7 of a ModelProto is a number"),
        (b"\x00\x00\x00\x00ORTM" + b"\0" * 60, "ONNX Runtime's own format"),
        (b"\x0b" * 40, "wire type 3"),
        (plan(), "is no ONNX|outside|cut off"),
    ],
)
def test_what_is_no_onnx_is_refused(data, message):
    refused(data, ONNX, message)


def test_graph_of_endless_fields_is_refused_before_it_takes_long(monkeypatch):
    monkeypatch.setattr(containers, "MAX_FIELDS", 1000)
    refused(b"\x08\x08" * 2000, ONNX, "has more than 1000 fields")


class Evil:
    def __reduce__(self):
        return print, ("loaded",)


@pytest.mark.parametrize("name", [ONNX, FALLBACK, PLAN, PT2])
@pytest.mark.parametrize("protocol", range(6))
def test_pickle_under_any_name_is_refused(name, protocol, capsys):
    data = pickle.dumps(Evil(), protocol=protocol)
    refused(data, name, "is a pickle, not an engine")
    refused(b"cposix\nsystem\n(S'true'\ntR.", name, "is a pickle, not an engine")
    assert capsys.readouterr().out == ""


def test_legacy_torch_save_is_refused_as_a_pickle():
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    refused(buffer.getvalue(), PT2, "is a pickle, not an engine")


def test_plan_says_what_made_it():
    assert looked(plan(), PLAN) == "TensorRT plan of 8.6.0.12"
    assert looked(plan((1, 7, 1, 116), tag=b"vtrt"), PLAN) == "TensorRT-RTX plan of 1.7.1.116"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (plan()[:20], "is no TensorRT plan, or its header is cut off"),
        (plan()[:-1], "is cut off: it has 127 bytes, its header says 128"),
        (plan() + b"x", "is longer than it says: it has 129 bytes, its header says 128"),
        (b"gtrt" + plan()[4:], "is no TensorRT plan"),
        (model().SerializeToString(), "is no TensorRT plan"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_whole_plan_is_refused(data, message):
    refused(data, PLAN, message)


def test_package_of_aotinductor_is_let_through_and_holds_no_pickle(genuine):
    assert looked(genuine, PT2) == "AOTInductor package of 10 files"


def test_every_kind_of_cut_of_a_package_is_refused(genuine):
    for size in (0, 1, 4, 30, 1000, len(genuine) // 2, len(genuine) - 22, len(genuine) - 1):
        refused(genuine[:size], PT2, "is empty|no whole zip|begins with")
    refused(genuine + b"\0", PT2, "its directory is not at its end")
    refused(b"#!/bin/sh\n" + genuine, PT2, "not as a zip file does")


def test_what_torch_save_and_torch_export_write_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, saved)
    refused(saved.getvalue(), PT2, r"data\.pkl', which is a pickle")
    program = torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),))
    path = tmp_path / "exported.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path)
    refused(path.read_bytes(), PT2, "which is a zip file itself|does not hold")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("m/data/aotinductor/../../../../root/.bashrc", b"x"), "would be written outside"),
        (("/etc/passwd", b"x"), "would be written outside"),
        (("m/data/aotinductor/model/..\\x.so", b"x"), "would be written outside"),
        (("m/data//aotinductor/x.so", b"x"), "would be written outside"),
        (("m/byteorder", b"big"), "'m/byteorder' twice"),
        (("m/ByteOrder", b"big"), "'m/byteorder' twice"),
        (("other/byteorder", b"little"), "has 2 top folders"),
        (("m/models/model.json", b"{}"), "which an AOTInductor package does not hold"),
        (("m/data/constants/opaque_obj_0", b"x"), "which an AOTInductor package does not hold"),
        (("m/data/weights/weight_0", b"x"), "which an AOTInductor package does not hold"),
        (("m/data/aotinductor/model/data.pkl", b"x"), "is a pickle"),
        (("m/data/aotinductor/model/c.json", pickle.dumps([1])), "is a pickle"),
        (("m/data/aotinductor/model/c.json", package()), "is a zip file itself"),
    ],
)
def test_member_that_a_package_does_not_hold_is_refused(extra, message):
    assert looked(package(), PT2) == "AOTInductor package of 3 files"
    refused(package(extra), PT2, message)


def test_package_without_a_compiled_model_is_refused():
    refused(package(so=None), PT2, "there is no compiled model")


def test_symbolic_link_in_a_package_is_refused():
    link = zipfile.ZipInfo("m/data/aotinductor/model/x.so")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(package((link, "/etc/passwd")), PT2, "which is a symbolic link")


def changed(data, signature, offset, form, value):
    """The last header with this signature, with one number in it replaced."""
    at = data.rfind(signature) + offset
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def test_encrypted_member_is_refused():
    refused(changed(package(), b"PK\1\2", 8, "<H", 1), PT2, "which is encrypted")
    refused(changed(package(), b"PK\3\4", 6, "<H", 1), PT2, "own header says something else")


def test_zip_bomb_is_refused():
    bomb = package(so=b"\0" * (2 << 20), packed=zipfile.ZIP_DEFLATED)
    refused(bomb, PT2, "would unpack to 2097152: more than 100 times")
    lying = changed(changed(package(), b"PK\1\2", 10, "<H", 8), b"PK\1\2", 24, "<I", 0xFFFFFFFE)
    refused(lying, PT2, "more than 100 times")


def test_total_of_more_than_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(containers, "MAX_UNPACKED_BYTES", 100)
    refused(package(), PT2, "would unpack to")


def test_overlapping_members_are_refused():
    data = package(("m/version", b"x"))
    refused(changed(data, b"PK\1\2", 42, "<I", 0), PT2, "overlaps another file")
    first = data.find(b"PK\1\2")
    longer = data[: first + 20] + struct.pack("<II", 200, 200) + data[first + 28 :]
    refused(longer, PT2, "overlaps another file")


def test_member_that_its_own_header_calls_otherwise_is_refused():
    data = package()
    at = data.find(b"m/byteorder")
    refused(data[:at] + b"m/byteordes" + data[at + 11 :], PT2, "which its own header calls otherwise")


def test_directory_that_hides_in_a_comment_is_refused():
    inner = package(("m/models/model.json", b"{}"))
    data = changed(package(), b"PK\5\6", 20, "<H", len(inner)) + inner
    refused(data, PT2, "which an AOTInductor|not at its end|overlaps|lies past|calls otherwise")


def test_number_of_files_that_the_directory_does_not_hold_is_refused():
    for count in (2, 4, 60000):
        data = changed(changed(package(), b"PK\5\6", 8, "<H", count), b"PK\5\6", 10, "<H", count)
        refused(data, PT2, "more than it says|cut off|more than 10000")


def test_other_name_is_refused():
    refused(model().SerializeToString(), "artifacts/model.pkl", "no engine is called so")
    refused(model().SerializeToString(), "evidence/metrics.json", "no engine is called so")


def test_file_that_is_cut_short_meanwhile_is_an_error():
    class Shrinking(io.BytesIO):
        def seek(self, at, whence=0):
            found = super().seek(at, whence)
            self.truncate(100)
            return found

    with pytest.raises(VerificationError, match="cut off"):
        require_engine(Shrinking(model().SerializeToString()), ONNX)


def test_stream_that_cannot_be_read_is_an_error():
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(VerificationError, match="cannot be read"):
        require_engine(closed, ONNX)


GENUINE = {
    ONNX: model(constant(tensor("k"))).SerializeToString(),
    PLAN: plan(),
    PT2: package(("m/archive_format", b"pt2")),
}


def at_most_refused(data, name):
    started = time.monotonic()
    with contextlib.suppress(VerificationError):
        assert looked(data, name)
    assert time.monotonic() - started < 1.0


@given(st.binary(max_size=2000), st.sampled_from([ONNX, FALLBACK, PLAN, PT2]))
def test_any_bytes_pass_or_are_refused(data, name):
    at_most_refused(data, name)


@given(st.data(), st.sampled_from([ONNX, PLAN, PT2]))
def test_damaged_engines_pass_or_are_refused(data, name):
    content = bytearray(GENUINE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 8))
        content[at : at + cut] = data.draw(st.binary(max_size=12))
    at_most_refused(bytes(content), name)


def test_no_framework_is_imported_for_it(tmp_path):
    (tmp_path / "model.onnx").write_bytes(GENUINE[ONNX])
    code = (
        "import sys\n"
        "from gate.engines.containers import require_engine\n"
        f"print(require_engine(open({str(tmp_path / 'model.onnx')!r}, 'rb'), {ONNX!r}))\n"
        "print({'onnx', 'torch', 'tensorrt', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ONNX, of its own\nset()\n"
