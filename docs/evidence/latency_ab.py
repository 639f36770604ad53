"""The A/B rule on real engines: one against itself, and a copy with a real extra node against it.

    python docs/evidence/latency_ab.py SPEC OUT --engine NAME [--batch 8] [--timed gpu_compute] [--repeat 20]

The extra node is a matrix product of the input; its width is found so that the copy is about as much slower as asked.
Each decision is the gate's own: fresh processes, legs in turn, looks at 5, 8, 12, 20. Writes OUT/ab-<engine>-<which>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gate.engines import backend as backend_named
from gate.engines.interface import Backend
from gate.latency.config import LatencySpec, RegressionSpec
from gate.spec import EngineSpec, read_spec
from gate.steps.context import CheckOptions, Context, Silence
from gate.steps.feeds import SampleFeeds
from gate.steps.latency import Rival, Timed, Timing, measured_latency
from gate.steps.make import exported_graph, lowered_graph, make_engine
from gate.steps.rivals import engine_subject
from gate.verdict import Evidence

MOST_ELEMENTS = 4096
TRIES = 8


def main() -> None:
    """Measure, print a line for each decision, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--timed", default="host_wall")
    parser.add_argument("--tolerance", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--slower", type=float, default=5.0, help="percent")
    parser.add_argument("--width", type=int, default=256, help="of the extra node, to begin with")
    parser.add_argument(
        "--close",
        type=float,
        default=0.12,
        metavar="FRACTION",
        help="how near to what was asked for the copy's slowdown must be, as a fraction of it",
    )
    parser.add_argument("--calibration", type=int, default=20, help="sessions in which a width is tried")
    parser.add_argument("--which", choices=("same", "slower", "both"), default="both")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rule = Rule(args)
    if args.which in ("same", "both"):
        rule.decide("same", rule.base)
    if args.which in ("slower", "both"):
        rule.decide("slower", rule.slowed(args.slower, args.width))
    rule.run.close()


class Rule:
    """One engine, and decisions against it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        file = read_spec(args.spec)
        self.run = Context(file, CheckOptions(cache=args.out / "cache", reference=args.reference), Silence())
        self.run.open_samples()
        self.run.open_reference()
        engine = file.engine(args.engine)
        self.backend: Backend = backend_named(engine.backend)
        exported = exported_graph(self.run)
        from_exported = self.backend.origin(engine) == "exported"
        self.graph = exported.path if from_exported else lowered_graph(self.run, engine, exported).path
        self.engine = msgspec.structs.replace(engine, onnx=str(self.graph))
        began = time.monotonic()
        self.base = engine_subject(self.engine, file=file, made=make_engine(self.run, self.engine, self.backend))
        print(f"{engine.name}: made in {time.monotonic() - began:.1f} s", flush=True)

    def slowed(self, percent: float, width: int) -> Any:
        """A copy that is about so many percent slower at the median."""
        tried = [(0, 0.0)]
        for _ in range(TRIES):
            path = self.args.out / f"slowed-{self.args.engine}-{width}.onnx"
            extra_node(self.graph, path, width=width)
            engine = msgspec.structs.replace(self.engine, name="slowed", onnx=str(path.resolve()))
            subject = engine_subject(engine, file=self.run.file, made=make_engine(self.run, engine, self.backend))
            found = self.timed(subject, tolerance=1000.0, sessions=self.args.calibration)
            slower = 100.0 * (found.latencies[0].comparisons[0].ratios["p50"].ratio - 1.0)
            print(f"extra node of width {width}: {slower:+.2f} %", flush=True)
            if abs(slower - percent) <= self.args.close * percent:
                return subject
            tried.append((width, slower))
            width = next_width(tried, percent)
            if any(width == each for each, _ in tried):
                break
        raise SystemExit(f"no width makes it {percent} % slower: {tried}")

    def timed(self, subject: Any, *, tolerance: float, sessions: int = LatencySpec().sessions) -> Timed:
        """One decision: is the subject slower than the engine?"""
        engine: EngineSpec = msgspec.structs.replace(
            self.engine,
            latency=LatencySpec(
                batch=self.args.batch,
                timed=self.args.timed,
                max_time_s=600.0,
                sessions=sessions,
                regression=RegressionSpec(against="base", p50=tolerance),
            ),
        )
        timing = Timing(
            file=None,
            engine=engine,
            subject=subject,
            evidence=self.backend.runs_here(engine) or Evidence.PREFLIGHT,
            rival=lambda against: Rival(against, "the engine", self.base),
            feeds=SampleFeeds(self.run.spec, self.run.source),
            advance=lambda: None,
        )
        found = measured_latency(timing)
        if not found.latencies:
            raise SystemExit(f"nothing was measured: {found.findings}")
        return found

    def decide(self, which: str, subject: Any) -> None:
        """So many decisions, each with its time."""
        rows: list[dict[str, Any]] = []
        for index in range(self.args.repeat):
            began = time.monotonic()
            found = self.timed(subject, tolerance=self.args.tolerance)
            finding, latency = found.findings[0], found.latencies[0]
            comparison = latency.comparisons[0]
            row = {
                "status": finding.status.value,
                "slower_percent": 100.0 * (comparison.ratios["p50"].ratio - 1.0),
                "interval": [
                    100.0 * (comparison.ratios["p50"].interval.lower - 1.0),
                    100.0 * (comparison.ratios["p50"].interval.upper - 1.0),
                ],
                "sessions": comparison.sessions,
                "seconds": time.monotonic() - began,
                "p50_ms": latency.p50_ms,
                "detail": getattr(finding, "detail", "") or getattr(finding, "message", ""),
            }
            rows.append(row)
            print(
                f"{which:<7} {index + 1:>2} {row['status']:<13} {row['slower_percent']:+.2f} % after {row['sessions']} "
                f"sessions, {row['seconds']:.1f} s  {row['detail'] if row['status'] == 'INCONCLUSIVE' else ''}",
                flush=True,
            )
        name = f"ab-{self.args.engine}-{which}.json"
        (self.args.out / name).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        counts = Counter(row["status"] for row in rows)
        seconds = sorted(row["seconds"] for row in rows)
        sessions = [row["sessions"] for row in rows]
        print(
            f"{self.args.engine} {which}, tolerance {self.args.tolerance:g} %: {dict(counts)}; "
            f"median {np.median([row['slower_percent'] for row in rows]):+.2f} %; sessions {np.mean(sessions):.1f} on "
            f"average; time to decision {np.median(seconds):.1f} s, at most {seconds[-1]:.1f} s",
            flush=True,
        )


def next_width(tried: list[tuple[int, float]], percent: float) -> int:
    """Between the narrowest that was too slow and the widest below it that was not, as if the time grew with the width.

    Where none was too slow yet it is wider than all, 8 times at the most. A width that is tried already says that there is
    none between. Widths above one that was too slow are left out: an engine that is built anew need not be slower by more.
    """
    narrowest = min((each for each in tried if each[1] > percent), default=None)
    a, slow_a = max(each for each in tried if each[1] <= percent and (narrowest is None or each[0] < narrowest[0]))
    if narrowest is None:
        return max(a + 1, int(a * (min(8.0, percent / slow_a) if slow_a > 0 else 8.0)))
    b, slow_b = narrowest
    return max(1, a + 1, min(b - 1, int(a + (percent - slow_a) * (b - a) / (slow_b - slow_a))))


def extra_node(graph: Path, out: Path, *, width: int) -> None:
    """A copy of a graph with a matrix product of its first input, whose mean, made negligible, is added to an output."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(graph))
    given, result = model.graph.input[0], model.graph.output[0]
    half = result.type.tensor_type.elem_type == TensorProto.FLOAT16
    dtype = np.float16 if half else np.float32
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    size = min(MOST_ELEMENTS, int(np.prod([dim.dim_value for dim in given.type.tensor_type.shape.dim][1:])))
    weights = np.random.default_rng(0).standard_normal((size, width)).astype(dtype) / np.asarray(size, dtype)
    constants = {
        "extra/starts": np.array([0], np.int64),
        "extra/ends": np.array([size], np.int64),
        "extra/axes": np.array([1], np.int64),
        "extra/weights": weights,
        "extra/scale": np.asarray(6e-8 if half else 1e-30, dtype),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    before = f"{result.name}/before"
    for node in model.graph.node:
        node.output[:] = [before if name == result.name else name for name in node.output]
        node.input[:] = [before if name == result.name else name for name in node.input]
    model.graph.node.extend(
        [
            helper.make_node("Cast", [given.name], ["extra/cast"], to=kind),
            helper.make_node("Flatten", ["extra/cast"], ["extra/flat"], axis=1),
            helper.make_node("Slice", ["extra/flat", "extra/starts", "extra/ends", "extra/axes"], ["extra/part"]),
            helper.make_node("MatMul", ["extra/part", "extra/weights"], ["extra/product"]),
            helper.make_node("ReduceMean", ["extra/product"], ["extra/mean"], axes=[1], keepdims=1),
            helper.make_node("Mul", ["extra/mean", "extra/scale"], ["extra/small"]),
            helper.make_node("Add", [before, "extra/small"], [result.name]),
        ]
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(out))


if __name__ == "__main__":
    main()
