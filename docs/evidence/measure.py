"""GPU compute time of every engine of a spec at several batch sizes, beside a bare CUDA-event loop; and what comparing costs.

    python docs/evidence/measure.py SPEC OUT [--reference RECORDING]

Engines come from the cache of an earlier check; those that cannot run here are left out. The gate's own timing and a
bare loop over the same engine file take turns, so that both see the same clocks. Writes OUT/measure-<spec>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gate.compare import OutputAccumulator
from gate.engines import backend as backend_named
from gate.errors import GateError
from gate.spec import EngineSpec, located, read_spec
from gate.steps.context import CheckOptions, Context, Silence
from gate.steps.make import make_engine
from gate.timing import sample
from gate.tolerances import allclose_tolerances

BATCHES = (1, 8, 32)
TURNS = 6
CALLS = 200


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", type=Path)
    args = parser.parse_args()
    file = read_spec(args.spec)
    run = Context(file, CheckOptions(cache=args.out / "cache", reference=args.reference), Silence())
    run.open_samples()
    run.open_reference()
    found: dict[str, Any] = {}
    for engine in file.spec.engines:
        try:
            found[engine.name] = measured(run, engine)
        except GateError as err:
            print(f"{engine.name:<20} not measured: {' '.join(err.message.split())}")
    target = args.out / f"measure-{args.spec.name.split('.')[0]}.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(run: Context, engine: EngineSpec) -> dict[str, Any]:
    """One engine at every batch size, and its comparison with the reference."""
    backend = backend_named(engine.backend)
    if backend.runs_here(engine) is None:
        raise GateError("it does not run here")
    made = make_engine(run, engine, backend)
    result: dict[str, Any] = {"batches": {}}
    with backend.open(made.path, spec=run.spec, engine=located(engine, run.file.folder)) as runner:
        samples = next(run.source.batches(max(BATCHES))).inputs
        for size in BATCHES:
            feed = {name: np.ascontiguousarray(values[:size]) for name, values in samples.items()}
            call = runner.gpu_timed(feed)  # type: ignore[attr-defined]
            host = runner.timed(feed)
            with bare_loop(engine, made.path, feed, run) as bare:
                ours: list[int] = []
                theirs: list[int] = []
                call(), host()
                for turn in range(TURNS):
                    for kept, what in ((ours, call), (theirs, bare))[:: 1 if turn % 2 else -1]:
                        if what is not None:
                            kept.extend(durations(what))
                walls = durations(host)
            result["batches"][size] = numbers(ours, theirs, walls)
            show(engine.name, size, result["batches"][size])
        result["comparing"] = comparing(run, engine, runner)
    print(f"{engine.name:<20} {json.dumps(result['comparing'])}")
    return result


def durations(call: Callable[[], int | None]) -> list[int]:
    """One turn, nanoseconds."""
    return list(sample(call, samples=CALLS, warm_up_s=0.05, max_time_s=60.0).durations_ns)


def numbers(ours: list[int], theirs: list[int], walls: list[int]) -> dict[str, float | None]:
    """Nearest-rank percentiles in milliseconds."""

    def rank(values: list[int], p: float) -> float:
        ordered = sorted(values)
        return ordered[max(0, int(np.ceil(p * len(ordered))) - 1)] / 1e6

    return {
        "n": len(ours),
        "p50_ms": rank(ours, 0.5),
        "p95_ms": rank(ours, 0.95),
        "p99_ms": rank(ours, 0.99),
        "bare_p50_ms": rank(theirs, 0.5) if theirs else None,
        "host_wall_p50_ms": rank(walls, 0.5),
    }


def show(name: str, size: int, each: dict[str, float | None]) -> None:
    """One line of the table."""
    bare = each["bare_p50_ms"]
    ratio = "" if bare is None else f"  bare p50 {bare:.4f}  ratio {each['p50_ms'] / bare:.4f}"  # type: ignore[operator]
    print(
        f"{name:<20} batch {size:<3} p50 {each['p50_ms']:.4f}  p95 {each['p95_ms']:.4f}  p99 {each['p99_ms']:.4f} ms"
        f"{ratio}  host wall {each['host_wall_p50_ms']:.3f}",
        flush=True,
    )


def comparing(run: Context, engine: EngineSpec, runner: Any) -> dict[str, float]:
    """Seconds of running the engine, of comparing its outputs, and of the bookkeeping, over all samples once."""
    accumulators: dict[str, OutputAccumulator] = {}
    inside = compared = digested = 0.0
    held = [(batch, reference) for batch, reference in run.pairs()]
    plain = run.source.source  # type: ignore[attr-defined]
    began = time.perf_counter()
    batches = list(plain.batches(held[0][0].size))
    generated = time.perf_counter() - began
    began = time.perf_counter()
    from gate.data.samples import _row_digests

    for batch in batches:
        list(_row_digests(batch))
    digested = time.perf_counter() - began
    for batch, reference in held:
        began = time.perf_counter()
        outputs = runner.run(batch.inputs)
        middle = time.perf_counter()
        for name, values in reference.items():
            if name not in accumulators:
                scale = run.recording.outputs[name]
                atol, rtol = allclose_tolerances(engine, rms=scale.rms)
                accumulators[name] = OutputAccumulator(
                    name, dtype=values.dtype, atol=atol, rtol=rtol, center=scale.center, batch_axis=scale.batch_axis
                )
            accumulators[name].add(values, outputs[name], first_sample=batch.first)
        inside += middle - began
        compared += time.perf_counter() - middle
    began = time.perf_counter()
    for each in accumulators.values():
        each.metrics()
    compared += time.perf_counter() - began
    return {
        "samples": sum(batch.size for batch, _ in held),
        "engine_s": round(inside, 4),
        "comparing_s": round(compared, 4),
        "digesting_s": round(digested, 4),
        "making_samples_s": round(generated, 4),
        "reference_s": round(reference_seconds(run, held), 4),
    }


def reference_seconds(run: Context, held: list[Any]) -> float:
    """The reference's own runs over the same samples; NaN where PyTorch is not here."""
    try:
        with run.model.runner() as runner:
            runner.run(held[0][0].inputs)
            began = time.perf_counter()
            for batch, _ in held:
                runner.run(batch.inputs)
            return time.perf_counter() - began
    except (GateError, ImportError):
        return float("nan")


@contextmanager
def bare_loop(
    engine: EngineSpec, path: Path, feed: dict[str, np.ndarray], run: Context
) -> Iterator[Callable[[], int] | None]:
    """The same engine file, run by the vendor's API alone between two CUDA events; None where that is not written."""
    if engine.backend == "tensorrt":
        yield bare_tensorrt(path, feed)
    elif engine.backend == "torch" and engine.options.mode in (None, "eager") and engine.precision == "fp32":
        yield bare_torch(feed, run)
    else:
        yield None


def bare_tensorrt(path: Path, feed: dict[str, np.ndarray]) -> Callable[[], int]:
    """Source: the TensorRT developer guide, performing inference with explicit addresses, and CUDA's event API."""
    import tensorrt as trt
    from cuda import cudart

    def checked(answer: Any) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise RuntimeError(f"CUDA: {status}")
        return values[0] if values else None

    logger = trt.Logger(trt.Logger.ERROR)
    trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    loaded = runtime.deserialize_cuda_engine(path.read_bytes())
    context = loaded.create_execution_context()
    stream = checked(cudart.cudaStreamCreate())
    for name, array in feed.items():
        context.set_input_shape(name, array.shape)
        address = checked(cudart.cudaMalloc(array.nbytes))
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(cudart.cudaMemcpy(address, array.ctypes.data, array.nbytes, kind))
        context.set_tensor_address(name, address)
    for index in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(index)
        if name not in feed:
            size = int(np.prod(context.get_tensor_shape(name))) * 4
            context.set_tensor_address(name, checked(cudart.cudaMalloc(size)))
    start, end = checked(cudart.cudaEventCreate()), checked(cudart.cudaEventCreate())

    def once() -> int:
        cudart.cudaEventRecord(start, stream)
        context.execute_async_v3(int(stream))
        cudart.cudaEventRecord(end, stream)
        cudart.cudaEventSynchronize(end)
        return int(cudart.cudaEventElapsedTime(start, end)[1] * 1e6)

    once.kept = (runtime, loaded, context)  # type: ignore[attr-defined]
    return once


def bare_torch(feed: dict[str, np.ndarray], run: Context) -> Callable[[], int]:
    """The module itself, eager, between two of PyTorch's CUDA events."""
    import torch

    module = run.model.module.to("cuda")
    tensors = [torch.from_numpy(array).to("cuda") for array in feed.values()]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> int:
        with torch.inference_mode():
            start.record()
            module(*tensors)
            end.record()
        end.synchronize()
        return int(start.elapsed_time(end) * 1e6)

    return once


if __name__ == "__main__":
    main()
