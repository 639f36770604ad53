"""Who accepts a baseline: what the environment, git or the login says."""

from __future__ import annotations

import getpass
import os
import subprocess

ACCEPTED_BY = "GATE_ACCEPTED_BY"


def author() -> str:
    """`$GATE_ACCEPTED_BY`, else git's user, else the login; empty where none is known, which `accept` refuses."""
    stated = os.environ.get(ACCEPTED_BY, "").strip()
    if stated:
        return stated
    try:
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        pass
    else:
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""
