"""What an engine's file is by its content: looked at without the framework that would load it, and without loading it.

Each file is walked by seeking, in memory that does not grow with it, and no length that it states is believed. A file is
never mapped: one that is cut short meanwhile is then an error here, and not the end of the process.
"""

from __future__ import annotations

import re
import stat
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO

from gate.engines.tensorrt.plan import read_header
from gate.errors import VerificationError

FALLBACK_PATH = "artifacts/fallback.onnx"
"""The ONNX graph that an engine was compiled from, for machines that the engine does not fit."""

MAX_FIELDS = 5_000_000
"""Of a graph, those inside skipped ones left out. A network of 100,000 nodes has about two million."""
MAX_DEPTH = 100
"""Messages within messages. Source: protobuf's own default, `CodedInputStream::default_recursion_limit_`."""
MAX_MEMBERS = 10_000
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_UNPACKED_BYTES = 64 * 2**30
MAX_RATIO = 100
"""Of a member's unpacked size to its packed one, where it is larger than `LEAST_BOMB_BYTES`."""
LEAST_BOMB_BYTES = 2**20

_HEAD_BYTES = 256
_WINDOW_BYTES = 64 * 1024
_TEXT_BYTES = 300

_PICKLE = re.compile(rb"\x80[\x00-\x7f]|[(\[\]{})]*(?:c|i)[A-Za-z_][\w.]*\r?\n[A-Za-z_][\w.]*\r?\n")
"""PROTO, which begins every pickle since protocol 2; before that, GLOBAL or INST. Source: CPython's `pickletools`."""
_ORT_FORMAT = b"ORTM"
"""At offset 4 of a model in ONNX Runtime's own format. Source: ONNX Runtime, `core/flatbuffers/schema/ort.fbs`."""

_TENSOR = "TensorProto"
_NESTED: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
        "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
        "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
        "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
        "NodeProto": {5: "AttributeProto"},
        "AttributeProto": {
            5: _TENSOR,
            6: "GraphProto",
            10: _TENSOR,
            11: "GraphProto",
            22: "SparseTensorProto",
            23: "SparseTensorProto",
        },
        "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
        _TENSOR: {13: "StringStringEntryProto"},
    }
)
"""Fields through which a model can hold a tensor, and what they hold. Source: onnx.proto of ONNX 1.23."""
_IR_VERSION, _GRAPH, _OPSET = (1, 0), (7, 2), (8, 2)
"""Field and wire type of what every model has."""
_NAME, _DATA_LOCATION, _EXTERNAL_DATA = 8, 14, 13
_OP_TYPE, _NODE_NAME = 4, 3
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FOREIGN_CODE = ("EPContext", "PythonOp", "PythonOpGrad")
"""Operators that hold or name another engine, or Python code. Source: ONNX Runtime's contrib operators."""

_END, _END64, _END64_AT, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_PACKAGE = "data/aotinductor/"
_MARKERS = frozenset(
    ("archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id")
)
"""Source: torch/csrc/export/pt2_archive_constants.h and caffe2/serialize/inline_container.cc of PyTorch 2.13."""


def require_engine(stream: BinaryIO, name: str) -> str:
    """Look at an engine's file, or the graph beside it: it must be whole, what its name says, and refer to nothing outside.

    Args:
        stream: The file, which can seek; what is open is looked at, whatever has its name by now. It is at offset 0
            afterwards.
        name: Its path in the bundle, such as `artifacts/model.plan`.

    Returns:
        What it is, in words: `ONNX, of its own`, `TensorRT plan of 8.6.0.12`, `AOTInductor package of 10 files`.

    Raises:
        VerificationError: It is something else, cut off, keeps weights in other files, or holds a pickle; names which.
    """
    kinds = {
        "artifacts/model.onnx": _onnx,
        FALLBACK_PATH: _onnx,
        "artifacts/model.plan": _plan,
        "artifacts/model.pt2": _package,
    }
    look = kinds.get(name)
    if look is None:
        raise VerificationError(f"no engine is called so; engines are {', '.join(kinds)}", where=name)
    file = _File(stream, name)
    head = file.read(0, min(_HEAD_BYTES, file.size))
    if not head:
        raise VerificationError("is empty", where=name)
    if _PICKLE.match(head) is not None:
        raise VerificationError(
            "is a pickle, not an engine",
            where=name,
            hint="Loading a pickle runs what is in it. Seal the engine's own file.",
        )
    words = look(file, head)
    stream.seek(0)
    return words


class _File:
    """A file that is read at offsets, through a small window."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self.where = where
        self._stream = stream
        self._window = b""
        self._window_at = 0
        try:
            self.size = stream.seek(0, 2)
        except (OSError, ValueError) as err:
            raise VerificationError(f"cannot be read: {err}", where=where) from err

    def refused(self, message: str, *, hint: str | None = None) -> VerificationError:
        return VerificationError(message, where=self.where, hint=hint)

    def read(self, at: int, size: int) -> bytes:
        """Exactly these bytes; a few only.

        Raises:
            VerificationError: They are not there.
        """
        start = at - self._window_at
        if start < 0 or start + size > len(self._window):
            try:
                self._stream.seek(at)
                self._window = self._stream.read(max(size, _WINDOW_BYTES))
            except (OSError, ValueError) as err:
                raise self.refused(f"cannot be read: {err}") from err
            self._window_at, start = at, 0
        found = self._window[start : start + size]
        if len(found) != size:
            raise self.refused(f"is cut off: byte {at + len(found)} is missing")
        return found

    def varint(self, at: int, end: int) -> tuple[int, int]:  # value and where it ends, never outside this module
        """A variable-length integer of protobuf, and the offset behind it.

        Raises:
            VerificationError: It goes on past `end`, or is longer than ten bytes.
        """
        value = 0
        data = self.read(at, min(10, end - at)) if at < end else b""
        for index, byte in enumerate(data):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, at + index + 1
        raise self.refused(f"is no ONNX file: there is no number at byte {at}, or the file is cut off")


@dataclass
class _Message:
    """A message of protobuf that is being walked.

    Args:
        kind: Its name in onnx.proto; of others the fields are walked and not looked at.
        at, end: Where the next field begins, and where the message ends.
        name: Of a tensor or node, once it was read.
        problem: What is wrong with a tensor or node, to be told when its name is known.
    """

    kind: str
    at: int
    end: int
    name: str = ""
    problem: str = ""
    location: str | None = None
    key: str = ""
    value: str = ""


@dataclass
class _Field:
    """A field of a message: its number and wire type, its value where that is a number, else where its bytes lie."""

    number: int
    wire: int
    value: int
    start: int
    end: int


def _onnx(file: _File, head: bytes) -> str:
    """Walk a model as far as its tensors; their data is skipped."""
    if head[4:8] == _ORT_FORMAT:
        raise file.refused("is a model in ONNX Runtime's own format, not ONNX")
    seen: set[tuple[int, int]] = set()
    stack = [_Message("ModelProto", 0, file.size)]
    count = 0
    while stack:
        message = stack[-1]
        if message.at >= message.end:
            stack.pop()
            _require_of_its_own(file, message)
            if message.kind == "StringStringEntryProto" and stack and message.key == "location":
                stack[-1].location = message.value
            continue
        count += 1
        if count > MAX_FIELDS:
            raise file.refused(f"has more than {MAX_FIELDS} fields, which no engine's graph has")
        field = _field(file, message)
        message.at = field.end
        if message.kind == "ModelProto":
            seen.add((field.number, field.wire))
        inner = _look(file, message, field)
        if inner is not None:
            if len(stack) >= MAX_DEPTH:
                raise file.refused(f"its messages lie more than {MAX_DEPTH} deep in each other")
            stack.append(inner)
    for field_and_wire, what in ((_IR_VERSION, "version"), (_GRAPH, "graph"), (_OPSET, "operator set")):
        if field_and_wire not in seen:
            raise file.refused(f"is no ONNX model, or cut off: it has no {what}")
    return "ONNX, of its own"


def _field(file: _File, message: _Message) -> _Field:
    """The next field.

    Tags are held strictly, since what parsers make of sloppy ones differs: a tag of five bytes loses its upper bits in one.
    """
    tag, start = file.varint(message.at, message.end)
    number, wire = tag >> 3, tag & 7
    if not 0 < number < 2**29 or start - message.at != max(1, -(-tag.bit_length() // 7)):
        raise file.refused(f"is no ONNX file: there is no field at byte {message.at}")
    value = 0
    if wire == _VARINT:
        value, end = file.varint(start, message.end)
    elif wire == _LENGTH:
        length, start = file.varint(start, message.end)
        end = start + length
    elif wire in (_FIXED64, _FIXED32):
        end = start + (8 if wire == _FIXED64 else 4)
    else:
        raise file.refused(f"is no ONNX file: field {number} at byte {message.at} is of wire type {wire}")
    if end > message.end:
        raise file.refused(
            f"is no ONNX file, or cut off: field {number} at byte {message.at} ends {end - message.end} bytes past what "
            "holds it"
        )
    return _Field(number, wire, value, start, end)


def _look(file: _File, message: _Message, field: _Field) -> _Message | None:
    """Take from a field what matters; returns the message to walk next, where the field holds one."""
    known = _NESTED.get(message.kind, {}).get(field.number)
    if known is not None:
        if field.wire != _LENGTH:
            raise file.refused(f"is no ONNX file: field {field.number} of a {message.kind} is a number")
        if message.kind == _TENSOR:
            message.problem = message.problem or "its weights lie outside the bundle"
        return _Message(known, field.start, field.end)
    if message.kind == _TENSOR:
        if field.number == _DATA_LOCATION and (field.wire != _VARINT or field.value != 0):
            message.problem = "its weights lie outside the bundle"
        elif field.number == _NAME:
            message.name = _text(file, field)
    elif message.kind == "NodeProto":
        if field.number == _NODE_NAME:
            message.name = _text(file, field)
        elif field.number == _OP_TYPE and (operator := _text(file, field)) in _FOREIGN_CODE:
            message.problem = f"is an {operator}: an engine or code of its own, which nobody checked"
    elif message.kind == "StringStringEntryProto":
        if field.number == _KEY:
            message.key = _text(file, field)
        elif field.number == _VALUE:
            message.value = _text(file, field)
    return None


def _require_of_its_own(file: _File, message: _Message) -> None:
    """Refuse a tensor or a node that was found wrong, once it was walked to its end and its name is known."""
    if not message.problem:
        return
    if message.kind == _TENSOR:
        place = "it does not say where" if message.location is None else repr(message.location)
        raise file.refused(
            f"{message.problem}: {place} (tensor {message.name!r})",
            hint="Save the graph with its weights inside: onnx.save(model, path, save_as_external_data=False).",
        )
    raise file.refused(f"node {message.name!r} {message.problem}")


def _text(file: _File, field: _Field) -> str:
    """A field's text, its beginning where it is long."""
    if field.wire != _LENGTH:
        raise file.refused(f"is no ONNX file: field {field.number} at byte {field.start} is no text")
    data = file.read(field.start, min(field.end - field.start, _TEXT_BYTES))
    return data.decode("utf-8", "backslashreplace")


def _plan(file: _File, head: bytes) -> str:
    """Hold a plan's header against the file's length."""
    header = read_header(head)
    if header is None:
        raise file.refused(
            f"is no TensorRT plan, or its header is cut off: it begins with {head[:4]!r}, a plan of TensorRT 8.6 and above "
            "with b'ftrt', one of TensorRT-RTX with b'vtrt'"
        )
    if header.length_bytes is not None and header.length_bytes != file.size:
        what = "cut off" if file.size < header.length_bytes else "longer than it says"
        raise file.refused(f"is {what}: it has {file.size} bytes, its header says {header.length_bytes}")
    product, _, version = header.made_by.partition(" ")
    return f"{product} plan {version}" if header.version is None else f"{product} plan of {version}"


@dataclass(frozen=True)
class _Member:
    """An entry of a zip file's central directory."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    packed: int
    unpacked: int
    offset: int
    mode: int


def _package(file: _File, head: bytes) -> str:
    """Hold a zip file's directory against what an AOTInductor package holds. No member is unpacked."""
    if not head.startswith(_LOCAL):
        raise file.refused(f"is no AOTInductor package: it begins with {head[:4]!r}, not as a zip file does")
    start, size, count = _directory(file)
    members: list[_Member] = []
    data = file.read(start, size)
    for member in _members(file, data, count):
        _require_sane(file, member)
        members.append(member)
    names = Counter(unicodedata.normalize("NFC", each.name).casefold() for each in members)
    if len(names) != len(members):
        raise file.refused(f"holds {names.most_common(1)[0][0]!r} twice")
    if (total := sum(each.unpacked for each in members)) > MAX_UNPACKED_BYTES:
        raise file.refused(f"would unpack to {total / 2**30:.0f} GiB, more than {MAX_UNPACKED_BYTES // 2**30} GiB")
    _require_layout(file, members, start)
    _require_package(file, members)
    return f"AOTInductor package of {len(members)} files"


def _directory(file: _File) -> tuple[int, int, int]:  # offset, size and entries, never outside this module
    """Where the central directory lies. Nothing may stand before the first member or after the end, as PyTorch writes it.

    Readers that search for it find one in a comment, too, and so two readers may see two packages in one file.

    Source: PKWARE's APPNOTE.TXT 6.3.10, 4.3.14 to 4.3.16.
    """
    cut = "is no whole zip file: its directory is not at its end"
    if file.size < 22:
        raise file.refused(cut)
    end_at = file.size - 22
    signature, disk, first, here, count, size, start, comment = struct.unpack("<4s4H2IH", file.read(end_at, 22))
    if signature != _END or comment:
        raise file.refused(cut)
    if disk or first or here != count:
        raise file.refused("is a part of a zip file of several parts")
    directory_end = end_at
    if end_at >= 76 and file.read(end_at - 20, 4) == _END64_AT:
        _, _, end64_at, disks = struct.unpack("<4sIQI", file.read(end_at - 20, 20))
        directory_end = end_at - 76
        if end64_at != directory_end or disks != 1:
            raise file.refused(cut)
        signature, length, _, _, disk, first, here64, count64, size64, start64 = struct.unpack(
            "<4sQ2H2I4Q", file.read(directory_end, 56)
        )
        if signature != _END64 or length != 44 or disk or first or here64 != count64:
            raise file.refused(cut)
        pairs = ((count, count64, 0xFFFF), (size, size64, 0xFFFFFFFF), (start, start64, 0xFFFFFFFF))
        if any(short not in (long, most) for short, long, most in pairs):
            raise file.refused("its directory says two things of itself")
        count, size, start = count64, size64, start64
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise file.refused(f"holds {count} files, more than {MAX_MEMBERS}, or names that are too long")
    if start + size != directory_end:
        raise file.refused(cut)
    return start, size, count


def _members(file: _File, data: bytes, count: int) -> Iterator[_Member]:
    """The entries of a central directory.

    Source: PKWARE's APPNOTE.TXT 6.3.10, 4.3.12 and 4.5.3.
    """
    at = 0
    for index in range(count):
        if len(data) - at < 46:
            raise file.refused(f"its directory is cut off: it says {count} files, and lists {index}")
        fields = struct.unpack_from("<4s6H3I5H2I", data, at)
        signature, _, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length, comment_length = fields[
            :13
        ]
        disk, _, attributes, offset = fields[13], *fields[14:]
        name_at = at + 46
        extra_at = name_at + name_length
        at = extra_at + extra_length + comment_length
        if signature != _ENTRY or at > len(data):
            raise file.refused(f"its directory is damaged at entry {index}")
        raw_name = data[name_at:extra_at]
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError as err:
            raise file.refused(f"holds a file whose name is no UTF-8: {raw_name[:80]!r}") from err
        long = _zip64_of(data[extra_at : extra_at + extra_length])
        sizes = []
        for value in (unpacked, packed, offset):
            if value != 0xFFFFFFFF:
                sizes.append(value)
            elif len(long) >= 8:
                sizes.append(int.from_bytes(long[:8], "little"))
                long = long[8:]
            else:
                raise file.refused(f"{name!r} says that its size is elsewhere, and it is not")
        if disk not in (0, 0xFFFF):
            raise file.refused("is a part of a zip file of several parts")
        yield _Member(name, raw_name, flags, method, sizes[1], sizes[0], sizes[2], mode=attributes >> 16)
    if at != len(data):
        raise file.refused("its directory holds more than it says")


def _zip64_of(extra: bytes) -> bytes:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def _require_sane(file: _File, member: _Member) -> None:
    """Refuse a member that would be written elsewhere, or that unpacks to far more than it is."""
    name = member.name
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f\x7f]", name):
        raise file.refused(f"holds {name!r:.200}, which would be written outside the package's folder")
    if stat.S_IFMT(member.mode) not in (0, stat.S_IFREG):
        what = "a symbolic link" if stat.S_ISLNK(member.mode) else "no regular file"
        raise file.refused(f"holds {name!r}, which is {what}")
    if member.flags & _ENCRYPTED:
        raise file.refused(f"holds {name!r}, which is encrypted")
    if member.method not in (_STORED, _DEFLATED):
        raise file.refused(f"holds {name!r}, packed by method {member.method}, which PyTorch does not use")
    if member.method == _STORED and member.packed != member.unpacked:
        raise file.refused(f"holds {name!r}, which is not packed and has two sizes")
    if member.unpacked > LEAST_BOMB_BYTES and member.unpacked > MAX_RATIO * member.packed:
        raise file.refused(
            f"holds {name!r}, {member.packed} bytes that would unpack to {member.unpacked}: more than {MAX_RATIO} times"
        )


def _require_layout(file: _File, members: list[_Member], directory: int) -> None:
    """Hold each member's own header against the directory, and refuse members that share bytes."""
    free = 0
    for member in sorted(members, key=lambda each: each.offset):
        if member.offset < free or (free == 0 and member.offset != 0):
            raise file.refused(f"holds {member.name!r}, which overlaps another file, or bytes before the first one")
        if member.offset + 30 + len(member.raw_name) > directory:
            raise file.refused(f"holds {member.name!r}, which lies past the files' end")
        header = struct.unpack("<4s5H3I2H", file.read(member.offset, 30))
        signature, _, flags, method = header[:4]
        name_length, extra_length = header[-2:]
        if signature != _LOCAL or file.read(member.offset + 30, len(member.raw_name)) != member.raw_name:
            raise file.refused(f"holds {member.name!r}, which its own header calls otherwise")
        if name_length != len(member.raw_name) or method != member.method or flags & _ENCRYPTED:
            raise file.refused(f"holds {member.name!r}, of which its own header says something else")
        start = member.offset + 30 + name_length + extra_length
        free = start + member.packed
        if free > directory:
            raise file.refused(f"holds {member.name!r}, which is cut off")
        if member.method == _STORED:
            _require_no_pickle(file, member, file.read(start, min(_HEAD_BYTES, member.packed)))


def _require_no_pickle(file: _File, member: _Member, head: bytes) -> None:
    """Refuse a member that is a pickle, or a zip file that may hold one."""
    if re.match(rb"\x80[\x02-\x05]", head) is not None or member.name.endswith((".pkl", ".pickle")):
        raise file.refused(
            f"holds {member.name!r}, which is a pickle: what torch.save wrote is no engine",
            hint='Seal what AOTInductor wrote: options = { mode = "aotinductor" }.',
        )
    if head.startswith(_LOCAL):
        raise file.refused(f"holds {member.name!r}, which is a zip file itself")


def _require_package(file: _File, members: list[_Member]) -> None:
    """Refuse what an AOTInductor package does not hold.

    PyTorch's loader unpickles the constants of an exported program that lies beside the compiled one (`models/`), so
    there may be none.

    Source: `load_pt2` in torch/export/pt2_archive/_package.py of PyTorch 2.13.
    """
    roots = {each.name.partition("/")[0] for each in members}
    if len(roots) != 1:
        raise file.refused(f"is no AOTInductor package: it has {len(roots)} top folders, a package has one")
    libraries = 0
    for member in members:
        _require_no_pickle(file, member, b"")
        inside = member.name.partition("/")[2]
        if inside in _MARKERS:
            continue
        model, _, rest = inside.removeprefix(_PACKAGE).partition("/")
        if not inside.startswith(_PACKAGE) or not model or not rest:
            raise file.refused(f"holds {member.name!r}, which an AOTInductor package does not hold")
        libraries += rest.endswith(".so")
    if not libraries:
        raise file.refused(f"is no AOTInductor package: there is no compiled model in {_PACKAGE}")
