"""The equivalent command line of the vendor's own tool, trtexec."""

from __future__ import annotations

import shlex
from pathlib import Path

from gate.spec import EngineSpec, GateSpec


def build_command(
    name: str, onnx: Path, out: Path, *, spec: GateSpec, engine: EngineSpec, typed: bool, flags: tuple[str, ...]
) -> str:
    """The same build by the vendor's tool; file names without folders, which differ between machines.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.
        typed: Whether the network is strongly typed.
        flags: Precision flags of a weakly typed network: `FP16`, `INT8`.
    """
    tool = "tensorrt_rtx" if name == "tensorrt_rtx" else "trtexec"
    parts = [tool, f"--onnx={onnx.name}", f"--saveEngine={out.name}"]
    dynamic = {name: each for name, each in spec.inputs.items() if each.axes}
    if dynamic:
        for which in ("min", "opt", "max"):
            shapes = ",".join(f"{name}:{'x'.join(map(str, each.sized(which)))}" for name, each in dynamic.items())
            parts.append(f"--{which}Shapes={shapes}")
    if name == "tensorrt":
        if typed:
            parts.append("--stronglyTyped")
        else:
            parts += [f"--{flag.lower()}" for flag in flags]
        if engine.precision != "tf32":
            parts.append("--noTF32")
    if engine.options.workspace_mib is not None:
        parts.append(f"--memPoolSize=workspace:{engine.options.workspace_mib}")
    if engine.options.builder_optimization_level is not None:
        parts.append(f"--builderOptimizationLevel={engine.options.builder_optimization_level}")
    return shlex.join(parts)
