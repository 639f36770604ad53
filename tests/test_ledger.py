import base64
import contextlib
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate import ledger as ledger_module
from gate.errors import LedgerError, PromotionRefused, SpecError
from gate.ledger import append, head_path, lock_path, read_ledger, require_digest, sign_head
from gate.manifest import canonical_json, sha256_hex
from gate.release.statements import (
    FIRST_PREVIOUS,
    IN_TOTO,
    LEDGER_ENTRY,
    LEDGER_HEAD,
    LedgerEntry,
    LedgerHead,
    payload_of,
)
from gate.signing import KeySigner, new_key, open_signer
from gate.trust import PolicyFile, read_policy

LATER = "2026-11-21T12:00:00Z"
POLICY = """schema = 1
ledger = "ledger.jsonl"

[[key]]
name = "ci"
owner = "CI"
roles = ["gate"]
public = "{gate}"

[[key]]
name = "alice"
owner = "Alice"
roles = ["promoter"]
public = "{alice}"
{alice_more}

[[key]]
name = "bob"
owner = "Bob"
roles = ["promoter"]
public = "{bob}"

[[key]]
name = "carol"
owner = "Carol"
roles = ["release"]
public = "{carol}"

[model.detector]
spec = "any"
data = "any"
baseline = "any"

[slot.production]
"""


@dataclass
class World:
    root: Path
    signers: dict[str, KeySigner]
    policy: PolicyFile

    @property
    def path(self):
        return self.root / "ledger.jsonl"

    def with_alice(self, more):
        return write_policy(self.root, self.signers, more)

    def read(self, policy=None, now=None):
        return read_ledger(self.path, policy or self.policy, now=now)

    def take_over(self, policy, *, who="bob", now=LATER, show=None):
        return sign_head(self.path, policy, self.signers[who], now=now, show=show)

    def append(self, serial, *, who="alice", expected=None, **values):
        expected = self.read() if expected is None else expected
        return append(self.path, self.policy, expected, making(serial, **values), self.signers[who])

    def filled(self, count=3):
        for serial in range(count):
            self.append(serial)
        return self.path.read_bytes().splitlines(keepends=True)

    def sign(self, entry, *, who="alice", payload_type=LEDGER_ENTRY):
        return self.signers[who].sign(payload_of(entry), payload_type).to_bytes()

    def head(self, lines, *, who="alice", **values):
        made = LedgerHead(entries=len(lines), last=sha256_hex(lines[-1]))
        made = msgspec.structs.replace(made, **values)
        head_path(self.path).write_bytes(self.sign(made, who=who, payload_type=LEDGER_HEAD))

    def write(self, lines, *, who="alice"):
        """Lines, with a head that fits them: as a thief of a promoter's key could."""
        self.path.write_bytes(b"".join(lines))
        self.head(lines, who=who)


def making(serial, **values):
    made = {
        "time": f"2026-11-21T10:00:{serial % 60:02}Z", "action": "promote", "model": "detector", "slot": "production",
        "stage": "full", "full": True, "verdict": sha256_hex(str(serial).encode()), "serial": serial,
        "engine": "trt-fp16", "engine_sha256": "e" * 64, "bundle": f"/bundles/{serial}", "policy_sha256": "f" * 64,
        "approvals": (), "requests": None, "reason": "",
    }  # fmt: skip
    return lambda index, previous: LedgerEntry(index=index, previous=previous, **{**made, **values})


def write_policy(root, signers, more=""):
    text = POLICY.format(**{name: each.public.text for name, each in signers.items()}, alice_more=more)
    (root / "trust.toml").write_text(text)
    return read_policy(root / "trust.toml")


@pytest.fixture(scope="module")
def signers(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys")
    for name in ("gate", "alice", "bob", "carol", "mallory"):
        new_key(keys / name, password=None)
    return {name: open_signer(str(keys / name)) for name in ("gate", "alice", "bob", "carol", "mallory")}


@pytest.fixture
def world(signers, tmp_path):
    return World(tmp_path, signers, write_policy(tmp_path, signers))


def refused(world, message, policy=None, now=None):
    with pytest.raises(LedgerError, match=message) as caught:
        world.read(policy, now)
    assert caught.value.exit_code == 4


def test_nothing_is_an_empty_history(world):
    found = world.read()
    assert found.lines == ()
    assert found.notes == ()
    assert found.head == FIRST_PREVIOUS
    assert not world.path.exists()


def test_what_is_appended_is_read_again_with_who_signed_it(world):
    world.append(1)
    written = world.append(2, who="bob")
    found = world.read()
    assert [each.serial for each in found.history.entries] == [1, 2]
    assert found.signers == written.signers == ("alice", "bob")
    assert found.lines == written.lines
    assert found.history == written.history
    assert found.head == sha256_hex(world.path.read_bytes().splitlines(keepends=True)[-1])
    assert found.notes == ()
    assert {each.name for each in world.root.iterdir()} == {
        "trust.toml", "ledger.jsonl", "ledger.jsonl.head", "ledger.jsonl.lock"
    }  # fmt: skip


def test_every_flipped_byte_of_a_line_is_refused(world):
    lines = world.filled(2)
    line = lines[1]
    for position in range(0, len(line), 7):
        changed = line[:position] + bytes([line[position] ^ 1]) + line[position + 1 :]
        world.path.write_bytes(lines[0] + changed)
        with pytest.raises(LedgerError, match=r"ledger\.jsonl"):
            world.read()


def test_every_flipped_byte_of_the_head_is_refused(world):
    world.filled(1)
    head = head_path(world.path).read_bytes()
    for position in range(0, len(head), 5):
        changed = head[:position] + bytes([head[position] ^ 1]) + head[position + 1 :]
        head_path(world.path).write_bytes(changed)
        with pytest.raises(LedgerError, match=r"ledger\.jsonl"):
            world.read()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [lines[1], lines[2]], r"ledger\.jsonl:1: is entry 1, and entry 0 belongs here"),
        (lambda lines: [lines[0], lines[2]], r"ledger\.jsonl:2: is entry 2, and entry 1 belongs here"),
        (lambda lines: [lines[0], lines[2], lines[1]], r"ledger\.jsonl:2: is entry 2"),
        (lambda lines: [lines[0], lines[1], lines[1], lines[2]], r"ledger\.jsonl:3: is entry 1"),
        (lambda lines: [*lines, lines[2]], r"ledger\.jsonl:4: is entry 2, and entry 3 belongs here"),
        (lambda lines: lines[:2], r"ledger\.jsonl: has 2 whole lines, and its head says 3: lines were cut off"),
        (lambda lines: [], r"has 0 whole lines, and its head says 3"),
        (lambda lines: [*lines[:2], lines[2][:-1]], "has 2 whole lines, and its head says 3"),
        (lambda lines: [*lines[:2], lines[2][:50]], "has 2 whole lines, and its head says 3"),
        (lambda lines: [lines[0][:50], *lines[1:]], r"ledger\.jsonl:1: its envelope is not what a ledger holds"),
        (lambda lines: [b"\n", *lines], r"ledger\.jsonl:1: its envelope is not what a ledger holds"),
        (lambda lines: [*lines, b"\n"], r"ledger\.jsonl:4: its envelope is not what a ledger holds"),
        (lambda lines: [*lines, b"\x00" * 100 + b"\n"], r"ledger\.jsonl:4: its envelope"),
        (lambda lines: [*lines, b"[" * 60_000 + b"\n"], r"ledger\.jsonl:4: its envelope"),
        (lambda lines: [*lines, b"x" * 70_000 + b"\n"], r"ledger\.jsonl:4: is too long: the limits are 65536"),
        (lambda lines: [*lines, b" " * 70_000], r"ledger\.jsonl:4: is too long: the limits are 65536"),
        (lambda lines: [lines[0].replace(b"\n", b"\r\n"), *lines[1:]], r"ledger\.jsonl:1: .* not written as"),
        (lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], r"ledger\.jsonl:1: its envelope"),
    ],
)
def test_lines_that_were_edited_removed_reordered_doubled_or_cut_are_refused(world, change, message):
    lines = world.filled()
    world.path.write_bytes(b"".join(change(lines)))
    refused(world, message)


REWRITES = {
    "white space": lambda line: line.replace(b'{"payload"', b'{ "payload"'),
    "white space at the end": lambda line: line[:-1] + b" \n",
    "a key twice": lambda line: line.replace(b'{"payload"', b'{"payload":"","payload"'),
    "the same key twice": lambda line: line.replace(b'"payloadType"', b'"payloadType":"x","payloadType"'),
    "another key": lambda line: line.replace(b'{"payload"', b'{"a":1,"payload"'),
    "an escape": lambda line: line.replace(b"payloadType", b"payload\\u0054ype"),
    "an escaped slash": lambda line: line.replace(b"application/", b"application\\/"),
    "another order": lambda line: canonical_json(dict(reversed(json.loads(line).items()))).replace(
        b'{"payload"', b'{"signatures":[],"payload"'
    ),
    "NaN": lambda line: line.replace(b'{"payload":', b'{"payload":NaN,"x":'),
    "null": lambda line: b"null\n",
    "a list": lambda line: b"[]\n",
}


@pytest.mark.parametrize("name", REWRITES)
def test_an_envelope_that_means_the_same_and_is_written_otherwise_is_refused(world, name):
    lines = world.filled(2)
    changed = REWRITES[name](lines[1])
    assert changed != lines[1]
    world.write([lines[0], changed])
    refused(world, r"ledger\.jsonl:2: its envelope is not")


PAYLOADS = {
    "white space": lambda data: data.replace(b'{"action"', b'{ "action"'),
    "a key twice": lambda data: data.replace(b'{"action"', b'{"action":"revoke","action"'),
    "an escape": lambda data: data.replace(b"detector", b"det\\u0065ctor"),
    "a float": lambda data: data.replace(b'"serial":1', b'"serial":1.0'),
    "an exponent": lambda data: data.replace(b'"serial":1', b'"serial":1e0'),
    "NaN": lambda data: data.replace(b'"serial":1', b'"serial":NaN'),
    "a negative index": lambda data: data.replace(b'"index":1', b'"index":-1'),
    "a huge number": lambda data: data.replace(b'"serial":1', b'"serial":' + b"9" * 400),
    "text for a number": lambda data: data.replace(b'"serial":1', b'"serial":"1"'),
    "no version": lambda data: data.replace(b'"schema_version":1,', b""),
    "another version": lambda data: data.replace(b'"schema_version":1', b'"schema_version":2'),
    "no newline": lambda data: data[:-1],
    "an unknown key": lambda data: data.replace(b'{"action"', b'{"aaa":1,"action"'),
    "no verdict": lambda data: data.replace(b'"verdict"', b'"verdicts"'),
    "another action": lambda data: data.replace(b'"promote"', b'"approve"'),
    "nothing": lambda data: b"",
    "depth": lambda data: b"[" * 20_000 + b"\n",
    "not UTF-8": lambda data: data.replace(b"detector", b"det\xffctor"),
    "a lone surrogate": lambda data: data.replace(b"detector", b"det\\ud800ctor"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_signed_entry_that_is_not_canonical_is_refused(world, name):
    """Signed by a promoter, so that the reading alone stops it."""
    lines = world.filled(2)
    payload = base64.b64decode(json.loads(lines[1])["payload"])
    changed = PAYLOADS[name](payload)
    assert changed != payload
    world.write([lines[0], world.signers["alice"].sign(changed, LEDGER_ENTRY).to_bytes()])
    refused(world, r"ledger\.jsonl:2: its entry is not")


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": "other"},
        {"verdict": "9" * 64},
        {"serial": 1000},
        {"slot": "staging"},
        {"time": "2026-11-21T10:00:59Z"},
    ],
)
def test_an_entry_that_was_edited_under_its_signature_is_refused(world, changes):
    lines = world.filled(2)
    outer = json.loads(lines[1])
    entry = {**json.loads(base64.b64decode(outer["payload"])), **changes}
    outer["payload"] = base64.b64encode(canonical_json(entry)).decode()
    world.write([lines[0], canonical_json(outer)])
    refused(world, r"ledger\.jsonl:2: the signature does not hold")


def test_an_entry_of_another_type_is_refused(world):
    lines = world.filled(2)
    entry = making(2)(2, sha256_hex(lines[1]))
    for payload_type in (IN_TOTO, LEDGER_HEAD):
        world.path.write_bytes(b"".join([*lines, world.sign(entry, payload_type=payload_type)]))
        refused(world, r"ledger\.jsonl:3: its payload is 'application/.*', not 'application/vnd.trt-gate.ledger-entry")
    head_path(world.path).write_bytes(lines[0])
    world.path.write_bytes(b"".join(lines))
    refused(world, r"ledger\.jsonl\.head: its payload is")


@pytest.mark.parametrize(
    "who, message",
    [
        ("mallory", "is signed by the key .*, which the policy .* does not have"),
        ("carol", "is signed by carol, who is release, not promoter"),
        ("gate", "is signed by ci, who is gate, not promoter"),
    ],
)
def test_only_promoters_sign_lines_and_heads(world, who, message):
    lines = world.filled(2)
    world.write([lines[0], world.sign(making(1)(1, sha256_hex(lines[0])), who=who)])
    refused(world, rf"ledger\.jsonl:2: {message}")
    world.path.write_bytes(b"".join(lines))
    world.head(lines, who=who)
    refused(world, rf"ledger\.jsonl\.head: {message}")


def test_a_line_with_no_two_or_somebody_elses_signature_is_refused(world):
    lines = world.filled(1)
    outer = json.loads(lines[0])
    for signatures, message in (
        ([], "has 0 signatures"),
        (outer["signatures"] * 2, "has 2 signatures"),
        ([{**outer["signatures"][0], "keyid": world.signers["bob"].public.keyid}], "the signature does not hold"),
    ):
        world.write([canonical_json({**outer, "signatures": signatures})])
        refused(world, rf"ledger\.jsonl:1: {message}")


def test_a_revoked_promoter_counts_for_what_came_before_and_for_nothing_after(world):
    lines = world.filled(2)
    world.head(lines, who="bob")
    before = world.with_alice("revoked = 2026-11-21T10:00:02Z")
    assert len(world.read(before).lines) == 2
    refused(
        world,
        r"ledger\.jsonl:2: is signed by alice, .* was revoked",
        world.with_alice("revoked = 2026-11-21T10:00:01Z"),
    )
    world.write([*lines, world.sign(making(2)(2, sha256_hex(lines[1])))], who="bob")
    refused(world, r"ledger\.jsonl:3: is signed by alice, .* was revoked", before)


def test_a_head_by_a_key_that_is_revoked_by_now_is_refused_until_another_promoter_signs_it(world):
    world.filled(2)
    policy = world.with_alice('revoked = 2026-11-21T11:00:00Z\nreason = "stolen"')
    assert len(world.read(policy, "2026-11-21T10:59:59Z").lines) == 2
    why = r"\.head: its head is signed by alice, whose key was revoked on 2026-11-21T11:00:00Z: stolen(.|\n)*"
    refused(world, why + r"gate ledger sign --policy .*trust\.toml --key KEY", policy, "2026-11-21T11:00:00Z")
    shown = []
    done = world.take_over(policy, show=shown.append)
    assert (shown[0].head_signer, done.head_signer) == ("alice", "bob")
    found = world.read(policy, LATER)
    assert (found.head_signer, found.notes, found.lines) == ("bob", (), shown[0].lines)
    assert found.lines == done.lines


def test_a_revoked_promoter_cannot_rewrite_what_came_after_them(world):
    """The old head and the lines up to it, with one line more of before the revocation, signed by whoever stole the key."""
    lines = world.filled(2)
    policy = world.with_alice("revoked = 2026-11-21T10:30:00Z")
    world.take_over(policy, now="2026-11-21T11:00:00Z")
    kept = head_path(world.path).read_bytes()
    forged = world.sign(making(2)(2, sha256_hex(lines[1])))
    world.write([*lines, forged], who="alice")
    refused(world, r"\.head: its head is signed by alice", policy, LATER)
    head_path(world.path).write_bytes(kept)
    refused(world, r"ledger\.jsonl:3: line 3, which the head does not know yet, is signed by alice", policy, LATER)


def test_a_key_that_has_run_out_is_noted_and_stops_nobody(world):
    lines = world.filled(2)
    policy = world.with_alice("valid_until = 2026-11-21T11:00:00Z")
    assert world.read(policy, "2026-11-21T10:59:59Z").notes == ()
    (note,) = world.read(policy, LATER).notes
    assert "its head is signed by alice, whose key expired on 2026-11-21T11:00:00Z" in note
    assert "gate ledger sign" in note
    world.head(lines[:1])
    assert len(world.read(policy, LATER).notes) == 3
    world.take_over(policy)
    assert world.read(policy, LATER).notes == ()


def test_taking_a_ledger_over_leaves_no_other_check_out(world):
    lines = world.filled(3)
    policy = world.with_alice("revoked = 2026-11-21T11:00:00Z")
    for change, message in (
        (lambda: world.path.write_bytes(b"".join(lines[:2])), "lines were cut off"),
        (lambda: world.path.write_bytes(b"".join([lines[0], lines[2]])), "a line was added, removed or moved"),
        (lambda: world.head(lines, last="0" * 64), "says that line 3 is 000000000000"),
        (lambda: world.head(lines, who="carol"), "who is release, not promoter"),
        (lambda: head_path(world.path).unlink(), "is missing"),
    ):
        change()
        before = head_path(world.path).read_bytes() if head_path(world.path).exists() else None
        with pytest.raises(LedgerError, match=message):
            world.take_over(policy)
        assert before is None or head_path(world.path).read_bytes() == before
        world.write(lines)
    world.take_over(policy)


@pytest.mark.parametrize(
    "who, now, message",
    [
        ("alice", LATER, "the key alice was revoked"),
        ("carol", LATER, "carol is release; the ledger is signed by promoter"),
        ("mallory", LATER, "does not have the key"),
        ("bob", "2026-11-21T09:00:00Z", "the clock here says 2026-11-21T09:00:00Z"),
    ],
)
def test_only_a_promoter_who_counts_now_takes_a_ledger_over(world, who, now, message):
    world.filled(2)
    before = head_path(world.path).read_bytes()
    with pytest.raises(PromotionRefused, match=message):
        world.take_over(world.with_alice("revoked = 2026-11-21T11:00:00Z"), who=who, now=now)
    assert head_path(world.path).read_bytes() == before


def test_what_is_shown_can_still_be_refused_and_nothing_is_signed_where_nothing_is(world):
    with pytest.raises(PromotionRefused, match="there is no ledger yet"):
        world.take_over(world.policy)
    world.filled(1)
    before = head_path(world.path).read_bytes()
    with pytest.raises(LedgerError, match="put back"):
        world.take_over(world.policy, show=lambda ledger: ledger.require_line("9" * 64))
    assert head_path(world.path).read_bytes() == before


def test_a_whole_line_that_the_head_does_not_know_is_taken_over_with_it(world):
    lines = world.filled(2)
    world.head(lines[:1])
    world.take_over(world.policy)
    assert (world.read().notes, len(world.read().lines)) == ((), 2)


def test_a_head_of_no_lines_is_there_before_the_first_one(world):
    lines = world.filled(1)
    nothing = LedgerHead(entries=0, last=FIRST_PREVIOUS)
    head_path(world.path).write_bytes(world.sign(nothing, payload_type=LEDGER_HEAD))
    assert "line 1 is whole" in world.read().notes[0]
    world.path.write_bytes(lines[0][:50])
    assert world.read().lines == ()
    world.path.write_bytes(b"")
    assert "its first entry was begun and never committed" in world.read().notes[0]
    world.path.unlink()
    assert world.read().lines == ()
    world.append(5)
    assert world.read().notes == ()
    head_path(world.path).write_bytes(
        world.sign(msgspec.structs.replace(nothing, last="9" * 64), payload_type=LEDGER_HEAD)
    )
    refused(world, "says 0 lines, and that the last one is 999999999999")


@pytest.mark.parametrize("left", [b"", b'{"pay'])
def test_a_ledger_of_one_line_that_was_emptied_is_refused(world, left):
    world.filled(1)
    world.path.write_bytes(left)
    refused(world, "has 0 whole lines, and its head says 1: lines were cut off")


def test_a_promoter_counts_from_and_until_its_dates(world):
    world.filled(2)
    assert len(world.read(world.with_alice("valid_until = 2026-11-21T10:00:02Z")).lines) == 2
    refused(world, r":2: is signed by alice, .* expired", world.with_alice("valid_until = 2026-11-21T10:00:01Z"))
    refused(world, r":1: is signed by alice, .* valid from", world.with_alice("valid_from = 2026-11-21T10:00:01Z"))


def test_a_head_by_a_key_that_was_gone_by_then_is_refused(world):
    world.append(0, who="bob")
    world.append(5, who="bob")
    lines = world.path.read_bytes().splitlines(keepends=True)
    world.head(lines, who="alice")
    assert len(world.read().lines) == 2
    policy = world.with_alice("valid_until = 2026-11-21T10:00:05Z")
    refused(world, r"ledger\.jsonl\.head: is signed by alice, whose key was no longer valid", policy)
    assert len(world.read(world.with_alice("valid_from = 2026-11-21T10:00:09Z")).lines) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"last": "0" * 64}, "says that line 3 is 000000000000, and it is"),
        ({"entries": 4}, "has 3 whole lines, and its head says 4"),
        ({"entries": 2}, "says that line 2 is"),
        ({"entries": 1}, "says 1 lines, and there are 3"),
        ({"entries": 2**53}, "its head says 9007199254740992"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(world, values, message):
    lines = world.filled()
    world.head(lines, **values)
    refused(world, message)


def test_an_older_head_is_refused_as_soon_as_two_lines_are_beyond_it(world):
    lines = world.filled(4)
    for count, behind in ((4, 0), (3, 1)):
        world.head(lines[:count])
        assert len(world.read().notes) == behind
    world.head(lines[:2])
    refused(world, "says 2 lines, and there are 4")


def test_one_of_both_files_missing_is_refused(world):
    world.filled(2)
    kept = world.path.read_bytes()
    world.path.unlink()
    refused(world, "is missing, and ledger.jsonl.head says that it has 2 lines")
    world.path.write_bytes(kept)
    head_path(world.path).unlink()
    refused(world, "ledger.jsonl.head, which says how many lines it has, is missing")
    world.path.write_bytes(kept[:20])
    refused(world, "is missing")


def test_a_ledger_of_one_entry_that_lost_its_file_or_its_head_is_refused(world):
    lines = world.filled(1)
    world.path.unlink()
    refused(world, "is missing, and ledger.jsonl.head says that it has 1 lines")
    world.path.write_bytes(lines[0])
    head_path(world.path).unlink()
    refused(world, "which says how many lines it has, is missing")


@pytest.mark.parametrize("which", ["ledger", "head"])
def test_what_is_no_file_of_its_own_is_refused(world, which):
    world.filled(2)
    path = world.path if which == "ledger" else head_path(world.path)
    other = world.root / "other"
    path.rename(other)
    path.symlink_to(other)
    refused(world, "is a symbolic link")
    path.unlink()
    os.link(other, path)
    refused(world, "has 2 hard links, may have 1")
    path.unlink()
    os.mkfifo(path)
    refused(world, "is not a regular file")
    path.unlink()
    path.mkdir()
    refused(world, "is not a regular file")


def test_nothing_is_written_into_what_is_no_file_of_its_own(world):
    other = world.root / "other"
    other.write_bytes(b"")
    world.path.symlink_to(other)
    with pytest.raises(LedgerError, match="is a symbolic link"):
        world.append(1)
    assert other.read_bytes() == b""


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("other"), lambda path: path.mkdir()])
def test_a_lock_that_is_no_file_is_an_error_and_nothing_is_written(world, make):
    make(lock_path(world.path))
    with pytest.raises(LedgerError, match=r"ledger\.jsonl\.lock: cannot be locked"):
        world.append(1)
    assert not world.path.exists()


def test_a_folder_that_cannot_be_written_to_is_a_refusal(world):
    (world.root / "file").write_bytes(b"")
    path = world.root / "file" / "ledger.jsonl"
    with pytest.raises(LedgerError, match="cannot be"):
        append(path, world.policy, world.read(), making(1), world.signers["alice"])


def test_a_ledger_beyond_the_limit_is_refused_before_it_is_all_read(world, monkeypatch):
    world.filled(3)
    monkeypatch.setattr(ledger_module, "MAX_LEDGER_BYTES", 2000)
    refused(world, r"ledger\.jsonl:\d: is too long")


def test_a_torn_last_line_was_never_committed_and_the_next_entry_cuts_it_off(world):
    lines = world.filled(2)
    torn = world.sign(making(2)(2, sha256_hex(lines[1])))
    for part in (torn[:1], torn[:100], torn[:-1]):
        world.path.write_bytes(b"".join(lines) + part)
        found = world.read()
        assert len(found.lines) == 2
        assert f"line 3 is torn ({len(part)} bytes" in found.notes[0]
    world.append(7)
    found = world.read()
    assert [each.serial for each in found.history.entries] == [0, 1, 7]
    assert found.notes == ()


def test_a_whole_line_that_the_head_does_not_know_counts_and_the_next_entry_mends_the_head(world):
    lines = world.filled(3)
    world.head(lines[:2])
    found = world.read()
    assert len(found.lines) == 3
    assert "line 3 is whole, and ledger.jsonl.head does not know it yet" in found.notes[0]
    world.append(7, who="bob")
    assert world.read().notes == ()
    assert len(world.read().lines) == 4


def test_a_line_beyond_the_head_and_a_torn_one_after_it_are_refused(world):
    lines = world.filled(3)
    world.head(lines[:2])
    world.path.write_bytes(b"".join(lines) + b'{"pay')
    refused(world, "says 2 lines, and there are 3")


def test_whoever_comes_second_is_told_who_was_first(world):
    world.filled(1)
    seen = world.read()
    world.append(1, who="bob")
    before = world.path.read_bytes()
    with pytest.raises(
        PromotionRefused,
        match="somebody else was first: bob wrote entry 1 at 2026-11-21T10:00:01Z: promote serial 1 full of detector / "
        "production(.|\n)*run again",
    ) as caught:
        world.append(2, expected=seen)
    assert caught.value.exit_code == 4
    assert world.path.read_bytes() == before


def test_a_ledger_that_was_replaced_between_reading_and_writing_is_refused(world):
    world.filled(2)
    seen = world.read()
    world.path.unlink()
    head_path(world.path).unlink()
    world.append(50)
    with pytest.raises(LedgerError, match="was replaced by another ledger"):
        world.append(51, expected=seen)


def test_time_does_not_go_back(world):
    world.filled(2)
    with pytest.raises(PromotionRefused, match="clock here says 2026-11-21T09:00:00Z, .* is of 2026-11-21T10:00:01Z"):
        world.append(5, time="2026-11-21T09:00:00Z")
    assert len(world.append(5, time="2026-11-21T10:00:01Z").lines) == 3


@pytest.mark.parametrize(
    "who, message",
    [
        ("mallory", "does not have the key"),
        ("carol", "carol is release; the ledger is signed by promoter"),
        ("gate", "ci is gate; the ledger is signed by promoter"),
    ],
)
def test_nobody_else_writes(world, who, message):
    with pytest.raises(PromotionRefused, match=message):
        world.append(1, who=who)
    assert not world.path.exists()


def test_a_key_that_is_not_valid_now_writes_nothing(world):
    for more, message in (
        ("valid_until = 2026-11-21", "the key alice expired"),
        ("revoked = 2026-11-21", "the key alice was revoked"),
        ("valid_from = 2026-11-22", "the key alice is valid from"),
    ):
        world.policy = world.with_alice(more)
        with pytest.raises(PromotionRefused, match=message):
            world.append(1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"verdict": sha256_hex(b"1")}, r"ledger\.jsonl:3: promotes .*, which has all of the traffic already"),
        ({"bundle": "x" * 70_000}, "the entry is .* bytes long, the limit is 65536"),
        ({"model": ""}, "does not say the model"),
        ({"action": "rollback", "verdict": "9" * 64}, "never had all of the traffic"),
    ],
)
def test_an_entry_that_would_be_refused_when_it_is_read_is_not_written(world, values, message):
    world.filled(2)
    before = world.path.read_bytes(), head_path(world.path).read_bytes()
    with pytest.raises(LedgerError, match=message):
        world.append(5, **values)
    assert (world.path.read_bytes(), head_path(world.path).read_bytes()) == before


def test_a_line_that_was_kept_elsewhere_is_looked_for(world):
    world.filled(3)
    old = world.path.read_bytes(), head_path(world.path).read_bytes()
    witness = world.append(3).head
    assert world.read().require_line(witness) == 3
    world.path.write_bytes(old[0])
    head_path(world.path).write_bytes(old[1])
    assert len(world.read().lines) == 3
    with pytest.raises(LedgerError, match="put back to an older state"):
        world.read().require_line(witness)


@pytest.mark.parametrize("text", ["", "abc", "g" * 64, "a" * 63, "a" * 65])
def test_what_is_expected_has_to_be_a_whole_digest(text):
    with pytest.raises(SpecError, match="is no SHA-256"):
        require_digest(text)
    assert require_digest("A" * 64) == "a" * 64


@given(st.text(max_size=200), st.text(max_size=50))
def test_the_quick_writing_is_the_canonical_one(reason, bundle):
    with contextlib.suppress(UnicodeEncodeError):
        (reason + bundle).encode()
        entry = making(1, reason=reason, bundle=bundle)(0, FIRST_PREVIOUS)
        assert ledger_module._ENCODER.encode(entry) + b"\n" == payload_of(entry)


COMMON = """
    import os, signal, sys, time
    from pathlib import Path
    from gate.errors import GateError
    from gate.ledger import append, head_path, read_ledger
    from gate.manifest import sha256_hex
    from gate.release.statements import LedgerEntry
    from gate.signing import open_signer
    from gate.trust import read_policy

    policy, key = read_policy(Path(sys.argv[1])), open_signer(sys.argv[2])
    path = Path(sys.argv[3])

    def making(serial):
        return lambda index, previous: LedgerEntry(
            index=index, previous=previous, time="2026-11-21T11:00:00Z", action="promote", model="detector",
            slot="production", stage="full", full=True, verdict=sha256_hex(str(serial).encode()), serial=serial,
            engine="trt-fp16", engine_sha256="e" * 64, bundle="/b", policy_sha256="f" * 64, approvals=(),
            requests=None, reason="",
        )
"""


def script(body, world, key_file, *more, wait=True):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(COMMON) + textwrap.dedent(body)]
    command += [str(world.root / "trust.toml"), str(key_file), str(world.path), *map(str, more)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return finished(started) if wait else started


def finished(started):
    out, err = started.communicate(timeout=100)
    assert started.returncode == 0, err
    return out


@pytest.fixture
def key_file(world):
    """A promoter's key in a file, for other processes."""
    key = world.root / "keys" / "bob.pem"
    new_key(key, password=None)
    world.signers = {**world.signers, "bob": open_signer(str(key))}
    world.policy = write_policy(world.root, world.signers)
    return key


SECOND = """
    seen = read_ledger(path, policy)
    print("read", flush=True)
    while not Path(sys.argv[5]).exists():
        time.sleep(0.001)
    try:
        append(path, policy, seen, making(int(sys.argv[4])), key)
        print("won")
    except GateError as err:
        print("lost", err)
"""


def test_of_two_processes_that_decided_on_the_same_state_one_wins_and_the_other_is_told(world, key_file):
    world.filled(2)
    both = [script(SECOND, world, key_file, serial, world.root / "go", wait=False) for serial in (10, 20)]
    for each in both:
        assert each.stdout.readline() == "read\n"
    (world.root / "go").touch()
    said = sorted(finished(each) for each in both)
    assert said[0].startswith("lost")
    assert "somebody else was first: bob wrote entry 2" in said[0]
    assert said[1].startswith("won")
    assert len(world.read().lines) == 3


MANY = """
    won = 0
    for serial in range(15):
        while True:
            try:
                seen = read_ledger(path, policy)
                last = seen.history.last_serial("detector", "production")
                append(path, policy, seen, making(0 if last is None else last + 1), key)
                break
            except GateError as err:
                assert "somebody else was first" in str(err), err
    print("done")
"""
WATCH = """
    seen = 0
    while not Path(sys.argv[4]).exists():
        found = read_ledger(path, policy)
        assert len(found.lines) >= seen
        seen = len(found.lines)
    print(seen)
"""


def test_readers_never_see_a_ledger_that_does_not_verify_while_others_write(world, key_file):
    watcher = script(WATCH, world, key_file, world.root / "stop", wait=False)
    writers = [script(MANY, world, key_file, wait=False) for _ in range(2)]
    assert [finished(each) for each in writers] == ["done\n"] * 2
    (world.root / "stop").touch()
    finished(watcher)
    assert len(world.read().lines) == 30


KILLED = """
    first = int(sys.argv[4])
    for serial in range(first):
        append(path, policy, read_ledger(path, policy), making(serial), key)
    # Every call of this kind that an append makes, and a write that the kill tears in two.
    names = ("open", "write", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir", "close", "fstat")
    step, states = 0, set()
    kept = {each: each.read_bytes() for each in (path, head_path(path)) if each.exists()}
    while True:
        step += 1
        for each in (path, head_path(path)):
            each.unlink(missing_ok=True)
        for each, content in kept.items():
            each.write_bytes(content)
        pid = os.fork()
        if pid == 0:
            seen = read_ledger(path, policy)
            count = 0

            def counted(name, call):
                def inner(*args, **kwargs):
                    global count
                    count += 1
                    if count == step:
                        if name == "write":
                            call(args[0], bytes(args[1])[: len(args[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    found = call(*args, **kwargs)
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return found
                return inner

            for name in names:
                setattr(os, name, counted(name, getattr(os, name)))
            append(path, policy, seen, making(first), key)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = read_ledger(path, policy)
        assert len(found.lines) in (first, first + 1), len(found.lines)
        states.add((len(found.lines) - first, bool(found.notes)))
        # The same command again: it goes through, or says that this is done.
        if len(found.lines) == first:
            again = append(path, policy, found, making(first), key)
        else:
            again = append(path, policy, found, making(first + 1), key)
        after = read_ledger(path, policy)
        assert after.lines == again.lines and after.notes == (), after.notes
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    print(step, sorted(states))
"""


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_kill_at_any_call_of_an_append_leaves_the_old_or_the_new_and_it_can_be_run_again(world, key_file, first):
    said = script(KILLED, world, key_file, first)
    steps, _, states = said.partition(" ")
    assert int(steps) > 15
    # Not begun, torn or begun, a whole line that the head does not know, and done.
    expected = {(0, False), (0, True), (1, True), (1, False)}
    assert set(map(tuple, json.loads(states.replace("(", "[").replace(")", "]").lower()))) == expected


def test_a_full_disk_leaves_the_ledger_as_it_was(world, key_file):
    world.filled(2)
    before = world.path.read_bytes(), head_path(world.path).read_bytes()
    said = script(
        """
        import resource
        seen = read_ledger(path, policy)
        size = path.stat().st_size + 100
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            append(path, policy, seen, making(9), key)
        except GateError as err:
            print(err)
        """,
        world,
        key_file,
    )
    assert "cannot be written: File too large; nothing was added" in said
    assert (world.path.read_bytes(), head_path(world.path).read_bytes()) == before


def test_the_lock_lies_beside_the_ledger(world):
    world.append(1)
    assert lock_path(world.path).name == "ledger.jsonl.lock"
    assert lock_path(world.path).read_bytes() == b""
