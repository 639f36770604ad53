"""The trust policy's text: what it takes, what it refuses, and where it says so."""

from __future__ import annotations

import datetime as dt
import re
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import SpecError
from gate.release import policy as policy_module
from gate.release.policy import (
    ModelPins,
    StagePolicy,
    TrustedKey,
    TrustPolicy,
    is_valid,
    moment_from_text,
    policy_from_text,
    policy_schema,
    requirements,
)

GOOD = """schema = 1
ledger = "ledger.jsonl"

[[key]]
name = "gate-ci"
owner = "CI of the detector team"
roles = ["gate"]
public = "ed25519:00"
valid_from = 2026-01-01
valid_until = 2027-01-01T01:30:00+02:00

[[key]]
name = "anna"
owner = "Anna"
roles = ["release", "security"]
public = "ed25519:01"

[[key]]
name = "ben"
owner = "Ben"
roles = ["release"]
public = "ed25519:02"

[[key]]
name = "deploy"
owner = "deployment"
roles = ["promoter"]
public = "ed25519:03"

[model.detector]
spec = ["../gate.toml"]
data = "any"
baseline = []

[slot.production]
evidence = "device"
findings = ["parity", "latency.p99_ms"]
approvals = { release = 2 }
max_age_days = 30
  [[slot.production.stage]]
  name = "shadow"
  approvals = {}
  max_age_days = 60
  min_hours = 24
  [[slot.production.stage]]
  name = "canary-5"
  traffic_percent = 5
  min_requests = 100000
  [[slot.production.stage]]
  name = "full"
  approvals = { release = 1, security = 1 }

[slot.staging]
load = "approved"
evidence = "host"
"""


def parse(text: str) -> TrustPolicy:
    return policy_from_text(text, path=Path("trust.toml"))


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) >= 1, old
    return GOOD.replace(old, new, 1)


def line(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_a_good_policy_is_read_whole():
    found = parse(GOOD)
    assert found.ledger == "ledger.jsonl"
    assert [each.name for each in found.key] == ["gate-ci", "anna", "ben", "deploy"]
    assert found.key[0].roles == ("gate",)
    assert found.model == {"detector": ModelPins(spec=("../gate.toml",), data="any", baseline=())}
    assert found.slot["production"].approvals == {"release": 2}
    assert [each.name for each in found.slot["production"].stage] == ["shadow", "canary-5", "full"]


def test_what_is_left_out_of_a_slot_is_strict():
    slot = parse(changed('load = "approved"\nevidence = "host"\n', "")).slot["staging"]
    assert (slot.evidence, slot.load, slot.fallback, slot.approvals) == ("device", "promoted", (), {})
    assert slot.stage == (StagePolicy(name="full"),)


def test_dates_become_utc_texts():
    key = parse(GOOD).key[0]
    assert key.valid_from == "2026-01-01T00:00:00Z"
    assert key.valid_until == "2026-12-31T23:30:00Z"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("2026-01-01T00:00:00", "has no offset from UTC; write 2026-01-01T00:00:00Z"),
        ("2026-01-01T00:00:00.5Z", "takes whole seconds"),
        ("0001-01-01T00:00:00+14:00", "is not between the years 1 and 9999 in UTC"),
        ("9999-12-31T23:59:59-12:00", "is not between the years 1 and 9999 in UTC"),
        ('"2026-01-01T00:00:00Z"', "without quotes, got '2026-01-01T00:00:00Z'"),
        ('"2026-99-99T99:99:99Z"', "without quotes"),
        ("12:00:00", "takes a date such as 2027-01-01 .*, got a time"),
        ("20260101", "takes a date such as 2027-01-01 .*, got 20260101"),
        ("nan", "takes a date .*, got nan"),
        ("true", "takes a date .*, got True"),
        ("[2026-01-01]", "takes a date .*, got a list"),
    ],
)
def test_a_time_that_could_be_read_two_ways_is_refused(given, message):
    text = changed("valid_from = 2026-01-01", f"valid_from = {given}")
    with pytest.raises(SpecError, match=rf"trust\.toml:9: \[\[key\]\] valid_from: .*{message}"):
        parse(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('roles = ["gate"]', 'role = ["gate"]', r"trust\.toml:7: \[\[key\]\] has no key 'role'; did you mean 'roles'\?"),
        ("schema = 1", "schema = 2", r"trust\.toml:1: the policy schema: must be 1, got 2"),
        ("schema = 1\n", "", r"the policy needs 'schema'"),
        ("schema = 1", "schema = true", r"trust\.toml:1: the policy schema: expected int, got True"),
        ('owner = "Anna"\n', "", r"trust\.toml:12: \[\[key\]\] needs 'owner'"),
        ('owner = "Anna"', 'owner = ""', r"trust\.toml:14: \[\[key\]\] owner: expected str of length >= 1, got ''"),
        ('["release", "security"]', '"release"', r"trust\.toml:15: \[\[key\]\] roles: expected array, got 'release'"),
        ('["release", "security"]', "[]", r"trust\.toml:15: \[\[key\]\] roles: expected array of length >= 1"),
        ('["release", "security"]', '["release", 7]', r"trust\.toml:15: \[\[key\]\] roles\[1\]: expected str, got 7"),
        ('["release", "security"]', '["re lease"]', r"roles\[0\]: takes letters, digits, .*, got 're lease'"),
        ('data = "any"\n', "", r"trust\.toml:\d+: \[model\.detector\] needs 'data'"),
        ('data = "any"', 'data = "all"', r"""\[model\.detector\] data: must be "any" or a list, got 'all'"""),
        ('data = "any"', "data = 1", r"\[model\.detector\] data: expected str \| array, got 1"),
        ("[model.detector]", '[model."a b"]', r"\[model\] 'a b': takes letters, digits, .*, got 'a b'"),
        ('evidence = "device"', 'evidence = "devise"', r"must be one of .*, got 'devise'; did you mean 'device'\?"),
        ("release = 2", 'release = "2"', r"\[slot\.production\.approvals\] release: expected int, got '2'"),
        ("release = 2", "release = 0", r"\[slot\.production\.approvals\] release: expected int >= 1, got 0"),
        ("release = 2", "release = true", r"\[slot\.production\.approvals\] release: expected int, got True"),
        ("max_age_days = 30", "max_age_days = nan", r"\[slot\.production\] max_age_days: expected float > 0\.0, got nan"),
        ("max_age_days = 30", "max_age_days = inf", r"max_age_days: expected float <= 36500\.0, got inf"),
        ("max_age_days = 30", "max_age_days = -1", r"max_age_days: expected float > 0\.0, got -1"),
        ("min_hours = 24", "min_hours = nan", r"\[\[slot\.production\.stage\]\] min_hours: expected float > 0\.0, got nan"),
        ("min_hours = 24", "min_hours = inf", r"\[\[slot\.production\.stage\]\] min_hours: expected float <= 876000\.0"),
        ("min_requests = 100000", "min_requests = 1e5", r"min_requests: expected int, got 100000\.0"),
        ("min_requests = 100000", "min_requests = 0", r"min_requests: expected int >= 1, got 0"),
        ("min_requests = 100000", f"min_requests = {10**30}", r"min_requests: expected int <= 9007199254740991"),
        ("min_requests = 100000", f"min_requests = 0x{'f' * 9000}", r"min_requests: .*got a number of 36000 bits"),
        ("min_requests = 100000", f"min_requests = {'9' * 5000}", r"is not TOML: Exceeds the limit"),
        ("min_hours = 24", f"min_hours = 0x{'f' * 9000}", r"min_hours: .*got a number of 36000 bits"),
        ("traffic_percent = 5", "traffic_percent = 101", r"traffic_percent: expected float <= 100\.0, got 101"),
        ("traffic_percent = 5", "traffic_percent = nan", r"traffic_percent: expected float > 0\.0, got nan"),
        ('[[slot.production.stage]]\n  name = "shadow"', 'traffic = "1"\n  [[slot.production.stage]]\n  name = "shadow"',
         r"\[slot\.production\] has no key 'traffic'"),
        ('load = "approved"', 'load = "all"', r"\[slot\.staging\] load: must be one of approved, promoted, got 'all'"),
        ('load = "approved"', 'load = "approved"\nfallback = ["tf"]', r"\[slot\.staging\] fallback\[0\]: must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named_with_its_line(old, new, message):
    with pytest.raises(SpecError, match=message) as raised:
        parse(changed(old, new))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ('name = "ben"', 'name = "anna"', 'name = "anna"\nowner = "Ben"', "two keys are named 'anna'"),
        ('["gate"]', '["gate", "release"]', 'roles = ["gate", "release"]', "'gate-ci' issues verdicts .* cannot be release"),
        ('["gate"]', '["gate", "promoter"]', 'roles = ["gate", "promoter"]', "cannot be promoter too"),
        ('["gate"]', '["gate", "gate"]', 'roles = ["gate", "gate"]', "has a role twice"),
        ('["gate"]', '["security"]', "[[key]]", "no key has role 'gate'"),
        ('["gate"]', '["Gate"]', 'roles = ["Gate"]', "has role 'Gate'; did you mean 'gate'"),
        ('["promoter"]', '["PROMOTER"]', 'roles = ["PROMOTER"]', "did you mean 'promoter'"),
        ("release = 2", "release = 3", "approvals", r"asks for 3 .* role 'release'; keys that have it: 2 \(anna, ben\)"),
        ("release = 2", "relase = 1", "approvals", r"role 'relase'; keys that have it: none; did you mean 'release'"),
        ("release = 2", "gate = 1", "approvals", "asks for approvals by role 'gate', which approves nothing"),
        ("security = 1", "promoter = 1", "approvals = { release = 1, p", "stage 'full' asks .* role 'promoter', which"),
        ("security = 1", "security = 2", "approvals = { release = 1, s", "stage 'full' asks for 2 approvals"),
        ('load = "approved"\n', 'load = "approved"\nstage = []\n', "stage = []", "slot 'staging' has no stage"),
        ('name = "canary-5"', 'name = "shadow"', 'name = "shadow"\n  traffic', "two stages named 'shadow'"),
        ('name = "shadow"', 'name = "shadow"\n  traffic_percent = 6', "traffic_percent = 5", "falls from 6 .* to 5"),
        ('name = "full"', 'name = "full"\n  traffic_percent = 50', "traffic_percent = 50", "is all of the traffic"),
        ('name = "full"', 'name = "full"\n  min_hours = 1', "min_hours = 1", "min_hours in the last stage, 'full'"),
        ('name = "full"', 'name = "full"\n  min_requests = 1', "min_requests = 1\n", "min_requests in the last stage"),
        ("2027-01-01T01:30:00+02:00", "2026-01-01", "valid_until", "never valid: valid_until 2026-01-01 is not after"),
        ('owner = "Ben"', 'owner = "Ben"\nreason = "stolen"', "reason", "'ben' has the reason .* add revoked"),
        ('owner = "Ben"', 'owner = "\\u001b[2J"', 'owner = "\\u001b[2J"', "cannot be printed: '.x1b"),
        ('name = "ben"', 'name = "anna\\n"', 'name = "anna\\n"', "takes letters, digits"),
        ('["release", "security"]', '["release\\n"]', 'roles = ["release\\n"]', "takes letters, digits"),
        ("release = 2", '"release\\n" = 2', "approvals", "takes letters, digits"),
        ('ledger = "ledger.jsonl"\n', "", "[slot.production]", 'name one .* or set load = "approved"'),
        ('"ledger.jsonl"', '""', "ledger =", "ledger = '': takes a file beside the policy"),
        ('"ledger.jsonl"', '"."', "ledger =", "takes a file beside the policy"),
        ('"ledger.jsonl"', '"/var/ledger.jsonl"', "ledger =", "takes a file beside the policy"),
        ('"ledger.jsonl"', '"a/../../b.jsonl"', "ledger =", "takes a file beside the policy"),
        ('"ledger.jsonl"', '"a\\u0000b"', "ledger =", "takes a file beside the policy"),
        ('"ledger.jsonl"', '"./trust.toml"', "ledger =", "is this policy itself"),
        ('["../gate.toml"]', "[]", "spec = []", r"\[model\.detector\] spec is an empty list"),
        ('data = "any"', "data = []", "data = []", r"\[model\.detector\] data is an empty list"),
        ('data = "any"', 'data = ["set.json"]', "data =", "data: takes SHA-256 digests of 64 lower-case hex digits"),
        ('data = "any"', f'data = ["{"A" * 64}"]', "data =", "64 lower-case hex digits"),
        ('data = "any"', f'data = ["{"a" * 64}\\n"]', "data =", "64 lower-case hex digits"),
        ('["../gate.toml"]', f'["{"a" * 63}"]', "spec =", "64 lower-case hex digits"),
        ('["../gate.toml"]', f'["sha256:{"a" * 64}"]', "spec =", "64 lower-case hex digits"),
        ('["../gate.toml"]', '["any"]', "spec =", '"any" stands alone'),
        ('["../gate.toml"]', '["a\\u0000b"]', "spec =", "takes a file's path or its SHA-256"),
        ('"latency.p99_ms"', '""', "findings", "findings has '', which names no check"),
        ('"latency.p99_ms"', '" parity"', "findings", "findings has ' parity', which names no check"),
        ('"latency.p99_ms"', '"a\\u0007"', "findings", "cannot be printed"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_line(old, new, at, message):
    text = changed(old, new)
    with pytest.raises(SpecError, match=message) as raised:
        parse(text)
    assert raised.value.where == f"trust.toml:{line(text, at)}"


def test_tables_in_the_singular_are_named():
    with pytest.raises(SpecError, match=r"write \[\[key\]\] in place of \[key\]"):
        parse('schema = 1\n[key]\nname = "a"\n')
    with pytest.raises(SpecError, match=r"write \[\[slot\.s\.stage\]\] in place of \[slot\.s\.stage\]"):
        parse(GOOD + '[slot.s]\n[slot.s.stage]\nname = "full"\n')


def test_a_policy_with_no_key_model_or_slot_is_refused():
    head = GOOD[: GOOD.index("[model.detector]")]
    with pytest.raises(SpecError, match="the policy needs 'key'"):
        parse("schema = 1\n")
    with pytest.raises(SpecError, match="the policy key: expected array of length >= 1"):
        parse("schema = 1\nkey = []\n[model]\n[slot]\n")
    with pytest.raises(SpecError, match="the policy model: expected object of length >= 1"):
        parse(head + "[model]\n[slot.s]\n")
    with pytest.raises(SpecError, match="the policy slot: expected object of length >= 1"):
        parse(GOOD[: GOOD.index("[slot.production]")] + "[slot]\n")


def test_a_revoked_key_leaves_the_policy_readable():
    text = changed('owner = "Ben"', 'owner = "Ben"\nrevoked = 2026-05-01\nreason = "left"')
    assert parse(text).key[2].revoked == "2026-05-01T00:00:00Z"


def test_shares_may_stay_the_same_and_the_last_may_say_100():
    text = changed(
        'name = "full"',
        'name = "canary-again"\n  traffic_percent = 5\n  [[slot.production.stage]]\n  name = "full"\n  traffic_percent = 100',
    )
    assert [each.traffic_percent for each in parse(text).slot["production"].stage] == [None, 5, 5, 100]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trust.toml: is empty"),
        ("# nothing but a comment\n", "is empty"),
        ("schema = 1\nschema = 1\n", r"trust\.toml:2: is not TOML: Cannot overwrite"),
        (GOOD + "[slot.staging]\n", "is not TOML: Cannot declare"),
        ("schema = 1\nx = [", r"is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ("a = " + "{a=" * 100_000, "is not TOML"),
        ("schema = 1\0", "is not TOML"),
        ("\ufeffschema = 1", "is not TOML"),
        ("schema = 1\nx = 2026-02-30\n", "is not TOML"),
        ("x.x" + ".x" * 500 + " = 1", "the policy has no key 'x'"),
        ('"\\u001b[2J" = 1', "the policy has no key '.x1b"),
        ('"..." = 1', "the policy has no key '...'"),
        (GOOD + '[model."..."]\n', r"\[model\] '?\.\.\.'?: takes letters"),
        (GOOD + '[model."a\\u001b"]\n', r"\[model\] 'a.x1b': takes letters"),
        ("[slot.a.approvals]\n'...' = 1\n", r"needs|takes letters"),
    ],
)
def test_what_is_no_policy_is_refused_and_nothing_else_is_raised(text, message):
    with pytest.raises(SpecError, match=message) as raised:
        parse(text)
    assert "\x1b" not in str(raised.value)


def test_the_line_in_a_long_policy_is_found_quickly():
    keys = "".join(
        f'[[key]]\nname = "k{i}"\nowner = "o"\nroles = ["release"]\npublic = "ed25519:{i}"\n' for i in range(1000)
    )
    text = GOOD.replace(
        "[model.detector]", keys + '[[key]]\nname = "k7"\nowner = "o"\nroles = ["x"]\npublic = "p"\n[model.detector]'
    )
    began = time.monotonic()
    with pytest.raises(SpecError, match="two keys are named 'k7'") as raised:
        parse(text)
    last = text[: text.rindex('name = "k7"')].count("\n") + 1
    assert raised.value.where == f"trust.toml:{last}"
    assert time.monotonic() - began < 10


LINES = GOOD.splitlines(keepends=True)


@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(st.sampled_from(LINES), max_size=40).map("".join),
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.text(max_size=8)).map(
            lambda cut: GOOD[: cut[0]] + cut[2] + GOOD[cut[0] + cut[1] :]
        ),
        st.tuples(
            st.sampled_from([i for i, each in enumerate(LINES) if "=" in each]),
            st.sampled_from(["nan", "-inf", "0", "-1", "1e400", "[]", "{}", "[[]]", '""', '"a"', "true", "2026-01-01",
                             "12:00:00", "{ a = 1 }", "0x" + "f" * 300, "[{}]", "[nan]", '{ "" = 1 }', '["a", 1]']),
        ).map(lambda put: "".join([*LINES[: put[0]], f"{LINES[put[0]].split('=')[0]}= {put[1]}\n", *LINES[put[0] + 1 :]])),
    )
)  # fmt: skip
def test_any_text_gives_a_policy_or_an_error_with_the_file_s_name(text):
    found, error = None, None
    try:
        found = parse(text)
    except SpecError as err:
        error = err
    if found is None:
        assert re.match(r"trust\.toml(:\d+)?: ", str(error))
        return
    assert any("gate" in each.roles for each in found.key)
    for slot in found.slot:
        for stage in found.slot[slot].stage:
            requirements(found, slot, stage.name)


def test_a_stage_s_own_demands_stand_in_place_of_the_slot_s():
    found = parse(GOOD)
    shadow, canary, full = (requirements(found, "production", each) for each in ("shadow", "canary-5", "full"))
    assert (shadow.approvals, shadow.max_age_days, shadow.evidence) == ({}, 60, "device")
    assert (canary.approvals, canary.max_age_days) == ({"release": 2}, 30)
    assert full.approvals == {"release": 1, "security": 1}
    assert {each.findings for each in (shadow, canary, full)} == {("parity", "latency.p99_ms")}


def test_minimums_are_those_of_the_stage_before():
    found = parse(GOOD)
    shadow, canary, full = (requirements(found, "production", each) for each in ("shadow", "canary-5", "full"))
    assert (shadow.previous, shadow.min_hours, shadow.min_requests) == (None, None, None)
    assert (canary.previous, canary.min_hours, canary.min_requests) == ("shadow", 24, None)
    assert (full.previous, full.min_hours, full.min_requests) == ("canary-5", None, 100000)


def test_requirements_do_not_change_the_policy():
    found = parse(GOOD)
    requirements(found, "production", "canary-5").approvals.clear()
    assert requirements(found, "production", "canary-5").approvals == {"release": 2}


def test_an_unknown_slot_or_stage_is_an_error_that_names_those_there_are():
    found = parse(GOOD)
    with pytest.raises(
        SpecError, match=r"there is no slot 'prodution'; did you mean 'production'\? \(it has production, staging\)"
    ):
        requirements(found, "prodution", "full")
    with pytest.raises(SpecError, match=r"slot 'production': there is no stage 'x'; it takes shadow, canary-5, full$"):
        requirements(found, "production", "x")


KEY = TrustedKey(
    name="k",
    owner="o",
    roles=("gate",),
    public="p",
    valid_from="2026-01-01T00:00:00Z",
    valid_until="2026-10-01T00:00:00Z",
)


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("2025-12-31T23:59:59Z", "is valid from 2026-01-01 on"),
        ("2026-01-01T00:00:00Z", None),
        ("2026-09-30T23:59:59Z", None),
        ("2026-10-01T00:00:00Z", "expired on 2026-10-01"),
        ("2026-11-01T00:00:00Z", "expired on 2026-10-01"),
    ],
)
def test_a_key_counts_from_its_first_moment_to_before_its_last(at, reason):
    assert is_valid(KEY, at) == reason


def test_a_revoked_key_counts_for_nothing_from_then_on():
    revoked = msgspec.structs.replace(KEY, revoked="2026-05-01T12:00:00Z", reason="laptop stolen")
    assert is_valid(revoked, "2026-05-01T11:59:59Z") is None
    assert is_valid(revoked, "2026-05-01T12:00:00Z") == "was revoked on 2026-05-01T12:00:00Z: laptop stolen"
    assert is_valid(revoked, "2030-01-01T00:00:00Z") == "was revoked on 2026-05-01T12:00:00Z: laptop stolen"


def test_a_key_without_dates_is_valid_until_it_is_revoked():
    plain = TrustedKey(name="k", owner="o", roles=("gate",), public="p")
    assert is_valid(plain, "2026-01-01T00:00:00Z") is None
    revoked = msgspec.structs.replace(plain, revoked="2026-01-01T00:00:00Z")
    assert is_valid(revoked, "2026-01-01T00:00:00Z") == "was revoked on 2026-01-01"


@pytest.mark.parametrize(
    "at", ["", "2026-05-01", "2026-05-01T00:00:00", "2026-02-31T00:00:00Z", "2026-05-01T00:00:00Z\n", "~"]
)
def test_a_key_does_not_count_at_what_is_no_time(at):
    assert "which is no time" in (is_valid(KEY, at) or "")
    assert moment_from_text(at) is None


def test_the_schema_takes_what_is_read_and_describes_every_key():
    jsonschema = pytest.importorskip("jsonschema")
    tomllib = pytest.importorskip("tomllib")
    schema = policy_schema()
    assert schema["$id"] == "urn:trt-gate:schema:trust:1"
    jsonschema.Draft202012Validator.check_schema(schema)
    tables = [schema, *schema["$defs"].values()]
    assert {each["title"] for each in tables} == {"trust.toml", "TrustedKey", "ModelPins", "SlotPolicy", "StagePolicy"}
    assert [key for each in tables for key, value in each["properties"].items() if not value.get("description")] == []
    assert "null" not in str(schema)

    def as_json(value):
        if isinstance(value, dict):
            return {key: as_json(each) for key, each in value.items()}
        if isinstance(value, list):
            return [as_json(each) for each in value]
        return value.isoformat() if isinstance(value, (dt.date, dt.datetime)) else value

    check = jsonschema.Draft202012Validator(schema)
    raw = as_json(tomllib.loads(GOOD))
    assert list(check.iter_errors(raw)) == []
    assert list(check.iter_errors({**raw, "slots": {}}))
    assert list(check.iter_errors({**raw, "schema": 2}))


def test_the_documentation_names_every_key_and_its_example_is_read():
    text = (Path(__file__).parents[2] / "docs" / "trust-policy.md").read_text(encoding="utf-8")
    for struct in (policy_module.TrustPolicy, TrustedKey, ModelPins, policy_module.SlotPolicy, StagePolicy):
        for key in struct.__struct_fields__:
            assert f"| `{key}`" in text, f"{struct.__name__}.{key}"
    examples = re.findall(r"```toml\n(schema = 1\n.*?)```", text, re.DOTALL)
    assert len(examples) == 1
    assert parse(examples[0]).slot["production"].stage[-1].name == "full"
