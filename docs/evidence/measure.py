"""GPU compute time of every engine of a spec at several batch sizes, beside a bare CUDA-event loop; and what comparing costs.

    python docs/evidence/measure.py SPEC OUT --engine NAME [--reference RECORDING]

The engine comes from the cache of an earlier check; one that cannot run here is left out. One engine a process: what crashes
takes no other with it. The gate's own timing and a bare loop over the same engine file take turns, so that both see the
same clocks, at several placements of their buffers. Writes OUT/measure-<engine>.json.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gate.cache import Cache
from gate.data.batches import Batch
from gate.data.samples import DigestedSource
from gate.engines import backend as backend_named
from gate.errors import GateError
from gate.reference import batch_size, record
from gate.spec import EngineSpec, located, read_spec
from gate.steps.compare import compare_outputs
from gate.steps.context import CheckOptions, Context, Silence
from gate.steps.make import make_engine, model_resources
from gate.timing import interleave
from gate.verdict import Evidence, Failure, Finding

BATCHES = (1, 8, 32)
PLACEMENTS = 5
TURNS = 3
CALLS = 200
WARM_UP_S = 0.05


def main() -> None:
    """Measure and write."""
    faulthandler.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--reference", type=Path)
    args = parser.parse_args()
    file = read_spec(args.spec)
    run = Context(file, CheckOptions(cache=args.out / "cache", reference=args.reference), Silence())
    run.open_samples()
    run.open_reference()
    engine = file.engine(args.engine)
    try:
        found = {engine.name: measured(run, engine)}
    except GateError as err:
        print(f"{engine.name:<20} not measured: {' '.join(err.message.split())}")
        return
    (args.out / f"measure-{engine.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(run: Context, engine: EngineSpec) -> dict[str, Any]:
    """One engine at every batch size, and its comparison with the reference."""
    backend = backend_named(engine.backend)
    if backend.runs_here(engine) is None:
        raise GateError("it does not run here")
    made = make_engine(run, engine, backend)
    result: dict[str, Any] = {"batches": {}}
    here = located(engine, run.file.folder)

    def opened() -> AbstractContextManager[Any]:
        return backend.open(made.path, spec=run.spec, engine=here, resources=model_resources(run))

    samples = next(run.source.batches(max(BATCHES))).inputs
    with opened() as runner:
        for size in BATCHES:
            feed = {name: np.ascontiguousarray(values[:size]) for name, values in samples.items()}
            with ExitStack() as stack:
                pairs = [Pair(engine_alone(runner, feed), bare_loop(engine, made.path, feed, run))]
                while pairs[0].bare is not None and len(pairs) < PLACEMENTS:
                    another: Any = stack.enter_context(opened())
                    pairs.append(Pair(engine_alone(another, feed), bare_loop(engine, made.path, feed, run)))
                for turn in range(TURNS):
                    for pair in pairs:
                        pair.measure(first=turn % 2)
                walls = host_walls(runner.timed(feed))
            result["batches"][size] = numbers(pairs, walls)
            show(engine.name, size, result["batches"][size])
        result["comparing"] = comparing(run, engine, runner)
    print(f"{engine.name:<20} {json.dumps(result['comparing'])}")
    return result


@dataclass
class Pair:
    """The gate's call and the bare loop beside it, each with buffers of its own, and what they took (nanoseconds)."""

    call: Callable[[], int]
    bare: Callable[[], int] | None
    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)

    def measure(self, *, first: int) -> None:
        """One turn of both, the bare loop first where `first` is 0."""
        for kept, what in ((self.ours, self.call), (self.theirs, self.bare))[:: 1 if first else -1]:
            if what is not None:
                kept.extend(durations(what))


def engine_alone(runner: Any, feed: dict[str, Any]) -> Callable[[], int]:
    """What `timed = "gpu_compute"` is of: an inference whose inputs lie on the device, nanoseconds."""
    once = runner.region_timed([feed], transfers=False, wait="spin")
    return lambda: once(0)().gpu_compute


def durations(call: Callable[[], int]) -> list[int]:
    """One turn of a call that says what it took, nanoseconds."""
    until = time.monotonic() + WARM_UP_S
    while time.monotonic() < until:
        call()
    return [call() for _ in range(CALLS)]


def host_walls(call: Callable[[], None]) -> list[int]:
    """One turn by the host's clock, nanoseconds."""
    (found,) = interleave([lambda _: call()], kept=CALLS, leg=CALLS, discard=2)
    return list(found.regions["host_wall"])


def numbers(pairs: list[Pair], walls: list[int]) -> dict[str, Any]:
    """Nearest-rank percentiles in milliseconds; p50 is the median over where the buffers lie, which moves it by 1 to 2 %."""

    def rank(values: list[int], p: float) -> float:
        ordered = sorted(values)
        return ordered[max(0, int(np.ceil(p * len(ordered))) - 1)] / 1e6

    pooled = [value for pair in pairs for value in pair.ours]
    each = [rank(pair.ours, 0.5) for pair in pairs]
    bare = [rank(pair.theirs, 0.5) for pair in pairs if pair.theirs]
    return {
        "n": len(pooled),
        "p50_ms": statistics.median(each),
        "p95_ms": rank(pooled, 0.95),
        "p99_ms": rank(pooled, 0.99),
        "bare_p50_ms": statistics.median(bare) if bare else None,
        "host_wall_p50_ms": rank(walls, 0.5),
        "placements_p50_ms": each,
        "placements_bare_p50_ms": bare,
    }


def show(name: str, size: int, each: dict[str, Any]) -> None:
    """One line of the table."""
    bare = each["bare_p50_ms"]
    ratio = "" if bare is None else f"  bare p50 {bare:.4f}  ratio {each['p50_ms'] / bare:.4f}"
    print(
        f"{name:<20} batch {size:<3} p50 {each['p50_ms']:.4f}  p95 {each['p95_ms']:.4f}  p99 {each['p99_ms']:.4f} ms"
        f"{ratio}  host wall {each['host_wall_p50_ms']:.3f}",
        flush=True,
    )


@dataclass(frozen=True)
class Held:
    """Batches that are in memory already: what making samples costs is not the gate's."""

    kept: list[Batch]

    def __len__(self) -> int:
        return sum(batch.size for batch in self.kept)

    def batches(self, size: int) -> Iterator[Batch]:
        """As they were made."""
        del size
        yield from self.kept


def comparing(run: Context, engine: EngineSpec, runner: Any) -> dict[str, float]:
    """Seconds over all samples once: the engine alone, the reference alone, and what the gate adds to either.

    What it adds is the difference between its own loop (samples held against their digests, reference read or written,
    outputs compared) and the bare calls of the runner on the same arrays.
    """
    plain = run.source
    run.source = DigestedSource(Held(list(plain.batches(batch_size(run.file)))), run.digest, "samples in memory")
    batches = run.source.source.kept  # type: ignore[attr-defined]
    found: dict[str, float] = {"samples": len(run.source)}
    found["engine_s"] = best(lambda: [runner.run(batch.inputs) for batch in batches])
    found["with_comparing_s"] = best(lambda: compared(run, engine, runner))
    try:
        with run.model.runner() as reference:
            found["reference_s"] = best(lambda: [reference.run(batch.inputs) for batch in batches])
        found["with_recording_s"] = best(lambda: recorded(run))
    except (GateError, ImportError):
        pass  # no PyTorch here: the other Python measures the reference
    run.source = plain
    return {name: round(value, 4) for name, value in found.items()}


def best(call: Callable[[], object], turns: int = 3) -> float:
    """The shortest of some turns, seconds, after one that is not counted."""
    call()
    taken = []
    for _ in range(turns):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


def compared(run: Context, engine: EngineSpec, runner: Any) -> None:
    """The gate's own loop over all samples: every finding of parity."""
    findings: list[Finding | Failure] = []
    if compare_outputs(run, engine, runner, Evidence.DEVICE, findings) is None or not findings:
        raise GateError("nothing was compared")


def recorded(run: Context) -> None:
    """The reference's outputs over all samples, written as a recording."""
    with tempfile.TemporaryDirectory() as name:
        record(
            run.model,
            file=run.file,
            source=run.source,
            digest=run.digest,
            cache=Cache(Path(name), on_rebuild=print),
            advance=lambda: None,
        )


def bare_loop(engine: EngineSpec, path: Path, feed: dict[str, np.ndarray], run: Context) -> Callable[[], int] | None:
    """The same engine file, run by the vendor's API alone between two CUDA events; None where that is not written."""
    if engine.backend == "tensorrt":
        return bare_tensorrt(path, feed)
    if engine.backend == "torch" and engine.options.mode in (None, "eager") and engine.precision == "fp32":
        return bare_torch(feed, run)
    return None


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

    module = copy.deepcopy(run.model.module).to("cuda")
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
