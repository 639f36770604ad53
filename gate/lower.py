"""Lowering: the FP32 ONNX graph in another precision, made once for all backends.

fp16 and bf16 are made by NVIDIA Model Optimizer's AutoCast, with FP32 inputs and outputs. int8 is made by ONNX
Runtime's quantizer as explicit Q/DQ that TensorRT accepts: symmetric int8 for activations and weights, weights per
channel, no quantised bias, Q/DQ at the inputs of convolutions and matrix multiplications only, so that TensorRT can
fuse what follows them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gate.chatter import quiet
from gate.engines.graph import external_files, layers_of, opset_of, unsafe_external_file
from gate.engines.interface import CalibrationRecord, Layer, LoweringRecord, TensorRange
from gate.errors import LoweringError
from gate.spec import LoweringSpec
from gate.tensors import Array, NamedArrays

_QUANTIZED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INT8_STEPS = 127
"""Steps on each side of zero in symmetric int8."""

_FP16_RANGE = 32_768.0
"""A value above half of the largest float16 keeps its node in FP32: unseen samples may be twice as large."""

_AUTOCAST_BATCHES = 8
"""Batches of real samples that AutoCast looks at for values that float16 cannot hold."""

_DISTRIBUTION = {"fp16": "nvidia-modelopt", "bf16": "nvidia-modelopt", "int8": "onnxruntime"}
_INSTALL = 'pip install "trt-gate[lower]"'

_LARGE_BYTES = 1_800_000_000


def tool_version(precision: str, lowering: LoweringSpec | None = None) -> str:  # noqa: ARG001
    """The tool that makes a precision, with its version, for a cache's key; `copy` for fp32 and tf32.

    Raises:
        LoweringError: It is not installed; the hint is the command that installs it.
    """
    if precision in ("fp32", "tf32"):
        return "copy"
    if precision not in _DISTRIBUTION:
        raise LoweringError(f"no tool makes {precision!r}; there is fp32, tf32, {', '.join(_DISTRIBUTION)}")
    distribution = _DISTRIBUTION[precision]
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError as err:
        raise LoweringError(f"{precision} is made by {distribution}, which is not installed", hint=_INSTALL) from err


def lower(
    onnx: Path,
    *,
    precision: str,
    out: Path,
    calibration: Iterable[NamedArrays] | None = None,
    lowering: LoweringSpec | None = None,  # noqa: ARG001
) -> LoweringRecord:
    """Write the graph in a precision.

    Args:
        onnx: The FP32 graph.
        precision: fp32 and tf32 copy it: TF32 is a setting of the compiler.
        lowering: How; left out: the precision's defaults.
        out: The file to write; weights above the size of a protobuf message go to `<out>.data`.
        calibration: Batches of samples by input. int8 needs them. fp16 uses the first few, where given, to find
            values that float16 cannot hold.

    Raises:
        LoweringError: The tool is not installed or failed, nothing was lowered, the inputs or outputs changed, or
            the calibration is missing, empty, not finite or constant.
    """
    tool_version(precision)
    source = _load(onnx)
    with tempfile.TemporaryDirectory(prefix="gate-lower-") as name:
        folder = Path(name)
        record: CalibrationRecord | None = None
        if precision in ("fp32", "tf32"):
            model, tool = source, "copy"
        elif precision == "int8":
            model, record = _quantized(source, folder, calibration)
            tool = "onnxruntime.quantization.quantize_static"
        else:
            model = _cast(source, folder, precision, calibration)
            tool = "modelopt.onnx.autocast"
        layers = layers_of(model)
        if precision in ("fp16", "bf16", "int8"):
            _require_lowered(model, layers, source=source, precision=precision, where=str(onnx))
        _write(model, out, folder)
    return LoweringRecord(
        precision=precision,
        tool=tool,
        tool_version=importlib.metadata.version(_DISTRIBUTION[precision]) if precision in _DISTRIBUTION else "",
        opset=opset_of(model),
        layers=layers,
        calibration=record,
    )


def _load(path: Path) -> Any:
    import onnx

    try:
        plain = onnx.load(str(path), load_external_data=False)
        wrong = unsafe_external_file(path, external_files(plain))
        if wrong is None:
            return onnx.load(str(path))
    except Exception as err:
        raise LoweringError(f"cannot be read as ONNX: {err}", where=str(path)) from err
    raise LoweringError(wrong, where=str(path))


def _write(model: Any, out: Path, folder: Path) -> None:
    import onnx

    data = out.with_name(out.name + ".data")
    large = _is_large(model)
    final = folder / "final"
    final.mkdir()
    new = final / out.name
    onnx.save_model(model, str(new), save_as_external_data=large, all_tensors_to_one_file=True, location=data.name)
    onnx.checker.check_model(str(new))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gate-lower-", dir=out.parent) as name:
        for target in (data, out):
            made = final / target.name
            if made.exists():
                staged = Path(name, target.name)
                shutil.copyfile(made, staged)
                staged.replace(target)
            elif target.exists():
                target.unlink()


def _cast(source: Any, folder: Path, precision: str, calibration: Iterable[NamedArrays] | None) -> Any:
    """The graph by AutoCast, its inputs and outputs in their own types."""
    import onnx

    path = folder / "source.onnx"
    _save(source, path)
    settings: dict[str, Any] = {"data_max": float("inf")}
    if precision == "fp16" and calibration is not None and _has_fixed_or_batch_inputs(source):
        settings = _ranges_for_autocast(folder, calibration) or settings
    with quiet() as chatter:
        try:
            from modelopt.onnx.autocast import convert_to_mixed_precision
        except ImportError as err:
            raise LoweringError(
                f"{precision} is made by NVIDIA Model Optimizer, which is not installed ({err})",
                hint=_INSTALL,
            ) from err
        try:
            model = convert_to_mixed_precision(
                str(path), low_precision_type=precision, keep_io_types=True, providers=["cpu"], **settings
            )
            model = onnx.shape_inference.infer_shapes(model)
        except Exception as err:
            told = " · ".join(chatter.tail(3))
            raise LoweringError(
                f"Model Optimizer cannot make {precision}: {type(err).__name__}: {err}{f' ({told})' if told else ''}"
            ) from err
    return model


def _has_fixed_or_batch_inputs(model: Any) -> bool:
    """Whether only the first axis of the inputs is dynamic, as AutoCast's reader of samples needs."""
    return all(
        dimension.HasField("dim_value")
        for value in model.graph.input
        for dimension in value.type.tensor_type.shape.dim[1:]
    )


def _ranges_for_autocast(folder: Path, calibration: Iterable[NamedArrays]) -> dict[str, Any] | None:
    """Settings that let AutoCast keep in FP32 what float16 cannot hold, from a few batches of real samples."""
    batches = folder / "samples"
    batches.mkdir()
    count = 0
    for batch in calibration:
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in batch.items()}
        np.savez(batches / f"{count:04d}.npz", **arrays)
        count += 1
        if count == _AUTOCAST_BATCHES:
            break
    return {"data_max": _FP16_RANGE, "calibration_data": str(batches)} if count else None


def _quantized(
    source: Any, folder: Path, calibration: Iterable[NamedArrays] | None
) -> tuple[Any, CalibrationRecord]:  # the pair never leaves this module
    """The graph with explicit Q/DQ by min-max calibration.

    Min-max is the method because parity does not choose between them and it clips nothing that it has seen. Measured on
    two small classifiers of real digits, five seeds each, 256 calibration samples, rel_rmse on 797 others: min-max
    1.14e-2 and 7.3e-3, entropy the same scales, percentile 99.999 1.11e-2 and 7.3e-3, better in five of the ten and
    worse in five. Leaving the outputs of the operators unquantised did choose: 1.0e-2 instead of 1.4e-2 on one of them.
    It costs speed on ONNX Runtime, which then fuses less; TensorRT fuses what follows.
    """
    import onnx

    if calibration is None:
        raise LoweringError(
            "int8 needs calibration samples, and there are none", hint='Add calibration = "module:function" to [data].'
        )
    inputs = {
        value.name for value in source.graph.input if value.name not in {each.name for each in source.graph.initializer}
    }
    path, made = folder / "source.onnx", folder / "int8.onnx"
    _save(source, path)
    reader = _Reader(calibration, inputs)
    with quiet() as chatter:
        try:
            import onnxruntime
            from onnxruntime.quantization import (
                CalibrationDataReader,
                CalibrationMethod,
                QuantFormat,
                QuantType,
                quantize_static,
            )
        except ImportError as err:
            raise LoweringError(
                f"int8 is made by ONNX Runtime's quantizer, which is not installed ({err})",
                hint=_INSTALL,
            ) from err
        onnxruntime.set_default_logger_severity(3)

        class Samples(CalibrationDataReader):  # type: ignore[misc]
            """Batches for the quantizer."""

            def get_next(self) -> dict[str, Array] | None:
                """The next batch, or None at the end."""
                return next(reader, None)

        try:
            quantize_static(
                str(path),
                str(made),
                Samples(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTIZED_OPERATORS),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=_is_large(source),
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": list(_QUANTIZED_OPERATORS),
                },
            )
            model = onnx.load(str(made))
        except LoweringError:
            raise
        except Exception as err:
            reader.require_complete()
            told = " · ".join(chatter.tail(2))
            raise LoweringError(
                f"ONNX Runtime cannot make int8: {type(err).__name__}: {err}{f' ({told})' if told else ''}"
            ) from err
    reader.require_complete()
    del model.metadata_props[:]
    ranges = _activation_ranges(model)
    return model, CalibrationRecord(method="minmax", samples=reader.samples, sha256=reader.sha256(), ranges=ranges)


class _Reader:
    """Batches on their way into the quantizer, checked, counted and digested."""

    def __init__(self, batches: Iterable[NamedArrays], inputs: set[str]) -> None:
        self._batches: Iterator[NamedArrays] = iter(batches)
        self._inputs = inputs
        self._digests = {name: hashlib.sha256() for name in sorted(inputs)}
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self.samples = 0

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Array]:
        batch = next(self._batches)
        if set(batch) != self._inputs:
            raise LoweringError(
                f"calibration samples have the inputs {', '.join(sorted(batch)) or 'none'}, "
                f"the graph takes {', '.join(sorted(self._inputs))}"
            )
        arrays = {name: np.ascontiguousarray(batch[name]) for name in sorted(batch)}
        counts = {array.shape[0] if array.ndim else 1 for array in arrays.values()}
        if len(counts) != 1:
            raise LoweringError(f"calibration inputs differ in their number of samples: {sorted(counts)}")
        for name, array in arrays.items():
            self._look_at(name, array)
        self.samples += counts.pop()
        return arrays

    def _look_at(self, name: str, array: Array) -> None:
        if self.samples == 0 and not self._low.get(name):
            self._digests[name].update(f"{name}\0{array.dtype}\0{list(array.shape[1:])}\0".encode())
        self._digests[name].update(array.tobytes())
        if array.size == 0 or array.dtype.kind not in "fiu":
            return
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise LoweringError(
                f"calibration input {name!r} has {int(np.sum(~np.isfinite(array)))} values that are not finite, "
                f"in the batch that begins with sample {self.samples}"
            )
        low, high = float(np.min(array)), float(np.max(array))
        self._low[name] = min(low, self._low.get(name, low))
        self._high[name] = max(high, self._high.get(name, high))

    def require_complete(self) -> None:
        """Refuse a calibration that can tell nothing.

        Raises:
            LoweringError: It is empty, or a floating input is the same number everywhere.
        """
        if self.samples == 0:
            raise LoweringError(
                "the calibration has no samples",
                hint="The function named in [data] calibration gives none.",
            )
        if self._low and all(self._low[name] == self._high[name] for name in self._low):
            name, value = next(iter(self._low.items()))
            raise LoweringError(
                f"every calibration value of input {name!r} is {value:g}: no range can be learnt from it",
                hint="Give real samples, preprocessed as in evaluation.",
            )

    def sha256(self) -> str:
        """Of all samples seen."""
        whole = hashlib.sha256()
        for name, digest in self._digests.items():
            whole.update(f"{name}\0{digest.hexdigest()}\0".encode())
        return whole.hexdigest()


def _activation_ranges(model: Any) -> tuple[TensorRange, ...]:
    """Ranges by the scales of the graph's QuantizeLinear nodes.

    Raises:
        LoweringError: A tensor's range is empty or not finite, as of a layer that gave zeros only.
    """
    from onnx import numpy_helper

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, TensorRange] = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in values or node.input[1] not in values:
            continue
        high = float(np.max(numpy_helper.to_array(values[node.input[1]]).astype(np.float64))) * _INT8_STEPS
        if not np.isfinite(high) or high <= 0:
            raise LoweringError(f"calibration gave tensor {node.input[0]!r} the range {high:g}")
        found[node.input[0]] = TensorRange(name=node.input[0], low=-high, high=high, clipped_fraction=0.0)
    return tuple(found.values())


def _require_lowered(model: Any, layers: tuple[Layer, ...], *, source: Any, precision: str, where: str) -> None:
    lowered = [
        layer
        for layer in layers
        if layer.precision == precision and layer.type not in ("Cast", "QuantizeLinear", "DequantizeLinear")
    ]
    if not lowered:
        raise LoweringError(
            f"nothing was lowered: no node of the graph computes in {precision}",
            where=where,
            hint="Look for what it is made of: int8 needs a convolution or matrix multiplication with constant weights.",
        )
    for kind in ("input", "output"):
        before = [(each.name, each.type.tensor_type.elem_type) for each in getattr(source.graph, kind)]
        after = [(each.name, each.type.tensor_type.elem_type) for each in getattr(model.graph, kind)]
        if before != after:
            raise LoweringError(f"lowering changed the {kind}s: before {before}, after {after}", where=where)


def _save(model: Any, path: Path) -> None:
    import onnx

    large = _is_large(model)
    onnx.save_model(model, str(path), save_as_external_data=large, all_tensors_to_one_file=True, location="source.data")


def _is_large(model: Any) -> bool:
    """Whether it is longer than a protobuf message may be."""
    return int(model.ByteSize()) > _LARGE_BYTES
