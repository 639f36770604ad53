import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gate import atomic
from gate.errors import BundleError, GateError


def run_script(body: str, *args: object) -> str:
    """Run a script of its own process, so that it can be killed or limited; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(body), *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_is_written_with_its_folders_and_nothing_else_stays(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    atomic.write_bytes(path, b"one")
    atomic.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        atomic.write_bytes(tmp_path / "file", b"x")
        with atomic.folder(tmp_path / "folder") as made:
            (made / "inner").write_bytes(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder" / "inner").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == mode | (0o111 & ~umask)


def test_a_symbolic_link_at_the_target_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other").write_bytes(b"keep")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    atomic.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "other").read_bytes() == b"keep"
    assert not (tmp_path / "file").is_symlink()


def test_a_target_that_is_a_folder_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        atomic.write_bytes(tmp_path / "file", b"x")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_folder_whose_making_is_interrupted_leaves_nothing(tmp_path, error):
    def half():
        with atomic.folder(tmp_path / "entry") as made:
            (made / "file").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole(tmp_path):
    with atomic.folder(tmp_path / "a" / "entry") as made:
        (made / "sub").mkdir()
        (made / "sub" / "file").write_bytes(b"x")
        assert not (tmp_path / "a" / "entry").exists()
    assert (tmp_path / "a" / "entry" / "sub" / "file").read_bytes() == b"x"
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["entry"]


@pytest.mark.parametrize("existing", ["keep", "refuse", "replace"])
def test_what_happens_to_a_folder_that_exists(tmp_path, existing):
    path = tmp_path / "entry"
    path.mkdir()
    (path / "old").write_bytes(b"old")

    def write():
        with atomic.folder(path, existing=existing) as made:
            (made / "new").write_bytes(b"new")

    if existing == "refuse":
        with pytest.raises(GateError, match="entry: exists already"):
            write()
    else:
        write()
    assert [each.name for each in path.iterdir()] == ["new" if existing == "replace" else "old"]
    assert [each.name for each in tmp_path.iterdir()] == ["entry"]


def test_a_folder_is_replaced_where_the_file_system_cannot_exchange_names(tmp_path, monkeypatch):
    class NoSuchCall:
        renameat2 = None

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **kwargs: NoSuchCall)
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "old").write_bytes(b"old")
    with atomic.folder(tmp_path / "entry", existing="replace") as made:
        (made / "new").write_bytes(b"new")
    assert [each.name for each in (tmp_path / "entry").iterdir()] == ["new"]
    assert [each.name for each in tmp_path.iterdir()] == ["entry"]


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_holds_stays(tmp_path):
    dead = int(run_script("import os; print(os.getpid())"))
    for name in (f".tmp-{dead}-{'0' * 16}", f".tmp-{os.getppid()}-{'0' * 16}", ".tmp-other", f".tmp-{dead}-short"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    stale_file = tmp_path / f".tmp-{dead}-{'1' * 16}"
    stale_file.write_bytes(b"x")
    atomic.write_bytes(tmp_path / "file", b"x")
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"file", f".tmp-{os.getppid()}-{'0' * 16}", ".tmp-other", f".tmp-{dead}-short"}


def test_what_is_locked_stays_although_its_pid_is_unknown_here(tmp_path):
    """As in a cache that two containers share: the other's pid means nothing here, its lock does."""
    fcntl = pytest.importorskip("fcntl")
    dead = int(run_script("import os; print(os.getpid())"))
    other = tmp_path / f".tmp-{dead}-{'0' * 16}"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        atomic.remove_stale(tmp_path)
        assert other.exists()
    finally:
        os.close(lock)
    atomic.remove_stale(tmp_path)
    assert not other.exists()


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path):
    """A real limit of the kernel on file sizes stands in for the disk's end."""
    atomic.write_bytes(tmp_path / "file", b"old")
    output = run_script(
        """
        import resource, sys
        from pathlib import Path
        from gate import atomic
        from gate.errors import GateError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        root = Path(sys.argv[1])
        for target in ("file", "new"):
            try:
                atomic.write_bytes(root / target, b"x" * 5000)
            except GateError as err:
                print(err)
        try:
            with atomic.folder(root / "entry") as made:
                (made / "one").write_bytes(b"x" * 900)
                (made / "two").write_bytes(b"x" * 5000)
        except GateError as err:
            print(err)
        """,
        tmp_path,
    )
    assert output.count("cannot be written: File too large; nothing was left behind") == 3
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_really_full_disk_leaves_nothing_and_says_what_to_do(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(GateError, match="No space left on device(.|\n)*free some space"):
            atomic.write_bytes(disk / "file", b"x" * 200_000)
        with pytest.raises(GateError, match="No space left on device"), atomic.folder(disk / "entry") as made:
            (made / "file").write_bytes(b"x" * 200_000)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KILLED_AT_EVERY_STEP = """
    import os, signal, sys
    from pathlib import Path
    from gate import atomic

    root = Path(sys.argv[1])
    step = 0
    while True:
        step += 1
        pid = os.fork()
        if pid == 0:
            seen = 0

            def kill(event, args):
                global seen
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "fcntl.flock"):
                    seen += 1
                    if seen == step:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            atomic.write_bytes(root / "file", b"new" * 1000)
            with atomic.folder(root / "entry") as made:
                (made / "one").write_bytes(b"1" * 1000)
                (made / "two").write_bytes(b"2" * 1000)
            with atomic.folder(root / "entry", existing="replace") as made:
                (made / "three").write_bytes(b"3" * 1000)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        file = root / "file"
        content = file.read_bytes() if file.exists() else b""
        assert content in (b"", b"new" * 1000), content[:10]
        entry = root / "entry"
        files = {each.name: each.read_bytes() for each in entry.iterdir()} if entry.exists() else {}
        assert files in ({}, {"one": b"1" * 1000, "two": b"2" * 1000}, {"three": b"3" * 1000}), list(files)
        assert files or step < 40
        atomic.remove_stale(root)
        assert {each.name for each in root.iterdir()} <= {"file", "entry"}, list(root.iterdir())
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        if "one" in files or "three" in files:
            atomic.discard(entry)
    print(step)
"""


def test_a_kill_at_any_step_leaves_nothing_or_all(tmp_path):
    assert int(run_script(KILLED_AT_EVERY_STEP, tmp_path)) > 15


def test_discard_removes_files_folders_and_links_and_accepts_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "file", "folder", "nothing"):
        atomic.discard(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_excludes_another_holder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (
        atomic.locked(tmp_path / "lock"),
        Path(tmp_path / "lock").open("rb") as other,
        pytest.raises(BlockingIOError, match="unavailable"),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "link": "link: is a symbolic link",
        "pipe": "is not a regular file",
        ".": "is not a regular file",
        "none": "none: is missing",
    }.items():
        with pytest.raises(BundleError, match=message):
            atomic.open_regular(tmp_path / name)
    assert atomic.read_regular(tmp_path / "file", limit_bytes=3) == b"abc"
    with pytest.raises(BundleError, match="too long: the limit is 2 bytes"):
        atomic.read_regular(tmp_path / "file", limit_bytes=2)
    os.link(tmp_path / "file", tmp_path / "second")
    with pytest.raises(BundleError, match="has 2 hard links, may have 1"):
        atomic.open_regular(tmp_path / "file", single_link=True)


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert atomic.digest_of_file(tmp_path / "file").sha256.startswith("ba7816bf")
    assert atomic.digest_of_file(tmp_path / "file").size_bytes == 3


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_as_it_is_then(tmp_path, monkeypatch):
    path = tmp_path / "head"
    atomic.write_bytes(path, b"0")
    opened = os.open
    left = [3]

    def replaced(name, *rest, **options):
        file = opened(name, *rest, **options)
        if Path(name) == path and left[0]:
            left[0] -= 1
            other = tmp_path / "other"
            other.write_bytes(str(3 - left[0]).encode())
            other.replace(path)
        return file

    monkeypatch.setattr(os, "open", replaced)
    with atomic.open_regular(path, single_link=True) as stream:
        assert stream.read() == b"3"


def test_a_file_that_is_replaced_without_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "head"
    path.write_bytes(b"")
    opened = os.open

    def gone(name, *rest, **options):
        file = opened(name, *rest, **options)
        if Path(name) == path:
            other = tmp_path / "other"
            other.touch()
            other.replace(path)
        return file

    monkeypatch.setattr(os, "open", gone)
    with pytest.raises(BundleError, match="was replaced 100 times while it was opened"):
        atomic.open_regular(path, single_link=True)
