"""An engine of a real bundle, loaded: what runs is what was verified, or what the policy allows in its place."""

import dataclasses
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from gate import loading, promotion, verification
from gate.engines.containers import FALLBACK_PATH
from gate.errors import (
    BackendUnavailable,
    BundleError,
    DigestMismatch,
    GateError,
    IdentityMismatch,
    IncompatibleEngine,
    LedgerError,
    PromotionRefused,
    RunError,
    SignatureMismatch,
    SpecError,
    StaleVerdict,
    VerificationError,
)
from gate.loading import load
from gate.manifest import sha256_hex
from gate.pipeline import CheckOptions, Silence, check, seal_passed
from gate.release.statements import IN_TOTO, envelope_from_bytes
from gate.signing import new_key, open_signer
from gate.spec import read_spec
from gate.store import VERDICT_PATH, Release
from gate.trust import read_policy
from tests.test_store import reseal

MODEL = """
import torch


def load():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3).eval()
"""
DATA = """
import numpy as np


def evaluation():
    return {"input": np.random.default_rng(0).standard_normal((32, 4), dtype=np.float32)}
"""
SPEC = """schema = 1

[model]
id = "tiny"
factory = "model:load"
exporter = ["torchscript"]
output_names = ["scores"]

[inputs.input]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 4, max = 16 }

[data]
source = "data:evaluation"
samples = 32

[[engine]]
name = "ort"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]

[[engine]]
name = "aoti"
backend = "torch"
precision = "fp32"
options = { mode = "aotinductor" }
  [engine.parity]

[[engine]]
name = "rtx"
backend = "tensorrt_rtx"
precision = "fp32"
evidence = "preflight"

[[engine]]
name = "rtx-bf16"
backend = "tensorrt_rtx"
precision = "bf16"
evidence = "preflight"

[policy]
seal_evidence = "preflight"
seal_fallback = true
"""
POLICY = """schema = 1
ledger = "ledger.jsonl"

[[key]]
name = "gate-ci"
owner = "CI"
roles = ["gate"]
public = "{gate}"

[[key]]
name = "ada"
owner = "Ada"
roles = ["promoter"]
public = "{promoter}"

[model.tiny]
spec = "any"
data = "any"
baseline = "any"

[slot.production]
evidence = "preflight"

[slot.staged]
evidence = "preflight"
[[slot.staged.stage]]
name = "shadow"
[[slot.staged.stage]]
name = "canary-5"
[[slot.staged.stage]]
name = "full"

[slot.open]
evidence = "preflight"
load = "approved"

[slot.graph]
evidence = "preflight"
load = "approved"
fallback = ["onnx", "pytorch"]

[slot.model]
evidence = "preflight"
load = "approved"
fallback = ["pytorch"]

[slot.either]
evidence = "preflight"
load = "approved"
fallback = ["pytorch", "onnx"]
"""
SLOTS = ("production", "staged", "open", "graph", "model", "either")
FEEDS = {"input": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3).eval()


def expected():
    with torch.no_grad():
        return linear()(torch.from_numpy(FEEDS["input"])).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three engines, checked and sealed with a key, and the policy that trusts it; read only."""
    root = tmp_path_factory.mktemp("made")
    for name, text in (("model.py", MODEL), ("data.py", DATA), ("gate.toml", SPEC)):
        (root / name).write_text(text)
    public = {}
    for role in ("gate", "promoter"):
        public[role] = new_key(root / f"{role}.pem", password=None).text
    (root / "trust").mkdir()
    (root / "trust/trust.toml").write_text(POLICY.format(**public))
    file = read_spec(root / "gate.toml")
    run = check(file, CheckOptions(cache=root / "cache", baselines=root / "baselines"), Silence())
    release = Release(slots=SLOTS, serial=118, signer=open_signer(str(root / "gate.pem")))
    sealed = seal_passed(file, run, root / "dist", baselines=root / "baselines", release=release)
    assert [each.reason for each in sealed] == [None] * 4
    first = msgspec.structs.replace(run, engines=run.engines[:1])
    later = dataclasses.replace(release, serial=120)
    (sealed,) = seal_passed(file, first, root / "later", baselines=root / "baselines", release=later)
    assert sealed.reason is None
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    """A copy of it that a test may change; temporary files go into `scratch`."""
    shutil.copytree(made / "dist", tmp_path / "dist")
    shutil.copytree(made / "later", tmp_path / "later")
    shutil.copytree(made / "trust", tmp_path / "trust")
    for name in ("gate.pem", "promoter.pem"):
        shutil.copy2(made / name, tmp_path / name)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path


def loaded(root, engine="ort", slot="open", *, dist="dist", **more):
    return load(root / dist / "tiny" / engine, root / "trust/trust.toml", model="tiny", slot=slot, **more)


def promoter(root):
    return {"policy": read_policy(root / "trust/trust.toml"), "signer": open_signer(str(root / "promoter.pem"))}


def promote(root, engine="ort", slot="production", *, dist="dist"):
    return promotion.promote(root / dist / "tiny" / engine, model="tiny", slot=slot, **promoter(root))


def stage(root, *, candidate=1):
    """Serial 118 has all of the traffic of `staged`, serial 120 is a candidate in its first stage, or a later one."""
    for _ in range(3):
        promote(root, slot="staged")
    for _ in range(candidate):
        promote(root, slot="staged", dist="later")


def edit_policy(root, old, new):
    path = root / "trust/trust.toml"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def meanwhile(monkeypatch, change):
    """Somebody who writes to the bundle's folder when it was verified and nothing of it was loaded yet."""
    real = loading.verify

    def verify(bundle, **asked):
        verified = real(bundle, **asked)
        change(Path(bundle))
        return verified

    monkeypatch.setattr(loading, "verify", verify)


def test_engine_that_was_verified_runs(root, caplog):
    with loaded(root) as engine:
        np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(engine.run(FEEDS)["scores"], engine.infer(FEEDS)["scores"])
        assert list(engine.inputs) == ["input"]
        assert list(engine.outputs) == ["scores"]
        assert engine.timed(FEEDS)() is None
        assert (engine.fallback, engine.reason) == (None, None)
        assert engine.metadata.engine == "ort"
        assert engine.verified.slot == "open"
    assert not caplog.records
    assert list((root / "scratch").iterdir()) == []
    engine.close()
    with pytest.raises(RunError, match="closed"):
        engine.infer(FEEDS)
    with pytest.raises(GateError, match="kept open|closed"):
        engine.verified.open("artifacts/model.onnx")


def test_package_of_aotinductor_runs(root):
    with loaded(root, "aoti") as engine:
        np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)
        assert engine.fallback is None


def test_engine_runs_on_when_its_bundle_is_gone(root):
    with loaded(root) as engine:
        shutil.rmtree(root / "dist")
        np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)


def test_paths_may_be_texts(root):
    with load(str(root / "dist/tiny/ort"), str(root / "trust/trust.toml"), model="tiny", slot="open") as engine:
        assert engine.fallback is None


def test_path_to_a_policy_and_the_policy_itself_are_the_same(root):
    with load(root / "dist/tiny/ort", read_policy(root / "trust/trust.toml"), model="tiny", slot="open") as engine:
        assert engine.fallback is None


@pytest.mark.parametrize("name", ["artifacts/model.onnx", "policy/gate.toml"])
def test_file_that_is_exchanged_after_verification_is_not_what_is_loaded(root, monkeypatch, name):
    def exchange(bundle):
        (bundle / "other").write_bytes(b"something else")
        (bundle / "other").rename(bundle / name)

    meanwhile(monkeypatch, exchange)
    with loaded(root) as engine:
        np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)


def written(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff\xff\xff\xff")


def appended(path):
    with path.open("ab") as file:
        file.write(b"\0")


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def emptied(path):
    os.truncate(path, 0)


def linked(path):
    other = path.parent.parent.parent / "link"
    os.link(path, other)
    appended(other)


@pytest.mark.parametrize("change", [written, appended, cut, emptied, linked])
@pytest.mark.parametrize("name", ["artifacts/model.onnx", "policy/gate.toml"])
def test_file_that_is_written_to_after_verification_is_refused(root, monkeypatch, change, name):
    meanwhile(monkeypatch, lambda bundle: change(bundle / name))
    with pytest.raises(DigestMismatch, match="was written to after it was verified"):
        loaded(root)
    assert list((root / "scratch").iterdir()) == []


@pytest.mark.parametrize("change", [written, appended, cut])
def test_package_that_is_written_to_after_verification_is_refused(root, monkeypatch, change):
    meanwhile(monkeypatch, lambda bundle: change(bundle / "artifacts/model.pt2"))
    with pytest.raises(DigestMismatch, match="was written to after it was verified"):
        loaded(root, "aoti")


def test_fallback_that_is_written_to_is_refused_and_not_passed_over(root, monkeypatch):
    meanwhile(monkeypatch, lambda bundle: appended(bundle / FALLBACK_PATH))
    with pytest.raises(DigestMismatch, match="was written to after it was verified"):
        loaded(root, "rtx", "graph", reference=linear)


def test_what_is_loaded_cannot_be_written_to_by_this_user_either(root, monkeypatch):
    found = []
    real = loading.backend_named

    def backend(name):
        made = real(name)
        opened = made.open

        def watched(path, **more):
            found.append(path)
            assert not path.resolve().is_relative_to(root / "dist")
            assert (path.parent.stat().st_mode & 0o777) == 0o700
            with pytest.raises(PermissionError), path.open("r+b") as file:
                file.write(b"x")
            with path.open("rb") as file:
                assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == loading._all_seals()
            return opened(path, **more)

        made.open = watched
        return made

    monkeypatch.setattr(loading, "backend_named", backend)
    loaded(root).close()
    assert len(found) == 1


def test_private_copy_is_a_file_of_this_user_where_there_is_no_memory_for_it(root, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with loaded(root) as engine:
        np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)
        (folder,) = (root / "scratch").iterdir()
        assert (folder.stat().st_mode & 0o777) == 0o700
        assert ((folder / "model.onnx").stat().st_mode & 0o777) == 0o600
    assert list((root / "scratch").iterdir()) == []


def test_slot_that_takes_what_was_promoted_refuses_what_was_not(root):
    with pytest.raises(
        PromotionRefused, match="holds serial 118; .* 'production': nothing was promoted into it"
    ) as err:
        loaded(root, slot="production")
    assert err.value.hint.startswith("gate promote ")
    promote(root)
    with loaded(root, slot="production") as engine:
        assert engine.metadata.engine == "ort"
    with pytest.raises(PromotionRefused, match=r"(?m)another verdict of serial 118 \(.*\); in the slot is serial 118$"):
        loaded(root, "aoti", "production")
    with pytest.raises(PromotionRefused, match="(?m)holds serial 120; in the slot is serial 118$"):
        loaded(root, slot="production", dist="later")


def test_candidate_is_loaded_by_who_names_its_stage_alone(root):
    stage(root)
    with loaded(root, slot="staged") as engine:
        assert (engine.verified.statement.predicate.serial, engine.verified.stage) == (118, "full")
    with loaded(root, slot="staged", dist="later", stage="shadow") as engine:
        assert (engine.verified.statement.predicate.serial, engine.verified.stage) == (120, "shadow")
    for given in (None, "full"):
        with pytest.raises(
            PromotionRefused, match=r"serial 120, a candidate in stage shadow alone; in .* is serial 118"
        ) as err:
            loaded(root, slot="staged", dist="later", stage=given)
        assert "stage='shadow'" in err.value.hint


def test_candidate_that_is_put_where_production_lies_is_refused(root):
    stage(root)
    shutil.rmtree(root / "dist/tiny/ort")
    shutil.copytree(root / "later/tiny/ort", root / "dist/tiny/ort")
    with pytest.raises(PromotionRefused, match="holds serial 120, a candidate in stage shadow alone; in the slot is"):
        loaded(root, slot="staged")


def test_candidate_where_nothing_has_all_of_the_traffic_is_not_loaded_for_all_of_it(root):
    promote(root, slot="staged")
    with pytest.raises(PromotionRefused, match="nothing has all of the traffic, serial 118 is in stage shadow"):
        loaded(root, slot="staged")


def test_stage_takes_what_is_in_it_now_and_not_what_has_all_of_the_traffic(root):
    stage(root, candidate=2)
    with loaded(root, slot="staged", dist="later", stage="canary-5") as engine:
        assert engine.verified.stage == "canary-5"
    with pytest.raises(PromotionRefused, match="not in stage 'shadow' of the slot 'staged': nothing is in that stage"):
        loaded(root, slot="staged", dist="later", stage="shadow")
    with pytest.raises(PromotionRefused, match="serial 118, which has all of the traffic; in stage 'canary-5' of the"):
        loaded(root, slot="staged", stage="canary-5")
    promote(root, slot="staged", dist="later")
    with loaded(root, slot="staged", dist="later") as engine:
        assert engine.verified.stage == "full"
    with pytest.raises(PromotionRefused, match="nothing is in that stage, serial 120 is in stage full"):
        loaded(root, slot="staged", dist="later", stage="canary-5")
    with pytest.raises(PromotionRefused, match="holds serial 118; in the slot is serial 120") as err:
        loaded(root, slot="staged")
    assert "gate rollback" in err.value.hint


def test_candidate_that_was_dropped_is_loaded_by_nobody(root):
    stage(root)
    promotion.rollback(model="tiny", slot="staged", reason="slow", **promoter(root))
    for given in (None, "shadow"):
        with pytest.raises(PromotionRefused, match="holds serial 120"):
            loaded(root, slot="staged", dist="later", stage=given)


@pytest.mark.parametrize("slot", ["staged", "open"])
@pytest.mark.parametrize("name", ["canary", ""])
def test_stage_that_the_policy_does_not_have_is_an_error(root, slot, name):
    stage(root)
    with pytest.raises(SpecError, match=f"slot '{slot}': .*no stage '{name}'"):
        loaded(root, slot=slot, stage=name)


def test_stage_is_passed_on_where_the_slot_takes_what_is_approved(root):
    edit_policy(
        root, '[slot.staged]\nevidence = "preflight"', '[slot.staged]\nevidence = "preflight"\nload = "approved"'
    )
    with loaded(root, slot="staged", stage="canary-5") as engine:
        assert engine.verified.stage == "canary-5"
    with loaded(root, slot="staged") as engine:
        assert engine.verified.stage == "full"


def test_what_has_all_of_the_traffic_loads_when_its_stage_was_renamed(root):
    stage(root)
    edit_policy(root, 'name = "full"', 'name = "all"')
    for given in (None, "all", "full"):
        with loaded(root, slot="staged", stage=given) as engine:
            assert (engine.verified.statement.predicate.serial, engine.verified.stage) == (118, "all")
            assert any("stage full of staged is not in the policy any more" in each for each in engine.warnings)
        with pytest.raises(PromotionRefused, match="serial 120, a candidate"):
            loaded(root, slot="staged", dist="later", stage=given)


def test_only_stage_of_a_slot_may_be_renamed(root):
    promote(root)
    edit_policy(
        root,
        '[slot.production]\nevidence = "preflight"\n',
        '[slot.production]\nevidence = "preflight"\n[[slot.production.stage]]\nname = "all"\n',
    )
    with loaded(root, slot="production") as engine:
        assert engine.verified.stage == "all"


def test_candidate_in_what_became_the_last_stage_does_not_have_all_of_the_traffic(root):
    stage(root, candidate=2)
    edit_policy(root, '[[slot.staged.stage]]\nname = "full"\n', "")
    for given in (None, "canary-5"):
        with loaded(root, slot="staged", stage=given) as engine:
            assert engine.verified.statement.predicate.serial == 118
        with pytest.raises(PromotionRefused, match="serial 120, a candidate in stage canary-5 alone"):
            loaded(root, slot="staged", dist="later", stage=given)


def test_bundle_that_was_sealed_anew_in_place_says_so(root):
    promote(root)
    shutil.rmtree(root / "dist/tiny/ort")
    shutil.copytree(root / "later/tiny/ort", root / "dist/tiny/ort")
    message = "(?m)holds serial 120; in the slot is serial 118: keep each bundle in a folder of its own$"
    with pytest.raises(PromotionRefused, match=message) as err:
        loaded(root, slot="production")
    assert "written over" in err.value.hint
    (root / "current").symlink_to(root / "dist/tiny/ort")
    with pytest.raises(PromotionRefused, match=message):
        load(root / "current", root / "trust/trust.toml", model="tiny", slot="production")


def test_verdict_that_is_exchanged_while_it_is_verified_is_refused(root, monkeypatch):
    stage(root)
    real = loading.verify

    def exchange(bundle, **asked):
        shutil.rmtree(bundle)
        shutil.copytree(root / "later/tiny/ort", bundle)
        return real(bundle, **{**asked, "stage": "shadow"})

    monkeypatch.setattr(loading, "verify", exchange)
    with pytest.raises(VerificationError, match="exchanged while it was verified"):
        loaded(root, slot="staged")


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda path: path.write_bytes(b"{}"), lambda path: path.write_bytes(b"")]
)
def test_bundle_whose_verdict_cannot_be_read_is_not_loaded(root, change):
    promote(root)
    change(root / "dist/tiny/ort" / VERDICT_PATH)
    with pytest.raises(BundleError, match="verdict"):
        loaded(root, slot="production")


@pytest.mark.parametrize("slot", ["production", "open"])
def test_ledger_that_was_put_back_is_found_out_by_a_line_that_is_kept_elsewhere(root, slot):
    before = promote(root).sha256
    kept = {path: path.read_bytes() for path in (root / "trust").glob("ledger.jsonl*")}
    after = promotion.revoke(str(root / "dist/tiny/aoti"), reason="wrong labels", **promoter(root)).sha256
    for witness in (None, before, after):
        with loaded(root, slot=slot, expect=witness) as engine:
            assert engine.fallback is None
    for path, data in kept.items():
        path.write_bytes(data)
    for witness in (after, "", after.upper()):
        with pytest.raises(LedgerError, match="put back to an older state"):
            loaded(root, slot=slot, expect=witness)


def test_witness_of_a_ledger_that_the_policy_does_not_name_is_an_error(root):
    file = read_policy(root / "trust/trust.toml")
    file = dataclasses.replace(file, policy=msgspec.structs.replace(file.policy, ledger=None))
    with pytest.raises(LedgerError, match="names no ledger"):
        load(root / "dist/tiny/ort", file, model="tiny", slot="open", expect="0" * 64)


def test_warnings_of_the_verification_are_told_and_kept(root, monkeypatch, caplog):
    real = loading.verify

    def verify(bundle, **asked):
        verified = real(bundle, **asked)
        object.__setattr__(verified, "warnings", ("key gate-ci expired", "the policy takes another spec by now"))
        return verified

    monkeypatch.setattr(loading, "verify", verify)
    promote(root)
    with loaded(root, slot="production") as engine:
        assert engine.warnings == ("key gate-ci expired", "the policy takes another spec by now")
    assert [each.name for each in caplog.records] == ["gate.loading"] * 2
    for record, warning in zip(caplog.records, engine.warnings, strict=True):
        assert record.levelno == logging.WARNING
        assert record.getMessage() == f"tiny of slot production ({root / 'dist/tiny/ort'}): {warning}"


def shown_good_bytes(root, monkeypatch, engine, name):
    """A bundle whose file is refused, signed all the same, and put in order just for verification's look at it."""
    path = root / "dist/tiny" / engine / name
    good = path.read_bytes()
    bad = b"\xf8\x86\x00\x01" + good  # An unknown field whose tag is too long: protobuf reads it, the gate does not.
    path.write_bytes(bad)
    changes = {"engine_sha256": sha256_hex(bad)} if name == "artifacts/model.onnx" else {}
    reseal(root / "dist/tiny" / engine, **changes)
    verdict = root / "dist/tiny" / engine / VERDICT_PATH
    payload = envelope_from_bytes(verdict.read_bytes(), payload_type=IN_TOTO, where="").payload
    verdict.write_bytes(open_signer(str(root / "gate.pem")).sign(payload, IN_TOTO).to_bytes())

    def overwrite(data):
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(data)

    real = verification.require_engine

    def racing(stream, named):
        if named != name:
            return real(stream, named)
        overwrite(good)
        try:
            return real(stream, named)
        finally:
            overwrite(bad)

    with pytest.raises(VerificationError, match="is no ONNX file"):
        loaded(root, engine)
    monkeypatch.setattr(verification, "require_engine", racing)


@pytest.mark.parametrize("in_memory", [True, False])
def test_engine_that_verification_was_shown_other_bytes_of_is_not_loaded(root, monkeypatch, in_memory):
    shown_good_bytes(root, monkeypatch, "ort", "artifacts/model.onnx")
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(VerificationError, match="is no ONNX file") as err:
        loaded(root)
    assert err.value.where == str(root / "dist/tiny/ort/artifacts/model.onnx")
    assert list((root / "scratch").iterdir()) == []


def test_fallback_that_verification_was_shown_other_bytes_of_is_not_loaded(root, monkeypatch):
    shown_good_bytes(root, monkeypatch, "rtx", FALLBACK_PATH)
    with pytest.raises(VerificationError, match="is no ONNX file"):
        loaded(root, "rtx", "graph", reference=linear)


def test_what_was_promoted_loads_when_its_verdict_is_long_expired(root):
    promote(root)
    with loaded(root, slot="production", now="2099-01-01T00:00:00Z") as engine:
        assert engine.fallback is None
    with pytest.raises(StaleVerdict):
        loaded(root, slot="open", now="2099-01-01T00:00:00Z")


@pytest.mark.parametrize("slot", ["production", "open"])
def test_revoked_verdict_is_not_loaded(root, slot):
    promote(root)
    promotion.revoke(str(root / "dist/tiny/ort"), reason="wrong labels", **promoter(root))
    with pytest.raises(StaleVerdict, match="revoked"):
        loaded(root, slot=slot)


def test_ledger_that_was_cut_is_refused(root):
    promote(root)
    ledger = root / "trust/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-40] + b"\n")
    for slot in ("production", "open"):
        with pytest.raises(LedgerError):
            loaded(root, slot=slot)


def test_ledger_that_was_removed_empties_the_slot(root):
    promote(root)
    for path in (root / "trust").glob("ledger.jsonl*"):
        path.unlink()
    with pytest.raises(PromotionRefused, match="nothing was promoted into it"):
        loaded(root, slot="production")


def test_policy_without_a_ledger_has_nothing_promoted(root):
    path = root / "trust/trust.toml"
    file = read_policy(path)
    path.write_text(path.read_text().replace('ledger = "ledger.jsonl"\n', ""))
    with pytest.raises(SpecError, match="keeps no ledger"):
        loaded(root)
    file = dataclasses.replace(file, policy=msgspec.structs.replace(file.policy, ledger=None))
    bundle = root / "dist/tiny/ort"
    with pytest.raises(PromotionRefused, match="names no ledger"):
        load(bundle, file, model="tiny", slot="production")
    with load(bundle, file, model="tiny", slot="open") as engine:
        assert engine.fallback is None


def test_slot_model_and_policy_must_be_what_was_asked_for(root):
    with pytest.raises(SpecError, match="has no slot 'staging'"):
        loaded(root, slot="staging")
    with pytest.raises(GateError, match="other"):
        load(root / "dist/tiny/ort", root / "trust/trust.toml", model="other", slot="open")
    for slot in ("open", "production"):
        with pytest.raises(IdentityMismatch, match="'other'"):
            load(root / "dist/tiny/ort", root / "trust/trust.toml", model="other", slot=slot)
    shutil.copy(root / "trust/trust.toml", root / "dist/tiny/ort/policy/trust.toml")
    with pytest.raises(VerificationError, match="inside the bundle"):
        load(root / "dist/tiny/ort", root / "dist/tiny/ort/policy/trust.toml", model="tiny", slot="open")


def test_bundle_of_a_key_that_nobody_trusts_is_not_loaded(root):
    path = root / "trust/trust.toml"
    other = new_key(root / "other.pem", password=None).text
    text = path.read_text()
    path.write_text(
        text.replace(next(line for line in text.splitlines() if "public" in line), f'public = "{other}"', 1)
    )
    with pytest.raises(SignatureMismatch, match="is not in the policy"):
        loaded(root)


def test_plan_that_does_not_fit_is_an_error_where_the_policy_allows_nothing_else(root):
    with pytest.raises((BackendUnavailable, IncompatibleEngine), match="tensorrt_rtx"):
        loaded(root, "rtx", reference=linear)


def test_plan_that_does_not_fit_runs_as_the_graph_it_was_compiled_from_and_says_so(root, caplog):
    with caplog.at_level(logging.WARNING, "gate.loading"), loaded(root, "rtx", "graph") as engine:
        np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)
        assert engine.fallback == "onnx"
        assert "tensorrt_rtx" in engine.reason
    (record,) = caplog.records
    assert record.name == "gate.loading"
    assert "runs as ONNX on the CPU and not as the engine that was checked" in record.getMessage()


def test_plan_that_does_not_fit_runs_as_the_reference_where_the_policy_says_so(root, caplog):
    for slot in ("model", "either"):
        with loaded(root, "rtx", slot, reference=linear) as engine:
            np.testing.assert_allclose(engine.infer(FEEDS)["scores"], expected(), rtol=1e-5, atol=1e-6)
            assert engine.fallback == "pytorch"
    assert len(caplog.records) == 2


def test_graph_that_only_tensorrt_runs_says_so(root):
    with pytest.raises(IncompatibleEngine, match="onnx: .*made for TensorRT, and ONNX Runtime does not have all"):
        loaded(root, "rtx-bf16", "graph")
    with loaded(root, "rtx-bf16", "graph", reference=linear) as engine:
        assert engine.fallback == "pytorch"


def test_graph_that_the_installed_runtime_refuses_is_incompatible_and_may_fall_back(root, monkeypatch):
    real = loading.backend_named

    def backend(name):
        made = real(name)

        def refuse(path, **_):
            raise RunError("ONNX Runtime refuses the graph: opset 99 is not known", where=str(path))

        made.open = refuse
        return made

    monkeypatch.setattr(loading, "backend_named", backend)
    with pytest.raises(
        IncompatibleEngine, match=r"was checked with ONNX Runtime .* here refuses it: .*opset 99"
    ) as caught:
        loaded(root)
    assert caught.value.where == str(root / "dist/tiny/ort/artifacts/model.onnx")
    with loaded(root, slot="model", reference=linear) as engine:
        assert engine.fallback == "pytorch"
    with pytest.raises(RunError, match="opset 99"):
        loaded(root, "aoti", "model", reference=linear)
    assert list((root / "scratch").iterdir()) == []


def other_weights():
    torch.manual_seed(1)
    return torch.nn.Linear(4, 3).eval()


def failing():
    raise ValueError("no weights here")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "pytorch: load was given no reference"),
        (other_weights, "pytorch: the reference has other weights"),
        (failing, "pytorch: the reference failed: ValueError: no weights here"),
        (lambda: None, "pytorch: the reference failed"),
    ],
)
def test_reference_that_is_not_that_of_the_check_does_not_run(root, reference, message, caplog):
    with pytest.raises(IncompatibleEngine, match=message) as caught:
        loaded(root, "rtx", "model", reference=reference)
    assert "engine: " in caught.value.message
    assert not caplog.records
    with loaded(root, "rtx", "either", reference=reference) as engine:
        assert engine.fallback == "onnx"


def test_bundle_without_a_graph_says_how_to_have_one(root, made):
    spec = made / "without.toml"
    spec.write_text(SPEC.replace("seal_fallback = true\n", ""))
    file = read_spec(spec)
    options = CheckOptions(cache=made / "cache", baselines=made / "baselines", engines=("rtx",))
    release = Release(slots=SLOTS, signer=open_signer(str(root / "gate.pem")))
    shutil.rmtree(root / "dist")
    seal_passed(file, check(file, options, Silence()), root / "dist", release=release)
    assert not (root / "dist/tiny/rtx" / FALLBACK_PATH).exists()
    with pytest.raises(IncompatibleEngine, match="onnx: the bundle holds no graph .* seal_fallback = true"):
        loaded(root, "rtx", "graph")


def test_graph_that_is_not_at_hand_or_was_changed_keeps_the_engine_from_being_sealed(made, tmp_path):
    file = read_spec(made / "gate.toml")
    options = CheckOptions(cache=made / "cache", baselines=made / "baselines", engines=("rtx",))
    run = check(file, options, Silence())
    (result,) = run.engines
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(Path(result.graph_path).read_bytes() + b"\x0a\x00")
    for path, reason in (
        (None, "is not at hand; run the check again"),
        (str(tmp_path / "gone.onnx"), "is not at hand; run the check again"),
        (str(changed), "was changed since"),
    ):
        other = msgspec.structs.replace(run, engines=(msgspec.structs.replace(result, graph_path=path),))
        (sealed,) = seal_passed(file, other, tmp_path / "dist")
        assert sealed.path is None
        assert reason in sealed.reason
    assert not (tmp_path / "dist").exists()
