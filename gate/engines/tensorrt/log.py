"""What TensorRT's logger is told: collected, for build records and error messages."""

from __future__ import annotations

from typing import Any

_LAST_LINES = 12


class Log:
    """What a TensorRT logger was told."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, str]] = []

    def logger(self, trt: Any) -> Any:
        """A logger of that module which collects instead of printing."""
        messages = self._messages

        class Collecting(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                messages.append((getattr(severity, "name", str(severity)), message))

        return Collecting()

    def complaints(self) -> tuple[str, ...]:
        """Warnings and errors, each once."""
        told = (
            f"{severity}: {message}"
            for severity, message in self._messages
            if severity in ("WARNING", "ERROR", "INTERNAL_ERROR")
        )
        return tuple(dict.fromkeys(told))

    def last(self) -> tuple[str, ...]:
        """The last warnings and errors; the last messages of any kind where there are none."""
        complaints = self.complaints()
        return (complaints or tuple(message for _, message in self._messages))[-_LAST_LINES:]

    def node(self) -> str | None:
        """The layer that the last error names: `… for node /f/Conv`, `{ForeignNode[/f/Conv]}`."""
        for severity, message in reversed(self._messages):
            if severity not in ("ERROR", "INTERNAL_ERROR"):
                continue
            for before, after in (("ForeignNode[", "]"), ("for node ", "."), ("node name: ", " ")):
                _, found, rest = message.partition(before)
                if found:
                    return rest.partition(after)[0].strip() or None
        return None
