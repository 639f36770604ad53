"""Faults of what is stored (baselines, cache entries, bundles), met through the command: none may pass."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gate.baseline import digest_of, read_baseline
from gate.manifest import canonical_json, sha256_hex
from tests.withstand.conftest import Project

BASELINE = "baselines/digits-two/candidate/cpu.json"


@pytest.fixture
def accepted(project: Project) -> Project:
    """The project with an accepted baseline, and a spec that asks for it."""
    project.edit(("  [engine.parity]\n", "  [engine.parity]\n  [engine.baseline]\n  top1_drop_at_most_pp = 0.5\n"))
    first = project.check()
    assert first.code == 1, "a first run without a baseline fails"
    assert "gate baseline accept" in first.text
    done = project.gate(
        "baseline", "accept", str(project.folder / "report"), "--reason", "first", "--by", "a tester",
        "--baselines", str(project.folder / "baselines"),
    )  # fmt: skip
    assert done.code == 0, done.text
    return project


def _edit(project: Project, change: Callable[[dict[str, Any]], None], *, sign_again: bool) -> None:
    path = project.folder / BASELINE
    raw = json.loads(path.read_bytes())
    change(raw)
    if sign_again:
        del raw["digest"]
        raw["digest"] = sha256_hex(canonical_json(raw))
    path.write_text(json.dumps(raw, indent=2, sort_keys=True))


def test_an_accepted_baseline_is_passed(accepted: Project) -> None:
    assert accepted.check().code == 0


def _loosen_output(raw: dict[str, Any]) -> None:
    raw["outputs"][0]["rel_rmse"] = 0.9


def _loosen_top1(raw: dict[str, Any]) -> None:
    raw["task"]["top1"] = 700


def _loosen_interval(raw: dict[str, Any]) -> None:
    raw["task"]["interval"] = {"lower": 0.1, "upper": 1.0}


@pytest.mark.parametrize("change", [_loosen_output, _loosen_top1, _loosen_interval])
def test_a_baseline_edited_by_hand_is_refused(accepted: Project, change: Callable[[dict[str, Any]], None]) -> None:
    _edit(accepted, change, sign_again=False)
    outcome = accepted.check()
    assert outcome.code == 1
    assert outcome.failing["baseline"]["error"] == "BaselineError"


@pytest.mark.parametrize("change", [_loosen_top1, _loosen_interval])
def test_a_baseline_that_its_own_record_contradicts_is_refused_even_with_a_new_digest(
    accepted: Project, change: Callable[[dict[str, Any]], None]
) -> None:
    _edit(accepted, change, sign_again=True)
    outcome = accepted.check()
    assert outcome.code == 1
    assert outcome.failing["baseline"]["error"] == "BaselineError"


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "sm90"), ("precision", "int8"), ("data_sha256", "0" * 64), ("backend_version_family", "99")],
)
def test_a_baseline_of_something_else_is_refused_and_not_compared(accepted: Project, key: str, value: str) -> None:
    _edit(accepted, lambda raw: raw["subject"].__setitem__(key, value), sign_again=True)
    assert digest_of(read_baseline(accepted.folder / BASELINE)), "it is whole, and of something else"
    outcome = accepted.check()
    assert outcome.code == 1
    assert f"is of another {key}" in outcome.failing["baseline"]["message"]


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"null"])
def test_a_baseline_that_cannot_be_read_is_refused(accepted: Project, content: bytes) -> None:
    (accepted.folder / BASELINE).write_bytes(content)
    outcome = accepted.check()
    assert outcome.code == 1
    assert "baseline" in outcome.failing


def test_a_run_that_fails_otherwise_cannot_be_accepted(accepted: Project) -> None:
    from tests.withstand.test_engine_faults import permuted_classes

    accepted.break_engine(permuted_classes)
    assert accepted.check().code == 1
    done = accepted.gate(
        "baseline", "accept", str(accepted.folder / "report"), "--reason", "make it green",
        "--baselines", str(accepted.folder / "other"),
    )  # fmt: skip
    assert done.code == 1
    assert not (accepted.folder / "other").exists()


@pytest.mark.parametrize("kind", ["reference", "engine", "model"])
def test_a_flipped_byte_in_the_cache_is_noticed_and_made_again(
    project: Project, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("own-cache")
    project = Project(project.folder, cache, project.capture)
    assert project.check().code == 0
    files = sorted(path for path in (cache / kind).rglob("*") if path.is_file() and path.name != "entry.json")
    assert files
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 0x40
    files[0].write_bytes(data)
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert "is corrupt" in outcome.text
    assert f"{kind}/" in outcome.text
    assert "corrupt" not in project.check().text


@pytest.fixture
def bundle(project: Project) -> Path:
    """A sealed bundle."""
    outcome = project.check("--seal", str(project.folder / "dist"))
    assert outcome.code == 0, outcome.text
    path = project.folder / "dist" / "digits-two" / "candidate"
    assert project.gate("verify", str(path)).code == 0
    return path


def _files(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def test_a_flipped_byte_in_each_file_of_a_bundle_is_refused(project: Project, bundle: Path) -> None:
    for path in _files(bundle):
        data = path.read_bytes()
        broken = bytearray(data)
        broken[len(broken) // 2] ^= 1
        path.write_bytes(broken)
        outcome = project.gate("verify", str(bundle))
        assert outcome.code == 4, f"{path}: {outcome.text}"
        assert path.name in outcome.text or "statement" in outcome.text, outcome.text
        path.write_bytes(data)
    assert project.gate("verify", str(bundle)).code == 0


def test_an_added_file_is_refused(project: Project, bundle: Path) -> None:
    (bundle / "artifacts" / "extra.bin").write_bytes(b"x")
    outcome = project.gate("verify", str(bundle))
    assert outcome.code == 4
    assert "extra.bin" in outcome.text


def test_a_removed_file_is_refused(project: Project, bundle: Path) -> None:
    for path in _files(bundle):
        kept = path.read_bytes()
        path.unlink()
        outcome = project.gate("verify", str(bundle))
        assert outcome.code == 4, f"{path}: {outcome.text}"
        path.write_bytes(kept)


def test_edited_metadata_is_refused(project: Project, bundle: Path) -> None:
    path = bundle / "artifacts" / "metadata.json"
    text = path.read_text()
    assert '"fp32"' in text
    path.write_text(text.replace('"fp32"', '"fp16"'))
    outcome = project.gate("verify", str(bundle))
    assert outcome.code == 4
    assert "metadata.json" in outcome.text


def test_an_engine_of_another_bundle_is_refused(project: Project, bundle: Path) -> None:
    engine = bundle / "artifacts" / "model.onnx"
    engine.write_bytes(engine.read_bytes() + b"\x00")
    outcome = project.gate("verify", str(bundle))
    assert outcome.code == 4
    assert "model.onnx" in outcome.text


def test_nothing_that_failed_is_sealed(project: Project) -> None:
    from tests.withstand.test_engine_faults import one_weight_zeroed

    project.break_engine(one_weight_zeroed)
    outcome = project.check("--seal", str(project.folder / "dist"))
    assert outcome.code == 1
    assert "not sealed" in outcome.text
    assert not (project.folder / "dist" / "digits-two" / "candidate").exists()


def test_a_cached_engine_changed_between_check_and_seal_is_not_sealed(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gate import pipeline

    real = pipeline.seal_passed

    def tampered(file: Any, run: Any, out: Path, **options: Any) -> Any:
        path = Path(run.engines[0].engine_path)
        kept = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        try:
            return real(file, run, out, **options)
        finally:
            path.write_bytes(kept)

    monkeypatch.setattr(pipeline, "seal_passed", tampered)
    outcome = project.check("--seal", str(project.folder / "dist"))
    assert outcome.code == 4, outcome.text
    assert "its sha256 is" in outcome.text
    assert not (project.folder / "dist" / "digits-two" / "candidate").exists()


def _left_over(folder: Path) -> list[str]:
    """Files that a later run would take for whole ones although they are not."""
    found: list[str] = []
    for entry in folder.rglob("entry.json"):
        if ".tmp" in str(entry.relative_to(folder)):
            continue
        record = json.loads(entry.read_bytes())
        for name, expected in record["files"].items():
            data = (entry.parent / name).read_bytes()
            if sha256_hex(data) != expected["sha256"]:
                found.append(str(entry.parent / name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_at_any_time_leaves_nothing_half_written(project: Project, number: signal.Signals) -> None:
    """Stopped at several moments of check and seal: what is there afterwards is whole, and the next run passes."""
    cache, dist = project.folder / "cache", project.folder / "dist"
    command = [
        sys.executable, "-m", "gate", "check", str(project.spec), "--cache", str(cache), "--seal", str(dist),
        "--report", str(project.folder / "report"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    stopped = 0
    for delay in (0.3, 1.2, 2.2, 2.8, 3.4):
        process = subprocess.Popen(
            command, cwd=project.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(delay)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        stopped += process.returncode != 0
        assert b"Traceback" not in error
        assert _left_over(cache) == []
        sealed = dist / "digits-two" / "candidate"
        if sealed.exists():
            assert project.gate("verify", str(sealed)).code == 0
            shutil.rmtree(dist)
    assert stopped
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.gate("verify", str(dist / "digits-two" / "candidate")).code == 0


def test_a_full_disk_leaves_nothing_half_written(project: Project) -> None:
    """A limit on the size of files stands for a disk that is full in the middle of a write."""
    cache, dist = project.folder / "cache", project.folder / "dist"
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))\n"
        "from gate.cli.main import main\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = ["check", str(project.spec), "--cache", str(cache), "--seal", str(dist)]
    for limit in (700, 3_000, 20_000, 120_000):
        done = subprocess.run(
            [sys.executable, "-c", script, str(limit), *arguments],
            cwd=project.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        assert _left_over(cache) == []
        assert not (dist / "digits-two" / "candidate").exists()
    again = subprocess.run(
        [sys.executable, "-m", "gate", *arguments], cwd=project.folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
