"""Keys, and the signatures that they make: a key file, a key in the environment, or one in a token or a cloud KMS.

Signing goes through securesystemslib, which knows the tokens and the clouds. Verifying needs `cryptography` alone, so
that it loads no cloud's library; both are held to the same bytes by the tests.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import secrets
import shlex
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gate import atomic
from gate.errors import BundleError, GateError, SignatureMismatch, SigningError, SpecError
from gate.release.statements import Envelope, Signed

Ask = Callable[[str], str]
"""Gives the secret that is described, such as `password of keys/gate-ci.pem`."""

_T = TypeVar("_T")
_ED25519 = "ed25519"
_P256 = "ecdsa-sha2-nistp256"
_P384 = "ecdsa-sha2-nistp384"
_RSA = "rsassa-pss-sha256"
_KEY_TYPES = {_ED25519: "ed25519", _P256: "ecdsa", _P384: "ecdsa", _RSA: "rsa"}
"""securesystemslib's name for the key of each scheme."""
_EXTRAS = {
    "hsm": "hsm",
    "gcpkms": "gcpkms",
    "awskms": "awskms",
    "azurekms": "azurekms",
    "hv": "vault",
}
"""The extra of securesystemslib that each scheme of its signer URIs needs."""
_OTHER_KINDS = {"gnupg", "tkey"}
"""Schemes whose keys are of kinds that no policy takes: OpenPGP, ML-DSA."""

_RSA_BITS = range(3072, 8192 + 1)
_RSA_EXPONENTS = range(2**16 + 1, 2**256)
"""Source: FIPS 186-5, section 5.4 (e) and appendix A.1.1."""
_LIMIT_BYTES = 64 * 1024
_MAKE_ONE = "make a key: gate key new PATH"
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s[A-Za-z0-9+/=\s]+-----END PUBLIC KEY-----")
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)

_FIELD = 2**255 - 19
_CURVE_D = -121665 * pow(121666, -1, _FIELD) % _FIELD
_SMALL_ORDER_Y = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
    }
)
"""The y of the eight points of edwards25519 whose order divides 8: under one of them anybody can sign.

Source: RFC 7748, section 4.1 (the curve); the points are those that L times some point gives, L as in RFC 8032.
"""


@dataclass(frozen=True)
class PublicKey:
    """A public key; `public_key` makes them.

    Args:
        keyid: SHA-256 of the key's bytes, as hex: 32 of Ed25519, else DER SubjectPublicKeyInfo, so that one key has one.
        text: `ed25519:` and 64 hex digits, or PEM; the same text for the same key.
        scheme: How it signs: `ed25519`, `ecdsa-sha2-nistp256`, `ecdsa-sha2-nistp384` or `rsassa-pss-sha256`.
    """

    keyid: str
    text: str
    scheme: str


@dataclass(frozen=True)
class _Parsed:
    """A public key and what checks a signature with it: raises InvalidSignature of `cryptography`."""

    public: PublicKey
    check: Callable[[bytes, bytes], Any]


class _Unusable(Exception):
    """Why a text is no public key that counts."""


class KeySigner:
    """Signs with one private key; `open_signer` makes them.

    Attributes:
        public: The public key of what it signs.
    """

    def __init__(self, public: PublicKey, signer: Any, *, where: str, known_secrets: list[str]) -> None:
        self.public = public
        self._signer = signer
        self._where = where
        self._known_secrets = known_secrets

    def sign(self, payload: bytes, payload_type: str) -> Envelope:
        """Sign a payload, and verify the signature before it is given out: a token can return rubbish.

        Source: Dead Simple Signing Envelope, protocol.md (v1.0.2), the pre-authentication encoding.

        Raises:
            SigningError: The key cannot be used, or what came back is no signature by it.
        """

        def signature() -> bytes:
            from securesystemslib import dsse

            return bytes.fromhex(dsse.Envelope(payload, payload_type, {}).sign(self._signer).signature)

        made = _guarded(signature, "does not sign", where=self._where, known_secrets=self._known_secrets)
        envelope = Envelope(payload, payload_type, (Signed(self.public.keyid, base64.b64encode(made).decode()),))
        try:
            verified(envelope, (self.public,), where=self._where)
        except SignatureMismatch as err:
            raise SigningError(
                f"signed, and the signature is none by its public key {self.public.keyid[:16]}",
                where=self._where,
                hint=f"is the public key that of this private key, of the scheme {self.public.scheme}?",
            ) from err
        return envelope


def public_key(text: str, *, where: str) -> PublicKey:
    """Read a public key: `ed25519:` and 64 lower-case hex digits, or one PEM public key.

    PEM may hold Ed25519, ECDSA on P-256 or P-384, or RSA of 3072 to 8192 bits.

    Raises:
        SpecError: It is none, of another kind, too weak, or one under which anybody can sign.
    """
    try:
        return _parsed(text.strip()).public
    except _Unusable as err:
        raise SpecError(str(err), where=where, hint="print it: gate key show KEY") from err


def read_public_key(path: Path) -> PublicKey:
    """Read the file of a public key, such as `gate key new` writes beside the private one.

    Raises:
        SpecError: It is missing, no regular file, or holds no public key.
    """
    try:
        text = atomic.read_regular(path, limit_bytes=_LIMIT_BYTES).decode()
    except BundleError as err:
        raise SpecError(err.message, where=str(path)) from err
    except UnicodeDecodeError as err:
        raise SpecError("is no public key: it is not text", where=str(path)) from err
    except OSError as err:
        raise SpecError(f"cannot be read: {err.strerror}", where=str(path)) from err
    return public_key(text, where=str(path))


def open_signer(uri: str, *, public: str | None = None, ask: Ask | None = None) -> KeySigner:
    """Open a private key.

    Args:
        uri: A path to a PEM private key that only its owner can read; `env:NAME`, an environment variable that holds
            one; or one of securesystemslib's signer URIs, such as `hsm:2?label=release` or `awskms:alias/release`.
        public: The text of its public key. A token or KMS needs it; with another key it has to fit.
        ask: Gives a password or PIN; called only where one is needed.

    Raises:
        SigningError: It is missing, no private key, readable for others, of a kind that is not supported, or the
            password is wrong.
        SpecError: `public` is no public key.
    """
    if not uri or "\0" in uri:
        raise SigningError("no key was named", hint="name one: --key keys/gate-ci.pem")
    expected = None if public is None else public_key(public, where=f"public key of {_shown(uri)}")
    known_secrets: list[str] = []

    def told(what: str) -> str:
        if ask is None:
            raise SigningError(f"needs the {what}, and there is nobody to ask", where=_shown(uri))
        secret = ask(f"{what} of {_shown(uri)}")
        known_secrets.append(secret)
        return secret

    match = _URI.fullmatch(uri)
    scheme, rest = (match[1], match[2]) if match is not None else ("", "")
    if scheme == "env":
        pem = os.environ.get(rest)
        if not pem:
            what = "is not set" if pem is None else "is empty"
            raise SigningError(
                f"the environment variable {what}", where=uri, hint=f'export {rest or "NAME"}="$(cat KEY.pem)"'
            )
        return _pem_signer(pem.encode(errors="surrogateescape"), expected, told, where=uri)
    if scheme == "file2":
        # As the library reads its path, but with the checks that the library does not make.
        path = Path(os.environ.get("CRYPTO_SIGNER_PATH_PREFIX", ""), urlsplit(uri).path)
        return _pem_signer(_private_bytes(path), expected, told, where=str(path))
    if scheme and scheme in _schemes():
        return _library_signer(uri, scheme, expected, told, known_secrets)
    if scheme and not os.path.lexists(uri):
        known = ", ".join(sorted({"env", *_schemes()} - _OTHER_KINDS))
        raise SigningError(
            f"is no file, and no signer is registered for {scheme}:",
            where=_shown(uri),
            hint=f"name a path to a PEM private key, or one of these: {known}",
        )
    return _pem_signer(_private_bytes(Path(uri)), expected, told, where=uri)


def verified(envelope: Envelope, keys: Iterable[PublicKey], *, where: str) -> tuple[str, ...]:
    """Which of the keys signed an envelope.

    The key's own scheme says how its signature is checked; the envelope has no say in it.

    Args:
        envelope: What was signed; signatures by other keys are passed over.
        keys: Those that are known.
        where: What it was read from, for messages.

    Returns:
        The key ids whose signatures hold, in the envelope's order; empty where none of the keys signed.

    Raises:
        SignatureMismatch: A signature by one of the keys does not hold, or one key signed twice.
    """
    from cryptography.exceptions import InvalidSignature

    known: dict[str, PublicKey] = {}
    for key in keys:
        if known.setdefault(key.keyid, key) != key:
            raise SignatureMismatch(f"two public keys have the key id {key.keyid}", where=where)
    held: list[str] = []
    message: bytes | None = None
    for each in envelope.signatures:
        found = known.get(each.keyid)
        if found is None:
            continue
        if each.keyid in held:
            raise SignatureMismatch(f"the key {each.keyid[:16]} signed it twice", where=where)
        if message is None:
            message = _pre_authentication_encoding(envelope)
        try:
            signature = base64.b64decode(each.sig, validate=True)
            parsed = _parsed(found.text)
            if parsed.public != found:
                raise _Unusable("its key id or its scheme is not that of its public key")
            if base64.b64encode(signature).decode() != each.sig:
                raise _Unusable("its base64 is not canonical")
            parsed.check(signature, message)
        except InvalidSignature:
            raise SignatureMismatch(
                f"the signature by {each.keyid[:16]} does not hold: what was signed was changed, or something else was",
                where=where,
            ) from None
        except (_Unusable, ValueError) as err:
            raise SignatureMismatch(
                f"the signature by {each.keyid[:16]} cannot be checked: {err}", where=where
            ) from err
        held.append(each.keyid)
    return tuple(held)


def new_key(path: Path, *, password: str | None) -> PublicKey:
    """Make an Ed25519 key: `path` for its owner alone, and `<path>.pub` with the public key for everybody.

    Neither replaces anything, and each is there whole or not at all.

    Args:
        path: Of the private key, PKCS #8 PEM. Parent folders are made.
        password: What it is encrypted with; None: not at all.

    Raises:
        SigningError: One of the files exists, the password is empty or too long, or the disk does not take them.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    beside = path.with_name(f"{path.name}.pub") if path.name else path
    if _URI.fullmatch(str(path)):
        raise SigningError("a path that reads as a URI cannot be opened again", where=str(path), hint=f"./{path}")
    if not path.name or path.suffix == ".pub":
        raise SigningError("is no name for a private key", where=str(path), hint="name it so: keys/gate-ci.pem")
    if password == "":
        raise SigningError("the password is empty", where=str(path), hint="for a key without one: --no-password")
    for each in (path, beside):
        if os.path.lexists(each):
            raise _exists(each)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    private = Ed25519PrivateKey.generate()
    try:
        if password is not None:
            encryption = serialization.BestAvailableEncryption(_bytes_of(password))
        pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    except ValueError:
        raise SigningError("the password cannot be used: it has more than 1023 bytes", where=str(path)) from None
    text = _text_of(private.public_key())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale(path.parent)
        _write_new(path, pem, mode=0o600)
        try:
            _write_new(beside, f"{text}\n".encode(), mode=0o644)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as err:
        if isinstance(err, FileExistsError) and err.filename2 is not None:
            raise _exists(Path(os.fsdecode(err.filename2))) from err
        raise SigningError(f"cannot be written: {err.strerror or err}", where=str(path)) from err
    return _parsed(text).public


def require_private(file: int, path: Path) -> None:
    """Require of an open file that nobody but its owner can read or write it.

    Raises:
        SigningError: Others can.
    """
    mode = stat.S_IMODE(os.fstat(file).st_mode)
    if mode & 0o077:
        raise SigningError(
            f"others than its owner can use it: its mode is {mode:04o}, may be 0600",
            where=str(path),
            hint=f"chmod 600 {shlex.quote(str(path))}   # and make a new key if somebody may have read it",
        )


@lru_cache(maxsize=1024)
def _parsed(text: str) -> _Parsed:
    """Parse a public key once.

    Raises:
        _Unusable: With the reason.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    if "PRIVATE KEY" in text:
        raise _Unusable("is a private key; a public key is needed, and nobody else should have seen this one")
    if text.startswith("ed25519:"):
        digits = text.removeprefix("ed25519:")
        if re.fullmatch("[0-9a-f]{64}", digits) is None:
            raise _Unusable("is no public key: after ed25519: there are 64 lower-case hex digits, and nothing else")
        _require_strong_point(bytes.fromhex(digits))
        key: Any = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(digits))
    else:
        if len(text) > _LIMIT_BYTES or _PEM.fullmatch(text) is None:
            raise _Unusable(
                "is no public key: neither ed25519: and 64 hex digits nor one block of PEM, BEGIN PUBLIC KEY"
            )
        try:
            key = serialization.load_pem_public_key(text.encode())
        except (ValueError, TypeError, UnsupportedAlgorithm) as err:
            raise _Unusable("is no public key: its PEM is damaged, or of a kind that is not supported") from err

    if isinstance(key, ed25519.Ed25519PublicKey):
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        _require_strong_point(raw)
        return _Parsed(_public(raw, _text_of(key), _ED25519), key.verify)
    canonical = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1)):
        is_256 = isinstance(key.curve, ec.SECP256R1)
        ecdsa = ec.ECDSA(hashes.SHA256() if is_256 else hashes.SHA384())
        return _Parsed(
            _public(canonical, _text_of(key), _P256 if is_256 else _P384),
            lambda signature, data: key.verify(signature, data, ecdsa),
        )
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in _RSA_BITS:
            raise _Unusable(f"is an RSA key of {key.key_size} bits, may have {_RSA_BITS[0]} to {_RSA_BITS[-1]}")
        exponent = key.public_numbers().e
        if exponent not in _RSA_EXPONENTS:
            raise _Unusable("is an RSA key with an exponent that is not between 2^16 and 2^256")
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.AUTO)
        return _Parsed(
            _public(canonical, _text_of(key), _RSA),
            lambda signature, data: key.verify(signature, data, pss, hashes.SHA256()),
        )
    name = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
    raise _Unusable(f"is of a kind that is not supported ({name}): Ed25519, ECDSA on P-256 or P-384, or RSA")


def _public(canonical: bytes, text: str, scheme: str) -> PublicKey:
    return PublicKey(hashlib.sha256(canonical).hexdigest(), text, scheme)


def _text_of(key: Any) -> str:
    """The one text of a public key of `cryptography`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if isinstance(key, Ed25519PublicKey):
        return f"ed25519:{key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()}"
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode().strip()


def _require_strong_point(raw: bytes) -> None:
    """Require that 32 bytes are the one encoding of a point of edwards25519 whose order is large.

    OpenSSL takes any 32 bytes, and verifies forged signatures under a point of small order.

    Source: RFC 8032, section 5.1.3.

    Raises:
        _Unusable: They are not.
    """
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    if y % _FIELD in _SMALL_ORDER_Y:
        raise _Unusable("is an Ed25519 point of small order: anybody can sign under it")
    x_squared = (y * y - 1) * pow(_CURVE_D * y * y + 1, -1, _FIELD) % _FIELD
    if y >= _FIELD or pow(x_squared, (_FIELD - 1) // 2, _FIELD) != 1:
        raise _Unusable("is no point of Ed25519's curve")


def _pre_authentication_encoding(envelope: Envelope) -> bytes:
    """What is signed of an envelope.

    Source: Dead Simple Signing Envelope, protocol.md (v1.0.2).
    """
    kind = envelope.payload_type.encode(errors="surrogatepass")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(envelope.payload), envelope.payload)


def _schemes() -> dict[str, Any]:
    """The signers of each URI scheme, those that somebody registered too."""
    from securesystemslib.signer import SIGNER_FOR_URI_SCHEME

    registered: dict[str, Any] = SIGNER_FOR_URI_SCHEME
    return registered


def _private_bytes(path: Path) -> bytes:
    """A private key's file.

    Raises:
        SigningError: It is missing, no regular file, too long, or readable for others.
    """
    try:
        with atomic.open_regular(path) as stream:
            require_private(stream.fileno(), path)
            data = stream.read(_LIMIT_BYTES + 1)
    except BundleError as err:
        hint = None if os.path.lexists(path) else _MAKE_ONE
        raise SigningError(err.message, where=str(path), hint=hint) from err
    except OSError as err:
        raise SigningError(f"cannot be read: {err.strerror}", where=str(path)) from err
    if len(data) > _LIMIT_BYTES:
        raise SigningError("is no private key: it is too long", where=str(path))
    return data


def _pem_signer(pem: bytes, expected: PublicKey | None, told: Ask, *, where: str) -> KeySigner:
    """A signer of a PEM private key.

    Raises:
        SigningError: It is none, its password is wrong, or it is not that of the public key.
    """
    blocks = len(re.findall(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----", pem))
    if blocks == 0 and (b"PUBLIC KEY-----" in pem or pem.startswith(b"ed25519:")):
        raise SigningError("is a public key; signing needs the private one", where=where)
    if blocks != 1:
        what = "it is empty" if not pem.strip() else f"it has {blocks} blocks BEGIN ... PRIVATE KEY, needs 1"
        raise SigningError(f"is no PEM private key: {what}", where=where, hint=_MAKE_ONE)
    private = _loaded(pem, told, where=where)
    try:
        public = _parsed(_text_of(private.public_key())).public
    except (_Unusable, AttributeError, ValueError) as err:
        reason = str(err) if isinstance(err, _Unusable) else "is of a kind that does not sign"
        raise SigningError(reason, where=where, hint=_MAKE_ONE) from None
    if expected is not None and expected != public:
        raise SigningError(
            f"is the private key of {public.keyid[:16]}, not of the given public key {expected.keyid[:16]}", where=where
        )

    def signer() -> Any:
        from securesystemslib.signer import CryptoSigner

        return CryptoSigner(private, _library_key(public))

    made = _guarded(signer, "cannot be used", where=where, known_secrets=[])
    return KeySigner(public, made, where=where, known_secrets=[])


def _loaded(pem: bytes, told: Ask, *, where: str) -> Any:
    """The private key of `cryptography`. No cause is kept: it could show the key or the password."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    damaged = SigningError(
        "is no private key: its PEM is cut off or damaged, or of a kind that is not supported",
        where=where,
        hint=_MAKE_ONE,
    )
    try:
        return load_pem_private_key(pem, None)
    except TypeError:
        pass
    except (ValueError, UnsupportedAlgorithm):
        raise damaged from None
    password = told("password")
    wrong = SigningError(
        "the password is wrong, or the file is damaged" if password else "the password is empty", where=where
    )
    try:
        return load_pem_private_key(pem, _bytes_of(password))
    except UnsupportedAlgorithm:
        raise damaged from None
    except (TypeError, ValueError):
        raise wrong from None


def _library_signer(
    uri: str, scheme: str, expected: PublicKey | None, told: Ask, known_secrets: list[str]
) -> KeySigner:
    """A signer in a token or a KMS.

    Raises:
        SigningError: Its public key was not given, its library is missing, or it does not answer.
    """
    where = _shown(uri)
    if expected is None:
        raise SigningError(
            "needs its public key, which a token or a KMS is not asked for",
            where=where,
            hint="give the file that holds it: --public-key KEY.pub",
        )

    def signer() -> Any:
        from securesystemslib.signer import Signer

        return Signer.from_priv_key_uri(uri, _library_key(expected), told)

    made = _guarded(signer, "cannot be opened", where=where, known_secrets=known_secrets, extra=_EXTRAS.get(scheme))
    return KeySigner(expected, made, where=where, known_secrets=known_secrets)


def _library_key(public: PublicKey) -> Any:
    from securesystemslib.signer import SSlibKey

    value = public.text.removeprefix("ed25519:") if public.scheme == _ED25519 else f"{public.text}\n"
    return SSlibKey(public.keyid, _KEY_TYPES[public.scheme], public.scheme, {"public": value})


def _guarded(
    work: Callable[[], _T], what: str, *, where: str, known_secrets: list[str], extra: str | None = None
) -> _T:
    """Do what a library does; whatever it raises becomes a SigningError that does not hold what raised it.

    Raises:
        SigningError: It raised, in its own words unless they repeat a secret.
    """
    from securesystemslib.exceptions import UnsupportedLibraryError

    try:
        return work()
    except GateError:
        raise
    except Exception as err:  # noqa: BLE001  a signer may raise anything: its library's, its network's
        said = " ".join(str(err).split())[:300]
        raw = f"{err}{err!r}"
        if not said or any(secret and secret in raw for secret in known_secrets):
            said = "no more is said, for the message repeats a secret" if said else "no more is said"
        hint = None
        if isinstance(err, (UnsupportedLibraryError, ImportError)):
            hint = f'pip install "securesystemslib[{extra}]"' if extra else "install the library that its signer needs"
        failure = SigningError(f"{what}: {type(err).__name__}: {said}", where=where, hint=hint)
    raise failure


def _shown(uri: str) -> str:
    """A URI without what may hold a secret: the query of a signer's, and who logs in."""
    match = _URI.fullmatch(uri)
    if match is None or match[1] == "env":
        return uri
    return re.sub(r"//[^/@]*@", "//", uri.partition("?")[0])


def _bytes_of(password: str) -> bytes:
    return password.encode(errors="surrogateescape")


def _exists(path: Path) -> SigningError:
    return SigningError("exists already, and a key is never replaced", where=str(path), hint="choose another name")


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Write a file that nothing has the name of, in one step.

    The temporary name is of the kind that `gate.atomic` removes where a process was killed.

    Raises:
        FileExistsError: Something has the name.
    """
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(file, "wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's list of names; a file system that cannot is left to its ways."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError:
        pass
    finally:
        os.close(file)
