"""`gate key new | show`: signing keys, and the options by which other commands take one."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.errors import ExitCode, SigningError

if TYPE_CHECKING:
    from gate.signing import KeySigner, PublicKey

KEY = "GATE_KEY"
"""The environment variable that names the key where --key does not."""
PASSWORD = "GATE_KEY_PASSWORD"  # noqa: S105  its name
"""The environment variable that holds the password of a key file, or the PIN of a token."""
_LIMIT_BYTES = 64 * 1024


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its own two."""
    parser = subparsers.add_parser(
        "key", help=COMMANDS["key"], description="Make and show signing keys.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = commands.add_parser("new", help="make an Ed25519 key: PATH and PATH.pub", allow_abbrev=False)
    new.add_argument("path", type=Path, metavar="PATH", help="of the private key, such as keys/gate-ci.pem")
    secret = new.add_mutually_exclusive_group()
    secret.add_argument("--no-password", action="store_true", help="leave the private key unencrypted")
    _add_password_file(secret)
    new.set_defaults(run=_run_new)
    show = commands.add_parser("show", help="print a public key and its entry in a trust policy", allow_abbrev=False)
    show.add_argument("what", metavar="KEY", help="a private or public key's file, env:NAME, or a signer URI")
    _add_public_key(show)
    _add_password_file(show)
    show.set_defaults(run=_run_show)


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a command takes the key that it signs with; `signer_of` reads them."""
    parser.add_argument(
        "--key",
        default=os.environ.get(KEY) or None,
        metavar="KEY",
        help=f"a private key: its file, env:NAME, or a signer URI such as hsm:2 (left out: ${KEY})",
    )
    _add_public_key(parser)
    _add_password_file(parser)


def signer_of(args: argparse.Namespace) -> KeySigner:
    """Open the key that the options of `add_key_options` name.

    Raises:
        SigningError: None is named, it cannot be used, or its password is wrong or missing.
        SpecError: The file of the public key holds none.
    """
    if args.key is None:
        raise SigningError(
            "no key was named", hint=f"name one: --key keys/gate-ci.pem, or set {KEY}; make one: gate key new PATH"
        )
    return _open(args.key, args)


def _run_new(args: argparse.Namespace) -> ExitCode:
    """Make a key.

    Raises:
        SigningError: There is no password, or the files cannot be made.
    """
    from gate.signing import new_key

    password = None if args.no_password else _new_password(args)
    public = new_key(args.path, password=password)
    kind = "NOT encrypted: whoever reads it can sign" if password is None else "encrypted"
    print(f"made  {args.path} ({kind})\nmade  {args.path}.pub")
    print(_entry(public, _name(args.path.name)))
    return ExitCode.PASSED


def _run_show(args: argparse.Namespace) -> ExitCode:
    """Print a public key; a key in a token or a KMS signs something first, to show that it is the one.

    Raises:
        SigningError: It is no key, or it cannot be used.
        SpecError: It is no public key.
    """
    from gate.signing import read_public_key

    path = Path(args.what)
    if args.public_key is None and path.is_file() and not _is_private(path):
        public = read_public_key(path)
    else:
        signer = _open(args.what, args)
        signer.sign(b"", "application/vnd.trt-gate.key-check")
        public = signer.public
    print(_entry(public, _name(path.name)))
    return ExitCode.PASSED


def _open(uri: str, args: argparse.Namespace) -> KeySigner:
    from gate.signing import open_signer, read_public_key

    public = None if args.public_key is None else read_public_key(args.public_key).text
    return open_signer(uri, public=public, ask=_asker(args))


def _asker(args: argparse.Namespace) -> Callable[[str], str]:
    """Gives a password or PIN, and asks for each but once."""
    known: dict[str, str] = {}

    def ask(what: str) -> str:
        if what not in known:
            given = _given_password(args)
            known[what] = _typed(what) if given is None else given
        return known[what]

    return ask


def _new_password(args: argparse.Namespace) -> str:
    """The password of a new key.

    Raises:
        SigningError: There is none, or the two that were typed differ.
    """
    given = _given_password(args)
    if given is not None:
        return given
    what = f"password of the new key {args.path}"
    first = _typed(what)
    if first != _typed(f"{what}, again"):
        raise SigningError("the two passwords differ; nothing was made", where=str(args.path))
    return first


def _given_password(args: argparse.Namespace) -> str | None:
    """The password that a file or the environment gives; None: neither is there.

    Raises:
        SigningError: It is empty, or the file cannot be used.
    """
    if args.password_file is not None:
        return _password_of(args.password_file)
    given = os.environ.get(PASSWORD)
    if given == "":
        raise SigningError("is set, and empty", where=PASSWORD, hint=f"unset {PASSWORD}, or give it the password")
    return given


def _password_of(path: Path) -> str:
    """The one line of a password file, which may be a pipe.

    Raises:
        SigningError: It is unreadable, readable for others, empty, or has several lines.
    """
    import stat

    from gate.signing import require_private

    try:
        with path.open("rb") as stream:
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                require_private(stream.fileno(), path)
            data = stream.read(_LIMIT_BYTES + 1)
    except OSError as err:
        raise SigningError(f"cannot be read: {err.strerror}", where=f"--password-file {path}") from err
    line = data.decode(errors="surrogateescape").removesuffix("\n").removesuffix("\r")
    wrong = "is empty" if not line else "has more than one line" if "\n" in line or "\r" in line else None
    if wrong is not None:
        raise SigningError(wrong, where=f"--password-file {path}", hint="write the password into it, on one line")
    return line


def _typed(what: str) -> str:
    """Ask on the terminal, without showing what is typed.

    Raises:
        SigningError: There is no terminal, or the answer is empty.
    """
    import getpass
    import warnings

    hint = f"give it by --password-file FILE or {PASSWORD}"
    if sys.stdin is None or not sys.stdin.isatty():
        raise SigningError(f"the {what} is needed, and there is no terminal to ask on", hint=hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)
            answer = getpass.getpass(f"{what}: ")
    except (EOFError, getpass.GetPassWarning):
        raise SigningError(f"the {what} was not given", hint=hint) from None
    if not answer:
        raise SigningError(f"the {what} is empty", hint=hint)
    return answer


def _is_private(path: Path) -> bool:
    """Whether a file looks like a private key, so that it is read as one: with its mode checked, and its password."""
    from gate.atomic import open_regular
    from gate.errors import BundleError

    try:
        with open_regular(path) as stream:
            return b"PRIVATE KEY" in stream.read(_LIMIT_BYTES)
    except BundleError as err:
        raise SigningError(err.message, where=str(path)) from err


def _entry(public: PublicKey, name: str) -> str:
    """A key's entry in a trust policy, which is refused until somebody fills in whose it is and what it may sign."""
    text = f'"{public.text}"' if "\n" not in public.text else f'"""\n{public.text}\n"""'
    return f"""
# {public.scheme}, key id {public.keyid}
[[key]]
name   = "{name}"
owner  = ""                     # who holds the private key
roles  = []                     # ["gate"] issues verdicts, ["promoter"] signs the ledger, other names approve
public = {text}"""


def _name(file_name: str) -> str:
    """A name that a policy takes, from a file's name or a URI."""
    stem = Path(file_name.partition("?")[0].removesuffix(".pub")).stem
    return re.sub("[^A-Za-z0-9_.-]+", "-", stem).strip("-._")[:60] or "key"


def _add_public_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--public-key", type=Path, metavar="FILE", help="its public key, which a token or a KMS needs beside the URI"
    )


def _add_password_file(parser: Any) -> None:
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help=f"holds the password or PIN, on one line (left out: ${PASSWORD}, or the terminal)",
    )
