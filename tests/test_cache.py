import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.cache import Cache
from gate.errors import BundleError, GateError

KEY = Cache.entry_key(weights="w", opset=17)


def make(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"graph" * 100)
    (folder / "model.onnx.data").write_bytes(b"weights" * 100)


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return Cache(tmp_path / "cache", on_rebuild=said.append)


def test_what_was_put_is_got_with_its_files_and_meta(cache):
    assert cache.get("export", KEY) is None
    put = cache.put("export", KEY, make, {"opset": 17, "names": ["logits"]})
    got = cache.get("export", KEY)
    assert got == put
    assert got.meta == {"opset": 17, "names": ["logits"]}
    assert got.path("model.onnx").read_bytes() == b"graph" * 100
    assert len(got.sha256("model.onnx")) == 64


def test_meta_that_the_maker_fills_is_kept(cache):
    meta = {}

    def fills(folder):
        make(folder)
        meta["opset"] = 17

    assert cache.put("export", KEY, fills, meta).meta == {"opset": 17}


def test_a_file_that_the_entry_does_not_have_is_an_error(cache):
    entry = cache.put("export", KEY, make, {})
    with pytest.raises(KeyError, match="no file 'model.plan'; it has model.onnx, model.onnx.data"):
        entry.path("model.plan")


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=1, max_size=4))
def test_the_key_depends_on_every_part_and_not_on_their_order(parts):
    assert Cache.entry_key(**parts) == Cache.entry_key(**dict(reversed(parts.items())))
    name, value = next(iter(parts.items()))
    assert Cache.entry_key(**parts) != Cache.entry_key(**{**parts, name: [value]})


def test_another_version_of_the_gate_reuses_nothing(monkeypatch):
    before = Cache.entry_key(weights="w")
    monkeypatch.setattr("gate.__version__", "99.0")
    assert Cache.entry_key(weights="w") != before


def test_a_part_that_is_not_finite_makes_no_key():
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        Cache.entry_key(limit=float("nan"))


def test_an_existing_entry_is_not_made_again(cache):
    cache.put("export", KEY, make, {"a": 1})

    def never(folder):
        raise RuntimeError("made again")

    assert cache.put("export", KEY, never, {"a": 2}).meta == {"a": 1}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed"))


@pytest.mark.parametrize("damage", [flip, truncate, empty, link, folder_instead, pipe_instead, rename, Path.unlink])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "entry.json"])
def test_a_damaged_entry_is_reported_and_made_anew(cache, said, damage, name):
    good = cache.put("export", KEY, make, {"opset": 17})
    damage(good.folder / name)
    assert cache.get("export", KEY) is None
    assert len(said) == 1
    assert said[0].startswith(f"cache entry export/{KEY[:4]}… is corrupt (")
    assert said[0].endswith("; rebuilt")
    assert cache.put("export", KEY, make, {"opset": 17}) == good
    assert cache.get("export", KEY) == good
    assert len(said) == 1


def test_a_flipped_byte_names_the_file(cache, said):
    flip(cache.put("export", KEY, make, {}).path("model.onnx"))
    cache.get("export", KEY)
    assert said == [f"cache entry export/{KEY[:4]}… is corrupt (model.onnx: digest differs); rebuilt"]


def test_every_byte_of_the_record_counts(cache):
    record = cache.put("export", KEY, make, {"opset": 17}).folder / "entry.json"
    whole = record.read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 1
        cache.put("export", KEY, make, {"opset": 17})
        record.write_bytes(data)
        assert cache.get("export", KEY) is None


@pytest.mark.parametrize("add", [lambda f: (f / "extra").write_bytes(b"x"), lambda f: (f / "sub").mkdir()])
def test_an_entry_with_something_added_is_corrupt(cache, said, add):
    add(cache.put("export", KEY, make, {}).folder)
    assert cache.get("export", KEY) is None
    assert "not part of the entry" in said[0]


def test_an_entry_under_another_key_is_corrupt(cache, said):
    other = Cache.entry_key(weights="other")
    entry = cache.put("export", KEY, make, {})
    entry.folder.rename(entry.folder.with_name(other))
    assert cache.get("export", other) is None
    assert "is of export/" in said[0]


@pytest.mark.parametrize("replace", ["link", "file"])
def test_an_entry_that_is_no_folder_is_corrupt(cache, said, tmp_path, replace):
    entry = cache.put("export", KEY, make, {})
    entry.folder.rename(tmp_path / "moved")
    if replace == "link":
        entry.folder.symlink_to(tmp_path / "moved")
    else:
        entry.folder.write_bytes(b"x")
    assert cache.get("export", KEY) is None
    assert "not a folder" in said[0]
    assert (tmp_path / "moved" / "model.onnx").exists()
    cache.put("export", KEY, make, {})


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (lambda f: None, "nothing was made"),
        (lambda f: (f / "sub").mkdir(), "sub is not a plain file"),
        (lambda f: (f / "link").symlink_to("/etc/hosts"), "link is not a plain file"),
        (lambda f: (f / "entry.json").write_bytes(b"{}"), r"entry.json is not a plain file"),
    ],
)
def test_a_maker_that_does_not_write_plain_files_is_an_error(cache, maker, message):
    with pytest.raises(GateError, match=message):
        cache.put("export", KEY, maker, {})
    assert cache.get("export", KEY) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, GateError("no")])
def test_a_maker_that_is_interrupted_leaves_nothing(cache, error):
    def half(folder):
        make(folder)
        raise error

    with pytest.raises((KeyboardInterrupt, GateError), match=r"^$|no"):
        cache.put("export", KEY, half, {})
    assert list((cache.root / "export").iterdir()) == []


@pytest.mark.parametrize(("kind", "key"), [("../export", KEY), ("export", "../x"), ("export", "ABC"), ("", KEY)])
def test_a_key_that_could_lead_elsewhere_is_refused(cache, kind, key):
    with pytest.raises(GateError, match="not a cache key"):
        cache.get(kind, key)


def test_without_a_root_it_is_temporary_and_gone_at_exit():
    script = f"""
        from pathlib import Path
        from gate.cache import Cache
        cache = Cache(None)
        cache.put("export", {KEY!r}, lambda f: f.joinpath("a").write_bytes(b"x"), {{}})
        print(cache.root)
    """
    root = Path(
        subprocess.check_output([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], text=True).strip()
    )
    assert not root.exists()


def test_processes_that_make_the_same_entry_all_get_the_one_that_came_first(tmp_path):
    script = f"""
        import os, sys, time
        from pathlib import Path
        from gate.cache import Cache

        def make(folder):
            folder.joinpath("made").write_bytes(str(os.getpid()).encode() * 1000)
            time.sleep(0.1)

        cache = Cache(Path(sys.argv[1]), on_rebuild=lambda text: sys.exit(text))
        print("ready", flush=True)
        sys.stdin.readline()
        print(cache.put("engine", {KEY!r}, make, {{}}).sha256("made"))
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path)]
    workers = [
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    results = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert [each.name for each in (tmp_path / "engine").iterdir()] == [KEY]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from gate.cache import Cache

    root, key = Path(sys.argv[1]), sys.argv[2]

    def make(folder):
        folder.joinpath("a").write_bytes(b"a" * 1000)
        folder.joinpath("b").write_bytes(b"b" * 1000)

    step = 0
    while True:
        step += 1
        pid = os.fork()
        if pid == 0:
            seen = 0

            def kill(event, args):
                global seen
                if event in ("open", "os.rename", "os.mkdir", "os.scandir", "os.listdir", "fcntl.flock"):
                    seen += 1
                    if seen == step:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            Cache(root).put("engine", key, make, {"n": 1})
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        corrupt = []
        cache = Cache(root, on_rebuild=corrupt.append)
        entry = cache.get("engine", key)
        assert not corrupt, corrupt
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and entry.meta == {"n": 1}
            break
        if entry is not None:
            import shutil
            shutil.rmtree(entry.folder)
    assert [each.name for each in (root / "engine").iterdir()] == [key]
    print(step)
"""


def test_a_kill_at_any_step_of_put_leaves_no_corrupt_entry(tmp_path):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(KILLED), str(tmp_path), KEY]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
