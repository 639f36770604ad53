from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gate import __version__
from gate.cli import COMMANDS
from gate.cli.main import main
from gate.errors import ExitCode


def test_help_lists_every_command_and_exit_code(gate_command):
    outcome = gate_command("--help")
    assert outcome.code == 0
    assert all(name in outcome.out for name in COMMANDS)
    assert all(str(int(code)) in outcome.out for code in ExitCode)


def test_help_imports_only_argparse_and_the_errors():
    code = (
        "import sys\n"
        "from gate.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "heavy = loaded & {'msgspec', 'numpy', 'torch', 'rich', 'onnx', 'onnxruntime', 'jsonschema'}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*COMMANDS, "baseline accept", "baseline show", "baseline diff"])
def test_each_command_has_help(gate_command, name):
    outcome = gate_command(*name.split(), "--help")
    assert outcome.code == 0
    assert f"usage: gate {name}" in outcome.out


def test_the_version_is_printed(gate_command):
    assert gate_command("--version").out == f"gate {__version__}\n"


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "gate", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gate {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("chekc",), ("check",), ("check", "gate.toml", "--allow-failure")])
def test_wrong_usage_exits_2(gate_command, arguments):
    assert gate_command(*arguments).code == 2


def test_an_interruption_says_so_in_one_line(gate_command, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("gate.cli.check.run", interrupted)
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 130
    assert outcome.err.count("\n") == 1


def test_sigterm_ends_a_session_and_leaves_no_folder_behind(project):
    temporary = project / "temporary"
    temporary.mkdir()
    gate = subprocess.Popen(
        [sys.executable, "-m", "gate", "latency", "gate.toml::ort", "--p99", "1000"],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120.0
    while not (began := list(temporary.glob("gate-session-*/phase.txt"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert began
    gate.terminate()
    _, told = gate.communicate(timeout=60.0)
    assert gate.returncode == 143
    assert told.splitlines()[-1] == "terminated: no verdict; nothing half-written was left behind"
    assert "Traceback" not in told
    assert [each.name for each in temporary.iterdir() if each.name.startswith("gate-")] == []


def test_a_handler_of_sigterm_that_somebody_set_stays(gate_command, monkeypatch):
    seen = []
    monkeypatch.setattr("gate.cli.check.run", lambda args: seen.append(signal.getsignal(signal.SIGTERM)) or 0)

    def theirs(number, frame):
        raise AssertionError("not called")

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        assert gate_command("check", "gate.toml").code == 0
        assert seen == [theirs]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert gate_command("check", "gate.toml").code == 0
        assert seen[1] is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert gate_command("check", "gate.toml").code == 0
        assert callable(seen[2])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_handler_is_set(project, monkeypatch):
    monkeypatch.setattr("gate.cli.check.run", lambda args: 0)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["check", "gate.toml"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_fault_of_the_gate_exits_70_and_keeps_its_traceback(gate_command, project, monkeypatch):
    def broken(args):
        raise ZeroDivisionError("unexpected")

    monkeypatch.setattr("gate.cli.check.run", broken)
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 70
    assert outcome.err.startswith(
        "internal error, no verdict: ZeroDivisionError: unexpected\nThe traceback is in .gate/"
    )
    (crash,) = (project / ".gate").glob("crash-*.txt")
    assert "def broken" not in crash.read_text()
    assert "in broken" in crash.read_text()


def test_an_argument_that_names_a_command_is_not_taken_for_it(gate_command):
    assert gate_command("verify", "check").code == 4


def test_main_returns_an_int(project):
    assert main(["check", "missing.toml"]) == 2
