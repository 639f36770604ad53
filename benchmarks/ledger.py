"""What it takes to verify a ledger of 10,000 entries, each with a real signature.

    python -m benchmarks.ledger [--quick]

The ledger is made once, in a temporary folder. Exit code 1 where reading it takes longer than 2 s.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from gate.ledger import head_path, read_ledger
from gate.manifest import sha256_hex
from gate.release.statements import (
    FIRST_PREVIOUS,
    LEDGER_ENTRY,
    LEDGER_HEAD,
    CountedApproval,
    LedgerEntry,
    LedgerHead,
    payload_of,
)
from gate.signing import KeySigner, new_key, open_signer
from gate.trust import PolicyFile, read_policy

MOST_SECONDS = 2.0
ENTRIES = 10_000

POLICY = """schema = 1
ledger = "ledger.jsonl"

[[key]]
name = "promoter-1"
owner = "Release"
roles = ["promoter"]
public = "{promoter}"

[[key]]
name = "ci"
owner = "CI"
roles = ["gate"]
public = "{gate}"

[model.detector]
spec = "any"
data = "any"
baseline = "any"

[slot.production]
"""


def policy_of(folder: Path) -> tuple[PolicyFile, KeySigner]:
    """A policy, and the promoter's key."""
    keys = {name: new_key(folder / f"{name}.pem", password=None) for name in ("promoter", "gate")}
    path = folder / "trust.toml"
    path.write_text(POLICY.format(**{name: key.text for name, key in keys.items()}), encoding="utf-8")
    return read_policy(path), open_signer(str(folder / "promoter.pem"))


def entry(index: int, previous: str) -> LedgerEntry:
    """A promotion, as long as they are."""
    return LedgerEntry(
        index=index,
        previous=previous,
        time=f"2026-11-{1 + index // 3600:02}T10:{index // 60 % 60:02}:{index % 60:02}Z",
        action="promote",
        model="detector",
        slot="production",
        stage="full",
        full=True,
        verdict=sha256_hex(str(index).encode()),
        serial=index,
        engine="trt-fp16",
        engine_sha256="e" * 64,
        bundle=f"/srv/releases/detector/{index}/trt-fp16",
        policy_sha256="f" * 64,
        approvals=(CountedApproval("release-1", "release"), CountedApproval("release-2", "release")),
        requests=100_000,
        reason="as planned",
    )


def write(path: Path, signer: KeySigner, entries: int) -> None:
    """Write a ledger at once; `gate.ledger.append` flushes each line to the disk."""
    previous = FIRST_PREVIOUS
    with path.open("wb") as stream:
        for index in range(entries):
            line = signer.sign(payload_of(entry(index, previous)), LEDGER_ENTRY).to_bytes()
            stream.write(line)
            previous = sha256_hex(line)
    head = LedgerHead(entries=entries, last=previous)
    head_path(path).write_bytes(signer.sign(payload_of(head), LEDGER_HEAD).to_bytes())


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="read it once instead of three times")
    repeats = 1 if parser.parse_args().quick else 3
    with tempfile.TemporaryDirectory(prefix="gate-bench-") as name:
        folder = Path(name)
        policy, signer = policy_of(folder)
        path = folder / "ledger.jsonl"
        write(path, signer, ENTRIES)
        taken, busy, found = [], [], 0
        for _ in range(repeats):
            start, start_busy = time.perf_counter(), time.process_time()
            found = len(read_ledger(path, policy).lines)
            taken.append(time.perf_counter() - start)
            busy.append(time.process_time() - start_busy)
        size_mib = path.stat().st_size / 2**20
    seconds = min(taken)
    if found != ENTRIES:
        raise SystemExit(f"{found} entries were read, {ENTRIES} were written")
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("| | |\n|---|---|")
    print(f"| entries, MiB | {ENTRIES}, {size_mib:.1f} |")
    print(f"| seconds to verify (bound: {MOST_SECONDS:g}) | {seconds:.2f} |")
    print(f"| of it on the processor | {min(busy):.2f} |")
    print(f"| entries a second | {ENTRIES / seconds:.0f} |")
    print(f"| memory of the process, MiB | {memory_mib:.0f} |")
    return int(seconds > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
