"""The trust policy's file: where it may lie, whose keys it holds, what its pins stand for."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from gate import atomic
from gate.errors import ExitCode, IdentityMismatch, SpecError, VerificationError
from gate.manifest import pretty_json, sha256_hex
from gate.trust import MAX_POLICY_BYTES, Pinned, PolicyFile, ledger_path, pinned, read_policy

BASELINE = Path(__file__).parents[1] / "baselines"
PEM, SPKI = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def ed25519_text(seed: int) -> str:
    """The public key of a seed, as `gate key show` prints it."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32).public_key()
    return "ed25519:" + key.public_bytes_raw().hex()


def ed25519_pem(seed: int) -> str:
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32).public_key()
    return key.public_bytes(PEM, SPKI).decode()


def key(name: str, public: str, *roles: str) -> str:
    listed = ", ".join(f'"{role}"' for role in roles)
    return f'[[key]]\nname = "{name}"\nowner = "o"\nroles = [{listed}]\npublic = """{public}"""\n'


def policy(*keys: str, model: str = 'spec = "any"\ndata = "any"\nbaseline = "any"\n') -> str:
    return "\n".join(
        [
            'schema = 1\nledger = "ledger.jsonl"',
            *(keys or (key("gate-ci", ed25519_text(1), "gate"),)),
            f"[model.detector]\n{model}",
            "[slot.production]\n",
        ]
    )


def written(folder: Path, text: str | bytes | None = None, name: str = "trust.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = policy() if text is None else text
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_policy_is_read_with_its_keys_and_digest(tmp_path):
    text = policy(
        key("gate-ci", ed25519_text(1), "gate"),
        key("anna", ed25519_text(2), "release"),
        key("ben", ed25519_pem(3), "release", "promoter"),
    )
    path = written(tmp_path, text)
    file = read_policy(path)
    assert isinstance(file, PolicyFile)
    assert file.sha256 == sha256_hex(text.encode())
    assert [each.entry.name for each in file.keys.values()] == ["gate-ci", "anna", "ben"]
    assert all(each.public.keyid == keyid for keyid, each in file.keys.items())
    raw = bytes.fromhex(ed25519_text(3).removeprefix("ed25519:"))
    assert file.keys[sha256_hex(raw)].entry.roles == ("release", "promoter")
    assert ledger_path(file) == tmp_path / "ledger.jsonl"


def test_a_policy_without_a_ledger_has_no_path_of_one(tmp_path):
    text = policy().replace('ledger = "ledger.jsonl"', "") + 'load = "approved"\n'
    assert ledger_path(read_policy(written(tmp_path, text))) is None


def test_keys_of_a_policy_cannot_be_changed(tmp_path):
    file = read_policy(written(tmp_path))
    with pytest.raises(TypeError, match="does not support item assignment"):
        file.keys["0" * 64] = next(iter(file.keys.values()))


@pytest.mark.parametrize("again", [ed25519_text(2), ed25519_pem(2), f"\n  {ed25519_text(2)}\n"])
def test_one_key_under_two_names_is_refused(tmp_path, again):
    text = policy(
        key("gate-ci", ed25519_text(1), "gate"), key("anna", ed25519_text(2), "release"), key("ben", again, "release")
    )
    number = text[: text.rindex("public = ")].count("\n") + 1
    with pytest.raises(
        VerificationError, match="key 'ben': is the key of 'anna' too, so one key would count as two"
    ) as raised:
        read_policy(written(tmp_path, text))
    assert raised.value.where == f"{tmp_path / 'trust.toml'}:{number}"


def test_one_ecdsa_key_written_in_two_ways_is_refused(tmp_path):
    public = ec.derive_private_key(7, ec.SECP256R1()).public_key()
    pem = public.public_bytes(PEM, SPKI).decode()
    compact = pem.replace("\n", "\r\n")
    text = policy(key("gate-ci", ed25519_text(1), "gate"), key("a", pem, "release"), key("b", compact, "release"))
    with pytest.raises(VerificationError, match="'b': is the key of 'a' too"):
        read_policy(written(tmp_path, text))


def test_the_gate_s_key_cannot_approve_under_another_name(tmp_path):
    text = policy(key("gate-ci", ed25519_text(1), "gate"), key("anna", ed25519_pem(1), "release"))
    with pytest.raises(VerificationError, match="key 'anna': is the key of 'gate-ci' too"):
        read_policy(written(tmp_path, text))


@pytest.mark.parametrize("public", ["", "ed25519:12", "ed25519:" + "00" * 32, "-----BEGIN PUBLIC KEY-----\nx"])
def test_what_is_no_key_is_refused_with_its_name_and_line(tmp_path, public):
    text = policy(key("gate-ci", ed25519_text(1), "gate"), key("anna", public, "release"))
    with pytest.raises(SpecError, match=r"trust\.toml:1\d: key 'anna': ") as raised:
        read_policy(written(tmp_path, text))
    assert raised.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    "name", ["policy/trust.toml", "trust.toml", "a/b/trust.toml", "a/b/c/d/trust.toml", "seals/t.toml"]
)
def test_a_policy_inside_a_bundle_is_refused(tmp_path, name):
    bundle = tmp_path / "bundle"
    written(bundle, "{}", "seals/verdict.dsse.json")
    path = written(bundle, name=name)
    with pytest.raises(
        VerificationError, match="lies inside the bundle .*bundle: whoever hands over a bundle would say whom to trust"
    ):
        read_policy(path)


def test_a_policy_inside_a_bundle_is_refused_by_whatever_path_it_is_named(tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    written(bundle, "{}", "seals/verdict.dsse.json")
    written(bundle, name="policy/trust.toml")
    (tmp_path / "release").symlink_to(bundle / "policy")
    monkeypatch.chdir(bundle / "policy")
    for path in (
        tmp_path / "release" / "trust.toml",
        Path("trust.toml"),
        tmp_path / "bundle/seals/../policy/trust.toml",
    ):
        with pytest.raises(VerificationError, match="lies inside the bundle"):
            read_policy(path)


def test_a_seal_that_is_a_broken_link_still_tells_a_bundle(tmp_path):
    path = written(tmp_path / "bundle", name="policy/trust.toml")
    (tmp_path / "bundle" / "seals").mkdir()
    (tmp_path / "bundle" / "seals" / "verdict.dsse.json").symlink_to("nowhere")
    with pytest.raises(VerificationError, match="lies inside the bundle"):
        read_policy(path)


def test_a_policy_beside_a_bundle_is_read(tmp_path):
    written(tmp_path / "bundle", "{}", "seals/verdict.dsse.json")
    assert read_policy(written(tmp_path)).policy.schema == 1


def test_a_file_that_is_no_regular_one_is_refused(tmp_path):
    real = written(tmp_path, name="real.toml")
    (tmp_path / "link.toml").symlink_to(real)
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name, message in [
        ("none.toml", "is missing"),
        ("link.toml", "is a symbolic link"),
        ("folder.toml", "is not a regular file"),
        ("pipe.toml", "is not a regular file"),
        ("real.toml/trust.toml", "cannot be opened"),
        ("a\0b.toml", "cannot be read: embedded null"),
        ("x" * 300, "cannot be opened"),
    ]:
        with pytest.raises(SpecError, match=message) as raised:
            read_policy(tmp_path / name)
        assert raised.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"schema = 1\n\xff", r"is not a text file in UTF-8 \(byte 11\)"),
        (policy().encode("utf-16"), "is not a text file in UTF-8"),
        (b"schema = 1\x00", "is not TOML"),
        (b"#" * (MAX_POLICY_BYTES + 1), "is too long: the limit is 1048576 bytes"),
        (policy().encode()[:40], "is not TOML|needs"),
        (
            policy().replace("roles", "role").encode(),
            r"trust\.toml:6: \[\[key\]\] has no key 'role'; did you mean 'roles'",
        ),
    ],
)
def test_a_file_that_holds_no_policy_is_refused(tmp_path, data, message):
    with pytest.raises(SpecError, match=message):
        read_policy(written(tmp_path, data))


def test_every_prefix_of_a_policy_is_refused(tmp_path):
    text = policy()
    whole = text.rstrip()
    for length in range(0, len(whole) - 1, 7):
        with pytest.raises(SpecError):
            read_policy(written(tmp_path, text[:length]))


def test_any_is_no_pin_and_has_to_be_said(tmp_path):
    assert pinned(read_policy(written(tmp_path)), "detector") == Pinned(spec=None, data=None, baseline=None)


def test_an_empty_list_of_baselines_asks_for_none(tmp_path):
    model = f'spec = ["{"a" * 64}"]\ndata = ["{"b" * 64}", "{"c" * 64}"]\nbaseline = []\n'
    found = pinned(read_policy(written(tmp_path, policy(model=model))), "detector")
    assert found == Pinned(spec=frozenset({"a" * 64}), data=frozenset({"b" * 64, "c" * 64}), baseline=frozenset())


def test_files_are_pinned_by_what_they_hold(tmp_path):
    source = next(iter(sorted(BASELINE.rglob("*.json"))))
    digest = json.loads(source.read_bytes())["digest"]
    written(tmp_path, b"schema = 1\r\n", "gate.toml")
    written(tmp_path, source.read_bytes(), "baselines/h200.json")
    model = f'spec = ["../gate.toml", "{"a" * 64}"]\ndata = "any"\nbaseline = ["../baselines/h200.json"]\n'
    file = read_policy(written(tmp_path, policy(model=model), "release/trust.toml"))
    found = pinned(file, "detector")
    assert found.spec == {sha256_hex(b"schema = 1\r\n"), "a" * 64}
    assert found.baseline == {digest}


def test_a_pin_that_cannot_be_read_is_an_error_with_its_line(tmp_path):
    source = next(iter(sorted(BASELINE.rglob("*.json"))))
    written(tmp_path, source.read_bytes().replace(b'"digest": "', b'"digest": "0', 1), "edited.json")
    written(tmp_path, pretty_json({"a": 1}), "other.json")
    (tmp_path / "link.toml").symlink_to(written(tmp_path, "schema = 1", "gate.toml"))
    written(tmp_path / "bundle", "{}", "seals/verdict.dsse.json")
    written(tmp_path / "bundle", "schema = 1", "policy/gate.toml")
    for name, pin, message in [
        ("spec", "none.toml", r"spec: none\.toml is missing"),
        ("spec", "link.toml", r"spec: link\.toml is a symbolic link"),
        ("spec", ".", "spec: . is not a regular file"),
        ("spec", "bundle/policy/gate.toml", "lies inside the bundle .* judged by itself"),
        ("baseline", "none.json", r"baseline: none\.json is missing"),
        ("baseline", "edited.json", r"baseline: edited\.json (is not a baseline|was changed)"),
        ("baseline", "other.json", r"baseline: other\.json is not a baseline"),
        ("baseline", "gate.toml", r"baseline: gate\.toml is not JSON"),
    ]:
        pins = {"spec": '"any"', "baseline": '"any"', name: f'["{"a" * 64}", "{pin}"]'}
        text = policy(model=f'spec = {pins["spec"]}\ndata = "any"\nbaseline = {pins["baseline"]}\n')
        file = read_policy(written(tmp_path, text))
        with pytest.raises(SpecError, match=message) as raised:
            pinned(file, "detector")
        number = text[: text.index(f"{name} = ")].count("\n") + 1
        assert raised.value.where == f"{tmp_path / 'trust.toml'}:{number}"
        assert raised.value.exit_code is ExitCode.USAGE


def test_a_model_that_the_policy_does_not_have_is_refused(tmp_path):
    file = read_policy(written(tmp_path))
    with pytest.raises(
        IdentityMismatch, match=r"no model 'detecter'; did you mean 'detector'\? \(it has detector\)"
    ) as raised:
        pinned(file, "detecter")
    assert raised.value.exit_code is ExitCode.REFUSED
    with pytest.raises(IdentityMismatch, match="has no model 'x'; it takes detector"):
        pinned(file, "x")


def test_what_is_judged_is_what_was_read_once(tmp_path, monkeypatch):
    path = written(tmp_path)
    reads = []
    real = atomic.read_regular
    monkeypatch.setattr(atomic, "read_regular", lambda path, **limits: reads.append(path) or real(path, **limits))
    file = read_policy(path)
    assert reads == [path]
    assert file.sha256 == sha256_hex(path.read_bytes())


def test_the_example_of_the_documentation_is_read_with_its_keys(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "trust-policy.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(schema = 1\n.*?)```", text, re.DOTALL)
    file = read_policy(written(tmp_path, example))
    assert [each.entry.name for each in file.keys.values() if "release" in each.entry.roles] == ["anna", "ben", "carl"]
    with pytest.raises(SpecError, match=r"\[model\.detector\] spec: \.\./gate\.toml is missing"):
        pinned(file, "detector")
