"""fp16 and bf16 by NVIDIA Model Optimizer's AutoCast, with FP32 inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gate.chatter import quiet
from gate.lower.files import inputs_of, save
from gate.lower.nodes import exactly
from gate.lower.tools import importing, making
from gate.spec import LoweringSpec
from gate.tensors import NamedArrays

_FP16_RANGE = 32_768.0
"""A value above half of the largest float16 keeps its node in FP32: unseen samples may be twice as large."""

_BATCHES = 8
"""Batches of real samples that AutoCast looks at for values that do not fit."""


def cast(
    source: Any,
    folder: Path,
    *,
    precision: str,
    lowering: LoweringSpec,
    kept: tuple[str, ...],
    calibration: Iterable[NamedArrays] | None,
) -> tuple[Any, tuple[str, ...]]:  # the pair never leaves this package
    """The graph in fp16 or bf16, its inputs and outputs in their own types; and what a reader should know.

    Args:
        source: The FP32 graph, its nodes named.
        folder: For the tool's files.
        precision: fp16 or bf16.
        lowering: Its data_max; left out, fp16 with samples takes half of the largest float16, and no limit otherwise.
        kept: Names of the nodes that stay in FP32.
        calibration: Batches of samples, of which the first few are looked at.

    Raises:
        LoweringError: It is not installed, or failed.
    """
    import onnx

    path = folder / "source.onnx"
    save(source, path)
    settings: dict[str, Any] = {"data_max": float("inf")}
    notes: tuple[str, ...] = ()
    looks = precision == "fp16" or lowering.data_max is not None
    batches = folder / "samples"
    batches.mkdir()
    if looks and calibration is not None and _has_fixed_or_batch_inputs(source):
        count = _kept_batches(calibration, batches)
        if count:
            settings = {"data_max": lowering.data_max or _FP16_RANGE, "calibration_data": str(batches)}
    if lowering.data_max is not None and "calibration_data" not in settings:
        settings["data_max"] = lowering.data_max
        notes = (
            f"data_max = {lowering.data_max:g} was held against the values of one random input between 0 and 1, "
            "since there are no calibration samples",
        )
    with quiet() as chatter:
        with importing("NVIDIA Model Optimizer", precision):
            from modelopt.onnx.autocast import convert_to_mixed_precision
        with making("Model Optimizer", precision, chatter):
            model = convert_to_mixed_precision(
                str(path),
                low_precision_type=precision,
                nodes_to_exclude=exactly(kept),
                keep_io_types=True,
                providers=["cpu"],
                **settings,
            )
            model = onnx.shape_inference.infer_shapes(model)
    return model, notes


def _has_fixed_or_batch_inputs(model: Any) -> bool:
    """Whether only the first axis of the inputs is dynamic, as AutoCast's reader of samples needs."""
    return all(isinstance(size, int) for each in inputs_of(model).values() for size in each.shape[1:])


def _kept_batches(calibration: Iterable[NamedArrays], folder: Path) -> int:
    """Write the first few batches where AutoCast reads them; how many there were."""
    count = 0
    for count, batch in enumerate(islice(calibration, _BATCHES), start=1):
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in batch.items()}
        np.savez(folder / f"{count:04d}.npz", **arrays)
    return count
