"""The options of ONNX Runtime's execution providers: which there are, what they may not say, and what they become."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gate.errors import RunError, SpecError
from gate.manifest import canonical_json, sha256_hex
from gate.spec import EngineOptions, EngineSpec, GateSpec

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
NAMES: Mapping[str, str] = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
"""ONNX Runtime's name of each provider of the spec."""

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""Set to 0 in the environment, it keeps every NVIDIA library from TF32, whatever it is told in code.

Source: cuDNN's documentation of CUDNN_FMA_MATH; for TensorRT beneath ONNX Runtime, microsoft/onnxruntime#6427 and #26029.
"""

_TAKEN: Mapping[str, tuple[str, ...]] = {
    "cuda": (
        "arena_extend_strategy",
        "cudnn_conv1d_pad_to_nc1d",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "device_id",
        "do_copy_in_default_stream",
        "enable_skip_layer_norm_strict_mode",
        "fuse_conv_bias",
        "gpu_mem_limit",
        "prefer_nhwc",
        "sdpa_kernel",
        "tunable_op_enable",
        "tunable_op_max_tuning_duration_ms",
        "tunable_op_tuning_enable",
        "use_ep_level_unified_stream",
        "use_tf32",
    ),
    "tensorrt": (
        "device_id",
        "trt_auxiliary_streams",
        "trt_bf16_enable",
        "trt_build_heuristics_enable",
        "trt_builder_optimization_level",
        "trt_context_memory_sharing_enable",
        "trt_detailed_build_log",
        "trt_dla_core",
        "trt_dla_enable",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_engine_hw_compatible",
        "trt_force_sequential_engine_build",
        "trt_force_timing_cache",
        "trt_fp16_enable",
        "trt_int8_enable",
        "trt_layer_norm_fp32_fallback",
        "trt_load_user_initializer",
        "trt_max_partition_iterations",
        "trt_max_workspace_size",
        "trt_min_subgraph_size",
        "trt_op_types_to_exclude",
        "trt_preview_features",
        "trt_sparsity_enable",
        "trt_tactic_sources",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
        "trt_weight_stripped_engine_enable",
    ),
}
"""What a user may set. Source: the names that the provider libraries of onnxruntime-gpu 1.31.1 parse."""

_GRAPH = 'a captured graph replays the first call\'s addresses; backend = "tensorrt" has options.cuda_graph'
_OURS: Mapping[str, str] = {
    "enable_cuda_graph": _GRAPH,
    "trt_cuda_graph_enable": _GRAPH,
    "user_compute_stream": "the gate gives its own stream, to time on it",
    "has_user_compute_stream": "the gate gives its own stream, to time on it",
    "trt_profile_min_shapes": "profiles are the ranges in [inputs]",
    "trt_profile_opt_shapes": "profiles are the ranges in [inputs]",
    "trt_profile_max_shapes": "profiles are the ranges in [inputs]",
    "trt_int8_calibration_table_name": "the lowered graph carries its scales as Q/DQ",
    "trt_int8_use_native_calibration_table": "the lowered graph carries its scales as Q/DQ",
    "trt_extra_plugin_lib_paths": 'its digest would not be recorded; backend = "tensorrt" has options.plugins',
    "trt_engine_decryption_enable": "it loads a library whose digest would not be recorded",
    "trt_engine_decryption_lib_path": "it loads a library whose digest would not be recorded",
    "trt_dump_subgraphs": "it writes into the current folder",
    "trt_dump_ep_context_model": "what runs would be another file than the one that is checked",
    "trt_ep_context_embed_mode": "what runs would be another file than the one that is checked",
    "trt_ep_context_file_path": "what runs would be another file than the one that is checked",
    "trt_onnx_model_folder_path": "what runs would be another file than the one that is checked",
}
"""What a user may not set, and why."""

_WEAK = ("trt_bf16_enable", "trt_fp16_enable", "trt_int8_enable")
"""Options that make the TensorRT provider build a weakly typed network.

Source: tensorrt_execution_provider.cc, CreateNodeComputeInfoFromGraph: NetworkDefinitionCreationFlag::kSTRONGLY_TYPED
is set where none of them is on and TensorRT is 9 or later.
"""

_QUANTIZED_ON_CUDA = ("int8", "fp8")


def require_options(engine: EngineSpec, environment: Mapping[str, str] | None = None) -> None:
    """Hold the options of a provider against the provider, the precision and the environment.

    Args:
        engine: Of backend `onnxruntime`.
        environment: Left out: that of the process.

    Raises:
        SpecError: One is unknown, is the gate's to set, or contradicts the precision; or the provider cannot deliver
            the precision or the evidence.
    """
    environment = os.environ if environment is None else environment
    if engine.options.provider in (None, "cpu"):
        return
    for message, hint in _contradictions(engine, environment):
        raise SpecError(message, where=f"engine {engine.name!r}", hint=hint)


def _contradictions(engine: EngineSpec, environment: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    provider = engine.options.provider or "cpu"
    given = engine.options.provider_options or {}
    if engine.required_evidence == "preflight":
        yield (
            f'evidence "preflight" compiles only, and ONNX Runtime\'s {provider} provider compiles nothing without a GPU',
            'Ask for evidence = "device", or leave it out.',
        )
    for key, value in given.items():
        if key in _OURS:
            yield f"provider_options.{key} cannot be set: {_OURS[key]}", None
        if key not in _TAKEN[provider]:
            near = difflib.get_close_matches(key, _TAKEN[provider], n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            yield (
                f"ONNX Runtime's {provider} provider has no option {key!r}{meant}",
                f"It takes {', '.join(_TAKEN[provider])}.",
            )
        if key in _WEAK and _is_on(value):
            yield (
                f"provider_options.{key} contradicts precision {engine.precision!r}: the graph is lowered already, and "
                "with this option TensorRT chooses precisions itself",
                'Leave it out; precision = "fp16", "bf16" or "int8" lowers the graph. backend = "tensorrt" has weak typing.',
            )
        if key == "device_id" and str(value) != "0":
            yield (
                f"provider_options.device_id = {value}: the gate describes the first visible GPU and times on it",
                "Choose the GPU by CUDA_VISIBLE_DEVICES.",
            )
    if provider == "cuda":
        yield from _cuda_contradictions(engine, given, environment)
    else:
        yield from _tensorrt_contradictions(engine, given, environment)


def _cuda_contradictions(
    engine: EngineSpec, given: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[tuple[str, str | None]]:
    tf32 = given.get("use_tf32")
    for precision, wanted in (("fp32", False), ("tf32", True)):
        if engine.precision == precision and tf32 is not None and _is_on(tf32) is not wanted:
            yield (
                f"provider_options.use_tf32 = {str(tf32).lower()} contradicts precision {precision!r}",
                f'Ask for precision = "{"fp32" if wanted else "tf32"}", or leave the option out.',
            )
    if engine.precision == "tf32" and environment.get(TF32_OVERRIDE) == "0":
        yield f"{TF32_OVERRIDE}=0 turns TF32 off, and the precision is 'tf32'", f"unset {TF32_OVERRIDE}"
    if engine.precision in _QUANTIZED_ON_CUDA:
        yield (
            f"ONNX Runtime's cuda provider has no {engine.precision} convolution or matrix product: it would run the "
            "Q/DQ graph in floating point",
            'Use provider = "tensorrt", or backend = "tensorrt".',
        )


def _tensorrt_contradictions(
    engine: EngineSpec, given: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[tuple[str, str | None]]:
    off = environment.get(TF32_OVERRIDE) == "0"
    if engine.precision == "fp32" and not off:
        yield (
            "ONNX Runtime's tensorrt provider has TF32 on and no option that turns it off, and the precision is 'fp32'",
            f'Set {TF32_OVERRIDE}=0 in the environment, or ask for precision = "tf32".',
        )
    if engine.precision == "tf32" and off:
        yield f"{TF32_OVERRIDE}=0 turns TF32 off, and the precision is 'tf32'", f"unset {TF32_OVERRIDE}"
    path = given.get("trt_engine_cache_path")
    enabled = given.get("trt_engine_cache_enable")
    if enabled is not None and _is_on(enabled) and path is None:
        yield (
            "provider_options.trt_engine_cache_enable needs trt_engine_cache_path: which folder to keep engines in",
            None,
        )
    if path is not None and enabled is not None and not _is_on(enabled):
        yield "provider_options has trt_engine_cache_path, and trt_engine_cache_enable = false", None
    if path is not None and engine.rebuilds > 1:
        yield (
            f"rebuilds = {engine.rebuilds} builds anew, and provider_options.trt_engine_cache_path keeps what was built",
            "Leave one of them out.",
        )
    timing = given.get("trt_timing_cache_path")
    timing_enabled = given.get("trt_timing_cache_enable")
    if timing_enabled is not None and _is_on(timing_enabled) and timing is None:
        yield "provider_options.trt_timing_cache_enable needs trt_timing_cache_path: which folder to keep it in", None
    if timing is not None and timing_enabled is not None and not _is_on(timing_enabled):
        yield "provider_options has trt_timing_cache_path, and trt_timing_cache_enable = false", None


def resolved_options(options: EngineOptions, *, precision: str, spec: GateSpec) -> dict[str, str]:
    """What the provider is told: the user's options, and those that precision and inputs decide. Without any path.

    Values are text, booleans as `True` and `False`: that is how ONNX Runtime's parser reads them.

    Args:
        options: That `require_options` took.
        precision: As asked for in the spec.
        spec: Its inputs are the TensorRT provider's profile.

    Raises:
        RunError: An input's name cannot be written in a profile.
    """
    found = {
        key: str(value)
        for key, value in (options.provider_options or {}).items()
        if key not in ("trt_engine_cache_path", "trt_timing_cache_path")
    }
    if options.provider == "cuda":
        found.setdefault("use_tf32", "1" if precision == "tf32" else "0")
    if options.provider == "tensorrt":
        found["trt_engine_cache_enable"] = "True"
        if (options.provider_options or {}).get("trt_timing_cache_path") is not None:
            found["trt_timing_cache_enable"] = "True"
        found.update(profile_options(spec))
    return found


def profile_options(spec: GateSpec) -> dict[str, str]:
    """The inputs with a dynamic axis as the TensorRT provider's profile: `{"trt_profile_min_shapes": "x:1x3,y:1"}`.

    Raises:
        RunError: An input's name holds a character that separates names there.

    Source: TensorRT-ExecutionProvider.md, Explicit range of dynamic input shape for TRT optimization profiles.
    """
    dynamic = {name: each for name, each in spec.inputs.items() if each.axes}
    for name in dynamic:
        if ":" in name or "," in name:
            raise RunError(
                f"input {name!r} has a dynamic axis, and ONNX Runtime's TensorRT provider cannot read a profile for a "
                "name with ':' or ','",
                hint='Export it under another name, or use provider = "cuda".',
            )
    if not dynamic:
        return {}
    return {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, each.sized(which)))}" for name, each in dynamic.items()
        )
        for which in ("min", "opt", "max")
    }


def cache_key(*, model_sha256: str, options: Mapping[str, str], software: Mapping[str, str | None]) -> str:
    """The name of the folder that holds the compiled engines of exactly this: 32 hex digits.

    ONNX Runtime itself takes a cached engine for the same graph name and shape range; the weights are not in its key.

    Args:
        model_sha256: Of the graph with its external data.
        options: That the provider is told.
        software: Versions, the GPU, and what else decides the engine.
    """
    return sha256_hex(canonical_json({"model": model_sha256, "options": dict(options), "software": dict(software)}))[
        :32
    ]


def kept_folder(options: EngineOptions, key: str) -> Path | None:
    """The folder that a user keeps engines or timings in, by the option's name; None where it is not given.

    Raises:
        RunError: It is not an absolute path.
    """
    value = (options.provider_options or {}).get(key)
    if value is None:
        return None
    path = Path(str(value))
    if not path.is_absolute():
        raise RunError(f"provider_options.{key} = {str(path)!r} is not an absolute path")
    return path


def _is_on(value: object) -> bool:
    return str(value).lower() not in ("0", "false")
