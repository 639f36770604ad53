"""All benchmarks: `python -m benchmarks`. Exits 1 where a bound is not kept."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("compare", "command", "samples", "detection", "data", "timing", "latency_rule", "ledger", "sealing")


def main() -> int:
    """Run each in a process of its own, so that one's memory is not another's."""
    codes = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
