"""report.json: a whole run, written whole or not at all, and read back."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gate import atomic
from gate.errors import BundleError, GateError, MeasurementError
from gate.manifest import MAX_JSON_BYTES, canonical_json, pretty_json, strict_json
from gate.results import CheckRun, builtins_from, run_from_builtins

HINT = "Write one with: gate check SPEC"


def json_bytes(run: CheckRun, *, pretty: bool = True) -> bytes:
    """A run as JSON that `report_schema` describes: sorted keys, UTF-8, one newline at the end."""
    raw = builtins_from(run)
    return pretty_json(raw) if pretty else canonical_json(raw)


def write_report(run: CheckRun, path: Path) -> None:
    """Write `report.json`.

    Raises:
        GateError: The disk is full or may not be written to.
    """
    atomic.write_bytes(path, json_bytes(run))


def read_report(path: Path) -> CheckRun:
    """Read a `report.json`; statuses are computed again from its numbers.

    Raises:
        MeasurementError: It is missing, not strict JSON, or not a report of this version.
    """
    try:
        raw = strict_json(path.read_bytes(), where=str(path), limit_bytes=MAX_JSON_BYTES)
        return run_from_builtins(raw)
    except FileNotFoundError:
        raise MeasurementError("there is no such report", where=str(path), hint=HINT) from None
    except OSError as err:
        raise MeasurementError(f"cannot be read: {err.strerror}", where=str(path), hint=HINT) from err
    except (msgspec.ValidationError, BundleError, RecursionError) as err:
        message = err.message if isinstance(err, GateError) else f"is not a report: {err}"
        raise MeasurementError(message, where=str(path), hint=HINT) from err
    except MeasurementError as err:
        raise MeasurementError(f"is not a report: {err.message}", where=str(path), hint=HINT) from err
