"""int8 and fp8 by NVIDIA Model Optimizer, as explicit Q/DQ with FP32 scales."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gate.chatter import quiet
from gate.lower.files import is_large, save
from gate.lower.nodes import exactly
from gate.lower.samples import Samples, reader_of
from gate.lower.tools import importing, making


def quantized(
    source: Any, folder: Path, *, precision: str, samples: Samples, method: str, kept: tuple[str, ...]
) -> Any:
    """The graph with Q/DQ where Model Optimizer finds that TensorRT gains by it; its opset is at least 19.

    Scales stay FP32, since TensorRT 8.6 refuses FP16 ones. It leaves matrix multiplications with a side below 16, small
    convolutions and, for fp8, those of 16 channels and fewer in FP32, where they would be slower. An fp8 scale is the int8
    scale times 448 / 127, so that its range is 12.4 times what calibration saw: nothing is clipped, and steps that shrink
    with the value lose little by it.

    Source: modelopt.onnx.quantization.fp8.int8_to_fp8, graph_utils.find_nodes_from_matmul_to_exclude,
    find_nodes_from_convs_to_exclude (0.47).

    Args:
        source: The FP32 graph, its nodes named.
        folder: For the tool's files.
        precision: int8 or fp8.
        samples: What it is calibrated on.
        method: max or entropy.
        kept: Names of the nodes that stay in FP32.

    Raises:
        LoweringError: It is not installed, or failed.
    """
    import onnx

    path, made = folder / "source.onnx", folder / f"{precision}.onnx"
    save(source, path)
    with quiet() as chatter:
        with importing("NVIDIA Model Optimizer", precision):
            import onnxruntime
            from modelopt.onnx.quantization import quantize
        onnxruntime.set_default_logger_severity(3)
        with making("Model Optimizer", precision, chatter):
            with _restored("onnxruntime.quantization"):
                quantize(
                    str(path),
                    quantize_mode=precision,
                    calibration_data_reader=reader_of(samples),
                    calibration_method=method,
                    calibration_eps=["cpu"],
                    nodes_to_exclude=exactly(kept),
                    use_external_data_format=is_large(source),
                    output_path=str(made),
                    log_level="ERROR",
                    high_precision_dtype="fp32",
                )
            model = onnx.load(str(made))
    del model.metadata_props[:]
    return model


@contextlib.contextmanager
def _restored(package: str) -> Iterator[None]:
    """Undo what the block replaces in a package's modules, their classes and registries.

    Model Optimizer replaces methods of ONNX Runtime's quantizer for good; without this, what ONNX Runtime quantises later
    in the same process would be another graph.
    Source: modelopt.onnx.quantization.ort_patching.patch_ort_modules, ort_utils.configure_ort.
    """
    modules = [each for name, each in list(sys.modules.items()) if name == package or name.startswith(package + ".")]
    before = [(module, dict(vars(module))) for module in modules]
    classes = {
        value
        for _, names in before
        for value in names.values()
        if isinstance(value, type) and value.__module__.startswith(package)
    }
    methods = [(each, dict(vars(each))) for each in classes]
    registries = {
        id(value): (value, dict(value))
        for _, names in before
        for key, value in names.items()
        if isinstance(value, dict) and not key.startswith("__")
    }
    try:
        yield
    finally:
        for owner, names in (*before, *methods):
            for key, value in names.items():
                if vars(owner).get(key) is not value:
                    setattr(owner, key, value)
        for owner, names in methods:
            for key in vars(owner).keys() - names.keys():
                delattr(owner, key)
        for live, kept in registries.values():
            if live != kept:
                live.clear()
                live.update(kept)
