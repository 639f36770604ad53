"""The time of the system, in the one form in which files and statements have it."""

from __future__ import annotations

import datetime as dt


def utc_now() -> str:
    """Now, in UTC and whole seconds: `2026-11-21T10:00:00Z`, a gate.manifest.Timestamp."""
    return dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
