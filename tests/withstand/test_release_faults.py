"""A bundle, its approvals, the ledger and the policy, each with one thing wrong: the command refuses, and says what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest

from gate.cli.main import main
from gate.errors import ExitCode
from tests.withstand import release_artefacts as made
from tests.withstand.release_artefacts import bundle_files, key_file, lay_out, read_artefacts

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "threat-model.md"
ARTEFACTS = read_artefacts()
LARGE = tuple(each for each in ARTEFACTS if any(do["op"] == "whitespace" for do in each.do))
SMALL = tuple(each for each in ARTEFACTS if each not in LARGE)
PROMOTE = ("promote", "bundle", *made.WHERE, "--key", key_file("promoter"))
SEALS = tuple(name for name in bundle_files() if name.startswith("seals/approval-"))


@pytest.fixture
def case(tmp_path, monkeypatch):
    """The good files, in the working folder."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, *arguments):
    """The exit code of the command, and what it printed to both streams."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "internal error" not in captured.err
    return code, captured.out, captured.err


def ledger_of(root):
    """The bytes of the ledger and its head; None where one is missing."""
    paths = (root / "release/ledger.jsonl", root / "release/ledger.jsonl.head")
    return tuple(path.read_bytes() if path.is_file() else None for path in paths)


def require_refused(capsys, artefact, arguments, *, says=None):
    code, out, err = call(capsys, *arguments)
    assert code == artefact.exit, out + err
    for text in artefact.says if says is None else says:
        assert text in err, err
    assert not re.search("^(VERIFIED|PROMOTED)", out + err, re.MULTILINE)


def test_what_is_committed_is_what_the_package_makes(tmp_path):
    made.write(tmp_path)

    def content(root):
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    committed, anew = content(made.FOLDER), content(tmp_path)
    assert sorted(committed) == sorted(anew)
    differ = [name for name in committed if committed[name] != anew[name]]
    assert differ == [], "make them anew: python -m tests.withstand.release_artefacts"


def test_the_good_bundle_verifies_and_is_promoted(case, capsys):
    code, out, err = call(capsys, *made.VERIFY)
    assert (code, err) == (ExitCode.PASSED, "")
    assert out.endswith("VERIFIED  bundle\n")
    assert "2 of 2 release (ada, grace)" in out.replace("(grace, ada)", "(ada, grace)")
    before = ledger_of(case)
    code, out, err = call(capsys, *PROMOTE)
    assert (code, err) == (ExitCode.PASSED, "")
    assert "PROMOTED" in out
    after = ledger_of(case)
    assert after[0].startswith(before[0])
    assert len(after[0].splitlines()) == len(before[0].splitlines()) + 1
    assert call(capsys, *made.LEDGER_VERIFY)[0] == ExitCode.PASSED


def test_the_good_bundle_verifies_in_a_process_of_its_own(case):
    done = run_command(case, made.VERIFY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "VERIFIED" in done.stdout


@pytest.mark.parametrize("artefact", SMALL, ids=lambda each: each.name)
def test_what_is_broken_is_refused_by_its_cause(artefact, tmp_path, monkeypatch, capsys):
    lay_out(tmp_path, artefact)
    monkeypatch.chdir(tmp_path)
    before = ledger_of(tmp_path)
    require_refused(capsys, artefact, artefact.command)
    if artefact.command == made.VERIFY:
        require_refused(capsys, artefact, PROMOTE, says=())
    assert ledger_of(tmp_path) == before


@pytest.mark.parametrize(
    "artefact", [each for each in SMALL if each.command == made.VERIFY], ids=lambda each: each.name
)
def test_what_is_broken_is_refused_by_promote_with_the_same_cause(artefact, tmp_path, monkeypatch, capsys):
    lay_out(tmp_path, artefact)
    monkeypatch.chdir(tmp_path)
    require_refused(capsys, artefact, PROMOTE)


PEAK = """
import sys
from gate.cli.main import main
code = main(sys.argv[2:])
# Of this program alone; ru_maxrss also counts the process that it was started by.
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
with open(sys.argv[1], "w") as out:
    out.write(peak)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("artefact", LARGE, ids=lambda each: each.name)
def test_a_gigabyte_of_spaces_is_refused_at_once_in_little_memory(artefact, tmp_path):
    lay_out(tmp_path, artefact)
    peak = tmp_path / "peak"
    try:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(peak), *artefact.command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        seconds = time.monotonic() - began
    finally:
        for do in artefact.do:
            (tmp_path / do["path"]).unlink()
    assert done.returncode == artefact.exit, done.stderr
    assert all(text in done.stderr for text in artefact.says)
    assert seconds < 20
    assert int(peak.read_text()) < 200 * 1024, "KiB"


FLIPS = [(name, where) for name in bundle_files() for where in ("begin", "middle", "end")]


@pytest.mark.parametrize(("name", "where"), FLIPS)
def test_a_flipped_byte_in_any_file_is_refused(name, where, case, capsys):
    path = case / "bundle" / name
    data = bytearray(path.read_bytes())
    data[{"begin": 0, "middle": len(data) // 2, "end": -1}[where]] ^= 1
    path.write_bytes(data)
    code, _, err = call(capsys, *made.VERIFY)
    assert code == ExitCode.REFUSED
    if name in SEALS:
        assert "needs 1 more approval by role release: 1 of 2 release" in err
    assert name.rpartition("/")[2] in err
    assert call(capsys, *PROMOTE)[0] == ExitCode.REFUSED


def _remove(path):
    path.unlink()


def _rename(path):
    path.rename(path.with_name("renamed.json"))


def _empty(path):
    path.write_bytes(b"")


def _symlink(path):
    path.rename(path.parents[2] / "outside")
    path.symlink_to(path.parents[2] / "outside")


def _hard_link(path):
    (path.parents[2] / "outside").hardlink_to(path)


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _directory(path):
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"x")


def _empty_directory(path):
    path.unlink()
    path.mkdir()


def _swap(path):
    other = path.parents[1] / ("evidence/metrics.json" if path.name != "metrics.json" else "evidence/latency.json")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _longer(path):
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("name", bundle_files())
@pytest.mark.parametrize(
    "damage",
    [_remove, _rename, _empty, _symlink, _hard_link, _fifo, _directory, _empty_directory, _swap, _longer],
)
def test_any_file_that_is_damaged_as_a_file_is_refused(name, damage, case, capsys):
    damage(case / "bundle" / name)
    code, _, err = call(capsys, *made.VERIFY)
    assert code == ExitCode.REFUSED
    assert re.search(
        r"is missing|link|regular|was added|its sha256 is|is not JSON|is an empty folder|is too long|"
        r"is not written as|is no DSSE|1 more approval",
        err,
    ), err


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.jsonl.head"])
@pytest.mark.parametrize("where", range(0, 100, 7))
def test_a_flipped_byte_anywhere_in_the_ledger_is_refused(name, where, case, capsys):
    path = case / "release" / name
    data = bytearray(path.read_bytes())
    data[where * (len(data) - 1) // 98] ^= 1
    path.write_bytes(data)
    for arguments in (made.LEDGER_VERIFY, made.VERIFY, PROMOTE):
        code, _, err = call(capsys, *arguments)
        assert code == ExitCode.REFUSED
        assert "ledger.jsonl" in err


@pytest.mark.parametrize(
    "name",
    [
        each.name
        for each in SMALL
        if each.name.startswith("approval-") and each.name != "approval-of-the-verdict-before"
    ],
)
def test_an_approval_that_does_not_count_hinders_nobody(name, tmp_path, monkeypatch, capsys):
    """The two good approvals are there, and beside them the broken one under a free name."""
    (artefact,) = (each for each in ARTEFACTS if each.name == name)
    lay_out(tmp_path / "broken", artefact)
    lay_out(tmp_path)
    good = {path.read_bytes() for path in (tmp_path / "bundle/seals").iterdir()}
    others = [path for path in (tmp_path / "broken/bundle/seals").iterdir() if path.read_bytes() not in good]
    for path in others:
        target = tmp_path / "bundle/seals" / path.name
        (target if not target.exists() else target.with_name(f"approval-{'0' * 16}-{made.SLOT}.dsse.json")).write_bytes(
            path.read_bytes()
        )
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *made.VERIFY)
    assert (code, err) == (ExitCode.PASSED, "")
    assert out.count("not counted: ") == len(others)


def test_the_bomb_is_a_bomb():
    size = 3 * 2**20 + 5
    unpacking = zlib.decompressobj(-15)
    assert unpacking.decompress(made.bomb(size)) == bytes(size)
    assert unpacking.eof
    assert len(made.bomb(size)) < size / 100


def run_command_of(root, *arguments):
    """Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def run_command(root, arguments):
    """The command in a process of its own."""
    return run_command_of(root, "-m", "gate", *arguments)


@pytest.mark.parametrize("name", ["flipped-byte", "fifo", "failed-verdict-signed", "envelope-nested-without-end"])
def test_what_is_broken_is_refused_in_a_process_of_its_own(name, tmp_path):
    (artefact,) = (each for each in ARTEFACTS if each.name == name)
    lay_out(tmp_path, artefact)
    done = run_command(tmp_path, artefact.command)
    assert done.returncode == artefact.exit, done.stderr
    assert "Traceback" not in done.stderr
    assert all(text in done.stderr for text in artefact.says)


RACE = """
    import multiprocessing, os, sys
    from pathlib import Path
    import gate.promotion
    from gate.cli.main import main

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    append = gate.promotion.append

    def together(*arguments, **more):
        barrier.wait(30)
        return append(*arguments, **more)

    def run(name, arguments):
        for descriptor, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        gate.promotion.append = together
        sys.exit(main([*arguments, "--key", f"keys/test-only-{name}.pem"]))

    names = ("promoter", "promoter-second")
    both = [context.Process(target=run, args=(name, sys.argv[1:])) for name in names]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    for name, each in zip(names, both):
        print(name, each.exitcode)
"""


def run_script(root, script, *arguments):
    """A script in a process of its own; what it printed."""
    done = run_command_of(root, "-c", textwrap.dedent(script), *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_of_two_promoters_at_once_one_is_told_who_was_first(case, capsys):
    """Both have verified and decided on the same ledger before either writes."""
    printed = run_script(case, RACE, "promote", "bundle", *made.WHERE)
    codes = {name: int(code) for name, code in (line.split() for line in printed.splitlines())}
    assert sorted(codes.values()) == [0, 4], [(case / f"{name}.err").read_text() for name in codes]
    first, second = sorted(codes, key=codes.__getitem__)
    assert "PROMOTED" in (case / f"{first}.out").read_text()
    assert f"somebody else was first: {first} wrote entry 4" in (case / f"{second}.err").read_text()
    code, out, _ = call(capsys, *made.LEDGER_VERIFY)
    assert code == ExitCode.PASSED
    assert "5 entries" in out
    code, _, err = call(capsys, *PROMOTE)
    assert code == ExitCode.REFUSED
    assert "it is there already: serial 30" in err


KILLED = """
    import contextlib, io, os, shutil, signal, sys
    from pathlib import Path
    from gate.cli.main import main
    from gate.ledger import read_ledger
    from gate.trust import read_policy
    from gate.verification import verify
    from tests.withstand import release_artefacts as made

    what, good, case = sys.argv[1], Path("good").resolve(), Path("case").resolve()
    promote = ["promote", "bundle", *made.WHERE, "--key", made.key_file("promoter")]
    approve = ["approve", "bundle", *made.WHERE, "--key", made.key_file("grace")]

    def called(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        return code, out.getvalue() + err.getvalue()

    def seal():
        run, result, extra = made._checked(case)
        release = made.Release(slots=("production",), serial=40, valid_days=36_500, signer=made.signer("gate-ci"))
        passed = result.verdict.require_passed()
        made.seal(passed, run=run, result=result, engine_file=case / "model.onnx", extra=extra,
                  out=case / "sealed", release=release)

    def act():
        if what == "seal":
            seal()
            return 0
        return main(approve if what == "approve" else promote)

    def prepare():
        os.chdir("/")
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(good, case)
        os.chdir(case)
        if what == "first promotion":
            (case / "release/ledger.jsonl").unlink()
            (case / "release/ledger.jsonl.head").unlink()
        if what == "approve":
            made._do(case, {"op": "remove", "path": made._approval_file("grace")})

    def check():
        if what == "seal":
            there = (case / "sealed").exists()
            if there:
                policy = read_policy(case / "release/trust.toml")
                history = read_ledger(case / "release/ledger.jsonl", policy).history
                verify(case / "sealed", policy=policy, model=made.MODEL, slot=made.SLOT, history=history,
                       approvals=False).close()
            return there
        if what == "approve":
            code, text = called(*made.VERIFY)
            assert code == 0 or "needs 1 more approval by role release" in text, text
            return code == 0
        code, text = called(*made.LEDGER_VERIFY)
        before = 0 if what == "first promotion" else 4
        assert code == 0, text
        count = int(text.split(": ")[1].split()[0])
        assert count in (before, before + 1), text
        code, text = called(*made.VERIFY)
        assert code == 0, text
        return count == before + 1

    def again(done):
        if what == "seal":
            seal()
            return
        code, text = called(*(approve if what == "approve" else promote))
        already = "approved it for production already" if what == "approve" else "it is there already"
        assert (code == 4 and already in text) if done else code == 0, (code, text)

    def strays():
        return [str(each) for each in case.rglob(".tmp-*")]

    prepare()
    with contextlib.redirect_stdout(io.StringIO()):
        assert act() == 0
    steps, states, half = 0, set(), 0
    while True:
        prepare()
        pid = os.fork()
        if pid == 0:
            seen = -1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            write, fsync = os.write, os.fsync

            def step():
                global seen
                seen += 1
                if seen == steps:
                    os.kill(os.getpid(), signal.SIGKILL)

            def stop(event, arguments):
                writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.link", "os.truncate", "fcntl.flock"):
                    step()

            def writing(file, data):
                step()
                if seen + 1 == steps:
                    write(file, bytes(data)[: len(data) // 2])
                step()
                return write(file, data)

            def flushing(file):
                step()
                fsync(file)

            os.write, os.fsync = writing, flushing
            sys.addaudithook(stop)
            code = act()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        done = check()
        again(done)
        assert check()
        assert done or strays() == [], strays()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and done
            break
        states.add(done)
        steps += 1
    assert states == {False, True}, states
    print(steps)
"""


@pytest.mark.parametrize("what", ["seal", "approve", "first promotion", "promote"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_state_and_the_command_can_be_run_again(what, tmp_path):
    lay_out(tmp_path / "good")
    (tmp_path / "case").mkdir()
    assert int(run_script(tmp_path, KILLED, what)) >= 6


def shown_by(text):
    """What the threat model names: the tests, and the artefacts of its first part."""
    rows = [
        line.rpartition(" | ")[2]
        for line in text.partition("## What is not stopped")[0].splitlines()
        if line[:1] == "|"
    ]
    tests = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    return tests, set(re.findall(r"`([a-z0-9-]+)`", "\n".join(rows)))


def test_the_threat_model_names_tests_and_artefacts_that_there_are_and_every_artefact():
    tests, artefacts = shown_by(PAGE.read_text(encoding="utf-8"))
    assert len(tests) > 5
    for path, name in sorted(tests):
        assert f"\ndef {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{name}"
    assert artefacts == {each.name for each in ARTEFACTS}
    for link in re.findall(r"\]\(([\w.-]+\.md)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / link).is_file()


def test_every_row_of_the_threat_model_shows_or_advises_something():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line[:1] == "|":
            assert all(cell.strip() for cell in line.strip("|").split("|")), line


def test_the_tests_of_the_project_do_not_take_a_sealed_spec_for_one_to_check():
    done = run_command_of(
        REPOSITORY, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(made.FOLDER)
    )
    assert done.returncode == 5, done.stdout + done.stderr
    assert "no tests" in done.stdout
