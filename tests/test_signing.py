"""Keys and signatures, with real keys and with the library's own verification as the second implementation."""

from __future__ import annotations

import base64
import os
import signal
import stat
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from securesystemslib import dsse
from securesystemslib import signer as library

from gate.errors import SignatureMismatch, SigningError, SpecError
from gate.release.statements import IN_TOTO, LEDGER_ENTRY, Envelope, Signed, envelope_from_bytes
from gate.signing import PublicKey, new_key, open_signer, public_key, read_public_key, verified

PAYLOAD = b'{"status":"PASSED"}'
PASSWORD = "correct horse battery staple"
FIELD = 2**255 - 19
SMALL_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


def pem_of(private, password=None):
    encryption = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    )
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem_of(private):
    return (
        private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


@pytest.fixture(scope="module")
def privates():
    return {
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ecdsa-sha2-nistp256": ec.generate_private_key(ec.SECP256R1()),
        "ecdsa-sha2-nistp384": ec.generate_private_key(ec.SECP384R1()),
        "rsassa-pss-sha256": rsa.generate_private_key(65537, 3072),
    }


SCHEMES = ["ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "rsassa-pss-sha256"]


def key_file(folder, private, password=None, name="key.pem", mode=0o600):
    path = folder / name
    path.write_bytes(pem_of(private, password))
    path.chmod(mode)
    return path


@pytest.fixture
def signer(tmp_path, privates):
    return open_signer(str(key_file(tmp_path, privates["ed25519"])))


class TestPublicKey:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_each_kind_is_read_and_its_text_reads_as_itself(self, privates, scheme):
        read = public_key(public_pem_of(privates[scheme]), where="here")
        assert read.scheme == scheme
        assert public_key(f"\n {read.text}\n", where="here") == read

    def test_ed25519_has_one_key_id_as_hex_and_as_pem(self, privates):
        raw = privates["ed25519"].public_key().public_bytes_raw()
        assert public_key(f"ed25519:{raw.hex()}", where="a") == public_key(
            public_pem_of(privates["ed25519"]), where="b"
        )

    @pytest.mark.parametrize("scheme", ["ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384"])
    def test_a_compressed_or_rewrapped_pem_of_one_key_has_its_key_id(self, privates, scheme):
        pem = public_pem_of(privates[scheme])
        whole = base64.b64decode("".join(pem.splitlines()[1:-1]))
        point = (
            privates[scheme]
            .public_key()
            .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        )
        short = (
            privates[scheme]
            .public_key()
            .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        )
        algorithm = whole[whole.index(b"\x30", 1) : whole.index(b"\x03", len(whole) - len(point) - 5)]
        bits = b"\x03" + bytes([len(short) + 1, 0]) + short
        compressed = b"\x30" + bytes([len(algorithm) + len(bits)]) + algorithm + bits
        assert compressed != whole
        other = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(compressed).decode()}\n-----END PUBLIC KEY-----"
        rewrapped = f"-----BEGIN PUBLIC KEY-----\r\n{base64.b64encode(whole).decode()}\r\n-----END PUBLIC KEY-----"
        assert public_key(pem, where="a") == public_key(other, where="b") == public_key(rewrapped, where="c")

    @pytest.mark.parametrize("encoding", SMALL_ORDER)
    def test_points_under_which_anybody_can_sign_are_refused(self, encoding):
        with pytest.raises(SpecError, match=r"^trust.toml:4: is an Ed25519 point of small order"):
            public_key(f"ed25519:{encoding}", where="trust.toml:4")

    def test_a_point_of_small_order_is_refused_in_pem_too(self):
        der = bytes.fromhex("302a300506032b6570032100") + bytes.fromhex(SMALL_ORDER[2])
        pem = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(der).decode()}\n-----END PUBLIC KEY-----"
        with pytest.raises(SpecError, match="small order"):
            public_key(pem, where="here")

    def test_openssl_verifies_what_nobody_signed_under_each_of_them(self):
        for encoding in SMALL_ORDER:
            key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(encoding))
            forged = 0
            for message in (b"%d" % number for number in range(64)):
                for commitment in SMALL_ORDER:
                    try:
                        key.verify(bytes.fromhex(commitment) + bytes(32), message)
                    except InvalidSignature:
                        continue
                    forged += 1
                    break
            assert forged, encoding

    @pytest.mark.parametrize("y", range(2, 19))
    def test_a_second_encoding_of_a_point_is_refused(self, y):
        with pytest.raises(SpecError, match="is no point"):
            public_key(f"ed25519:{(FIELD + y).to_bytes(32, 'little').hex()}", where="here")

    def test_bytes_off_the_curve_are_refused_and_no_real_key_is(self):
        with pytest.raises(SpecError, match="is no point"):
            public_key(f"ed25519:{(2).to_bytes(32, 'little').hex()}", where="here")
        for _ in range(50):
            raw = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
            assert public_key(f"ed25519:{raw.hex()}", where="here").text.endswith(raw.hex())

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: "",
            lambda text: text[:-1],
            lambda text: text + "0",
            str.upper,
            lambda text: text.replace("ed25519:", "ed25519:0x"),
            lambda text: text.removeprefix("ed25519:"),
            lambda text: text.replace("ed25519:", "ed25519: "),
            lambda text: f"ed25519:{text[8:].upper()}g",
            lambda text: f"{text}\n{text}",
            lambda text: "ed25519:" + "٣" * 64,
        ],
    )
    def test_anything_but_64_hex_digits_is_refused(self, privates, change):
        text = f"ed25519:{privates['ed25519'].public_key().public_bytes_raw().hex()}"
        with pytest.raises(SpecError, match="is no public key"):
            public_key(change(text), where="here")

    @pytest.mark.parametrize(
        "change",
        [
            lambda pem: pem[: len(pem) // 2],
            lambda pem: pem + pem,
            lambda pem: "name: release\n" + pem,
            lambda pem: pem + "trailing",
            lambda pem: pem.replace("PUBLIC KEY", "CERTIFICATE"),
            lambda pem: pem.replace(pem.splitlines()[1], pem.splitlines()[1][:-8]),
            lambda pem: pem.replace(pem.splitlines()[1], "A" * 64),
            lambda pem: "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----",
            lambda pem: "-----BEGIN PUBLIC KEY-----\n" + "A" * 100_000 + "\n-----END PUBLIC KEY-----",
        ],
    )
    def test_pem_that_is_not_one_whole_public_key_is_refused(self, privates, change):
        with pytest.raises(SpecError, match="is no public key"):
            public_key(change(public_pem_of(privates["ecdsa-sha2-nistp256"])), where="here")

    def test_a_private_key_is_refused_and_not_repeated(self, privates):
        pem = pem_of(privates["ed25519"]).decode()
        with pytest.raises(SpecError, match="is a private key") as caught:
            public_key(pem, where="trust.toml:9")
        assert pem.splitlines()[1] not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize(
        "private",
        [
            lambda: ec.generate_private_key(ec.SECP521R1()),
            lambda: ec.generate_private_key(ec.SECP256K1()),
            ed448.Ed448PrivateKey.generate,
            x25519.X25519PrivateKey.generate,
            lambda: dsa.generate_private_key(1024),
        ],
    )
    def test_other_kinds_are_refused(self, private):
        with pytest.raises(SpecError, match="of a kind that is not supported"):
            public_key(public_pem_of(private()), where="here")

    def test_weak_rsa_is_refused(self, privates):
        with pytest.raises(SpecError, match="is an RSA key of 2048 bits, may have 3072 to 8192"):
            public_key(public_pem_of(rsa.generate_private_key(65537, 2048)), where="here")
        modulus = privates["rsassa-pss-sha256"].public_key().public_numbers().n
        small = rsa.RSAPublicNumbers(3, modulus).public_key()
        pem = small.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        with pytest.raises(SpecError, match="an exponent that is not between"):
            public_key(pem, where="here")

    def test_a_file_of_a_public_key_is_read(self, tmp_path, privates):
        path = tmp_path / "key.pub"
        path.write_text(public_pem_of(privates["ecdsa-sha2-nistp384"]))
        assert read_public_key(path).scheme == "ecdsa-sha2-nistp384"
        for content in (b"", b"\xff\xfe", b"x" * 70_000):
            path.write_bytes(content)
            with pytest.raises(SpecError, match=r"key\.pub: is (no public key|too long)"):
                read_public_key(path)
        path.unlink()
        with pytest.raises(SpecError, match="is missing"):
            read_public_key(path)
        path.symlink_to(tmp_path / "other.pub")
        with pytest.raises(SpecError, match="is a symbolic link"):
            read_public_key(path)


class TestSigning:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_the_library_verifies_what_each_kind_of_key_signed(self, tmp_path, privates, scheme):
        signer = open_signer(str(key_file(tmp_path, privates[scheme])))
        assert signer.public == public_key(public_pem_of(privates[scheme]), where="here")
        envelope = signer.sign(PAYLOAD, IN_TOTO)
        assert (envelope.payload, envelope.payload_type) == (PAYLOAD, IN_TOTO)
        assert verified(envelope, [signer.public], where="here") == (signer.public.keyid,)
        assert envelope_from_bytes(envelope.to_bytes(), payload_type=IN_TOTO, where="here") == envelope
        (signed,) = envelope.signatures
        key = library.SSlibKey.from_crypto(privates[scheme].public_key(), keyid=signer.public.keyid, scheme=scheme)
        theirs = library.Signature(signed.keyid, base64.b64decode(signed.sig).hex())
        assert dsse.Envelope(PAYLOAD, IN_TOTO, {signed.keyid: theirs}).verify([key], 1)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_what_the_library_signed_is_verified(self, privates, scheme):
        public = public_key(public_pem_of(privates[scheme]), where="here")
        key = library.SSlibKey.from_crypto(privates[scheme].public_key(), keyid=public.keyid, scheme=scheme)
        theirs = dsse.Envelope(PAYLOAD, IN_TOTO, {}).sign(library.CryptoSigner(privates[scheme], key))
        sig = base64.b64encode(bytes.fromhex(theirs.signature)).decode()
        envelope = Envelope(PAYLOAD, IN_TOTO, (Signed(public.keyid, sig),))
        assert verified(envelope, [public], where="here") == (public.keyid,)

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize(
        "change",
        [
            {"payload": PAYLOAD + b" "},
            {"payload": b""},
            {"payload_type": LEDGER_ENTRY},
            {"payload_type": ""},
        ],
    )
    def test_a_changed_payload_or_type_does_not_hold(self, tmp_path, privates, scheme, change):
        signer = open_signer(str(key_file(tmp_path, privates[scheme])))
        envelope = changed_envelope(signer.sign(PAYLOAD, IN_TOTO), **change)
        with pytest.raises(SignatureMismatch, match="seal.json: the signature by [0-9a-f]{16} does not hold"):
            verified(envelope, [signer.public], where="seal.json")

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_changed_signature_does_not_hold(self, tmp_path, privates, scheme):
        signer = open_signer(str(key_file(tmp_path, privates[scheme])))
        envelope = signer.sign(PAYLOAD, IN_TOTO)
        good = base64.b64decode(envelope.signatures[0].sig)
        for bad in (b"", good[:-1], good + b"\0", bytes(len(good)), good[:-1] + bytes([good[-1] ^ 1]), b"\0" * 4096):
            changed = Envelope(PAYLOAD, IN_TOTO, (Signed(signer.public.keyid, base64.b64encode(bad).decode()),))
            with pytest.raises(SignatureMismatch, match="does not hold|cannot be checked"):
                verified(changed, [signer.public], where="here")

    @pytest.mark.parametrize("sig", ["%", "AAA", "é", "A A="])
    def test_a_signature_that_is_not_base64_is_a_mismatch(self, signer, sig):
        with pytest.raises(SignatureMismatch, match="cannot be checked"):
            verified(Envelope(PAYLOAD, IN_TOTO, (Signed(signer.public.keyid, sig),)), [signer.public], where="here")

    def test_a_second_writing_of_a_signature_is_a_mismatch(self, signer):
        sig = signer.sign(PAYLOAD, IN_TOTO).signatures[0].sig
        assert sig.endswith("==")
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        other = f"{sig[:-3]}{alphabet[alphabet.index(sig[-3]) + 1]}=="
        assert base64.b64decode(other) == base64.b64decode(sig)
        with pytest.raises(SignatureMismatch, match="its base64 is not canonical"):
            verified(Envelope(PAYLOAD, IN_TOTO, (Signed(signer.public.keyid, other),)), [signer.public], where="here")

    def test_a_signature_by_nobody_known_does_not_count(self, tmp_path, privates, signer):
        other = open_signer(str(key_file(tmp_path, privates["ecdsa-sha2-nistp256"], name="other.pem")))
        assert verified(signer.sign(PAYLOAD, IN_TOTO), [other.public], where="here") == ()
        assert verified(signer.sign(PAYLOAD, IN_TOTO), [], where="here") == ()
        assert verified(Envelope(PAYLOAD, IN_TOTO, ()), [signer.public], where="here") == ()

    @pytest.mark.parametrize("scheme", SCHEMES[1:])
    def test_a_swapped_key_id_does_not_hold_whatever_the_other_key_is(self, tmp_path, privates, signer, scheme):
        other = public_key(public_pem_of(privates[scheme]), where="here")
        signature = signer.sign(PAYLOAD, IN_TOTO).signatures[0]
        swapped = Envelope(PAYLOAD, IN_TOTO, (Signed(other.keyid, signature.sig),))
        with pytest.raises(SignatureMismatch, match=f"the signature by {other.keyid[:16]} "):
            verified(swapped, [signer.public, other], where="here")

    def test_one_bad_signature_beside_a_good_one_is_a_mismatch(self, tmp_path, privates, signer):
        other = public_key(public_pem_of(privates["ecdsa-sha2-nistp256"]), where="here")
        good = signer.sign(PAYLOAD, IN_TOTO).signatures[0]
        both = Envelope(PAYLOAD, IN_TOTO, (good, Signed(other.keyid, good.sig)))
        with pytest.raises(SignatureMismatch, match=other.keyid[:16]):
            verified(both, [signer.public, other], where="here")

    def test_several_keys_are_told_in_the_order_of_their_signatures(self, tmp_path, privates, signer):
        other = open_signer(str(key_file(tmp_path, privates["ecdsa-sha2-nistp384"], name="other.pem")))
        signatures = [each.sign(PAYLOAD, IN_TOTO).signatures[0] for each in (other, signer)]
        envelope = Envelope(PAYLOAD, IN_TOTO, tuple(signatures))
        assert verified(envelope, [signer.public, other.public, signer.public], where="here") == (
            other.public.keyid,
            signer.public.keyid,
        )

    def test_one_key_does_not_count_twice(self, signer):
        signature = signer.sign(PAYLOAD, IN_TOTO).signatures[0]
        with pytest.raises(SignatureMismatch, match="signed it twice"):
            verified(Envelope(PAYLOAD, IN_TOTO, (signature, signature)), [signer.public], where="here")

    def test_a_public_key_that_was_put_together_by_hand_does_not_count(self, tmp_path, privates, signer):
        """One key under a second id would reach a threshold of two; another scheme could be weaker."""
        other = public_key(public_pem_of(privates["ecdsa-sha2-nistp256"]), where="here")
        signature = signer.sign(PAYLOAD, IN_TOTO).signatures[0]
        for forged in (
            PublicKey(other.keyid, signer.public.text, signer.public.scheme),
            PublicKey(signer.public.keyid, signer.public.text, other.scheme),
            PublicKey(signer.public.keyid, f" {signer.public.text}", signer.public.scheme),
        ):
            envelope = Envelope(PAYLOAD, IN_TOTO, (Signed(forged.keyid, signature.sig),))
            with pytest.raises(SignatureMismatch, match="cannot be checked"):
                verified(envelope, [forged], where="here")
        with pytest.raises(SignatureMismatch, match="two public keys have the key id"):
            verified(
                signer.sign(PAYLOAD, IN_TOTO),
                [signer.public, PublicKey(signer.public.keyid, other.text, other.scheme)],
                where="here",
            )

    def test_verifying_loads_no_signer_of_a_cloud(self, signer):
        code = (
            "import sys; from gate.signing import public_key, verified\n"
            "from gate.release.statements import envelope_from_bytes, IN_TOTO\n"
            "key = public_key(sys.argv[1], where='x')\n"
            "envelope = envelope_from_bytes(bytes.fromhex(sys.argv[2]), payload_type=IN_TOTO, where='x')\n"
            "print(*verified(envelope, [key], where='x'), 'securesystemslib' in sys.modules)"
        )
        data = signer.sign(PAYLOAD, IN_TOTO).to_bytes().hex()
        done = subprocess.run(
            [sys.executable, "-c", code, signer.public.text, data], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [signer.public.keyid, "False"]


def changed_envelope(envelope, **changes):
    fields = {"payload": envelope.payload, "payload_type": envelope.payload_type, "signatures": envelope.signatures}
    return Envelope(**{**fields, **changes})


class TestKeyFiles:
    def test_an_encrypted_key_asks_for_its_password_and_a_plain_one_does_not(self, tmp_path, privates):
        asked = []

        def ask(what):
            asked.append(what)
            return PASSWORD

        open_signer(str(key_file(tmp_path, privates["ed25519"])), ask=ask)
        assert asked == []
        path = key_file(tmp_path, privates["ed25519"], PASSWORD, name="locked.pem")
        signer = open_signer(str(path), ask=ask)
        assert asked == [f"password of {path}"]
        assert verified(signer.sign(PAYLOAD, IN_TOTO), [signer.public], where="here")

    @pytest.mark.parametrize("password", ["wrong password", "", "x" * 2000, "\udcff"])
    def test_a_wrong_password_is_said_and_not_repeated(self, tmp_path, privates, password):
        path = key_file(tmp_path, privates["ed25519"], PASSWORD)
        with pytest.raises(SigningError, match="the password is (wrong|empty)") as caught:
            open_signer(str(path), ask=lambda what: password)
        said = "".join(traceback.format_exception(caught.value))
        assert not password or password not in said

    def test_an_encrypted_key_with_nobody_to_ask_is_refused(self, tmp_path, privates):
        path = key_file(tmp_path, privates["ed25519"], PASSWORD)
        with pytest.raises(SigningError, match="needs the password, and there is nobody to ask"):
            open_signer(str(path))

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o601])
    def test_a_key_that_others_can_use_is_refused(self, tmp_path, privates, mode):
        path = key_file(tmp_path, privates["ed25519"], mode=mode, name="my key.pem")
        with pytest.raises(SigningError, match=f"its mode is {mode:04o}, may be 0600\nchmod 600 '.*my key.pem'"):
            open_signer(str(path))
        with pytest.raises(SigningError, match="its mode is"):
            open_signer(f"file2:{path}")

    def test_what_is_no_file_of_its_own_is_refused(self, tmp_path, privates):
        path = key_file(tmp_path, privates["ed25519"])
        link, pipe = tmp_path / "link.pem", tmp_path / "pipe.pem"
        link.symlink_to(path)
        os.mkfifo(pipe)
        for wrong, said in (
            (link, "is a symbolic link"),
            (pipe, "is not a regular file"),
            (tmp_path, "is not a regular file"),
            (tmp_path / "none.pem", "is missing"),
            (path / "below", "cannot be opened"),
            (tmp_path / ("x" * 300), "cannot be opened"),
        ):
            with pytest.raises(SigningError, match=said):
                open_signer(str(wrong))
        for wrong in ("", "a\0b"):
            with pytest.raises(SigningError, match="no key was named"):
                open_signer(wrong)

    def test_content_that_is_no_private_key_is_refused_and_not_repeated(self, tmp_path, privates):
        whole = pem_of(privates["ed25519"])
        path = tmp_path / "key.pem"
        for content, said in (
            (b"", "is no PEM private key: it is empty"),
            (b"\n \n", "is no PEM private key: it is empty"),
            (b"\xff\xfe\0", "it has 0 blocks"),
            (whole + whole, "it has 2 blocks"),
            (whole[: len(whole) // 2], "is no private key: its PEM is cut off or damaged"),
            (whole.replace(whole.splitlines()[1], b"AAAA"), "is no private key: its PEM is cut off or damaged"),
            (public_pem_of(privates["ed25519"]).encode(), "is a public key; signing needs the private one"),
            (f"ed25519:{'1' * 64}\n".encode(), "is a public key; signing needs the private one"),
            (b"x" * 70_000, "it is too long"),
        ):
            path.write_bytes(content)
            path.chmod(0o600)
            with pytest.raises(SigningError, match=said) as caught:
                open_signer(str(path), ask=lambda what: PASSWORD)
            assert whole.splitlines()[1].decode() not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize(
        "private",
        [
            lambda: ec.generate_private_key(ec.SECP521R1()),
            lambda: rsa.generate_private_key(65537, 2048),
            x25519.X25519PrivateKey.generate,
            ed448.Ed448PrivateKey.generate,
        ],
    )
    def test_a_key_that_no_policy_takes_does_not_sign(self, tmp_path, private):
        with pytest.raises(SigningError, match="not supported|RSA key of 2048 bits"):
            open_signer(str(key_file(tmp_path, private())))

    def test_an_ec_key_as_openssl_writes_it_signs(self, tmp_path, privates):
        path = tmp_path / "ec.pem"
        traditional = privates["ecdsa-sha2-nistp256"].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
        path.write_bytes(parameters + traditional)
        path.chmod(0o600)
        assert open_signer(str(path)).sign(PAYLOAD, IN_TOTO).signatures

    def test_a_public_key_that_is_given_has_to_fit(self, tmp_path, privates):
        path = str(key_file(tmp_path, privates["ed25519"]))
        own = public_pem_of(privates["ed25519"])
        assert open_signer(path, public=own).public == public_key(own, where="here")
        with pytest.raises(SigningError, match="is the private key of [0-9a-f]{16}, not of the given public key"):
            open_signer(path, public=public_pem_of(privates["ecdsa-sha2-nistp256"]))
        with pytest.raises(SpecError, match="is no public key"):
            open_signer(path, public="")

    def test_file2_is_read_with_the_checks_of_a_path(self, tmp_path, privates, monkeypatch):
        key_file(tmp_path, privates["ed25519"], PASSWORD)
        monkeypatch.setenv("CRYPTO_SIGNER_PATH_PREFIX", str(tmp_path))
        assert open_signer("file2:key.pem", ask=lambda what: PASSWORD).sign(PAYLOAD, IN_TOTO).signatures


class TestEnvironment:
    def test_a_key_in_the_environment_signs(self, privates, monkeypatch):
        monkeypatch.setenv("SIGNING_KEY", pem_of(privates["ed25519"]).decode())
        assert open_signer("env:SIGNING_KEY").sign(PAYLOAD, IN_TOTO).signatures
        monkeypatch.setenv("SIGNING_KEY", pem_of(privates["ed25519"], PASSWORD).decode())
        asked = []
        signer = open_signer("env:SIGNING_KEY", ask=lambda what: asked.append(what) or PASSWORD)
        assert asked == ["password of env:SIGNING_KEY"]
        assert signer.sign(PAYLOAD, IN_TOTO).signatures

    def test_a_variable_that_is_missing_empty_or_no_key_is_refused(self, monkeypatch):
        monkeypatch.delenv("SIGNING_KEY", raising=False)
        with pytest.raises(SigningError, match="env:SIGNING_KEY: the environment variable is not set"):
            open_signer("env:SIGNING_KEY")
        with pytest.raises(SigningError, match="env:: the environment variable is not set"):
            open_signer("env:")
        monkeypatch.setenv("SIGNING_KEY", "")
        with pytest.raises(SigningError, match="the environment variable is empty"):
            open_signer("env:SIGNING_KEY")
        monkeypatch.setenv("SIGNING_KEY", "hunter2\udcff")
        with pytest.raises(SigningError, match="is no PEM private key") as caught:
            open_signer("env:SIGNING_KEY")
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


class TokenSigner(library.Signer):
    """A token as a team may have one: it asks for a PIN at each signature, and what it does depends on the URI."""

    PRIVATE = ec.generate_private_key(ec.SECP256R1())

    def __init__(self, behaviour, public, ask):
        self.behaviour = behaviour
        self._public = public
        self.ask = ask

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri, public_key, secrets_handler=None):
        behaviour = priv_key_uri.partition("?")[0].partition(":")[2]
        if behaviour == "absent":
            raise OSError("no token in the slot")
        if behaviour == "library":
            raise ModuleNotFoundError("No module named 'tokenlib'")
        return cls(behaviour, public_key, secrets_handler)

    @property
    def public_key(self):
        return self._public

    def sign(self, payload):
        pin = self.ask("pin")
        if pin != "314159":
            raise ValueError(f"CKR_PIN_INCORRECT: {pin!r}")
        signature = library.CryptoSigner(self.PRIVATE).sign(payload).signature
        if self.behaviour == "silent":
            return None
        if self.behaviour == "network":
            raise ConnectionError("503 Service Unavailable\n<html>")
        rubbish = {"zeros": "00" * 70, "empty": "", "words": "not hex", "number": 7, "cut": signature[:-2]}
        return library.Signature("another key id", rubbish.get(self.behaviour, signature))


class TestTokens:
    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch):
        monkeypatch.setitem(library.SIGNER_FOR_URI_SCHEME, "token", TokenSigner)

    def open(self, uri, pin="314159", private=TokenSigner.PRIVATE):
        return open_signer(uri, public=public_pem_of(private), ask=lambda what: pin)

    def test_a_registered_scheme_signs(self):
        signer = self.open("token:good")
        envelope = signer.sign(PAYLOAD, IN_TOTO)
        assert [each.keyid for each in envelope.signatures] == [signer.public.keyid]
        assert verified(envelope, [signer.public], where="here") == (signer.public.keyid,)

    def test_it_is_asked_for_its_pin_by_its_uri_without_the_query(self):
        asked = []
        signer = open_signer(
            "token://me:secret@good?pin=314159",
            public=public_pem_of(TokenSigner.PRIVATE),
            ask=lambda what: asked.append(what) or "wrong",
        )
        with pytest.raises(SigningError) as caught:
            signer.sign(PAYLOAD, IN_TOTO)
        assert asked == ["pin of token://good"]
        assert "314159" not in str(caught.value)
        assert "secret@" not in str(caught.value)

    @pytest.mark.parametrize("behaviour", ["zeros", "cut", "empty"])
    def test_a_rubbish_signature_is_not_given_out(self, behaviour):
        with pytest.raises(SigningError, match="signed, and the signature is none by its public key"):
            self.open(f"token:{behaviour}").sign(PAYLOAD, IN_TOTO)

    @pytest.mark.parametrize("behaviour", ["words", "number", "silent", "network"])
    def test_whatever_it_raises_or_returns_is_a_signing_error(self, behaviour):
        with pytest.raises(SigningError, match=f"token:{behaviour}: does not sign: "):
            self.open(f"token:{behaviour}").sign(PAYLOAD, IN_TOTO)

    def test_the_signature_of_another_key_is_not_given_out(self):
        other = ec.generate_private_key(ec.SECP256R1())
        with pytest.raises(SigningError, match="is none by its public key"):
            self.open("token:good", private=other).sign(PAYLOAD, IN_TOTO)

    def test_a_pin_that_the_token_repeats_is_nowhere_in_the_error(self):
        pin = "27182" * 2
        with pytest.raises(SigningError, match="does not sign: ValueError: no more is said") as caught:
            self.open("token:good", pin=pin).sign(PAYLOAD, IN_TOTO)
        assert pin not in "".join(traceback.format_exception(caught.value))
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None

    def test_a_pin_with_nobody_to_ask_is_said(self):
        signer = open_signer("token:good", public=public_pem_of(TokenSigner.PRIVATE))
        with pytest.raises(SigningError, match="needs the pin, and there is nobody to ask"):
            signer.sign(PAYLOAD, IN_TOTO)

    def test_a_token_needs_its_public_key(self):
        with pytest.raises(SigningError, match="needs its public key.*\ngive the file that holds it: --public-key"):
            open_signer("token:good")

    def test_a_token_that_does_not_open_says_why(self):
        with pytest.raises(SigningError, match="token:absent: cannot be opened: OSError: no token in the slot"):
            self.open("token:absent")
        with pytest.raises(SigningError, match="'tokenlib'\ninstall the library that its signer needs"):
            self.open("token:library")

    def test_a_scheme_that_nobody_registered_is_refused_with_those_that_are(self):
        with pytest.raises(SigningError, match="no signer is registered for awskm:\n.*awskms, .*token") as caught:
            self.open("awskm:alias/release")
        assert "gnupg" not in str(caught.value)
        assert "tkey" not in str(caught.value)

    def test_a_file_whose_name_has_a_colon_is_a_file(self, tmp_path, privates, monkeypatch):
        monkeypatch.chdir(tmp_path)
        key_file(tmp_path, privates["ed25519"], name="team:release.pem")
        assert open_signer("team:release.pem").sign(PAYLOAD, IN_TOTO).signatures

    @pytest.mark.parametrize(
        "uri, module, extra",
        [
            ("hsm:2", "pkcs11", "hsm"),
            ("gcpkms:projects/a/cryptoKeyVersions/1", "google.cloud.kms", "gcpkms"),
            ("azurekms:vault.vault.azure.net/keys/a/1", "azure.keyvault.keys", "azurekms"),
            ("awskms:alias/release", "boto3", "awskms"),
            ("hv:release/1", "hvac", "vault"),
        ],
    )
    def test_a_missing_library_is_named_with_the_extra_that_brings_it(self, uri, module, extra):
        if _is_installed(module):
            pytest.skip(f"{module} is installed here")
        with pytest.raises(SigningError, match=rf'cannot be opened: .*\npip install "securesystemslib\[{extra}\]"'):
            self.open(uri)


def _is_installed(module):
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class TestNewKey:
    @pytest.mark.parametrize("password", [PASSWORD, None, "ü\udcff"])
    def test_a_new_key_signs_and_its_public_key_is_beside_it(self, tmp_path, password):
        path = tmp_path / "keys" / "gate-ci.pem"
        public = new_key(path, password=password)
        assert Path(f"{path}.pub").read_text() == f"{public.text}\n"
        assert read_public_key(Path(f"{path}.pub")) == public
        signer = open_signer(str(path), ask=lambda what: password)
        assert signer.public == public
        assert verified(signer.sign(PAYLOAD, IN_TOTO), [public], where="here") == (public.keyid,)
        assert (b"ENCRYPTED" in path.read_bytes()) is (password is not None)
        assert sorted(each.name for each in path.parent.iterdir()) == ["gate-ci.pem", "gate-ci.pem.pub"]

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
    def test_its_mode_is_0600_whatever_the_umask(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            new_key(tmp_path / "key.pem", password=None)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "key.pem.pub").stat().st_mode) == 0o644

    @pytest.mark.parametrize("taken", ["key.pem", "key.pem.pub"])
    @pytest.mark.parametrize("kind", ["file", "dangling link", "folder"])
    def test_nothing_is_replaced(self, tmp_path, taken, kind):
        there = tmp_path / taken
        if kind == "file":
            there.write_text("precious")
        elif kind == "folder":
            there.mkdir()
        else:
            there.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(SigningError, match=f"{taken}: exists already, and a key is never replaced"):
            new_key(tmp_path / "key.pem", password=None)
        assert [each.name for each in tmp_path.iterdir()] == [taken]
        assert kind != "file" or there.read_text() == "precious"

    @pytest.mark.parametrize("taken", ["key.pem", "key.pem.pub"])
    def test_nothing_is_replaced_that_came_in_between(self, tmp_path, taken, monkeypatch):
        monkeypatch.setattr("gate.signing.os.path.lexists", lambda path: False)
        (tmp_path / taken).write_text("precious")
        with pytest.raises(SigningError, match=f"{taken}: exists already"):
            new_key(tmp_path / "key.pem", password=None)
        assert [each.name for each in tmp_path.iterdir()] == [taken]
        assert (tmp_path / taken).read_text() == "precious"

    def test_names_that_could_not_be_used_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, said in (
            ("key.pub", "no name"),
            (".", "no name"),
            ("env:KEY", "reads as a URI"),
            ("hsm:2", "reads as a URI"),
        ):
            with pytest.raises(SigningError, match=said):
                new_key(Path(name), password=None)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("password, said", [("", "the password is empty"), ("x" * 1024, "more than 1023 bytes")])
    def test_a_password_that_cannot_be_used_is_refused(self, tmp_path, password, said):
        with pytest.raises(SigningError, match=said) as caught:
            new_key(tmp_path / "key.pem", password=password)
        assert "xxx" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made_is_said(self, tmp_path):
        (tmp_path / "keys").write_text("")
        with pytest.raises(SigningError, match="cannot be written: "):
            new_key(tmp_path / "keys" / "key.pem", password=None)

    @pytest.mark.parametrize("links_before", [0, 1])
    def test_a_process_killed_midway_leaves_no_half_key(self, tmp_path, links_before):
        code = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom gate import signing\n"
            "link, left = os.link, [int(sys.argv[2])]\n"
            "def killed(*args, **options):\n"
            "    if not left[0]:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    left[0] -= 1\n    link(*args, **options)\n"
            "os.link = killed\n"
            "import pathlib  # which keeps a link of its own in Python 3.10\n"
            "if hasattr(pathlib, '_NormalAccessor'):\n    pathlib._NormalAccessor.link = staticmethod(killed)\n"
            "signing.new_key(Path(sys.argv[1]), password='secret word')\n"
        )
        path = tmp_path / "key.pem"
        done = subprocess.run([sys.executable, "-c", code, str(path), str(links_before)], check=False)
        assert done.returncode == -signal.SIGKILL
        left = sorted(tmp_path.iterdir())
        assert all(stat.S_IMODE(each.stat().st_mode) in (0o600, 0o644) for each in left)
        assert path.exists() is bool(links_before)
        assert not Path(f"{path}.pub").exists()
        if links_before:
            assert open_signer(str(path), ask=lambda what: "secret word").sign(PAYLOAD, IN_TOTO).signatures
        new_key(tmp_path / "next.pem", password=None)
        names = {each.name for each in tmp_path.iterdir()} - {"key.pem"}
        assert names == {"next.pem", "next.pem.pub"}

    def test_two_keys_differ(self, tmp_path):
        assert new_key(tmp_path / "a", password=None).keyid != new_key(tmp_path / "b", password=None).keyid
