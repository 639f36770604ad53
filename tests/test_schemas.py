from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from gate.schemas import KINDS, schema, schema_bytes, spec_schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_is_a_schema(kind):
    Draft202012Validator.check_schema(schema(kind))


@pytest.mark.parametrize(("kind", "name"), [("spec", "gate.schema.json"), ("report", "report.schema.json")])
def test_the_published_schema_is_current(kind, name):
    published = (ROOT / "schemas" / name).read_bytes()
    assert published == schema_bytes(schema(kind)), f"run: gate schema {kind} > schemas/{name}"


def errors(text: str) -> list[str]:
    return [error.message for error in Draft202012Validator(spec_schema()).iter_errors(tomllib.loads(text))]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*gate.toml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path):
    assert errors(path.read_text()) == []


def test_a_key_that_does_not_exist_is_invalid():
    text = (ROOT / "examples/digits/gate.toml").read_text()
    assert any(
        "max_abs_diff" in error
        for error in errors(text.replace("[engine.parity]", "[engine.parity]\nmax_abs_diff = 1", 1))
    )
    assert any("valid under" in error for error in errors(text.replace("[model]", '[model]\nonnx = "x.onnx"')))


def test_each_key_is_described_for_the_editor():
    table = spec_schema()["$defs"]["ModelSpec"]["properties"]
    assert table["weights"]["description"].startswith("The files that the factory reads its weights from")
    limits = spec_schema()["$defs"]
    assert limits["TaskLimits"]["properties"]["top1_drop_at_most_pp"]["description"].endswith("#task-top1_drop_pp")
    for name in ("ParitySpec", "ParityLimits", "TaskLimits", "MemorySpec", "LatencySpec"):
        assert [key for key, each in limits[name]["properties"].items() if not each.get("description")] == []
    assert "null" not in str(spec_schema())
