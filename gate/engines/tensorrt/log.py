"""What TensorRT tells while it works, collected: its log, and the progress of a build."""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any

from gate.engines.interface import Progress

_LAST_LINES = 12
_COMPLAINTS = ("WARNING", "ERROR", "INTERNAL_ERROR")

_LOGGERS: list[Any] = []
"""Every logger that TensorRT was given, for as long as the process lives: the first one stays its global logger, which the
plugin registry writes to, and it is never asked whether it is still there. Source: NvInferRuntime.h, getLogger()."""

_LOGS: list[weakref.ref[Log]] = []
"""The logs, newest last: what a logger is told after its own log is gone belongs to whoever works now."""


class Log:
    """What a TensorRT logger was told: every warning and error, and the last messages of other kinds."""

    def __init__(self) -> None:
        self._complaints: list[tuple[str, str]] = []
        self._others: deque[str] = deque(maxlen=_LAST_LINES)

    def logger(self, trt: Any) -> Any:
        """A logger of that module which collects instead of printing."""
        own = weakref.ref(self, _forget)
        _LOGS.append(own)

        class Collecting(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log = own() or _newest()
                if log is not None:
                    log.tell(getattr(severity, "name", str(severity)), message)

        logger = Collecting()
        _LOGGERS.append(logger)
        return logger

    def note(self, message: str) -> None:
        """Add a warning of the gate's own."""
        self.tell("WARNING", message)

    def complaints(self) -> tuple[str, ...]:
        """Warnings and errors, each once."""
        return tuple(dict.fromkeys(f"{severity}: {message}" for severity, message in self._complaints))

    @property
    def count(self) -> int:
        """How many warnings and errors there were so far, repeated ones too."""
        return len(self._complaints)

    def last(self) -> tuple[str, ...]:
        """The last warnings and errors; the last messages of any kind where there are none."""
        return (self.complaints() or tuple(self._others))[-_LAST_LINES:]

    def node(self) -> str | None:
        """The layer that the last error names: `… for node /f/Conv`, `{ForeignNode[/f/Conv]}`."""
        for severity, message in reversed(self._complaints):
            if severity == "WARNING":
                continue
            for before, after in (("ForeignNode[", "]"), ("for node ", "."), ("node name: ", " ")):
                _, found, rest = message.partition(before)
                if found:
                    return rest.partition(after)[0].strip() or None
        return None

    def tell(self, severity: str, message: str) -> None:
        """A message, with the name of its severity."""
        if severity in _COMPLAINTS:
            self._complaints.append((severity, message))
        else:
            self._others.append(message)


def _newest() -> Log | None:
    return next((log for log in (each() for each in reversed(_LOGS)) if log is not None), None)


def _forget(gone: weakref.ref[Log]) -> None:
    _LOGS.remove(gone)


class Interruption:
    """Why a build is to stop: Ctrl-C, or an exception in Python code that the compiler called.

    An exception may not pass through the compiler's own frames, so it is kept here and raised when they are gone.
    """

    def __init__(self) -> None:
        self.cause: BaseException | None = None

    def stop(self, cause: BaseException) -> None:
        """Stop for this reason; the first one stays."""
        if self.cause is None:
            self.cause = cause

    def raise_cause(self) -> None:
        """Raise what stopped it, if anything did."""
        if self.cause is not None:
            raise self.cause

    @contextlib.contextmanager
    def noting_ctrl_c(self) -> Iterator[None]:
        """Note Ctrl-C instead of raising it, in the main thread; a second one ends the process at once.

        A handler that somebody else has installed is left in place.
        """
        handler = signal.getsignal(signal.SIGINT)
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or handler is not signal.default_int_handler:
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal.signal calls it
            if isinstance(self.cause, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            self.cause = KeyboardInterrupt()

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)


def progress_monitor(trt: Any, progress: Progress | None, interruption: Interruption) -> Any:
    """A monitor that tells `progress` the phase and its share, and ends the build where it is interrupted.

    Phases lie within each other; each is told by its own name. Calls may come from several threads at once.

    Source: tensorrt.pyi 10.13, IProgressMonitor: `step_complete` returns False to stop the build.

    Args:
        trt: The module; it has `IProgressMonitor`.
        progress: Told what happens; None only stops.
        interruption: Filled with what `progress` raises.
    """
    lock = threading.Lock()
    steps: dict[str, int] = {}

    def tell(name: str, done: float) -> None:
        try:
            with lock:
                if progress is not None and interruption.cause is None:
                    progress(name, done)
        except BaseException as err:  # noqa: BLE001 - kept, and raised when the compiler has returned
            interruption.stop(err)

    class Telling(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            steps[phase_name] = num_steps
            tell(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phase_name, min((step + 1) / max(steps.get(phase_name, 1), 1), 1.0))
            return interruption.cause is None

        def phase_finish(self, phase_name: str) -> None:
            tell(phase_name, 1.0)

    return Telling()
