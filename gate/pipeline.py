"""The order of steps, nothing else: check."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gate.results import CheckRun
from gate.spec import SpecFile


class Observer(Protocol):
    """Told what happens while it happens; a terminal shows progress, a test nothing."""

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:
        """A stage begins: `samples`, `reference`, `export`, `lower`, `build`, `compare`, `metamorphic`, `latency`.

        `total` is the number of steps where it is known (batches); it ends when the next begins or on `done`.
        """
        ...

    def advance(self, steps: int = 1) -> None:
        """So many steps of the current stage are done."""
        ...

    def note(self, text: str) -> None:
        """Something a reader should know: what was reused, a cache entry that was rebuilt."""
        ...

    def done(self) -> None:
        """The last stage ended."""
        ...


@dataclass(frozen=True)
class CheckOptions:
    """How to check.

    Args:
        engines: Only these, in the spec's order; empty: all.
        cache: Folder of the cache; None: no cache, everything is made anew in a temporary folder.
        baselines: Folder of the accepted baselines.
        reference: A folder made by `gate record`, for a host without PyTorch.
        latency: Measure latency (a check of it that is left out is a Failure, never a pass).
    """

    engines: tuple[str, ...] = ()
    cache: Path | None = field(default_factory=lambda: Path(".gate/cache"))
    baselines: Path = Path("baselines")
    reference: Path | None = None


def check(file: SpecFile, options: CheckOptions, observer: Observer) -> CheckRun:
    """Run a spec and judge it."""
    raise NotImplementedError
