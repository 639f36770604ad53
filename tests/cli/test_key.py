"""`gate key`, and the options by which other commands take a key."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gate.cli.key import add_key_options, signer_of
from gate.errors import SigningError, SpecError
from gate.release.statements import IN_TOTO
from gate.signing import public_key, verified

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PASSWORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    for name in ("GATE_KEY", "GATE_KEY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def password_file(project):
    path = project / "password"
    path.write_text(f"{PASSWORD}\n")
    path.chmod(0o600)
    return path


def entry_of(out):
    """The `[[key]]` that a command printed."""
    (entry,) = tomllib.loads(out[out.index("# ") :])["key"]
    return entry


class TestNew:
    def test_a_password_file_encrypts_the_key_and_opens_it_again(self, gate_command, project, password_file):
        made = gate_command("key", "new", "keys/gate-ci.pem", "--password-file", "password")
        assert made.code == 0, made.err
        assert made.out.startswith("made  keys/gate-ci.pem (encrypted)\nmade  keys/gate-ci.pem.pub\n")
        assert b"ENCRYPTED" in (project / "keys/gate-ci.pem").read_bytes()
        assert stat.S_IMODE((project / "keys/gate-ci.pem").stat().st_mode) == 0o600
        shown = gate_command("key", "show", "keys/gate-ci.pem", "--password-file", "password")
        assert shown.code == 0, shown.err
        assert shown.out in made.out
        assert PASSWORD not in made.out + made.err + shown.out + shown.err

    def test_the_environment_gives_the_password(self, gate_command, monkeypatch):
        monkeypatch.setenv("GATE_KEY_PASSWORD", PASSWORD)
        assert gate_command("key", "new", "key.pem").code == 0
        assert gate_command("key", "show", "key.pem").code == 0
        monkeypatch.setenv("GATE_KEY_PASSWORD", "another")
        wrong = gate_command("key", "show", "key.pem")
        assert (wrong.code, wrong.err) == (2, "key.pem: the password is wrong, or the file is damaged\n")

    def test_without_a_password_and_without_a_terminal_nothing_is_made(self, gate_command, project, monkeypatch):
        with Path(os.devnull).open() as nothing:
            monkeypatch.setattr("sys.stdin", nothing)
            outcome = gate_command("key", "new", "key.pem")
        assert outcome.code == 2
        assert "there is no terminal to ask on\ngive it by --password-file FILE or GATE_KEY_PASSWORD\n" in outcome.err
        assert not (project / "key.pem").exists()
        monkeypatch.setattr("sys.stdin", None)
        assert gate_command("key", "new", "key.pem").code == 2

    def test_a_key_without_a_password_has_to_be_asked_for_and_is_said(self, gate_command):
        outcome = gate_command("key", "new", "key.pem", "--no-password")
        assert outcome.code == 0
        assert "NOT encrypted: whoever reads it can sign" in outcome.out

    def test_an_empty_variable_is_no_password(self, gate_command, project, monkeypatch):
        monkeypatch.setenv("GATE_KEY_PASSWORD", "")
        outcome = gate_command("key", "new", "key.pem")
        assert outcome.code == 2
        assert "GATE_KEY_PASSWORD: is set, and empty" in outcome.err
        assert not (project / "key.pem").exists()

    def test_a_key_is_never_replaced(self, gate_command, project):
        assert gate_command("key", "new", "key.pem", "--no-password").code == 0
        before = (project / "key.pem").read_bytes()
        again = gate_command("key", "new", "key.pem", "--no-password")
        assert (again.code, (project / "key.pem").read_bytes()) == (2, before)
        assert "exists already, and a key is never replaced" in again.err

    def test_no_password_and_a_password_contradict_each_other(self, gate_command, password_file):
        outcome = gate_command("key", "new", "key.pem", "--no-password", "--password-file", "password")
        assert outcome.code == 2
        assert "not allowed with" in outcome.err

    @pytest.mark.parametrize(
        "content, mode, said",
        [
            (b"", 0o600, "is empty"),
            (b"\n", 0o600, "is empty"),
            (b"one\ntwo\n", 0o600, "has more than one line"),
            (b"secret\n", 0o644, "its mode is 0644, may be 0600"),
        ],
    )
    def test_a_password_file_that_is_wrong_makes_nothing(self, gate_command, project, content, mode, said):
        (project / "password").write_bytes(content)
        (project / "password").chmod(mode)
        outcome = gate_command("key", "new", "key.pem", "--password-file", "password")
        assert outcome.code == 2
        assert said in outcome.err
        assert not (project / "key.pem").exists()

    @pytest.mark.parametrize("what", ["missing", "folder"])
    def test_a_password_file_that_is_none_is_said(self, gate_command, project, what):
        (project / "folder").mkdir()
        outcome = gate_command("key", "new", "key.pem", "--password-file", what)
        assert outcome.code == 2
        assert f"--password-file {what}: cannot be read: " in outcome.err

    def test_a_password_may_come_through_a_pipe(self, project):
        command = f"{sys.executable} -c 'from gate.cli.key import _password_of; from pathlib import Path; import sys"
        script = f"{command}; print(_password_of(Path(sys.argv[1])))' <(echo from a pipe)"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == "from a pipe\n"


class TestShow:
    def test_the_entry_reads_as_toml_and_has_to_be_filled_in(self, gate_command, project):
        out = gate_command("key", "new", "keys/gate-ci.pem", "--no-password").out
        entry = entry_of(out)
        assert (entry["name"], entry["owner"], entry["roles"]) == ("gate-ci", "", [])
        public = public_key(entry["public"], where="here")
        assert (project / "keys/gate-ci.pem.pub").read_text() == f"{public.text}\n"
        assert f"key id {public.keyid}" in out

    def test_a_public_key_needs_no_password(self, gate_command, project, password_file):
        made = gate_command("key", "new", "key.pem", "--password-file", "password")
        shown = gate_command("key", "show", "key.pem.pub")
        assert shown.code == 0, shown.err
        assert entry_of(shown.out) == entry_of(made.out)

    def test_a_pem_public_key_is_shown_as_toml(self, gate_command, project):
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (project / "yubi key.pub").write_bytes(pem)
        entry = entry_of(gate_command("key", "show", "yubi key.pub").out)
        assert entry["name"] == "yubi-key"
        assert public_key(entry["public"], where="a") == public_key(pem.decode(), where="b")

    def test_a_key_in_the_environment_is_shown(self, gate_command, project, monkeypatch):
        made = gate_command("key", "new", "key.pem", "--no-password")
        monkeypatch.setenv("CI_KEY", (project / "key.pem").read_text())
        assert entry_of(gate_command("key", "show", "env:CI_KEY").out)["public"] == entry_of(made.out)["public"]

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["missing.pem"], "missing.pem: is missing"),
            (["env:NOT_SET"], "env:NOT_SET: the environment variable is not set"),
            (["hsm:2"], "hsm:2: needs its public key"),
            (["hsn:2"], "no signer is registered for hsn:"),
            (["gate.toml"], "gate.toml: is no public key"),
            (["."], "is not a regular file"),
            ([""], "no key was named"),
            (["hsm:2", "--public-key", "missing.pub"], "missing.pub: is missing"),
            (["link.pem"], "is a symbolic link"),
        ],
    )
    def test_what_is_no_key_is_a_usage_error(self, gate_command, project, arguments, said):
        gate_command("key", "new", "key.pem", "--no-password")
        (project / "link.pem").symlink_to(project / "key.pem")
        outcome = gate_command("key", "show", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert said in outcome.err

    def test_a_private_key_that_others_can_read_is_refused(self, gate_command, project):
        gate_command("key", "new", "key.pem", "--no-password")
        (project / "key.pem").chmod(0o644)
        outcome = gate_command("key", "show", "key.pem")
        assert outcome.code == 2
        assert "\nchmod 600 key.pem" in outcome.err


class TestOptions:
    def parse(self, *arguments):
        parser = argparse.ArgumentParser()
        add_key_options(parser)
        return parser.parse_args(arguments)

    def test_the_key_that_is_named_signs(self, gate_command, project, password_file):
        gate_command("key", "new", "key.pem", "--password-file", "password")
        signer = signer_of(self.parse("--key", "key.pem", "--password-file", "password"))
        envelope = signer.sign(b"{}", IN_TOTO)
        assert verified(envelope, [signer.public], where="here") == (signer.public.keyid,)

    def test_the_environment_names_the_key_where_the_option_does_not(self, gate_command, monkeypatch):
        gate_command("key", "new", "key.pem", "--no-password")
        monkeypatch.setenv("GATE_KEY", "key.pem")
        assert self.parse().key == "key.pem"
        assert self.parse("--key", "other.pem").key == "other.pem"
        assert signer_of(self.parse()).public.scheme == "ed25519"

    @pytest.mark.parametrize("value", [None, ""])
    def test_no_key_is_an_error_that_says_how_to_name_one(self, monkeypatch, value):
        if value is not None:
            monkeypatch.setenv("GATE_KEY", value)
        with pytest.raises(SigningError, match="no key was named\nname one: --key .* GATE_KEY; make one: gate key new"):
            signer_of(self.parse())

    def test_the_public_key_has_to_be_that_of_the_key(self, gate_command, project):
        gate_command("key", "new", "a.pem", "--no-password")
        gate_command("key", "new", "b.pem", "--no-password")
        assert signer_of(self.parse("--key", "a.pem", "--public-key", "a.pem.pub"))
        with pytest.raises(SigningError, match="not of the given public key"):
            signer_of(self.parse("--key", "a.pem", "--public-key", "b.pem.pub"))
        with pytest.raises(SpecError, match="b.pem: is a private key"):
            signer_of(self.parse("--key", "a.pem", "--public-key", "b.pem"))


def on_a_terminal(arguments, answers, cwd):
    """Run the command on a terminal of its own, and answer each question once it is asked."""
    ours, its = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATE_KEY")}
    process = subprocess.Popen(
        [sys.executable, "-m", "gate", *arguments],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    os.close(its)
    said, left, end = "", list(answers), time.monotonic() + 60
    while time.monotonic() < end:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            data = os.read(ours, 4096).decode()
        except OSError:
            break
        said += data
        if left and re.search(r"key\.pem(, again)?: $", said):
            said += "|"
            os.write(ours, left.pop(0).encode())
    process.wait(timeout=30)
    os.close(ours)
    return process.returncode, said


class TestTerminal:
    def test_a_password_is_asked_twice_and_never_shown(self, project):
        code, said = on_a_terminal(["key", "new", "key.pem"], [f"{PASSWORD}\n"] * 2, project)
        assert code == 0, said
        assert said.count("password of the new key key.pem") == 2
        assert PASSWORD not in said
        code, said = on_a_terminal(["key", "show", "key.pem"], [f"{PASSWORD}\n"], project)
        assert code == 0, said
        assert entry_of(said)["public"] == (project / "key.pem.pub").read_text().strip()

    @pytest.mark.parametrize(
        "answers, reason",
        [
            (["one\n", "two\n"], "the two passwords differ; nothing was made"),
            (["\n"], "key.pem is empty"),
            (["\x04"], "was not given"),
        ],
    )
    def test_two_passwords_that_differ_an_empty_one_and_none_make_nothing(self, project, answers, reason):
        code, said = on_a_terminal(["key", "new", "key.pem"], answers, project)
        assert (code, reason in said) == (2, True), said
        assert not (project / "key.pem").exists()
