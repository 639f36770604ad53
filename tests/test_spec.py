"""The spec: what it takes, what it refuses, and where it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from gate.errors import SpecError
from gate.spec import SpecFile, line_of, read_spec, spec_from_text

GOOD = """schema = 1

[model]
id = "m"
factory = "model:load"

[inputs.image]
dtype = "float32"
shape = ["batch", 3, "height", 8]
batch = { min = 1, opt = 4, max = 8 }
height = { min = 8, opt = 16, max = 32 }

[data]
source = "data:evaluation"
samples = 10

[task]
kind = "classification"

[[engine]]
name = "a"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
  rel_rmse = 1e-4
  [engine.latency]
  p99_ms = 2.0

[[engine]]
name = "b"
backend = "tensorrt_rtx"
precision = "fp16"
evidence = "preflight"
"""


def parse(text: str) -> SpecFile:
    return spec_from_text(text, path=Path("gate.toml"))


def test_a_good_spec_is_read_with_its_axes() -> None:
    file = parse(GOOD)
    image = file.spec.inputs["image"]
    assert image.sized("min") == (1, 3, 8, 8)
    assert image.sized("max") == (8, 3, 32, 8)
    assert file.spec.engines[1].required_evidence == "preflight"


def test_locations_name_the_line_of_the_key() -> None:
    file = parse(GOOD)
    assert file.engine_location("a", "parity", "rel_rmse") == "gate.toml:25"
    assert file.engine_location("b", "precision") == "gate.toml:32"
    assert file.engine_location("a", "parity", "max_abs") == "gate.toml:24", "an absent key: its table"


def test_a_value_over_several_lines_is_located_at_its_first() -> None:
    text = 'a = 1\nb = [\n  1,\n  2,\n]\nc = """\nx\n"""\nd = { e = 3 }\n'
    assert [line_of(text, (key,)) for key in "abcd"] == [1, 2, 6, 9]
    assert line_of(text, ("d", "e")) == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "rel_rmse = 1e-4",
            "rel_rmsd = 1e-4",
            r"gate\.toml:25: \[engine\.parity\] has no key 'rel_rmsd'; did you mean 'rel_rmse'",
        ),
        ("rel_rmse = 1e-4", "rel_rmse = nan", r"gate\.toml:25: \[engine\.parity\] rel_rmse"),
        ("rel_rmse = 1e-4", 'rel_rmse = "low"', r"gate\.toml:25: .*expected float, got 'low'"),
        ("samples = 10", "samples = 0", r"gate\.toml:15: \[data\] samples: expected int >= 1, got 0"),
        ('id = "m"', "", r"gate\.toml:3: \[model\] needs 'id'"),
        ('dtype = "float32"', 'dtype = "float23"', r"gate\.toml:8: .*did you mean 'float32'"),
        ("opt = 4", "opt = 9", r"gate\.toml:10: .*needs min <= opt <= max, got 1, 9, 8"),
        ("opt = 4", "best = 4", r"gate\.toml:10: \[inputs\.image\.batch\] has no key 'best'"),
        ("height = {", "hight = {", r"gate\.toml:9: .*dynamic axis 'height' without a range"),
        ('backend = "onnxruntime"', 'backend = "tensorrt"\nevidence = "host"', r"gate\.toml:23: .*runs on a GPU"),
        ('name = "b"', 'name = "a"', r"gate\.toml:30: two engines are named 'a'"),
        ('evidence = "preflight"', 'evidence = "preflight"\n[engine.parity]', r"gate\.toml:34: .*does not run"),
        ('evidence = "preflight"', "", r"gate\.toml:29: engine 'b': has no check"),
        ("p99_ms = 2.0", "batch = 2", r"gate\.toml:26: .*\[engine\.latency\] has no budget"),
        ("p99_ms = 2.0", "p99_ms = 2.0\nbatch = 9", r"gate\.toml:28: .*outside the profile"),
        ('factory = "model:load"', "", r"gate\.toml:3: .*exactly one of factory, onnx, outputs; it has none"),
        ('factory = "model:load"', 'factory = "model"', r"gate\.toml:5: .*expected 'module:function', got 'model'"),
        ('precision = "fp32"', 'precision = "int8"', r"gate\.toml:23: .*int8 is decided by its answers"),
        (
            'precision = "fp32"',
            'precision = "fp32"\noptions = { workspace_mib = 1 }',
            r"gate\.toml:24: .*has no option 'workspace_mib'",
        ),
        ('[task]\nkind = "classification"\n', "", None),
        ("schema = 1", "schema = 2", r"gate\.toml:1: "),
        ("schema = 1", "schema = ", r"gate\.toml:1: is not TOML"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(old: str, new: str, message: str | None) -> None:
    text = GOOD.replace(old, new, 1)
    if message is None:
        parse(text)
        return
    with pytest.raises(SpecError, match=message):
        parse(text)


def test_no_engine_is_refused() -> None:
    with pytest.raises(SpecError, match="nothing to check"):
        parse(GOOD[: GOOD.index("[[engine]]")].replace("schema = 1", "schema = 1\nengine = []"))


def test_a_task_limit_needs_a_task() -> None:
    text = GOOD.replace('[task]\nkind = "classification"\n', "").replace(
        "  [engine.latency]", "  [engine.task]\n  [engine.latency]"
    )
    with pytest.raises(SpecError, match=r"\[engine\.task\] needs a \[task\]"):
        parse(text)


def test_a_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="gate init"):
        read_spec(tmp_path / "gate.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="is not a text file in UTF-8"):
        read_spec(tmp_path / "gate.toml")


def test_an_engine_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"there is no engine 'ab'.* \(it has a, b\)"):
        parse(GOOD).engine("ab")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("schema = 1\n[engine]\nname = 'a'\n", r"gate\.toml:2: .*write \[\[engine\]\] in place of \[engine\]"),
        (GOOD.replace("schema = 1", "schema = 2"), r"schema: must be 1, got 2"),
        (GOOD.replace('id = "m"', 'id = "a b"'), r"id: takes letters, digits"),
    ],
)
def test_a_common_first_mistake_is_told_in_words(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse(text)


def test_a_folder_in_place_of_a_spec_names_the_file_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"is a folder, not a spec\ngate check .*gate\.toml"):
        read_spec(tmp_path)
