"""Plans that must be refused before TensorRT deserialises them: another version's, truncated, changed.

    python docs/evidence/broken_plans.py OUT

reads a sealed plan below OUT/dist, breaks copies of it in one way each, and prints what the gate says.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gate.engines import backend
from gate.errors import GateError
from gate.spec import read_spec

SPEC = Path("examples/digits/tensorrt.gate.toml")


def broken(plan: bytes) -> dict[str, bytes]:
    """The same plan, broken in one way each."""
    other_version = bytearray(plan)
    other_version[24:28] = bytes((10, 13, 0, 35))
    rtx = bytearray(plan)
    rtx[:4] = b"vtrt"
    tag = bytearray(plan)
    tag[0] ^= 0xFF
    return {
        "of TensorRT 10.13": bytes(other_version),
        "of TensorRT-RTX": bytes(rtx),
        "first byte flipped": bytes(tag),
        "empty": b"",
        "first 20 bytes": plan[:20],
        "first half": plan[: len(plan) // 2],
    }


def main(out: Path) -> int:
    """Print one line per broken plan, and one for a bundle with a flipped byte; 1 where one was taken."""
    bundle = min((out / "dist" / "digits-cnn").iterdir())
    plan = (bundle / "artifacts" / "model.plan").read_bytes()
    file = read_spec(SPEC)
    engine = file.spec.engines[0]
    taken = 0
    with tempfile.TemporaryDirectory() as name:
        for what, data in broken(plan).items():
            path = Path(name, "broken.plan")
            path.write_bytes(data)
            try:
                backend("tensorrt").open(path, spec=file.spec, engine=engine).close()
                taken += 1
                print(f"TAKEN    {what}")
            except GateError as err:
                print(f"REFUSED  {what}: {type(err).__name__}: {' '.join(err.message.split())}")
        for offset in (1000, len(plan) // 2, len(plan) - 1):
            copy = Path(name, "bundle")
            shutil.copytree(bundle, copy)
            changed = copy / "artifacts" / "model.plan"
            changed.chmod(0o644)
            data = bytearray(plan)
            data[offset] ^= 0x01
            changed.write_bytes(data)
            done = subprocess.run(
                [sys.executable, "-m", "gate", "verify", str(copy)], capture_output=True, text=True, check=False
            )
            refused = done.returncode == 4 and "REFUSED" in done.stderr
            taken += not refused
            said = " ".join(done.stderr.split()).replace(name, "")
            print(
                f"{'REFUSED' if refused else 'TAKEN  '}  bundle, bit of byte {offset} flipped: exit {done.returncode}: {said}"
            )
            shutil.rmtree(copy)
    return 1 if taken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
