"""The entry point: finds the sub-command, runs it, and turns what it raises into a message and an exit code.

Only argparse and the errors are imported here, so that `gate --help` answers at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gate.cli import COMMANDS
from gate.errors import ExitCode, GateError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

INTERRUPTED = 130
TERMINATED = 143
"""128 and the number of SIGTERM, as a shell has it."""

CRASHES = Path(".gate")

_EXIT_CODES = """exit codes: 0 passed, 1 failed, 2 usage or spec, 3 inconclusive, 4 verification refused, 70 internal error.
No option turns a failure into 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code: a `gate.errors.ExitCode`, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        SystemExit: From argparse, after `--help`, `--version` or a usage error.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    try:
        with _ended_in_order():
            return int(options.run(options))
    except GateError as err:
        _say(f"REFUSED  {err}" if err.exit_code is ExitCode.REFUSED else str(err))
        return int(err.exit_code)
    except _Terminated:
        _say("terminated: no verdict; nothing half-written was left behind")
        return TERMINATED
    except KeyboardInterrupt:
        _say("interrupted: no verdict; nothing half-written was left behind")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone, so the verdict was not delivered. Keep the exit from writing again.
        _close_output()
        return int(ExitCode.INTERNAL)
    except Exception as err:  # noqa: BLE001  anything else is a fault of the gate, and says so
        _say(_crash_message(err))
        return int(ExitCode.INTERNAL)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever lets Ctrl-C pass lets it pass too."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that folders and processes of the gate go with it, unless somebody else handles it."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:  # noqa: ARG001
        # Once is enough: a second one would end what cleans up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command, with the options of the one sub-command that is called."""
    parser = argparse.ArgumentParser(
        prog="gate",
        description="Accuracy-regression and release gate for TensorRT deployments.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, what in COMMANDS.items():
        if name == called:
            import_module(f"gate.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=what)
    return parser


class _Version(argparse.Action):
    """Prints the version, which is read only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002
        values: object,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        from gate import __version__

        print(f"gate {__version__}")
        parser.exit()


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _close_output() -> None:
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _crash_message(err: Exception) -> str:
    """One short message; the traceback goes into a file, or follows where none can be written."""
    import datetime as dt
    import traceback

    text = "".join(traceback.format_exception(err))
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    path = CRASHES / f"crash-{stamp}.txt"
    what = f"internal error, no verdict: {type(err).__name__}: {err}"
    try:
        from gate.atomic import write_bytes

        write_bytes(path, text.encode())
    except (GateError, OSError):
        return f"{what}\n{text}"
    return f"{what}\nThe traceback is in {path}; please report it."


if __name__ == "__main__":
    sys.exit(main())
