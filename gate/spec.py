"""The spec, `gate.toml`: read, validated, and refused with file, line and key.

Pure but for `read_spec`, which reads the one file. Nothing named in a spec is imported or opened here.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from gate.data.image_spec import ImagesSpec, Preprocess
from gate.errors import SpecError
from gate.latency.config import LatencySpec, StagesSpec, UsageSpec, fixed_batch_problem, latency_problems, timed_tables
from gate.postprocess.config import Postprocess, Tiling
from gate.postprocess.config import problems as postprocess_problems
from gate.toml_errors import KeyPath, conversion_error, did_you_mean, heading, line_of, tables_from_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
Dtype = Literal["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
BackendName = Literal["onnxruntime", "tensorrt_rtx", "tensorrt", "torch"]
QUANTIZED = ("int8", "fp8")
"""Precisions that need calibration, and whose answers decide."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table of the spec: frozen, and a key it does not know is an error."""


class AxisRange(_Table, frozen=True):
    """The sizes a dynamic axis may take; the engine is tuned for `opt`."""

    min: PositiveInt
    opt: PositiveInt
    max: PositiveInt


class InputSpec(_Table, frozen=True):
    """One input of the model.

    Args:
        dtype: Element type.
        shape: Sizes; a name makes the axis dynamic. The first axis is the batch.
        axes: The range of each named axis. In the file they stand beside `dtype`: `batch = { min = 1, … }`.
    """

    dtype: Dtype
    shape: tuple[str | PositiveInt, ...]
    axes: dict[str, AxisRange] = {}

    def sized(self, which: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """The shape with every dynamic axis at its `min`, `opt` or `max`."""
        return tuple(size if isinstance(size, int) else getattr(self.axes[size], which) for size in self.shape)


class ModelSpec(_Table, frozen=True):
    """The reference: a PyTorch factory, an ONNX file in FP32, or stored outputs. Exactly one of them.

    Args:
        id: Names the model in reports, baselines and bundles.
        factory: `module:function`, imported from the spec's folder or the environment; returns a
            `torch.nn.Module` in eval mode.
        onnx: An FP32 ONNX file.
        outputs: A safetensors or npz file, or a folder made by `gate record`.
        weights: The files that the factory reads its weights from. Naming them lets a later run reuse the
            recorded reference without importing PyTorch.
        output_names: Names of the outputs, in order; left out: the keys of a dict, or `output` for one and
            `output_0`, `output_1`, … for several.
        opset: ONNX opset of the export. TensorRT 8.6 takes at most 17, which torch's newer exporter does not write.
        exporter: Which of torch's exporters to use, tried in this order.
        simplify: Run onnxslim over the export, and check its result against the export.
        metrics: What training reported on this data: `{ top1 = 0.985 }`, or a JSON file of such numbers.
            A reference that misses it is an error before any engine is judged.
        device: Where the PyTorch reference runs. Its arithmetic is strict on both: FP32, TF32 off, deterministic.
    """

    id: Name
    factory: str | None = None
    onnx: str | None = None
    outputs: str | None = None
    weights: tuple[str, ...] | str = ()
    output_names: tuple[str, ...] = ()
    opset: Annotated[int, msgspec.Meta(ge=11, le=30)] = 18
    exporter: tuple[Literal["dynamo", "torchscript"], ...] = ("dynamo", "torchscript")
    simplify: bool = False
    metrics: dict[str, float] | str | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def weight_files(self) -> tuple[str, ...]:
        """`weights` as a tuple."""
        return (self.weights,) if isinstance(self.weights, str) else self.weights


class DataSpec(_Table, frozen=True):
    """Where the samples come from.

    Args:
        source: `module:function` returning the evaluation samples, or an npz or safetensors file.
        samples: How many there must be; fewer is an error.
        calibration: As `source`, for the samples that INT8 is calibrated on. None of them may be among the
            evaluation samples.
        calibration_samples: How many of them to use; fewer is an error.
        batch: How many samples go through reference and engines at a time.
        seed: Given to a source function that has a parameter named `seed`; chooses the images of `[data.images]`.
        images: In place of `source`: images and their ground truth, made the model's input by `[preprocess]`.
        calibration_images: In place of `calibration`, likewise.
    """

    samples: PositiveInt
    source: str | None = None
    images: ImagesSpec | None = None
    calibration_images: ImagesSpec | None = None
    calibration: str | None = None
    calibration_samples: PositiveInt = 128
    batch: PositiveInt = 64
    seed: int = 0

    @property
    def calibrates(self) -> bool:
        """Whether there are calibration samples."""
        return self.calibration is not None or self.calibration_images is not None


class TaskSpec(_Table, frozen=True):
    """What the model is for, so that answers can be compared with labels.

    Args:
        kind: The task: `classification`, `detection`, `instance_segmentation`, `keypoints`, `semantic_segmentation`,
            `regression`, `tracking`, `embedding`, `tokens`, or one that an installed package brings.
        output: classification: the output that holds the class scores, [N, classes]; left out: the only such output.
        options: Of the other kinds, such as `ignore_label = 255` (docs/tasks.md).
        resamples: How many times the samples are drawn anew for an interval.
    """

    kind: Name
    output: str | None = None
    options: dict[str, Any] = {}
    resamples: Annotated[int, msgspec.Meta(ge=100, le=100_000)] = 1000

    @property
    def is_classification(self) -> bool:
        """Whether top-1 against labels is what is measured."""
        return self.kind == "classification"


class ParityLimits(_Table, frozen=True):
    """Limits on the difference between engine and reference; METHOD of each in docs/findings.md.

    What is left out takes the default of the engine's precision, unless `defaults = false`.
    """

    max_abs: NonNegative | None = None
    mean_abs: NonNegative | None = None
    rel_rmse: NonNegative | None = None
    cosine_distance: NonNegative | None = None
    mean_cosine_distance: NonNegative | None = None
    centered_cosine_distance: NonNegative | None = None
    sqnr_db_at_least: float | None = None
    allclose_at_least: Fraction | None = None
    mismatch_fraction: Fraction | None = None
    top1_agreement_at_least: Fraction | None = None
    top5_agreement_at_least: Fraction | None = None


class ParitySpec(ParityLimits, frozen=True):
    """Parity with the reference.

    Args:
        atol, rtol: Tolerances behind `allclose_at_least`; left out: from the precision and the tensor's scale.
        defaults: Fill limits that are left out from the precision.
        outputs: Limits for one output by name, over those for all.
    """

    atol: NonNegative | None = None
    rtol: NonNegative | None = None
    defaults: bool = True
    outputs: dict[str, ParityLimits] = {}


class TaskLimits(_Table, frozen=True):
    """Limits on the task's own metric against labels. Drops are against the reference, in percentage points.

    With no key at all, `top1_drop_at_most_pp` takes the precision's default.
    """

    top1_at_least: Fraction | None = None
    top5_at_least: Fraction | None = None
    top1_drop_at_most_pp: NonNegative | None = None
    top5_drop_at_most_pp: NonNegative | None = None


MEMORY_BUDGETS = (
    "engine_mib",
    "host_peak_mib",
    "device_peak_mib",
    "device_steady_mib",
    "together_host_mib",
    "together_device_mib",
)


class MemorySpec(_Table, frozen=True):
    """Budgets for size: the engine's file, and the host and device memory that loading and running it adds.

    Args:
        engine_mib: The file.
        host_peak_mib, device_peak_mib: At the most, while it answers every sample.
        device_steady_mib: On the device once it is loaded and has run, in a fresh process.
        together_with: Other engines of the spec that are loaded beside it in one fresh process.
        together_host_mib, together_device_mib: What all of them take at the most.
    """

    engine_mib: Positive | None = None
    host_peak_mib: Positive | None = None
    device_peak_mib: Positive | None = None
    device_steady_mib: Positive | None = None
    together_with: tuple[str, ...] = ()
    together_host_mib: Positive | None = None
    together_device_mib: Positive | None = None

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets that it sets."""
        return tuple(key for key in MEMORY_BUDGETS if getattr(self, key) is not None)


class BaselineLimits(_Table, frozen=True):
    """Limits against the accepted baseline of this engine.

    Args:
        top1_drop_at_most_pp: Drop of top-1 accuracy, in percentage points, paired sample by sample.
        task_drop_at_most: Drop of the first value of another task (`mean_ap`, `mean_iou`), by paired resamples.
        rel_rmse_ratio_at_most: Growth of each output's rel_rmse.
    """

    top1_drop_at_most_pp: NonNegative | None = None
    task_drop_at_most: NonNegative | None = None
    rel_rmse_ratio_at_most: Annotated[float, msgspec.Meta(ge=1)] | None = None


class MetamorphicSpec(_Table, frozen=True):
    """Checks that need no reference. All are on unless switched off.

    Args:
        batch_independence: A sample's answer does not depend on its neighbours or its place in the batch.
        profile_edges: Every size from the profile's min to max agrees with batch 1.
        repeatability: The same input twice gives the same output.
        fresh_context: An execution context that ran other shapes before gives what a fresh one gives (TensorRT).
        rel_rmse: The difference allowed; left out: what the precision rounds to (docs/findings.md#metamorphic).
    """

    batch_independence: bool = True
    profile_edges: bool = True
    repeatability: bool = True
    fresh_context: bool = True
    rel_rmse: NonNegative | None = None


class EngineOptions(_Table, frozen=True):
    """Options of a backend; one that the backend does not have is an error. Paths start from the spec's folder.

    Args:
        threads: onnxruntime: intra-op threads. Left out: the runtime's choice.
        optimization: onnxruntime: graph optimisation level.
        provider: onnxruntime: the execution provider that must run the graph.
        provider_options: onnxruntime: options of that provider, by its own names: `{ trt_fp16_enable = true }`.
        cpu_nodes_at_most: onnxruntime on a GPU: the share of the graph's nodes that may run on another provider, shape
            arithmetic not counted. Left out: 0.05. Convolutions and matrix products never may.
        mode: torch: `eager`, `compile` (torch.compile), or `aotinductor`, the one that makes a file to release.
        cast: torch in fp16 or bf16: under `autocast`, or with the `weights` themselves converted.
        workspace_mib: tensorrt, tensorrt_rtx: workspace memory limit.
        builder_optimization_level: tensorrt: 0 to 5.
        tf32: tensorrt: let what stays in FP32 use TF32 in an fp16, bf16, int8 or fp8 engine.
        profiles: tensorrt, tensorrt_rtx: several optimization profiles, each the range of every dynamic axis. A shape is
            run in the first that holds it. Left out: one profile, the ranges of the inputs.
        timing_cache: tensorrt: a file that tactic timings are read from, where it exists, and written to.
        tactic_sources: tensorrt: only these. Left out: the version's default, on 8.x without cuBLAS and cuDNN.
        plugins: tensorrt: plugin libraries to load; their digests are part of the build record.
        version_compatible: tensorrt: a plan that later minor versions can run too.
        hardware_compatible: tensorrt: a plan for other GPUs too.
        strip_weights: tensorrt, tensorrt_rtx: a plan without weights, to be refitted. It cannot be sealed.
        typing: tensorrt: `strong`: precision is what the graph says. `weak` (8.6 and 10): the compiler chooses,
            within builder flags, from the FP32 graph. Left out: strong where the version can, else the lowered graph.
        layer_precisions: tensorrt, weak typing: constraints by pattern of layer names: `{ "/head/*" = "fp32" }`.
        calibrator: tensorrt, int8 in weak typing: how ranges are found.
        calibration_cache: tensorrt, int8 in weak typing: a file that ranges are read from, where it exists and
            belongs to this model, data and version, and written to.
        cuda_graph: tensorrt: capture the inference and replay it.
    """

    threads: PositiveInt | None = None
    optimization: Literal["disabled", "basic", "extended", "all"] | None = None
    provider: Literal["cpu", "cuda", "tensorrt"] | None = None
    provider_options: dict[str, str | bool | int | float] | None = None
    cpu_nodes_at_most: Fraction | None = None
    mode: Literal["eager", "compile", "aotinductor"] | None = None
    cast: Literal["autocast", "weights"] | None = None
    workspace_mib: PositiveInt | None = None
    builder_optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    tf32: bool | None = None
    profiles: tuple[dict[str, AxisRange], ...] | None = None
    timing_cache: str | None = None
    tactic_sources: (
        tuple[Literal["cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions"], ...] | None
    ) = None
    plugins: tuple[str, ...] | None = None
    version_compatible: bool | None = None
    hardware_compatible: Literal["ampere_plus", "same_compute_capability"] | None = None
    strip_weights: bool | None = None
    typing: Literal["strong", "weak"] | None = None
    layer_precisions: dict[str, Literal["fp32", "fp16", "bf16", "int8"]] | None = None
    calibrator: Literal["entropy", "minmax"] | None = None
    calibration_cache: str | None = None
    cuda_graph: bool | None = None


OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("threads", "optimization", "provider", "provider_options", "cpu_nodes_at_most"),
    "tensorrt_rtx": ("workspace_mib", "profiles", "strip_weights"),
    "tensorrt": (
        "workspace_mib",
        "builder_optimization_level",
        "tf32",
        "profiles",
        "timing_cache",
        "tactic_sources",
        "plugins",
        "version_compatible",
        "hardware_compatible",
        "strip_weights",
        "typing",
        "layer_precisions",
        "calibrator",
        "calibration_cache",
        "cuda_graph",
    ),
    "torch": ("mode", "cast"),
}


class LoweringSpec(_Table, frozen=True):
    """How the FP32 graph becomes one in the engine's precision.

    Args:
        tool: int8: `onnxruntime` (the default) or `modelopt`; fp8: `modelopt`. `none`: the graph carries Q/DQ already,
            from quantisation-aware training, and is taken as it is.
        method: int8: how the range of an activation is found. onnxruntime: `minmax` (the default), `entropy`,
            `percentile`; modelopt: `max`, `entropy` (the default).
        percentile: Of the absolute values, for that method.
        exclude_nodes: Regular expressions; a node whose whole name matches one stays in FP32.
        exclude_ops: Operators that stay in FP32.
        data_max: fp16, bf16: a node that gives a larger absolute value stays in FP32.
    """

    tool: Literal["onnxruntime", "modelopt", "none"] | None = None
    method: Literal["minmax", "entropy", "percentile", "max"] | None = None
    percentile: Annotated[float, msgspec.Meta(gt=50, lt=100)] | None = None
    exclude_nodes: tuple[str, ...] = ()
    exclude_ops: tuple[str, ...] = ()
    data_max: Positive | None = None


class EngineSpec(_Table, frozen=True):
    """One engine and what is asked of it.

    Args:
        name: Names it in reports, test ids and baselines.
        backend: What builds and runs it.
        precision: What it computes in.
        evidence: What the checks must rest on: `preflight` compiles only, `host` runs on a CPU, `device` on a GPU.
            Left out: `device` for TensorRT and for an onnxruntime provider on a GPU, else `host`. A torch engine runs on
            the GPU where `device` is asked for.
        optional: Where the backend is not installed, list the engine as NOT RUN instead of an error.
        onnx: An ONNX file that the team exported itself, already in `precision`.
        plan: An engine file that exists already.
        outputs: The engine's own name for an output of the reference: `{ logits = "output_0" }`.
        cast_io: Accept inputs and outputs in another floating dtype than the reference's.
        lowering: How its precision is made.
        rebuilds: Build it so many times; the spread of what the builds answer is part of each finding's interval.
        nms: Put decoding and suppression of `[postprocess]` into its graph: `onnx` as NonMaxSuppression, `efficient_nms` as
            TensorRT's plugin. The task is then judged by what comes out of the graph, parity by the outputs before it.
        task_limits: `[engine.task]` of a `[task]` that is not classification, written there: `mean_ap_at_least`,
            `mean_ap_drop_at_most`, `mean_ap_ratio_at_least`, and likewise for its other values. With `[tiling]` also
            `tiled_mean_ap_at_least`, and `tiled_mean_ap_gain_at_least` over the same engine's whole images.
    """

    name: Name
    backend: BackendName
    precision: Precision
    evidence: Literal["preflight", "host", "device"] | None = None
    optional: bool = False
    onnx: str | None = None
    plan: str | None = None
    outputs: dict[str, str] = {}
    cast_io: bool = False
    options: EngineOptions = EngineOptions()
    lowering: LoweringSpec = LoweringSpec()
    rebuilds: Annotated[int, msgspec.Meta(ge=1, le=20)] = 1
    parity: ParitySpec | None = None
    nms: Literal["onnx", "efficient_nms"] | None = None
    task: TaskLimits | None = None
    task_limits: dict[str, float] | None = None
    latency: LatencySpec | tuple[LatencySpec, ...] | None = None
    stages: StagesSpec | None = None
    usage: UsageSpec | None = None
    memory: MemorySpec | None = None
    baseline: BaselineLimits | None = None
    metamorphic: MetamorphicSpec = MetamorphicSpec()

    @property
    def required_evidence(self) -> Literal["preflight", "host", "device"]:
        """`evidence`, or the backend's default."""
        return self.evidence or ("device" if self.needs_gpu else "host")

    @property
    def needs_gpu(self) -> bool:
        """Whether it runs on nothing else."""
        return self.backend in ("tensorrt", "tensorrt_rtx") or self.options.provider in ("cuda", "tensorrt")

    @property
    def brings_scales(self) -> bool:
        """Whether a quantised engine needs no calibration samples: a graph or engine of the team's own, or QAT."""
        return self.onnx is not None or self.plan is not None or self.lowering.tool == "none"


class PolicySpec(_Table, frozen=True):
    """What may be sealed.

    Args:
        seal_evidence: The least evidence that a sealed engine's verdict rests on.
        seal_fallback: The ONNX graph that an engine was compiled from goes into its bundle as `artifacts/fallback.onnx`, for
            machines that the engine does not fit.
    """

    seal_evidence: Literal["preflight", "host", "device"] = "host"
    seal_fallback: bool = False


class GateSpec(_Table, frozen=True, rename={"engines": "engine"}):
    """A whole `gate.toml`."""

    schema: Literal[1]
    model: ModelSpec
    inputs: dict[str, InputSpec]
    data: DataSpec
    engines: tuple[EngineSpec, ...]
    task: TaskSpec | None = None
    preprocess: Preprocess | None = None
    postprocess: Postprocess | None = None
    tiling: Tiling | None = None
    policy: PolicySpec = PolicySpec()


class SpecFile(msgspec.Struct, frozen=True, kw_only=True):
    """A spec and the file it was read from.

    Args:
        path: As given by the user.
        text: Its content.
        spec: What it says.
    """

    path: Path
    text: str
    spec: GateSpec

    @property
    def folder(self) -> Path:
        """What relative paths and `module:function` in the spec start from."""
        return self.path.resolve().parent

    def engine(self, name: str) -> EngineSpec:
        """The engine of that name.

        Raises:
            SpecError: There is none; names the nearest.
        """
        names = [engine.name for engine in self.spec.engines]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.55)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(
                f"there is no engine {name!r}{meant} (it has {', '.join(names)})",
                where=str(self.path),
            )
        return self.spec.engines[names.index(name)]

    def location(self, *key: str | int) -> str:
        """`gate.toml:41` for a key such as `"engine", 2, "parity", "rel_rmse"`; the nearest parent's if absent."""
        return f"{self.path}:{line_of(self.text, key)}"

    def engine_location(self, engine: str, *key: str | int) -> str:
        """As `location`, for a key of the engine with that name."""
        index = [each.name for each in self.spec.engines].index(engine)
        return self.location("engine", index, *key)


def read_spec(path: Path) -> SpecFile:
    """Read and check a spec.

    Raises:
        SpecError: It cannot be read, is not TOML, has an unknown key or a value of the wrong type, contradicts
            itself, or asks for nothing.
    """
    try:
        # As it stands, line ends included: its digest is that of the file.
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise SpecError(
            "there is no such file", where=str(path), hint="write one: gate init module:function -o gate.toml"
        ) from None
    except IsADirectoryError:
        raise SpecError("is a folder, not a spec", where=str(path), hint=f"gate check {path / 'gate.toml'}") from None
    except UnicodeDecodeError as err:
        raise SpecError(f"is not a text file in UTF-8 (byte {err.start})", where=str(path)) from err
    except OSError as err:
        raise SpecError(f"cannot be read: {err.strerror or err}", where=str(path)) from err
    return spec_from_text(text, path=path)


def spec_from_text(text: str, *, path: Path) -> SpecFile:
    """As `read_spec`, for text that is already here. `path` names it in errors.

    Raises:
        SpecError: As `read_spec`.
    """
    raw = tables_from_text(text, path=path)
    if not raw:
        raise SpecError(
            "is empty",
            where=str(path),
            hint="write one: gate init module:function -o gate.toml (it begins: schema = 1)",
        )
    if isinstance(raw.get("engine"), dict):
        raise SpecError(
            "there may be several engines: write [[engine]] in place of [engine]",
            where=f"{path}:{line_of(text, ('engine',))}",
        )
    gathered = _with_task_limits(_with_axes(raw))
    try:
        spec = msgspec.convert(gathered, GateSpec)
    except msgspec.ValidationError as err:
        raise conversion_error(
            err,
            kind=GateSpec,
            raw=gathered,
            text=text,
            path=path,
            whole="the spec",
            in_file=_in_file,
            elsewhere=_elsewhere,
            distinct=frozenset({"precision"}),
        ) from err
    file = SpecFile(path=path, text=text, spec=spec)
    for key, message in _contradictions(spec):
        raise SpecError(message, where=file.location(*key))
    return file


def _with_axes(raw: dict[str, Any]) -> dict[str, Any]:
    """The raw tables with the named axes of each input gathered under `axes`."""
    inputs = raw.get("inputs")
    if not isinstance(inputs, dict):
        return raw
    gathered: dict[str, Any] = {}
    for name, table in inputs.items():
        if isinstance(table, dict):
            known = {key: value for key, value in table.items() if key in ("dtype", "shape")}
            axes = {key: value for key, value in table.items() if key not in known}
            gathered[name] = {**known, "axes": axes}
        else:
            gathered[name] = table
    return {**raw, "inputs": gathered}


def _with_task_limits(raw: dict[str, Any]) -> dict[str, Any]:
    """The raw tables with each `[engine.task]` under `task_limits` where the task is not classification."""
    task, engines = raw.get("task"), raw.get("engine")
    if not isinstance(task, dict) or task.get("kind") == "classification" or not isinstance(engines, list):
        return raw
    moved = [
        {("task_limits" if key == "task" else key): value for key, value in each.items()}
        if isinstance(each, dict) and "task_limits" not in each
        else each
        for each in engines
    ]
    return {**raw, "engine": moved}


def _in_file(key: KeyPath) -> KeyPath:
    """Where the file has what `_with_axes` and `_with_task_limits` moved."""
    if key[:1] == ("engine",) and key[2:3] == ("task_limits",):
        return (*key[:2], "task", *key[3:])
    if key[:1] == ("inputs",) and len(key) > 2 and key[2] == "axes":
        return key[:2] + key[3:]
    return key


def _elsewhere(key: KeyPath, name: str) -> str | None:
    """The table of the same engine that has a key of this name; None where there is none, or it is no engine's table."""
    if key[:1] != ("engine",):
        return None
    tables = {(): EngineSpec, ("options",): EngineOptions, ("lowering",): LoweringSpec}
    for path, table in tables.items():
        if name in table.__struct_fields__ and key[2:] != path:
            return heading(("engine", *path), "the spec") if path else "[[engine]]"
    return None


def _contradictions(spec: GateSpec) -> Iterator[tuple[KeyPath, str]]:
    """What is well-formed but cannot be meant: the key, and what is wrong with it."""
    for found, value in _numbers((), msgspec.to_builtins(spec)):
        if not math.isfinite(value):
            key = tuple("task" if each == "task_limits" else each for each in found)
            table = ".".join(each for each in key[:-1] if isinstance(each, str))
            yield key, f"[{table}] {key[-1]} = {value}: expected a finite number"
    yield from _model_contradictions(spec)
    yield from _input_contradictions(spec)
    if not spec.engines:
        yield ("engine",), "the spec has no [[engine]], so there is nothing to check"
    names: set[str] = set()
    for index, engine in enumerate(spec.engines):
        if engine.name in names:
            yield ("engine", index, "name"), f"two engines are named {engine.name!r}"
        names.add(engine.name)
        yield from (
            (("engine", index, *key), f"engine {engine.name!r}: {message}")
            for key, message in _engine_contradictions(spec, engine)
        )


def _numbers(key: KeyPath, value: Any) -> Iterator[tuple[KeyPath, float]]:
    """Every floating number of a tree and where it stands."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in pairs:
            yield from _numbers((*key, name), each)


def _model_contradictions(spec: GateSpec) -> Iterator[tuple[KeyPath, str]]:
    model = spec.model
    kinds = [key for key in ("factory", "onnx", "outputs") if getattr(model, key) is not None]
    if len(kinds) != 1:
        yield (
            ("model", *kinds[-1:]),
            f"[model] needs exactly one of factory, onnx, outputs; it has {', '.join(kinds) or 'none'}",
        )
    if model.factory is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model.factory):
        yield ("model", "factory"), f"[model] factory: expected 'module:function', got {model.factory!r}"
    if model.device == "cuda" and model.factory is None:
        yield ("model", "device"), "[model] device is for a PyTorch factory"
    if not model.exporter or len(set(model.exporter)) != len(model.exporter):
        yield ("model", "exporter"), "[model] exporter: name each exporter once, at least one"
    if len(set(model.output_names)) != len(model.output_names):
        yield ("model", "output_names"), "[model] output_names: a name stands twice"
    if model.metrics is not None and spec.task is None:
        yield ("model", "metrics"), "[model] metrics needs a [task] that measures them"
    yield from _data_contradictions(spec)
    for key in ("source", "calibration"):
        value = getattr(spec.data, key)
        if value is not None and not value.endswith((".npz", ".safetensors")) and ":" not in value:
            yield (
                ("data", key),
                f"[data] {key}: expected 'module:function' or an npz or safetensors file, got {value!r}",
            )


def _data_contradictions(spec: GateSpec) -> Iterator[tuple[KeyPath, str]]:
    data = spec.data
    if (data.source is None) == (data.images is None):
        both = "both source and images" if data.source is not None else "neither source nor images"
        yield ("data",), f"[data] needs exactly one of source and [data.images]; it has {both}"
    if data.calibration is not None and data.calibration_images is not None:
        yield ("data", "calibration"), "[data] has both calibration and [data.calibration_images]"
    if (data.images is not None or data.calibration_images is not None) and spec.preprocess is None:
        yield ("data", "images"), "[data.images] needs [preprocess], which says how an image becomes the input"
    if (data.images is not None or data.calibration_images is not None) and len(spec.inputs) != 1:
        yield ("inputs",), f"[data.images] gives one input, [inputs] has {len(spec.inputs)}"
    if spec.postprocess is not None:
        for problem in postprocess_problems(spec.postprocess):
            yield ("postprocess", problem.key), f"[postprocess] {problem.key} {problem.message}"
    yield from _tiling_contradictions(spec)
    if spec.task is not None and spec.task.is_classification:
        if spec.task.options:
            yield ("task", "options"), "[task] options are for other kinds than classification"
    elif spec.task is not None and spec.task.output is not None:
        yield ("task", "output"), '[task] output is for classification; other kinds take options = { output = "…" }'


def _tiling_contradictions(spec: GateSpec) -> Iterator[tuple[KeyPath, str]]:
    """What tiles need and the spec does not have."""
    if spec.tiling is None:
        return
    if spec.task is None or spec.task.kind != "detection":
        yield ("tiling",), '[tiling] needs [task] kind = "detection": boxes can be put together again'
    if spec.postprocess is None:
        yield ("tiling",), "[tiling] needs [postprocess], which says how the outputs become detections"
    if spec.preprocess is None:
        yield ("tiling",), "[tiling] needs [preprocess], which says how a tile becomes the input"
    elif spec.preprocess.resize == "center_crop":
        yield (
            ("preprocess", "resize"),
            '[tiling] needs another resize than "center_crop", which cuts edges off each tile',
        )
    elif spec.preprocess.resize == "none" and spec.preprocess.size is not None:
        yield (
            ("preprocess", "size"),
            '[tiling] gives tiles of another size than the images, and resize = "none" takes one size alone',
        )
    if (spec.data.source or "").endswith((".npz", ".safetensors")):
        yield (
            ("tiling",),
            "[tiling] needs images, of [data.images] or of a function; [data] source is a file of arrays",
        )


def _input_contradictions(spec: GateSpec) -> Iterator[tuple[KeyPath, str]]:
    if not spec.inputs:
        yield ("inputs",), "the spec has no [inputs.NAME]"
    seen: dict[str, tuple[str, AxisRange]] = {}
    for name, each in spec.inputs.items():
        key = ("inputs", name)
        named = [size for size in each.shape if isinstance(size, str)]
        if not each.shape:
            yield (*key, "shape"), f"[inputs.{name}] shape is empty: the first axis is the batch"
        if len(set(named)) != len(named):
            yield (*key, "shape"), f"[inputs.{name}] shape names an axis twice"
        for axis in named:
            if axis not in each.axes:
                yield (
                    (*key, "shape"),
                    f"[inputs.{name}] shape has a dynamic axis {axis!r} without a range; "
                    f"add {axis} = {{ min = 1, opt = 8, max = 32 }}",
                )
        for axis, sizes in each.axes.items():
            if axis not in named:
                yield (
                    (*key, axis),
                    f"[inputs.{name}] has no key {axis!r}, and its shape no such axis"
                    f"{did_you_mean(axis, ['dtype', 'shape', *named])}",
                )
            if not sizes.min <= sizes.opt <= sizes.max:
                yield (
                    (*key, axis),
                    f"[inputs.{name}] {axis}: needs min <= opt <= max, got {sizes.min}, {sizes.opt}, {sizes.max}",
                )
            if axis in seen and seen[axis][1] != sizes:
                yield (*key, axis), f"[inputs.{name}] {axis} differs from that of [inputs.{seen[axis][0]}]"
            seen[axis] = (name, sizes)
    first = [each.shape[0] for each in spec.inputs.values() if each.shape]
    if len(set(first)) > 1:
        yield ("inputs",), f"the inputs' first axes differ ({', '.join(map(str, first))}): it is the batch of all"


def _engine_contradictions(spec: GateSpec, engine: EngineSpec) -> Iterator[tuple[KeyPath, str]]:
    if engine.onnx is not None and engine.plan is not None:
        yield ("plan",), "has both onnx and plan"
    for key in EngineOptions.__struct_fields__:
        if getattr(engine.options, key) is not None and key not in OPTIONS_OF[engine.backend]:
            yield (
                ("options", key),
                f"backend {engine.backend!r} has no option {key!r}; it takes {', '.join(OPTIONS_OF[engine.backend])}",
            )
    yield from _backend_contradictions(spec, engine)
    yield from _option_contradictions(spec, engine)
    yield from _lowering_contradictions(engine)
    tables = ("parity", "task", "latency", "stages", "usage", "memory", "baseline")
    checks = {key: getattr(engine, key) for key in tables}
    if engine.task_limits is not None:
        checks["task"] = engine.task_limits
    asked = {key: table for key, table in checks.items() if table is not None}
    if engine.required_evidence == "preflight":
        for key in asked:
            if key != "memory":
                yield (key,), f"evidence 'preflight' compiles and does not run, so it cannot check [engine.{key}]"
        if engine.plan is not None:
            yield ("plan",), "evidence 'preflight' compiles, and a plan is compiled already"
        for key in MEMORY_BUDGETS[1:]:
            if engine.memory is not None and getattr(engine.memory, key) is not None:
                yield ("memory", key), f"evidence 'preflight' does not run, so it has no {key}"
        if engine.rebuilds > 1:
            yield ("rebuilds",), "evidence 'preflight' does not run, so rebuilds have no answers to compare"
    elif not asked:
        yield (
            (),
            "has no check: add [engine.parity] (empty takes the precision's defaults), [engine.task], "
            "[engine.latency], [engine.stages], [engine.usage], [engine.memory] or [engine.baseline]",
        )
    yield from _measurement_contradictions(spec, engine)
    if engine.parity is not None and not engine.parity.defaults:
        limits = [engine.parity, *engine.parity.outputs.values()]
        if not any(getattr(each, name) is not None for each in limits for name in ParityLimits.__struct_fields__):
            yield ("parity", "defaults"), "[engine.parity] has defaults = false and no limit of its own"
    if engine.task is not None and spec.task is None:
        yield ("task",), "[engine.task] needs a [task] table that says what the model is for"
    if engine.baseline is not None:
        classifies = spec.task is not None and spec.task.is_classification
        if engine.baseline.top1_drop_at_most_pp is not None and not classifies:
            yield ("baseline", "top1_drop_at_most_pp"), 'top1_drop_at_most_pp needs a [task] of kind = "classification"'
        if engine.baseline.task_drop_at_most is not None and (spec.task is None or classifies):
            yield (
                ("baseline", "task_drop_at_most"),
                "task_drop_at_most needs a [task] that is not classification, which has top1_drop_at_most_pp",
            )
    if engine.nms is not None:
        if spec.postprocess is None:
            yield ("nms",), "nms needs [postprocess], which says what the outputs mean"
        elif spec.postprocess.head == "function":
            yield ("nms",), 'nms needs a head of [postprocess] that is known; "function" is the project\'s own'
        if engine.onnx is not None or engine.plan is not None:
            yield ("nms",), "nms changes the graph that is made here, and the engine has its own onnx or plan"
        if engine.backend in ("torch", "tensorrt_rtx"):
            yield ("nms",), f"backend {engine.backend!r} cannot run it: it takes onnxruntime or tensorrt"
        if engine.nms == "efficient_nms" and engine.backend != "tensorrt":
            yield ("nms",), 'efficient_nms is a plugin of TensorRT: backend = "tensorrt", or nms = "onnx"'
        if engine.options.typing == "weak":
            yield ("nms",), "nms with weak typing is not supported: the lowered graph carries it"
    if (
        engine.precision in QUANTIZED
        and engine.required_evidence != "preflight"
        and engine.task is None
        and engine.task_limits is None
        and (engine.parity is None or engine.parity.top1_agreement_at_least is None)
    ):
        yield (
            ("precision",),
            f"{engine.precision} is decided by its answers: add [engine.task], or top1_agreement_at_least in [engine.parity]",
        )
    if engine.precision in QUANTIZED and not engine.brings_scales and not spec.data.calibrates:
        yield (
            ("precision",),
            f'{engine.precision} needs calibration samples: add calibration = "module:function" to [data]'
            + (
                ""
                if engine.options.typing == "weak"
                else ', or, where the model carries Q/DQ from training, lowering = { tool = "none" }'
            ),
        )
    if engine.plan is not None and engine.rebuilds > 1:
        yield ("rebuilds",), "a plan that exists already is not built, so it cannot be built again"
    if engine.onnx is None and engine.plan is None and spec.model.outputs is not None:
        yield (), "the reference is stored outputs, so the engine needs its own onnx or plan"


def _measurement_contradictions(spec: GateSpec, engine: EngineSpec) -> Iterator[tuple[KeyPath, str]]:
    """Budgets of latency, stages, usage and memory that are missing, or that this spec cannot be measured for."""
    on_gpu = engine.required_evidence == "device"
    if engine.memory is not None:
        memory = engine.memory
        if not memory.budgets:
            yield ("memory",), f"[engine.memory] has no budget; it takes {', '.join(MEMORY_BUDGETS)}"
        if engine.required_evidence == "host":
            for key in ("device_peak_mib", "device_steady_mib", "together_device_mib"):
                if getattr(memory, key) is not None:
                    yield ("memory", key), f'{key} needs an engine on a GPU, evidence "device"'
        others = [each.name for each in spec.engines if each.name != engine.name]
        for name in memory.together_with:
            if name not in others:
                yield (
                    ("memory", "together_with"),
                    f"together_with names {name!r}, which is no other engine{did_you_mean(name, others)}",
                )
        together = [key for key in memory.budgets if key.startswith("together")]
        if bool(memory.together_with) != bool(together):
            yield (
                ("memory", "together_with"),
                "together_with and together_host_mib or together_device_mib need each other",
            )
    batch_axis, sizes = batch_axis_of(spec), dynamic_axes_of(spec)
    if engine.latency is not None:
        yield from latency_problems(engine.latency, batch_axis=batch_axis, axes=sizes)
    others = [each.name for each in spec.engines if each.name != engine.name]
    for table in timed_tables(engine.latency):
        if table.spec.timed != "host_wall" and not on_gpu:
            yield (*table.key, "timed"), f'timed = "{table.spec.timed}" needs an engine on a GPU, evidence "device"'
        for name in table.spec.rivals:
            if name == engine.name:
                yield table.key, f"[engine.latency] against = {name!r} is the engine itself"
            elif name == "reference" and spec.model.factory is None:
                yield table.key, 'against = "reference" times the model itself: [model] needs a factory'
            elif name not in ("baseline", "reference", *others) and "/" not in name:
                yield (
                    table.key,
                    f"[engine.latency] against = {name!r} is neither baseline, reference, an engine nor the path of a bundle"
                    f"{did_you_mean(name, ['baseline', 'reference', *others])}",
                )
    if engine.usage is not None:
        budgets = ("power_w", "energy_mj", "gpu_percent_at_least", "cpu_percent_at_most")
        given = [key for key in budgets if getattr(engine.usage, key) is not None]
        if not given:
            yield ("usage",), f"[engine.usage] has no budget; it takes {', '.join(budgets)}"
        for key in given:
            if key != "cpu_percent_at_most" and not on_gpu:
                yield ("usage", key), f'{key} needs an engine on a GPU, evidence "device"'
        if isinstance(batch_axis, int):
            if (problem := fixed_batch_problem(engine.usage.batch, batch_axis)) is not None:
                yield ("usage", "batch"), f"[engine.usage] {problem}"
        elif batch_axis in sizes:
            low, high = sizes[batch_axis]
            if not low <= engine.usage.batch <= high:
                yield (
                    ("usage", "batch"),
                    f"[engine.usage] batch = {engine.usage.batch} is outside the profile ({low} to {high})",
                )


def _backend_contradictions(spec: GateSpec, engine: EngineSpec) -> Iterator[tuple[KeyPath, str]]:
    """A precision, evidence or source that the backend does not have."""
    options = engine.options
    if engine.backend == "onnxruntime" and engine.precision == "tf32" and options.provider in (None, "cpu"):
        yield ("precision",), 'tf32 needs a GPU: a TensorRT backend, torch, or provider = "cuda"'
    if engine.backend == "torch" and engine.precision == "tf32" and engine.evidence != "device":
        yield ("precision",), 'tf32 needs a GPU: add evidence = "device"'
    if engine.backend == "torch" and engine.precision in QUANTIZED:
        yield ("precision",), f"backend 'torch' has no {engine.precision}; it takes fp32, tf32, fp16, bf16"
    if engine.backend == "torch" and engine.onnx is not None:
        yield ("onnx",), "backend 'torch' is made from the model itself, not from ONNX"
    if engine.backend == "torch" and engine.plan is None and spec.model.factory is None:
        yield ("backend",), "backend 'torch' is made from the model itself: [model] needs a factory"
    if engine.backend == "torch" and engine.evidence == "preflight" and options.mode != "aotinductor":
        yield ("evidence",), "backend 'torch' compiles ahead of time only with options = { mode = \"aotinductor\" }"
    if engine.backend == "torch" and engine.plan is not None and options.mode != "aotinductor":
        yield ("plan",), 'a file that exists already is an AOTInductor package: add options = { mode = "aotinductor" }'
    if engine.backend == "onnxruntime" and engine.evidence == "device" and not engine.needs_gpu:
        yield (
            ("evidence",),
            "backend 'onnxruntime' runs on the CPU, whose evidence is host; "
            'options = { provider = "cuda" } runs it on a GPU',
        )
    if engine.needs_gpu and engine.evidence == "host":
        yield (
            ("evidence",),
            f"backend {engine.backend!r} runs on a GPU here: ask for 'device', or 'preflight' to compile only",
        )


def _option_contradictions(spec: GateSpec, engine: EngineSpec) -> Iterator[tuple[KeyPath, str]]:
    """Options that need another option."""
    options = engine.options
    if engine.backend == "onnxruntime" and options.provider in (None, "cpu"):
        for key in ("provider_options", "cpu_nodes_at_most"):
            if getattr(options, key) is not None:
                yield ("options", key), f'{key} needs provider = "cuda" or "tensorrt"'
    if options.cast is not None and engine.precision not in ("fp16", "bf16"):
        yield ("options", "cast"), f"cast is for fp16 and bf16, the precision is {engine.precision}"
    weak = ("layer_precisions", "calibrator", "calibration_cache")
    for key in weak:
        if getattr(options, key) is not None and options.typing != "weak":
            yield ("options", key), f'{key} needs typing = "weak": in strong typing the graph says the precision'
    for key in weak[1:]:
        if getattr(options, key) is not None and engine.precision != "int8":
            yield ("options", key), f"{key} is for int8, the precision is {engine.precision}"
    if options.typing == "weak" and engine.precision == "fp8":
        yield ("options", "typing"), "fp8 is explicit Q/DQ: it has no weak typing"
    if options.timing_cache is not None and engine.rebuilds > 1:
        yield (
            ("options", "timing_cache"),
            "timing_cache makes every build choose what the first one chose, so rebuilds would show no spread",
        )
    if options.tf32 is not None and engine.precision in ("fp32", "tf32"):
        yield (
            ("options", "tf32"),
            f'tf32 is for lower precisions; here ask for precision = "{"tf32" if options.tf32 else "fp32"}"',
        )
    for index, ranges in enumerate(options.profiles or ()):
        yield from _profile_contradictions(spec, ranges, index)
    if options.profiles is not None and not options.profiles:
        yield ("options", "profiles"), "profiles is empty"
    if options.profiles:
        for axis, whole in _axes(spec).items():
            parts = sorted((each[axis].min, each[axis].max) for each in options.profiles if axis in each)
            if not parts:
                continue
            reached = whole.min - 1
            for low, high in parts:
                if low > reached + 1:
                    break
                reached = max(reached, high)
            if reached < whole.max:
                yield (
                    ("options", "profiles"),
                    f"no profile holds {axis} = {reached + 1}, which [inputs] allows ({whole.min} to {whole.max})",
                )


def _profile_contradictions(
    spec: GateSpec, ranges: Mapping[str, AxisRange], index: int
) -> Iterator[tuple[KeyPath, str]]:
    key = ("options", "profiles", index)
    axes = _axes(spec)
    for axis, sizes in ranges.items():
        if axis not in axes:
            yield key, f"profile {index} has axis {axis!r}, which no input has{did_you_mean(axis, list(axes))}"
        elif not axes[axis].min <= sizes.min <= sizes.opt <= sizes.max <= axes[axis].max:
            yield (
                key,
                f"profile {index} {axis}: needs min <= opt <= max within {axes[axis].min} to {axes[axis].max}, "
                f"got {sizes.min}, {sizes.opt}, {sizes.max}",
            )
    for axis in axes:
        if axis not in ranges:
            yield key, f"profile {index} has no range for axis {axis!r}"


def _axes(spec: GateSpec) -> dict[str, AxisRange]:
    """Every dynamic axis of the inputs, by name."""
    return {name: sizes for each in spec.inputs.values() for name, sizes in each.axes.items()}


def _lowering_contradictions(engine: EngineSpec) -> Iterator[tuple[KeyPath, str]]:
    """Keys of [engine.lowering] that the precision or the tool does not have."""
    lowering = engine.lowering
    given = [key for key in LoweringSpec.__struct_fields__ if getattr(lowering, key) not in (None, ())]
    if not given:
        return
    for key, what in (("onnx", "an onnx of its own"), ("plan", "a plan")):
        if getattr(engine, key) is not None:
            yield ("lowering",), f"[engine.lowering] does nothing beside {what}"
            return
    if engine.backend == "torch" or engine.options.typing == "weak" or engine.precision in ("fp32", "tf32"):
        why = (
            "backend 'torch' is not lowered"
            if engine.backend == "torch"
            else 'typing = "weak" compiles the FP32 graph'
            if engine.options.typing == "weak"
            else f"{engine.precision} is not lowered"
        )
        yield ("lowering",), f"[engine.lowering] does nothing here: {why}"
        return
    takes: Mapping[str, tuple[str, ...]] = {
        "fp16": ("exclude_nodes", "exclude_ops", "data_max"),
        "bf16": ("exclude_nodes", "exclude_ops", "data_max"),
        "int8": ("tool", "method", "percentile", "exclude_nodes", "exclude_ops"),
        "fp8": ("tool", "exclude_nodes", "exclude_ops"),
    }
    for key in given:
        if key not in takes[engine.precision]:
            yield (
                ("lowering", key),
                f"[engine.lowering] {key} is not for {engine.precision}; it takes {', '.join(takes[engine.precision])}",
            )
    if lowering.tool == "none" and len(given) > 1:
        yield ("lowering", "tool"), 'tool = "none" takes the graph as it is, and no other key'
    if engine.precision == "fp8" and lowering.tool == "onnxruntime":
        yield ("lowering", "tool"), "fp8 is made by modelopt"
    methods = {"modelopt": ("max", "entropy")}.get(lowering.tool or "", ("minmax", "entropy", "percentile"))
    if lowering.method is not None and lowering.tool != "none" and lowering.method not in methods:
        yield (
            ("lowering", "method"),
            f"method {lowering.method!r} is not of {lowering.tool or 'onnxruntime'}; it has {', '.join(methods)}",
        )
    if lowering.percentile is not None and lowering.method != "percentile":
        yield ("lowering", "percentile"), 'percentile needs method = "percentile"'
    for index, pattern in enumerate(lowering.exclude_nodes):
        try:
            re.compile(pattern)
        except re.error as err:
            yield ("lowering", "exclude_nodes"), f"exclude_nodes[{index}] = {pattern!r} is no regular expression: {err}"


class JudgedEngine(msgspec.Struct, frozen=True):
    """What an engine's table says of how it is judged, whatever else it says."""

    name: str
    precision: Precision
    rebuilds: int = 1
    parity: ParitySpec | None = None
    latency: LatencySpec | tuple[LatencySpec, ...] | None = None


def judged_engine_of(data: bytes, engine: str) -> JudgedEngine:
    """How one engine is judged, read from a spec whose other parts may be of another version.

    Args:
        data: Of `gate.toml`.
        engine: Its name.

    Raises:
        SpecError: It is no TOML, has no such engine, or its tables of parity or latency are none.
    """
    try:
        engines = tomllib.loads(data.decode("utf-8")).get("engine", [])
        (found,) = [each for each in engines if each.get("name") == engine]
        return msgspec.convert(found, JudgedEngine, strict=True)
    except (ValueError, AttributeError, TypeError, RecursionError, msgspec.ValidationError) as err:
        raise SpecError(f"its [[engine]] {engine!r} cannot be read: {err}") from err


def batch_axis_of(spec: GateSpec) -> str | int:
    """Name of the inputs' first axis, or its size where it is fixed; 1 for an input without axes."""
    first = next(iter(spec.inputs.values())).shape[:1] if spec.inputs else ()
    return first[0] if first else 1


def dynamic_axes_of(spec: GateSpec) -> dict[str, tuple[int, int]]:
    """Least and most of each dynamic axis."""
    return {axis: (given.min, given.max) for each in spec.inputs.values() for axis, given in each.axes.items()}


def located(engine: EngineSpec, folder: Path) -> EngineSpec:
    """The engine with the paths of its options as absolute ones, which start from the spec's folder."""
    options = engine.options
    changed: dict[str, Any] = {
        key: str(folder / value)
        for key in ("timing_cache", "calibration_cache")
        if (value := getattr(options, key)) is not None
    }
    if options.plugins is not None:
        changed["plugins"] = tuple(str(folder / each) for each in options.plugins)
    given = options.provider_options or {}
    caches = ("trt_engine_cache_path", "trt_timing_cache_path")
    if any(key in given for key in caches):
        changed["provider_options"] = given | {key: str(folder / str(given[key])) for key in caches if key in given}
    if not changed:
        return engine
    return msgspec.structs.replace(engine, options=msgspec.structs.replace(options, **changed))
