import json
import math
from pathlib import Path

import msgspec
import pytest
from jsonschema import Draft202012Validator

from gate.engines.interface import CalibrationRecord, Layer, LoweringRecord, TensorRange
from gate.errors import BundleError, VerificationError
from gate.manifest import FileDigest, pretty_json
from gate.metadata import contradictions, metadata_bytes, metadata_from_bytes, metadata_of, metadata_schema
from gate.results import run_from_builtins

DATA = Path(__file__).parent / "data"
FILES = {"artifacts/model.onnx": FileDigest("a" * 64, 5)}


@pytest.fixture
def run():
    return run_from_builtins(json.loads((DATA / "run.json").read_bytes()))


@pytest.fixture
def metadata(run):
    return metadata_of(run, run.engines[0], FILES)


@pytest.fixture
def raw(metadata):
    return json.loads(metadata_bytes(metadata))


def test_the_published_schema_is_current():
    published = Path(__file__).parents[1] / "metadata_schema.json"
    assert published.read_bytes() == pretty_json(metadata_schema())


def test_the_schema_is_a_valid_2020_12_schema():
    schema = metadata_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


def objects(schema):
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for each in schema.values():
            yield from objects(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from objects(each)


def test_no_object_of_the_schema_takes_a_key_that_it_does_not_name():
    found = list(objects(metadata_schema()))
    assert len(found) > 10
    assert all(each["additionalProperties"] is False for each in found)


def test_it_says_what_a_sealed_engine_must_say(raw):
    for key in ("model_id", "onnx_opset", "precision", "profile", "trt_version", "cuda", "git", "created"):
        assert key in metadata_schema()["required"]
        assert key in raw
    assert raw["model_id"] == "digits-cnn@9c2b9c2"
    assert raw["profile"]["input"]["opt"] == [64, 1, 8, 8]
    assert raw["verdict"]["status"] == "PASSED"
    assert raw["verdict"]["evidence"] == "host"
    assert raw["latency"][0]["raw"] == "evidence/latency.json"
    assert raw["digests"]["reference"] == "3a1f" * 16


def test_it_reads_back_as_what_was_written(metadata):
    again = metadata_from_bytes(metadata_bytes(metadata), where="metadata.json")
    assert again == metadata
    assert metadata_bytes(again) == metadata_bytes(metadata)


def test_the_version_of_tensorrt_is_null_for_another_backend(run, metadata):
    assert metadata.trt_version is None
    assert metadata_of(run, run.engines[2], FILES).trt_version == "1.7.0.23"


def test_the_gpu_is_that_of_the_fingerprint(run):
    gpu = msgspec.structs.replace(
        run.device, kind="gpu", name="NVIDIA H200", compute_capability="9.0", driver="580.159", cuda="12.1"
    )
    on_gpu = metadata_of(msgspec.structs.replace(run, device=gpu), run.engines[0], FILES)
    assert (on_gpu.gpu.name, on_gpu.gpu.compute_capability) == ("NVIDIA H200", "9.0")
    assert (on_gpu.driver, on_gpu.cuda) == ("580.159", "12.1")
    metadata_from_bytes(metadata_bytes(on_gpu), where="x")


def test_a_gpu_without_its_compute_capability_is_refused(run):
    gpu = msgspec.structs.replace(run.device, kind="gpu")
    with pytest.raises(BundleError, match="without its compute capability"):
        metadata_of(msgspec.structs.replace(run, device=gpu), run.engines[0], FILES)


@pytest.mark.parametrize("engine", [1, 3])
def test_an_engine_that_did_not_pass_has_no_metadata(run, engine):
    with pytest.raises(BundleError, match="only what passed is sealed|was not built and judged"):
        metadata_of(run, run.engines[engine], FILES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_are_text_in_the_file_and_numbers_again(run, value):
    output = msgspec.structs.replace(run.engines[0].outputs[0], sqnr_db=value, worst_samples=((1, value),))
    result = msgspec.structs.replace(run.engines[0], outputs=(output,))
    again = metadata_from_bytes(metadata_bytes(metadata_of(run, result, FILES)), where="x").metrics.outputs[0]
    assert repr((again.sqnr_db, again.worst_samples)) == repr((value, ((1, value),)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("extra",), 1),
        (("gpu",), {"name": "x", "compute_capability": "9.0", "extra": 1}),
        (("verdict", "extra"), 1),
        (("verdict", "findings", 0, "extra"), 1),
        (("metrics", "outputs", 0, "extra"), 1),
        (("device", "extra"), 1),
        (("build", "extra"), 1),
        (("latency", 0, "extra"), 1),
        (("digests", "extra"), "a" * 64),
        (("verdict", "status"), "FAILED"),
        (("verdict", "findings"), []),
        (("verdict", "findings", 0, "status"), "INCONCLUSIVE"),
        (("verdict", "findings", 0, "n"), 0),
        (("verdict", "findings", 0, "estimate"), "0.1"),
        (("verdict", "findings", 0, "limit", "value"), "Infinity"),
        (("metrics", "outputs", 0, "rel_rmse"), "1e-3"),
        (("latency", 0, "p99_ms"), "NaN"),
        (("latency", 0, "n"), 0),
        (("latency", 0, "batch"), 0),
        (("latency", 0, "sessions"), 0),
        (("latency", 0, "regions", "elsewhere"), {}),
        (("latency", 0, "raw"), "../latency.json"),
        (("latency",), None),
        (("digests", "data"), "A" * 64),
        (("digests", "data"), "a" * 64 + "\n"),
        (("created",), "2026-11-21"),
        (("schema_version",), 2),
        (("files",), {"../x": {"sha256": "a" * 64, "size_bytes": 1}}),
        (("files",), {"a/.hidden": {"sha256": "a" * 64, "size_bytes": 1}}),
        (("files",), {"/etc/passwd": {"sha256": "a" * 64, "size_bytes": 1}}),
        (("files", "artifacts/model.onnx", "size_bytes"), -1),
        (("model_id",), ""),
        (("samples",), 0),
    ],
)
def test_what_the_schema_does_not_allow_is_refused(raw, path, value):
    *parents, last = path
    table = raw
    for each in parents:
        table = table[each]
    table[last] = value
    with pytest.raises(VerificationError, match=r"metadata\.json: "):
        metadata_from_bytes(pretty_json(raw), where="metadata.json")


def test_each_top_level_key_is_needed(raw):
    for key in set(raw) - {"schema_version"}:
        with pytest.raises(VerificationError, match=f"missing required field `{key}`"):
            metadata_from_bytes(pretty_json({k: v for k, v in raw.items() if k != key}), where="x")


CALIBRATION = CalibrationRecord(
    tool="onnxruntime 1.31.1",
    method="percentile",
    percentile=99.999,
    samples=4,
    sha256="b" * 64,
    ranges=(TensorRange(name="/a", low=-1.0, high=1.0),),
    notes=("calibrated on 4 samples",),
)


def quantised(run, precision="fp16"):
    lowering = LoweringRecord(
        precision=precision,
        tool="quantize_static",
        tool_version="1.31.1",
        opset=17,
        layers=(Layer("/a", "Conv", "int8"),),
        calibration=CALIBRATION,
        notes=("1 node stays",),
    )
    return msgspec.structs.replace(run.engines[0], lowering=lowering, warnings=("calibrated on 4 samples",))


def test_it_says_how_the_graph_was_quantised_and_what_to_be_warned_of(run):
    metadata = metadata_of(run, quantised(run), FILES)
    assert metadata.lowering.calibration == CALIBRATION
    assert metadata.warnings == ("calibrated on 4 samples",)
    raw = json.loads(metadata_bytes(metadata))
    assert raw["lowering"]["calibration"]["percentile"] == 99.999
    assert set(raw["lowering"]) == {"precision", "tool", "tool_version", "opset", "calibration", "notes"}
    assert metadata_from_bytes(metadata_bytes(metadata), where="x") == metadata
    assert [*contradictions(metadata, None)] == ["latency and its raw numbers do not come together"]


def test_an_engine_that_was_not_lowered_says_null(raw):
    assert raw["lowering"] is None
    assert raw["warnings"] == []


def test_lowering_of_another_precision_contradicts(run):
    found = [*contradictions(metadata_of(run, quantised(run, "int8"), FILES), None)]
    assert "lowering.precision is 'int8', precision is 'fp16'" in found
