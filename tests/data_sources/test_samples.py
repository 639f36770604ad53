"""Samples: read in batches, checked against the spec, digested, kept apart from calibration."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.data.batches import Batch
from gate.data.samples import (
    ArraySource,
    DigestedSource,
    Samples,
    all_batches,
    digest_of,
    open_source,
    require_disjoint,
    target_digest,
)
from gate.errors import DataError
from gate.spec import InputSpec, SpecFile, spec_from_text
from gate.targets import ImageRecord, ImageTarget

SPEC = """schema = 1
[model]
id = "m"
factory = "model:load"
[inputs.x]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 4, max = 8 }
[data]
source = "data:evaluation"
samples = 6
[[engine]]
name = "a"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
"""

INPUTS = {"x": InputSpec(dtype="float32", shape=("batch", 4), axes={})}


def spec_in(folder: Path, code: str) -> SpecFile:
    (folder / "data.py").write_text("import numpy as np\nfrom gate import Samples\n" + code)
    return spec_from_text(SPEC, path=folder / "gate.toml")


def opened(folder: Path, code: str, needed: int = 6):
    return open_source(spec_in(folder, code), "data:evaluation", needed=needed, key="source")


def test_samples_a_mapping_and_a_dataset_give_the_same_digest(tmp_path: Path) -> None:
    codes = [
        "def evaluation(): return Samples({'x': np.arange(24, dtype='f4').reshape(6, 4)}, np.arange(6))",
        "def evaluation(): return {'x': np.arange(24, dtype='f4').reshape(6, 4), 'label': np.arange(6)}",
        """class D:
    def __len__(self): return 6
    def __getitem__(self, i): return np.arange(4 * i, 4 * i + 4, dtype='f4'), i
def evaluation(): return D()""",
        """class D:
    def __len__(self): return 6
    def __getitem__(self, i): return {'x': np.arange(4 * i, 4 * i + 4, dtype='f4'), 'label': np.int64(i)}
def evaluation(): return D()""",
    ]
    digests = set()
    for index, code in enumerate(codes):
        folder = tmp_path / str(index)
        folder.mkdir()
        digests.add(digest_of(opened(folder, code), inputs=INPUTS, batch=4, where="here").data_sha256)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def evaluation(): return Samples({'x': np.zeros((0, 4), 'f4')})", "gives no samples"),
        ("def evaluation(): return Samples({'x': np.zeros((5, 4), 'f4')})", "gives 5 samples, \\[data\\] asks for 6"),
        ("def evaluation(): return Samples({'x': np.zeros((6, 4), 'f4')}, np.zeros(5, int))", "6 samples but 5 labels"),
        ("def evaluation(): return Samples({'y': np.zeros((6, 4), 'f4')})", "has inputs 'y', the spec has 'x'"),
        ("def evaluation(): return Samples({'x': np.zeros((6, 4), 'f4')}, np.zeros(6))", "labels must be integers"),
        ("def evaluation(): return 3", "gave a int"),
        ("def evaluation(): raise ValueError('no disk')", "ValueError: no disk"),
    ],
)
def test_a_source_that_cannot_be_used_is_an_error(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, code)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("np.zeros((6, 4), 'f8')", "is float64, the spec says float32"),
        ("np.zeros((6, 5), 'f4')", "has 5 on axis 1"),
        ("np.zeros((6, 4, 1), 'f4')", "has shape"),
        ("np.full((6, 4), np.nan, 'f4')", "NaN or Inf at sample 0"),
        ("np.where(np.arange(24).reshape(6, 4) == 21, np.inf, 0).astype('f4')", "NaN or Inf at sample 5"),
    ],
)
def test_a_sample_that_does_not_fit_the_spec_is_an_error(tmp_path: Path, code: str, message: str) -> None:
    source = opened(tmp_path, f"def evaluation(): return Samples({{'x': {code}}})")
    with pytest.raises(DataError, match=message):
        digest_of(source, inputs=INPUTS, batch=4, where="here")


def test_a_dataset_that_breaks_in_the_middle_names_the_sample(tmp_path: Path) -> None:
    code = """class D:
    def __len__(self): return 6
    def __getitem__(self, i): return np.zeros(4, 'f4') if i < 3 else open('/nowhere')
def evaluation(): return D()"""
    with pytest.raises(DataError, match="sample 3 cannot be read: FileNotFoundError"):
        digest_of(opened(tmp_path, code), inputs=INPUTS, batch=4, where="here")


def test_a_dataset_with_labels_for_some_is_an_error(tmp_path: Path) -> None:
    code = """class D:
    def __len__(self): return 6
    def __getitem__(self, i): return {'x': np.zeros(4, 'f4'), **({'label': 1} if i != 4 else {})}
def evaluation(): return D()"""
    with pytest.raises(DataError, match="sample 4 has no label"):
        digest_of(opened(tmp_path, code), inputs=INPUTS, batch=6, where="here")


def test_npz_and_safetensors_files_are_read_and_pickles_are_not(tmp_path: Path) -> None:
    file = spec_in(tmp_path, "")
    values = {"x": np.ones((6, 4), np.float32), "label": np.arange(6)}
    np.savez(tmp_path / "a.npz", **values)
    assert len(open_source(file, "a.npz", needed=6, key="source")) == 6
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        open_source(file, "b.npz", needed=6, key="source")
    (tmp_path / "c.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(file, "c.safetensors", needed=6, key="source")
    with pytest.raises(DataError, match="there is no file"):
        open_source(file, "d.npz", needed=6, key="source")


@given(batch=st.integers(1, 9), shift=st.integers(0, 5))
def test_the_digest_depends_on_content_and_order_and_not_on_the_batch(batch: int, shift: int) -> None:
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    one = digest_of(ArraySource(Samples({"x": values}), 6), inputs=INPUTS, batch=6, where="")
    other = digest_of(
        ArraySource(Samples({"x": np.roll(values, shift, axis=0)}), 6), inputs=INPUTS, batch=batch, where=""
    )
    assert (one.data_sha256 == other.data_sha256) == (shift == 0)
    assert sorted(one.samples) == sorted(other.samples)


def test_one_shared_sample_is_enough_to_refuse_a_calibration_set() -> None:
    values = np.arange(48, dtype=np.float32).reshape(12, 4)
    evaluation = digest_of(ArraySource(Samples({"x": values[:6]}), 6), inputs=INPUTS, batch=6, where="")
    apart = digest_of(ArraySource(Samples({"x": values[6:]}), 6), inputs=INPUTS, batch=6, where="")
    shared = digest_of(ArraySource(Samples({"x": values[5:]}), 7), inputs=INPUTS, batch=6, where="")
    require_disjoint(evaluation, apart)
    with pytest.raises(
        DataError, match=r"1 of 7 calibration samples are evaluation samples \(calibration 0 is evaluation 5\)"
    ):
        require_disjoint(evaluation, shared)


def digested(values: np.ndarray, batch: int = 2) -> tuple[np.ndarray, DigestedSource]:
    """An array of one's own, and a source of it that was digested."""
    mine = values.copy()
    source = ArraySource(Samples({"x": mine}), len(mine))
    return mine, DigestedSource(source, digest_of(source, inputs=INPUTS, batch=batch, where=""), "here")


VALUES = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.mark.parametrize("changed", range(5))
def test_a_batch_that_changed_is_never_given_however_early_its_taker_stops(changed: int) -> None:
    mine, source = digested(VALUES)
    mine[2 * changed + 1, 0] = -1.0
    given = []
    with pytest.raises(DataError, match=f"other samples or labels from {2 * changed} on"):
        given.extend(batch.first for batch in islice(source.batches(2), changed + 1))
    assert given == [2 * index for index in range(changed)]


@pytest.mark.parametrize("taken", [2, 3, 10], ids=["as it was digested", "otherwise", "at once"])
@pytest.mark.parametrize("columns", [4, 1 << 17], ids=["small", "large"])
def test_a_row_that_changed_is_told_at_any_batch_size(taken: int, columns: int) -> None:
    inputs = {"x": InputSpec(shape=("batch", columns), dtype="float32", axes={})}
    mine = np.random.default_rng(0).standard_normal((10, columns)).astype(np.float32)
    source = ArraySource(Samples({"x": mine}), 10)
    held = DigestedSource(source, digest_of(source, inputs=inputs, batch=2, where=""), "here")
    assert sum(batch.size for batch in held.batches(taken)) == 10
    mine[7] = mine[7, ::-1].copy()  # the same numbers, mirrored
    with pytest.raises(DataError, match="other samples or labels from"):
        list(held.batches(taken))


@pytest.mark.parametrize("changed", [0, 3, 4])
def test_who_goes_to_the_end_never_gets_there_with_a_batch_that_changed(changed: int) -> None:
    mine, source = digested(VALUES)
    assert [each.first for each in all_batches(source, 2)] == [0, 2, 4, 6, 8]
    mine[2 * changed + 1, 0] = -1.0
    given = []
    with pytest.raises(DataError, match=f"other samples or labels from {2 * changed} on"):
        given.extend(batch.first for batch in all_batches(source, 2))
    assert given == [2 * index for index in range(changed + 1)]


def test_the_same_bytes_in_another_shape_or_dtype_are_other_samples() -> None:
    given = {"x": VALUES}

    class Source:
        def __len__(self) -> int:
            return 10

        def batches(self, size: int) -> Iterator[Batch]:
            for first in range(0, 10, size):
                yield Batch(first, {"x": given["x"][first : first + size]}, None)

    held = DigestedSource(Source(), digest_of(Source(), inputs=INPUTS, batch=2, where=""), "here")
    for other in (VALUES.reshape(10, 2, 2), VALUES.view(np.int32)):
        given["x"] = other
        with pytest.raises(DataError, match="other samples or labels from 0 on"):
            list(held.batches(2))


def test_batches_come_in_order_and_whole() -> None:
    _, source = digested(VALUES)
    for size in (1, 3, 10, 99):
        given = [*source.batches(size)]
        assert [batch.first for batch in given] == [*range(0, 10, size)]
        assert np.array_equal(np.concatenate([batch.inputs["x"] for batch in given]), VALUES)


def test_one_batch_is_given_without_another_being_read() -> None:
    class Counting(ArraySource):
        read = 0

        def batches(self, size: int) -> Iterator[Batch]:
            for each in super().batches(size):
                Counting.read += 1
                yield each

    source = Counting(Samples({"x": VALUES}), 10)
    held = DigestedSource(source, digest_of(source, inputs=INPUTS, batch=2, where=""), "here")
    Counting.read = 0
    assert next(held.batches(2)).first == 0
    assert Counting.read == 1


def test_what_the_taker_does_to_its_batch_is_not_blamed_on_the_source() -> None:
    _, source = digested(VALUES)
    for batch in source.batches(2):
        batch.inputs["x"][...] = 7.0


def image_target(**changes: object) -> ImageTarget:
    annotation = {"id": 1, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "iscrowd": 0, **changes}
    return ImageTarget(ImageRecord(1, 64, 48, file_name="a.png"), (annotation,))


def test_a_target_is_digested_by_its_content() -> None:
    assert target_digest(image_target()) == target_digest(image_target())
    others = [
        image_target(category_id=4),
        image_target(bbox=[1.0, 2.0, 3.0, 4.5]),
        image_target(iscrowd=True),
        ImageTarget(ImageRecord(1, 64, 48, left=1.0, file_name="a.png"), image_target().annotations),
        ImageTarget(ImageRecord(1, 64, 48, file_name="a.png")),
    ]
    assert len({target_digest(each) for each in (image_target(), *others)}) == 6
    maps = [
        np.zeros((2, 3), np.int64),
        np.zeros((3, 2), np.int64),
        np.zeros((2, 3), np.int32),
        np.ones((2, 3), np.int64),
    ]
    assert len({target_digest(each) for each in maps}) == 4
    assert target_digest(["ab", "c"]) != target_digest(["a", "bc"])


def test_a_target_that_is_no_data_is_refused_with_its_sample(tmp_path: Path) -> None:
    source = ArraySource(Samples({"x": VALUES}, targets=[*range(9), object()]), 10)
    with pytest.raises(DataError, match="the target of sample 9 holds a object, expected numbers, texts, arrays"):
        digest_of(source, inputs=INPUTS, batch=4, where="here")
    with pytest.raises(DataError, match="has 6 samples but 5 targets"):
        opened(tmp_path, "def evaluation(): return Samples({'x': np.ones((6, 4), 'f4')}, targets=[0] * 5)")


def test_a_target_that_changed_is_told() -> None:
    targets = [np.full((2, 2), index) for index in range(10)]
    source = ArraySource(Samples({"x": VALUES}, targets=targets), 10)
    held = DigestedSource(source, digest_of(source, inputs=INPUTS, batch=2, where=""), "here")
    for each in (held.batches(2), all_batches(held, 5)):
        assert [target[0, 0] for batch in each for target in batch.targets or ()] == [*range(10)]
    targets[7] = targets[7] + 1
    with pytest.raises(DataError, match="other samples or labels from 6 on"):
        list(held.batches(2))


def test_targets_are_part_of_the_data_and_their_absence_too() -> None:
    found = {
        digest_of(ArraySource(Samples({"x": VALUES}, targets=each), 10), inputs=INPUTS, batch=2, where="").data_sha256
        for each in (None, [0] * 10, [1] * 10, [0.0] * 10)
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    "code",
    [
        "def evaluation(): return {'x': np.ones((6, 4), 'f4'), 'target': np.arange(6).reshape(6, 1)}",
        """class D:
    def __len__(self): return 6
    def __getitem__(self, i): return {'x': np.ones(4, 'f4'), 'target': np.array([i])}
def evaluation(): return D()""",
    ],
)
def test_a_mapping_or_a_dataset_gives_targets_too(tmp_path: Path, code: str) -> None:
    source = opened(tmp_path, code)
    assert [int(target[0]) for batch in source.batches(4) for target in batch.targets or ()] == [*range(6)]


def test_a_dataset_that_lacks_a_target_names_the_sample(tmp_path: Path) -> None:
    code = """class D:
    def __len__(self): return 6
    def __getitem__(self, i): return {'x': np.ones(4, 'f4'), 'target': None if i == 4 else i}
def evaluation(): return D()"""
    with pytest.raises(DataError, match="sample 4 has no target, others have"):
        list(opened(tmp_path, code).batches(6))
