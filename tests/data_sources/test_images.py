import contextlib
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from gate.data import decoding, image_sources, images
from gate.data.image_spec import ImagesSpec, Preprocess
from gate.data.images import ImageItem, ImageSet, ImageSource
from gate.data.preprocess import preprocessed
from gate.errors import DataError

NONE = Preprocess(resize="none", scale=1.0)


def picture(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_set(folder, count=6, **sizes):
    items = []
    for index in range(count):
        path = folder / f"{index:03}.png"
        Image.fromarray(picture(index, **sizes)).save(path)
        items.append(ImageItem(str(path), 100 + index, path.name, label=index % 3))
    return ImageSet(tuple(items), "set")


def source_of(found, **settings):
    return ImageSource(found, **{"preprocess": NONE, "input_name": "images", "workers": 0, **settings})


def all_of(source, size):
    return [
        (batch.first, batch.inputs["images"].copy(), None if batch.labels is None else batch.labels.tolist())
        for batch in source.batches(size)
    ]


def shared_memories():
    """How many of them this process has open."""
    gc.collect()
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "trt-gate-batch" in str(file.readlink()):
                found.add(file.stat().st_ino)
    return len(found)


def test_every_image_comes_in_order_as_it_is(tmp_path):
    source = source_of(image_set(tmp_path))
    batches = all_of(source, 4)
    assert len(source) == 6
    assert [first for first, _, _ in batches] == [0, 4]
    assert [labels for _, _, labels in batches] == [[0, 1, 2, 0], [1, 2]]
    values = np.concatenate([inputs for _, inputs, _ in batches])
    assert np.array_equal(values, np.stack([picture(index).transpose(2, 0, 1) for index in range(6)]))
    assert values.dtype == np.float32
    assert source.ids == tuple(range(100, 106))


def test_workers_give_what_none_gives_and_leave_nothing_behind(tmp_path):
    found = image_set(tmp_path, 23)
    config = Preprocess(size=(40, 40), mean=(0.4, 0.5, 0.6), std=(0.2,))
    expected = all_of(source_of(found, preprocess=config), 5)
    with source_of(found, preprocess=config, workers=2) as source:
        assert source.uses_processes
        for _ in range(2):
            got = all_of(source, 5)
            assert [first for first, _, _ in got] == [first for first, _, _ in expected]
            for (_, ours, labels), (_, theirs, others) in zip(got, expected, strict=True):
                assert np.array_equal(ours, theirs)
                assert labels == others
        assert len(multiprocessing.active_children()) == 2
        assert 1 <= shared_memories() <= 5
    assert multiprocessing.active_children() == []
    assert shared_memories() == 0


def test_a_pass_that_stops_early_keeps_what_it_gave_and_the_next_is_whole(tmp_path):
    found = image_set(tmp_path, 12)
    with source_of(found, workers=2) as source:
        for _ in range(5):
            stopped = source.batches(2)
            kept = next(stopped)
            stopped.close()
            got = all_of(source, 2)
            values = np.concatenate([each[1] for each in got])
            assert np.array_equal(values, np.stack([picture(index).transpose(2, 0, 1) for index in range(12)]))
        assert shared_memories() <= 12
    assert np.array_equal(kept.inputs["images"][1], picture(1).transpose(2, 0, 1))
    assert kept.inputs["images"].flags.writeable


def test_a_source_that_is_dropped_ends_its_workers(tmp_path):
    source = source_of(image_set(tmp_path), workers=1)
    assert len(multiprocessing.active_children()) == 1
    del source
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []
    assert shared_memories() == 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_images
if __name__ == "__main__":
    source = test_images.source_of(test_images.image_set(Path(sys.argv[1]), 40), workers=2)
    import multiprocessing
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_where_their_parent_was_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(here=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=120)
    pids = done.stdout.split()
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)
    assert shared_memories() == 0


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_threads_take_over_where_the_reader_cannot_be_sent(tmp_path):
    class Local:
        def read(self, place):
            return Path(place).read_bytes()

    found = image_set(tmp_path, 9)
    expected = all_of(source_of(found), 4)
    with source_of(ImageSet(found.items, "set", reader=Local()), workers=2) as source:
        assert not source.uses_processes
        got = all_of(source, 4)
    assert all(np.array_equal(ours[1], theirs[1]) for ours, theirs in zip(got, expected, strict=True))


def test_without_room_in_shared_memory_the_batch_comes_by_the_pipe(tmp_path, monkeypatch):
    found = image_set(tmp_path, 5)
    with source_of(found, workers=1) as source:
        monkeypatch.setattr(source._pool, "_shared_memory", lambda size: None)
        got = all_of(source, 3)
    assert np.array_equal(np.concatenate([each[1] for each in got]), all_of(source_of(found), 5)[0][1])


def test_shared_memory_that_cannot_be_reserved_is_not_written_to(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    memory = decoding.SharedMemory(24)
    assert decoding._shared(memory.path, memory.inode, 0, (2, 3), "float32").shape == (2, 3)
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert decoding._shared(memory.path, memory.inode, 0, (2, 3), "float32") is None


def test_another_file_under_the_same_descriptor_is_not_written_to(tmp_path):
    path = tmp_path / "of the user"
    path.write_bytes(b"precious")
    assert decoding._shared(str(path), path.stat().st_ino + 1, 0, (2,), "float32") is None
    assert decoding._shared(str(tmp_path / "gone"), 1, 0, (2,), "float32") is None
    assert path.read_bytes() == b"precious"


def test_parts_by_the_pipe_and_parts_in_shared_memory_make_one_batch(tmp_path):
    decoder = decoding.Decoder(decoding.FileReader(), NONE, "float32")
    jobs = [decoding.Job(item.place, item.name, 32, 24) for item in image_set(tmp_path, 3).items]
    expected = np.empty((3, 3, 24, 32), np.float32)
    decoder.fill(expected, jobs)
    shared = decoding.SharedMemory(expected.nbytes)
    shared.mapped[:] = expected.tobytes()
    parts = []
    for start, stop, answer in ((0, 1, None), (1, 3, expected[1:3])):
        done = decoding.Future()
        done.set_result(answer)
        parts.append(decoding.Part(start, jobs[start:stop], done))
    free = []
    batch = decoding.PendingBatch(expected.shape, decoder, jobs, parts, memory=shared, free=free)
    assert np.array_equal(batch.result(), expected)
    assert free == [shared]


def test_batches_that_are_kept_are_not_written_over(tmp_path):
    found = image_set(tmp_path, 30)
    expected = [each[1] for each in all_of(source_of(found), 2)]
    with source_of(found, workers=2) as source:
        views = [batch.inputs["images"][1:] for batch in source.batches(2)]
        again = [batch.inputs["images"][1:] for batch in source.batches(2)]
    for kept in (views, again):
        assert all(np.array_equal(ours, theirs[1:]) for ours, theirs in zip(kept, expected, strict=True))


def test_shared_memory_is_used_again_once_its_batch_is_gone():
    free = []
    memory = decoding.SharedMemory(24)
    values = memory.lent((2, 3), "float32", free)
    view = values[1:].T
    del values
    assert free == []
    del view
    assert free == [memory]


def test_larger_batches_get_memory_of_their_own(tmp_path):
    found = image_set(tmp_path, 8)
    with source_of(found, workers=1) as source:
        for size in (2, 4, 3, 8):
            values = np.concatenate([each[1] for each in all_of(source, size)])
            assert np.array_equal(values[5], picture(5).transpose(2, 0, 1))
            assert len(values) == 8


def test_a_batch_ends_where_the_shape_changes(tmp_path):
    small, large = image_set(tmp_path, 3), tmp_path / "large"
    large.mkdir()
    found = ImageSet(
        small.items
        + tuple(
            ImageItem(item.place, item.image_id + 50, f"large/{item.name}", label=0)
            for item in image_set(large, 2, height=50).items
        ),
        "set",
    )
    batches = all_of(source_of(found), 4)
    assert [inputs.shape for _, inputs, _ in batches] == [(3, 3, 24, 32), (2, 3, 50, 32)]
    assert [first for first, _, _ in batches] == [0, 3]


def broken(folder):
    """One image of each kind of broken, and what is said of it."""
    good = folder / "good.jpg"
    Image.fromarray(picture(1, 200, 200)).save(good, "JPEG")
    whole = good.read_bytes()
    png = folder / "flipped.png"
    Image.fromarray(picture(1)).save(png)
    bytes_of_png = bytearray(png.read_bytes())
    bytes_of_png[len(bytes_of_png) // 2] ^= 0xFF
    Image.fromarray(picture(2)).save(folder / "frames.gif", save_all=True, append_images=[Image.fromarray(picture(3))])
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(folder / "deep.png")
    contents = {
        "missing.jpg": (None, "there is no such file"),
        "empty.jpg": (b"", "is empty: 0 bytes"),
        "half.jpg": (whole[: len(whole) // 2], "cannot be decoded: OSError: image file is truncated"),
        "end.jpg": (whole[:-2], "cannot be decoded: OSError: image file is truncated"),
        "text.jpg": (b"no image at all", "is no image that Pillow reads"),
        "flipped.png": (bytes(bytes_of_png), "cannot be decoded"),
        "frames.gif": ((folder / "frames.gif").read_bytes(), "has 2 frames"),
        "deep.png": ((folder / "deep.png").read_bytes(), "has more than 8 bits a channel"),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    items = [ImageItem(str(good), 0, "good.jpg", label=0)]
    items += [ImageItem(str(folder / name), index, name, label=0) for index, name in enumerate(contents, start=1)]
    return ImageSet(tuple(items), "set"), {name: said for name, (_, said) in contents.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_broken_images_are_named_at_once_before_any_is_used(tmp_path, workers):
    found, expected = broken(tmp_path)
    with pytest.raises(DataError, match="8 problems") as caught:
        source_of(found, workers=workers)
    for name, said in expected.items():
        assert f"  {name}: {said}" in str(caught.value)
    assert "good.jpg" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_of_many_problems_twenty_are_named_and_the_others_counted(tmp_path):
    items = tuple(ImageItem(str(tmp_path / f"{index}.png"), index, f"{index}.png", label=0) for index in range(33))
    with pytest.raises(DataError, match="33 problems") as caught:
        source_of(ImageSet(items, "set"))
    assert str(caught.value).count("there is no such file") == 20
    assert "and 13 more" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_between_passes_is_named(tmp_path, workers):
    found = image_set(tmp_path)
    with source_of(found, workers=workers) as source:
        (tmp_path / "003.png").write_bytes(b"broken meanwhile")
        with pytest.raises(DataError, match="003.png: is no image that Pillow reads"):
            all_of(source, 2)
        Image.fromarray(picture(3, 25, 32)).save(tmp_path / "003.png")
        with pytest.raises(DataError, match="003.png: is 32 x 25 pixels and was 32 x 24 before"):
            all_of(source, 2)


@dataclass(frozen=True)
class Fatal:
    """Ends the process that reads the fourth image a second time."""

    seen: str

    def read(self, place):
        if place.endswith("003.png"):
            if Path(self.seen).exists():
                os._exit(9)
            Path(self.seen).touch()
        return Path(place).read_bytes()


FATAL = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_images
from gate.errors import DataError
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = test_images.image_set(folder)
    found = test_images.ImageSet(found.items, "set", reader=test_images.Fatal(str(folder / "seen")))
    with test_images.source_of(found, workers=1) as source:
        try:
            test_images.all_of(source, 2)
        except DataError as err:
            print(err)
"""


def test_a_worker_that_dies_is_an_error(tmp_path):
    script = tmp_path / "fatal.py"
    script.write_text(FATAL.format(here=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a worker process that decodes images ended" in done.stdout
    assert "workers = 0 decodes without other processes" in done.stdout


UNGUARDED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_images
from gate.errors import DataError
print("run")
with test_images.source_of(test_images.image_set(Path(sys.argv[1])), workers=1) as source:
    print(len(test_images.all_of(source, 2)), source.uses_processes)
"""


def test_a_script_without_a_guard_is_run_once(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED.format(here=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "run"
    assert done.stdout.count("run") == 1
    assert done.stdout.endswith("True\n")


def test_a_broken_pool_names_an_image_that_was_being_decoded():
    done = decoding.Future()
    done.set_exception(BrokenProcessPool("gone"))
    with pytest.raises(DataError, match="one was decoding 7.png or an image near it"):
        decoding._result(done, [decoding.Job("x", "7.png")])


def test_truncated_images_that_pillow_was_told_to_accept_are_not(tmp_path, monkeypatch):
    found = image_set(tmp_path, 2)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="Pillow was told to accept truncated images"):
        source_of(found)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_what_the_model_takes(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert(mode).save(path)
    found = ImageSet((ImageItem(str(path), 0, "a.tif", label=0),), "set")
    ((_, values, _),) = all_of(source_of(found), 1)
    assert values.shape == (1, 3, 8, 8)
    assert np.all(values == 255)


def turned(path, orientation, height=24, width=32):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(0, height, width)).save(path, "JPEG", exif=exif, quality=95)
    return path


def test_exif_orientation_is_applied(tmp_path):
    path = turned(tmp_path / "a.jpg", 6)
    source = source_of(ImageSet((ImageItem(str(path), 0, "a.jpg", label=0, size=(24, 32)),), "set"))
    ((_, values, _),) = all_of(source, 1)
    with Image.open(path) as image:
        expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1)
    assert np.array_equal(values[0], expected)
    assert source.described()["turned_by_exif"] == 1
    with pytest.raises(
        DataError, match="is 24 x 32 pixels once its EXIF orientation is applied, its ground truth says 32 x 24"
    ):
        source_of(ImageSet((ImageItem(str(path), 0, "a.jpg", label=0, size=(32, 24)),), "set"))


@pytest.mark.parametrize("orientation, height", [(3, 24), (2, 24), (6, 32)])
def test_boxes_of_an_image_that_may_or_may_not_be_turned_are_refused(tmp_path, orientation, height):
    path = turned(tmp_path / "a.jpg", orientation, height)
    item = ImageItem(str(path), 0, "a.jpg", annotations=(), size=(32, height))
    with pytest.raises(DataError, match=f"EXIF orientation {orientation}, and its size does not tell"):
        source_of(ImageSet((item,), "set"))
    assert len(source_of(ImageSet((ImageItem(str(path), 0, "a.jpg", label=1),), "set"))) == 1


def test_boxes_of_an_image_whose_size_tells_that_it_is_turned_are_taken(tmp_path):
    path = turned(tmp_path / "a.jpg", 8)
    item = ImageItem(str(path), 0, "a.jpg", annotations=(), size=(24, 32))
    (batch,) = source_of(ImageSet((item,), "set")).batches(1)
    assert (batch.targets[0].image.width, batch.targets[0].image.height) == (24, 32)


def test_a_subset_follows_from_seed_and_names_and_not_from_the_order(tmp_path):
    found = image_set(tmp_path, 20)
    backwards = ImageSet(tuple(reversed(found.items)), "set")
    first = source_of(found, samples=7, seed=3)
    assert len(first) == 7
    assert first.ids == tuple(sorted(first.ids))
    assert source_of(found, samples=7, seed=3).ids == first.ids
    assert set(source_of(backwards, samples=7, seed=3).ids) == set(first.ids)
    assert source_of(found, samples=7, seed=4).ids != first.ids
    assert source_of(found, samples=20).ids == source_of(found).ids
    assert set(source_of(found, samples=6, seed=3).ids) < set(first.ids)


def test_the_same_subset_is_chosen_on_every_machine():
    items = tuple(ImageItem("", index, f"{index:03}.png") for index in range(20))
    chosen = images.chosen_items(ImageSet(items, "set"), 5, 3)
    assert [item.image_id for item in chosen] == [2, 3, 10, 16, 17]


def test_only_the_images_of_the_subset_are_decoded(tmp_path):
    found = image_set(tmp_path, 20)
    chosen = source_of(found, samples=5).ids
    for item in found.items:
        if item.image_id not in chosen:
            Path(item.place).write_bytes(b"broken")
    assert source_of(found, samples=5).ids == chosen


@pytest.mark.parametrize("samples, said", [(7, "has 6 images, 7 were asked for"), (0, "there is nothing to use")])
def test_fewer_images_than_asked_for_are_an_error(tmp_path, samples, said):
    with pytest.raises(DataError, match=said):
        source_of(image_set(tmp_path), samples=samples)


def test_a_set_without_images_is_an_error():
    with pytest.raises(DataError, match="there is nothing to use"):
        source_of(ImageSet((), "set"))


def test_a_batch_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="a batch holds at least one sample, got 0"):
        next(source_of(image_set(tmp_path, 1)).batches(0))


def test_images_without_a_label_among_others_are_an_error(tmp_path):
    found = image_set(tmp_path, 3)
    bare = ImageItem(found.items[0].place, 9, "bare.png")
    with pytest.raises(DataError, match="3 of 4 images have label, expected all or none"):
        source_of(ImageSet((*found.items, bare), "set"))


def test_an_image_of_another_size_than_a_fixed_input_is_named(tmp_path):
    with pytest.raises(DataError, match="000.png: is 32 x 24 pixels, .preprocess. says size = .24, 33."):
        source_of(image_set(tmp_path, 1), preprocess=Preprocess(resize="none", size=(24, 33)))


def test_inputs_of_another_type_are_made_exactly_or_refused(tmp_path):
    found = image_set(tmp_path, 2)
    ((_, values, _),) = all_of(source_of(found, dtype="uint8"), 2)
    assert values.dtype == np.uint8
    assert np.array_equal(values[1], picture(1).transpose(2, 0, 1))
    ((_, halves, _),) = all_of(source_of(found, dtype="float16", preprocess=Preprocess(resize="none")), 2)
    expected, _ = preprocessed(picture(1), Preprocess(resize="none"), image_id=0)
    assert np.array_equal(halves[1], expected.astype(np.float16))
    with pytest.raises(DataError, match="000.png: does not become uint8"):
        all_of(source_of(found, dtype="uint8", preprocess=Preprocess(resize="none")), 2)
    with pytest.raises(DataError, match="000.png: does not become int8"):
        all_of(source_of(found, dtype="int8"), 2)


def test_the_record_names_every_image_and_changes_with_its_content(tmp_path):
    found = image_set(tmp_path)
    record = source_of(found, samples=4, seed=1).described()
    assert json.loads(json.dumps(record)) == record
    assert (record["images"], record["of"], record["seed"], len(record["ids"])) == (4, 6, 1, 4)
    first = source_of(found).described()
    Image.fromarray(picture(77)).save(tmp_path / "002.png")
    second = source_of(found).described()
    assert first["contents_sha256"] != second["contents_sha256"]
    assert first["names_sha256"] == second["names_sha256"]


def test_without_pillow_the_error_says_what_to_install(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from gate.data.images import *\n"
        f"item = ImageItem({str(tmp_path / 'a.png')!r}, 0, 'a.png', label=0)\n"
        "ImageSource(ImageSet((item,), 'set'), preprocess=Preprocess(size=(8, 8)), input_name='x', workers=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DataError" in done.stderr
    assert 'pip install "trt-gate[images]"' in done.stderr


def test_modules_load_without_pillow():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import gate.data.image_sources, gate.data.image_spec, gate.data.preprocess, gate.data.decoding"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_few_images_start_no_workers_unless_asked(tmp_path):
    found = image_set(tmp_path, 2)
    assert source_of(found, workers=None).workers == 0
    many = ImageSet(tuple(ImageItem(found.items[0].place, index, f"{index}", label=0) for index in range(200)), "set")
    with source_of(many, workers=None) as source:
        assert source.workers >= 1


def test_each_kind_is_opened_by_the_spec(tmp_path):
    for name, seed in (("cat", 1), ("dog", 2)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.fromarray(picture(seed)).save(tmp_path / "pets" / name / "a.png")
    (tmp_path / "pets.csv").write_text("path,label\npets/cat/a.png,cat\npets/dog/a.png,dog\n")
    coco = {
        "images": [{"id": 5, "file_name": "dog/a.png", "width": 32, "height": 24}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 3, "name": "dog"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for spec in (
        ImagesSpec(kind="folder", path="pets"),
        ImagesSpec(kind="csv", path="pets.csv"),
    ):
        with image_sources.open_images(spec, tmp_path, preprocess=NONE, input_name="x", samples=2) as source:
            (batch,) = source.batches(8)
            assert batch.labels.tolist() == [0, 1]
            assert batch.targets is None
            assert source.categories.names == {0: "cat", 1: "dog"}
    spec = ImagesSpec(kind="coco", path="pets", annotations="coco.json", workers=0)
    with image_sources.open_images(spec, tmp_path, preprocess=NONE, input_name="x") as source:
        (batch,) = source.batches(8)
        assert batch.labels is None
        assert batch.targets[0].image.image_id == 5
        assert batch.targets[0].annotations[0]["area"] == 12.0
        assert np.array_equal(batch.inputs["x"][0], picture(2).transpose(2, 0, 1))
