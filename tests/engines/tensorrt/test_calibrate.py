"""Calibration samples reach the calibrator whole and checked; a cache that belongs to something else is refused."""

import struct
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.engines.tensorrt.calibrate import (
    BatchShape,
    Cache,
    CacheKey,
    Feed,
    calibrator,
    ranges_of,
    read_cache,
    rebatched,
    write_cache,
)
from gate.engines.tensorrt.log import Interruption
from gate.errors import BuildError

KEY = CacheKey(model_sha256="a" * 64, calibration_sha256="b" * 64, tensorrt_version="8.6.0", method="entropy")
PAYLOAD = b"TRT-8600-EntropyCalibration2\nx: 3c010a14\n"
INPUTS = {"x": BatchShape("float32", (4, 2)), "k": BatchShape("int32", (4,))}


def samples(*sizes):
    start, made = 0, []
    for size in sizes:
        numbers = np.arange(start, start + size)
        made.append({"x": np.stack([numbers, -numbers], axis=1).astype(np.float32), "k": numbers.astype(np.int32)})
        start += size
    return made


def joined(batches, name="k"):
    return np.concatenate([batch[name] for batch in batches]) if batches else np.empty(0, np.int32)


@given(st.lists(st.integers(0, 11), max_size=8))
def test_rebatching_keeps_every_sample_in_order_but_the_rest(sizes):
    dropped = []
    made = list(rebatched(samples(*sizes), INPUTS, dropped=dropped.append))
    assert all(batch["x"].shape == (4, 2) and batch["x"].flags.c_contiguous for batch in made)
    assert len(made) == sum(sizes) // 4
    assert dropped == [sum(sizes) % 4]
    np.testing.assert_array_equal(joined(made), np.arange(sum(sizes) // 4 * 4))
    for batch in made:
        np.testing.assert_array_equal(batch["x"][:, 0], batch["k"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("k"), "the network has x, k"),
        (lambda batch: batch.update(z=batch["k"]), "the network has x, k"),
        (lambda batch: batch.update(x=batch["x"].astype(np.float64)), "'x' are float64, the network takes float32"),
        (lambda batch: batch.update(x=np.zeros((4, 3), np.float32)), r"'x' have the shape \[3\], the profile's opt is"),
        (lambda batch: batch.update(x=np.zeros(4, np.float32)), "have the shape"),
        (lambda batch: batch["x"].__setitem__((0, 0), np.nan), "'x' are not finite"),
        (lambda batch: batch["x"].__setitem__((0, 0), np.inf), "'x' are not finite"),
        (lambda batch: batch.update(k=batch["k"][:3]), r"differ in number between inputs \(x: 4, k: 3\)"),
    ],
)
def test_samples_that_do_not_fit_are_refused(change, message):
    (batch,) = samples(4)
    change(batch)
    with pytest.raises(BuildError, match=message):
        list(rebatched([batch], INPUTS, dropped=lambda count: None))


class DeviceMemory:
    def __init__(self):
        self.blocks, self.closed = {}, 0

    def stream(self):
        return 7

    def allocate(self, nbytes):
        self.blocks[len(self.blocks) + 1] = None
        return len(self.blocks)

    def free(self, address):
        del self.blocks[address]

    def to_device(self, address, array, stream):
        self.blocks[address] = array.copy()

    def synchronize(self, stream):
        pass

    def close(self, stream):
        self.closed += 1


def feed(*sizes, cache=None, progress=None, **other):
    memory, interruption = DeviceMemory(), Interruption()
    made = Feed(
        other.get("calibration", lambda: iter(samples(*sizes))),
        inputs=INPUTS,
        cache=cache,
        memory=lambda: memory,
        progress=progress,
        interruption=interruption,
    )
    return made, memory, interruption


def test_feed_serves_addresses_in_the_order_asked_for_and_ends():
    told = []
    made, memory, interruption = feed(3, 6, progress=lambda name, done: told.append((name, done)))
    seen = []
    while addresses := made.next(["k", "x"]):
        seen.append(memory.blocks[addresses[0]])
        assert memory.blocks[addresses[1]].shape == (4, 2)
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(8))
    assert (made.served, made.dropped, interruption.cause) == (2, 1, None)
    assert told == [("calibrate", 0.5), ("calibrate", 1.0)]
    made.found = PAYLOAD
    assert made.result() == Cache(payload=PAYLOAD, samples=8)
    made.close()
    made.close()
    assert (memory.blocks, memory.closed) == ({}, 1)


@pytest.mark.parametrize("sizes", [(), (0,), (3,), (1, 2)])
def test_less_than_one_batch_is_an_error(sizes):
    with pytest.raises(BuildError, match=f"{sum(sizes)} calibration samples do not fill one batch of 4"):
        feed(*sizes)


def test_feed_never_raises_into_the_compiler():
    made, _, interruption = feed(4)
    assert made.next(["other"]) is None
    assert isinstance(interruption.cause, BuildError)
    assert made.next(["x", "k"]) is None  # nothing more after that
    with pytest.raises(BuildError, match="the calibrator asks for other; the network has x, k"):
        interruption.raise_cause()


def test_samples_that_change_between_readings_are_noticed():
    reads = iter([samples(4), [{"x": np.full((4, 2), np.nan, np.float32), "k": np.zeros(4, np.int32)}]])
    made, _, interruption = feed(calibration=lambda: next(reads))
    assert made.next(["x", "k"]) is None
    with pytest.raises(BuildError, match="not finite"):
        interruption.raise_cause()


def test_ctrl_c_while_samples_are_read_is_kept():
    def interrupted(name, done):
        raise KeyboardInterrupt

    made, _, interruption = feed(4, progress=interrupted)
    assert made.next(["x", "k"]) is None
    assert isinstance(interruption.cause, KeyboardInterrupt)


def test_calibrator_that_was_not_asked_has_no_result():
    made, _, _ = feed(4)
    with pytest.raises(BuildError, match="asked the calibrator for nothing"):
        made.result()
    made.next(["x", "k"])
    with pytest.raises(BuildError, match="gave no ranges"):
        made.result()


def test_cache_is_served_instead_of_samples():
    cache = Cache(payload=PAYLOAD, samples=12)
    made, _, _ = feed(cache=cache)
    with pytest.raises(BuildError, match="asked the calibrator for nothing"):
        made.result()
    assert made.read() == PAYLOAD
    assert made.result() == cache


def test_calibrator_is_of_the_modules_class():
    class Base:
        def __init__(self):
            self.ready = True

    made, _, _ = feed(4)
    found = calibrator(SimpleNamespace(IInt8MinMaxCalibrator=Base), "minmax", made)
    assert isinstance(found, Base)
    assert found.ready
    assert found.get_batch_size() == 4
    assert found.read_calibration_cache() is None
    assert len(found.get_batch(["x", "k"])) == 2
    found.write_calibration_cache(memoryview(PAYLOAD))
    assert made.result().payload == PAYLOAD


def test_cache_is_read_as_written(tmp_path):
    path = tmp_path / "new" / "int8.cache"
    assert read_cache(path, KEY) is None
    write_cache(path, KEY, Cache(payload=PAYLOAD, samples=128))
    assert read_cache(path, KEY) == Cache(payload=PAYLOAD, samples=128)
    assert path.read_bytes().partition(b"\n")[2] == PAYLOAD  # what `tail -n +2` gives trtexec


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model_sha256", "another model: it has aaaaaaaaaaaa…, here is zzz"),
        ("calibration_sha256", "another set of calibration samples"),
        ("tensorrt_version", r"another version of TensorRT: it has 8\.6\.0, here is zzz"),
        ("method", "another calibrator: it has entropy, here is zzz"),
    ],
)
def test_cache_of_something_else_is_refused_and_left(tmp_path, field, message):
    path = tmp_path / "int8.cache"
    write_cache(path, KEY, Cache(payload=PAYLOAD, samples=128))
    before = path.read_bytes()
    with pytest.raises(BuildError, match=message) as caught:
        read_cache(path, msgspec.structs.replace(KEY, **{field: "zzz"}))
    assert "Delete the file" in caught.value.hint
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [lambda data: data[:-3], lambda data: data.replace(b"3c01", b"3c02"), lambda data: data + b"y"]
)
def test_cache_whose_ranges_were_changed_is_refused(tmp_path, change):
    path = tmp_path / "int8.cache"
    write_cache(path, KEY, Cache(payload=PAYLOAD, samples=128))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BuildError, match="is damaged"):
        read_cache(path, KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PAYLOAD, "TensorRT's own calibration cache"),
        (b"", "no calibration cache of the gate"),
        (b"\xff\xfe", "no calibration cache of the gate"),
        (b"{}\n" + PAYLOAD, "no calibration cache of the gate"),
        (b"[]", "no calibration cache of the gate"),
    ],
)
def test_file_that_is_no_cache_is_refused(tmp_path, content, message):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(BuildError, match=message):
        read_cache(tmp_path / "c", KEY)


def test_cache_of_no_sample_or_another_format_is_refused(tmp_path):
    path = tmp_path / "c"
    write_cache(path, KEY, Cache(payload=PAYLOAD, samples=0))
    with pytest.raises(BuildError, match="was made of 0 samples"):
        read_cache(path, KEY)
    path.write_bytes(path.read_bytes().replace(b"trt-gate", b"other"))
    with pytest.raises(BuildError, match="its format is 'other calibration cache'"):
        read_cache(path, KEY)


def test_cache_that_is_a_link_or_folder_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BuildError, match="the calibration cache is a symbolic link"):
        read_cache(tmp_path / "link", KEY)
    with pytest.raises(BuildError, match="the calibration cache is not a regular file"):
        read_cache(tmp_path / "folder", KEY)


@given(
    st.lists(st.tuples(st.from_regex(r"[a-z/.: ]{1,20}[a-z]", fullmatch=True), st.floats(0, 1e6, width=32)), min_size=1)
)
def test_ranges_are_the_scales_times_127(entries):
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in entries]
    found = ranges_of("\n".join(["TRT-8600-MinMaxCalibration", *lines, ""]).encode())
    assert [(each.name, each.high, each.low) for each in found] == [
        (name, scale * 127, -scale * 127) for name, scale in entries
    ]
    assert [each.state for each in found] == ["ok" if scale > 0 else "dead" for _, scale in entries]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "do not begin as TensorRT writes them"),
        (b"x: 3c010a14\n", "do not begin as TensorRT writes them"),
        (b"TRT-8600-EntropyCalibration2\n", "no range at all"),
        (b"TRT-8600-EntropyCalibration2\nx: zz\n", "line 2"),
        (b"TRT-8600-EntropyCalibration2\nx: 3c01\n", "line 2"),
        (b"TRT-8600-EntropyCalibration2\n3c010a14\n", "line 2"),
        (b"TRT-8600-EntropyCalibration2\nx: 7fc00000\n", "has the scale nan"),
        (b"TRT-8600-EntropyCalibration2\nx: 7f800000\n", "has the scale inf"),
        (b"TRT-8600-EntropyCalibration2\nx: bc010a14\n", "has the scale -"),
    ],
)
def test_ranges_that_cannot_be_read_are_an_error(payload, message):
    with pytest.raises(BuildError, match=message):
        ranges_of(payload)
