"""Where comparing on the device pays: `DeviceAccumulator` beside NumPy's accumulator with the copy to the host.

    python benchmarks/compare_on_device.py [--quick]

Times are the least of several repeats, ratios are within one run. Without a GPU the tensors lie on the CPU: the first row
is then what PyTorch spends on its operations alone, and the others say nothing about a GPU.
With a GPU the exit code is 1 where the device is the slower one from `LEAST_ELEMENTS` on.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable

import numpy as np
import torch

from gate.compare import OutputAccumulator
from gate.compare_on_device import LEAST_ELEMENTS, DeviceAccumulator, host_array

TOLERANCE = 4 * 2.0**-10
SHAPES = ((1, 16), (32, 1000), (32, 8192), (32, 16_384), (32, 32_768), (32, 131_072))


def least_ms(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs, in milliseconds."""
    call()
    return min(timeit.repeat(call, number=1, repeat=repeats)) * 1e3


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for a first look")
    repeats = 3 if parser.parse_args().quick else 20
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU: no GPU here"
    print(f"candidate on {where}; batches of float32, every metric, one batch an accumulator\n")
    print(f"{'batch':<16}{'elements':>12}{'NumPy ms':>12}{'device ms':>12}{'ratio':>8}")
    kept = True
    for shape in SHAPES:
        rng = np.random.default_rng(0)
        reference = rng.standard_normal(shape, dtype=np.float32)
        noise = np.float32(5e-4) * rng.standard_normal(shape, dtype=np.float32)
        candidate = torch.from_numpy(reference + noise).to(device)
        center = reference.mean(axis=0, dtype=np.float64)
        by_host, by_device = (
            kind("scores", np.float32, atol=TOLERANCE, rtol=TOLERANCE, center=center)
            for kind in (OutputAccumulator, DeviceAccumulator)
        )
        host = least_ms(lambda: by_host.add(reference, host_array(candidate), first_sample=0), repeats)  # noqa: B023 (called here)
        here = least_ms(lambda: by_device.add(reference, candidate, first_sample=0), repeats)  # noqa: B023 (called here)
        print(f"{shape!s:<16}{reference.size:>12,}{host:>12.2f}{here:>12.2f}{here / host:>8.2f}")
        kept = kept and (device == "cpu" or reference.size < LEAST_ELEMENTS or here <= host)
    print(f"\nused from {LEAST_ELEMENTS:,} elements on" + ("" if kept else ": NOT KEPT, the device is slower there"))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
