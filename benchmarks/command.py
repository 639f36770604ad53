"""What the command costs: start-up, a first and a repeated check of the example, collection by pytest, overhead.

    python benchmarks/command.py [--quick]

Each line gives a ratio to something measured in the same run on the same machine, and the bound that is promised.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "examples" / "digits" / "gate.toml"


def seconds(command: list[str], *, repeats: int, cwd: Path, expect: tuple[int, ...] = (0,)) -> list[float]:
    """Wall time of each of several runs of a command."""
    taken: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        taken.append(time.perf_counter() - started)
        if done.returncode not in expect:
            raise SystemExit(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}{done.stderr}")
    return taken


_missed: list[str] = []


def line(what: str, value: str, bound: str, *, kept: bool) -> None:
    """One row of the table; a row without a bound is information."""
    verdict = "" if not bound else "kept" if kept else "NOT KEPT"
    if not kept:
        _missed.append(what)
    print(f"{what:<58}{value:>26}   {bound:<12}{verdict}")


def start_up(repeats: int, folder: Path) -> None:
    """`gate --help` beside `python -c pass`."""
    bare = statistics.median(seconds([sys.executable, "-c", "pass"], repeats=repeats, cwd=folder))
    help_ = statistics.median(seconds([sys.executable, "-m", "gate", "--help"], repeats=repeats, cwd=folder))
    extra_ms = (help_ - bare) * 1e3
    line("gate --help, over python -c pass", f"+{extra_ms:.0f} ms", "<= 150 ms", kept=extra_ms <= 150)


def checks(folder: Path) -> None:
    """The example on a cold and on a warm cache, latency sampling apart."""
    cache = folder / "cache"
    command = [
        sys.executable, "-m", "gate", "check", str(SPEC), "--cache", str(cache), "--baselines", str(ROOT / "baselines"),
        "--report", str(folder / "report"),
    ]  # fmt: skip
    walls: list[float] = []
    reports: list[dict[str, dict[str, float]]] = []
    for _ in range(3):
        walls += seconds(command, repeats=1, cwd=folder)
        reports.append(json.loads((folder / "report" / "report.json").read_text()))
    spent = [wall - report["seconds"].get("latency", 0.0) for wall, report in zip(walls, reports, strict=True)]
    first, repeated = spent[0], min(spent[1:])
    line("first check of the example, without latency sampling", f"{first:.1f} s", "", kept=True)
    line("repeated check, without latency sampling", f"{repeated:.2f} s", "<= 3 s", kept=repeated <= 3)
    line("first over repeated", f"{first / repeated:.1f} x", ">= 5 x", kept=first / repeated >= 5)
    line("first check, all of it", f"{walls[0]:.1f} s", "<= 60 s", kept=walls[0] <= 60)
    stages = reports[-1]["seconds"]
    inside = sum(stages.get(name, 0.0) for name in ("inside_engines", "metamorphic", "latency"))
    overhead = walls[-1] - inside
    line(
        "repeated check: the gate's own time, outside the engines",
        f"{overhead:.2f} s of {walls[-1]:.2f} s",
        "",
        kept=True,
    )
    line("    of it comparing", f"{stages['compare'] - stages['inside_engines']:.2f} s", "", kept=True)
    others = {name: value for name, value in stages.items() if name not in ("total", "inside_engines")}
    print("    by stage: " + ", ".join(f"{name} {value:.2f} s" for name, value in others.items()))


def collection(folder: Path, *, specs: int = 200) -> None:
    """`pytest --collect-only` over many specs, beside an empty folder."""
    many = folder / "many"
    empty = folder / "empty"
    empty.mkdir()
    text = re.sub(r'"(model:load|data:\w+|weights\.safetensors|metrics\.json)"', r'"\1"', SPEC.read_text())
    for index in range(specs):
        target = many / f"case{index:03d}"
        target.mkdir(parents=True)
        (target / "gate.toml").write_text(text)
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    none = min(seconds([sys.executable, "-m", "pytest", *options, str(empty)], repeats=2, cwd=folder, expect=(5,)))
    all_ = min(seconds([sys.executable, "-m", "pytest", *options, str(many)], repeats=2, cwd=folder))
    line(f"pytest collects {specs} specs", f"{all_:.2f} s ({none:.2f} s without)", "<= 2 s", kept=all_ <= 2)


def main() -> int:
    """Run all of them; 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    quick = parser.parse_args().quick
    folder = Path(tempfile.mkdtemp(prefix="gate-bench-"))
    try:
        start_up(5 if quick else 15, folder)
        collection(folder)
        checks(folder)
    finally:
        shutil.rmtree(folder)
    return int(bool(_missed))


if __name__ == "__main__":
    sys.exit(main())
