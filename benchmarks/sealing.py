"""Sealing and verifying a bundle with a large engine, beside SHA-256 over the same bytes; and how soon a small one verifies.

    python -m benchmarks.sealing [--mib 1024] [--turns 5]

Each turn measures all of them one after another; the ratios are of medians. Peak memory is of a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from gate.results import run_from_builtins
from gate.store import seal, verify_seal

MOST = 1.2
"""Times the digest that verifying may take, and times digest and durable copy that sealing may."""
MOST_START_S = 0.3
"""From start to end of verifying a small bundle, in seconds."""
DATA = Path(__file__).parents[1] / "tests" / "data"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        verify_seal(args.peak)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engine = folder / "engine"
        block = os.urandom(1024 * 1024)
        with engine.open("wb") as file:
            for _ in range(args.mib):
                file.write(block)
        times: dict[str, list[float]] = {}
        for turn in range(args.turns):
            peak = measured(times, engine, folder / f"bundle-{turn}")
    started = start_up(repeats=15)
    base = statistics.median(times["hashlib.file_digest"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:<28} {middle:6.2f} s  {middle / base:5.2f} x  (from {min(values):.2f} to {max(values):.2f} s)")
    print(f"peak memory of verifying {args.mib} MiB: {peak} MiB")
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"gate verify --policy of a bundle of 23 KB, a whole process: {started * 1e3:.0f} ms (median of 15)")
    kept = (
        started <= MOST_START_S
        and middle["verify"] <= MOST * base
        and middle["seal"] <= MOST * middle["digest, then copy and flush"]
    )
    bounds = f"within {MOST:g} x the digest, sealing within {MOST:g} x what it cannot do without, {MOST_START_S * 1e3:.0f} ms"
    print(f"{bounds}: {'kept' if kept else 'NOT KEPT'}")
    sys.exit(0 if kept else 1)


def start_up(*, repeats: int) -> float:
    """Median seconds that `gate verify` of a small, signed bundle takes, ledger and approvals included.

    With byte code that is written already, as in an installed package.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [
        sys.executable, "-m", "gate", "verify", "bundle", "--policy", "release/trust.toml", "--model", "digits-cnn",
        "--slot", "production",
    ]  # fmt: skip
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, cwd=DATA / "release" / "good", check=True, capture_output=True, env=environment)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def measured(times: dict[str, list[float]], engine: Path, out: Path) -> str:
    """One turn of all; the peak memory of a process that verifies, in MiB."""
    digest = timed(times, "hashlib.file_digest", lambda: file_digest(engine))
    timed(times, "digest, then copy and flush", lambda: copied(engine, out.with_name("copy")))
    timed(times, "seal", lambda: sealed(engine, digest, out))
    timed(times, "verify", lambda: verify_seal(out))
    command = [sys.executable, "-m", "benchmarks.sealing", "--peak", str(out)]
    peak = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    shutil.rmtree(out)
    return peak


def timed(times: dict[str, list[float]], name: str, call):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Run, and keep how long it took."""
    began = time.perf_counter()
    found = call()
    times.setdefault(name, []).append(time.perf_counter() - began)
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as the standard library does it fastest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copied(engine: Path, out: Path) -> None:
    """What sealing cannot do without: the digest, and a copy that is on the disk."""
    file_digest(engine)
    shutil.copyfile(engine, out)
    with out.open("rb") as file:
        os.fsync(file.fileno())
    out.unlink()


def sealed(engine: Path, digest: str, out: Path) -> None:
    """Seal an engine of that digest."""
    run = run_from_builtins(msgspec.json.decode((DATA / "run.json").read_bytes()))
    result = msgspec.structs.replace(run.engines[0], engine_sha256=digest, latencies=())
    verdict = result.verdict
    assert verdict is not None
    findings = tuple(each for each in verdict.findings if not each.check.startswith("latency."))
    required = tuple(name for name in verdict.required if not name.startswith("latency"))
    result = msgspec.structs.replace(
        result, verdict=msgspec.structs.replace(verdict, findings=findings, required=required)
    )
    spec = (DATA / "sealed.toml").read_text().partition("  [engine.latency]")[0].encode()
    origin = msgspec.structs.replace(run.provenance, spec_sha256=hashlib.sha256(spec).hexdigest())
    run = msgspec.structs.replace(run, engines=(result,), provenance=origin)
    extra = {"policy/gate.toml": spec}
    seal(result.verdict.require_passed(), run=run, result=result, engine_file=engine, extra=extra, out=out)


if __name__ == "__main__":
    main()
