"""Files: replaced whole or not at all, locked, and read with an error that names them."""

import contextlib
import errno
import hashlib
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from texforce import files, run
from texforce.errors import ArtifactError, InputError, NotFoundError, StorageError

# --- replacing ---


def write_new(temporary: Path, kind: str) -> None:
    if kind == "file":
        temporary.write_text("new")
        return
    (temporary / "inner").mkdir(parents=True)
    (temporary / "inner" / "file").write_text("new")


def write_old(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").write_text("old")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with the files' bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


NEW = {"file": {"place": b"new"}, "folder": {"place": None, "place/inner": None, "place/inner/file": b"new"}}
CASES = pytest.mark.parametrize(
    ("kind", "exists"), [(kind, exists) for kind in ("file", "folder") for exists in (False, True)]
)


@CASES
def test_what_is_written_takes_the_place_of_what_was_there_and_nothing_is_left_beside_it(tmp_path, kind, exists):
    if exists:
        write_old(tmp_path / "place", kind)
    with files.replacing(tmp_path / "place") as temporary:
        write_new(temporary, kind)
        assert (tmp_path / "place").exists() is exists
    assert contents(tmp_path) == NEW[kind]


@CASES
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, kind, exists, error):
    if exists:
        write_old(tmp_path / "place", kind)
    before = contents(tmp_path)

    def write_and_fail():
        with files.replacing(tmp_path / "place") as temporary:
            write_new(temporary, kind)
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert contents(tmp_path) == before


def steps_of_replacing(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[str]:
    """Note each call that `replacing` makes on the disk, and let the one of a number fail."""
    seen: list[str] = []

    def watched(owner, name):
        original = getattr(owner, name)

        def step(*arguments, **named):
            seen.append(name)
            if len(seen) - 1 == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **named)

        return step

    for owner, name in ((files, "sync"), (files, "open_to_umask"), (Path, "rename")):
        monkeypatch.setattr(owner, name, watched(owner, name))
    return seen


@CASES
def test_a_failure_of_any_step_leaves_what_was_there_or_what_is_new(tmp_path, kind, exists):
    with pytest.MonkeyPatch.context() as patch:
        steps = steps_of_replacing(patch)
        (tmp_path / "sound").mkdir()
        if exists:
            write_old(tmp_path / "sound" / "place", kind)
        with files.replacing(tmp_path / "sound" / "place") as temporary:
            write_new(temporary, kind)
    num_steps, last_rename = len(steps), len(steps) - 1 - steps[::-1].index("rename")
    assert steps[-1] == "sync", "the folder's list of files must be on the disk too"
    for number in range(num_steps):
        folder = tmp_path / str(number)
        folder.mkdir()
        if exists:
            write_old(folder / "place", kind)
        before = contents(folder)
        with pytest.MonkeyPatch.context() as patch:
            steps_of_replacing(patch, number)
            with pytest.raises(OSError, match="No space"), files.replacing(folder / "place") as temporary:
                write_new(temporary, kind)
        assert contents(folder) == (before if number <= last_rename else NEW[kind]), (number, steps[number])


def test_the_content_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
    steps = steps_of_replacing(monkeypatch)
    with files.replacing(tmp_path / "place") as temporary:
        write_new(temporary, "folder")
    assert steps[: steps.index("rename")].count("sync") == 3  # the file and both folders
    assert steps[steps.index("rename") :] == ["rename", "sync"]


@pytest.fixture
def umask():
    """Set the umask for one test."""
    previous = os.umask(0o027)
    os.umask(previous)
    yield os.umask
    os.umask(previous)


@pytest.mark.parametrize(("mask", "of_file", "of_folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_what_is_written_has_the_permissions_of_the_umask(tmp_path, umask, mask, of_file, of_folder):
    umask(mask)
    with files.replacing(tmp_path / "place") as temporary:
        write_new(temporary, "folder")
        (temporary / "inner" / "file").chmod(0o600)  # as safetensors does
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"place": of_folder, "place/inner": of_folder, "place/inner/file": of_file}


def test_a_folder_keeps_the_group_that_its_parent_hands_down(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2775)
    if not folder.stat().st_mode & stat.S_ISGID:
        pytest.skip("this file system knows no set-group-ID folders")
    with files.replacing(folder / "place") as temporary:
        write_new(temporary, "folder")
    assert (folder / "place" / "inner").stat().st_mode & stat.S_ISGID


def test_safetensors_errors_of_the_disk_are_errors_of_the_disk(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, files.replacing(tmp_path / "place"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "place"))
    with pytest.raises(SafetensorError, match="header"), files.replacing(tmp_path / "place"):
        raise SafetensorError("Error while deserializing header: too large")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_leaves_beside_a_place_is_removed_by_name(tmp_path, kind):
    write_old(tmp_path / "place", kind)
    before = contents(tmp_path)
    child = os.fork()
    if not child:
        with files.replacing(tmp_path / "place") as temporary:
            write_new(temporary, kind)
            os._exit(9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_temporaries(tmp_path)
    assert contents(tmp_path) == before


def test_other_peoples_files_are_not_taken_for_temporary_ones(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / ".hidden").write_text("mine")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / ".text.tmp").write_text("cut off")
    files.remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "mine.tmp", "precious"]
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_folder_whose_removal_is_cut_off_is_a_temporary_one(tmp_path, monkeypatch):
    write_old(tmp_path / "place", "folder")

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        files.remove(tmp_path / "place")
    monkeypatch.undo()
    assert not (tmp_path / "place").exists()
    files.remove_temporaries(tmp_path)
    assert contents(tmp_path) == {}


def lay(path, kind):
    """Put a folder, a file or a link to a folder, which holds something, where a checkpoint may lie."""
    if kind == "folder":
        write_old(path, "folder")
    elif kind == "file":
        path.write_text("a file")
    else:
        (path.parent / "elsewhere").mkdir(exist_ok=True)
        (path.parent / "elsewhere" / "file").write_text("mine")
        path.symlink_to(path.parent / ("elsewhere" if kind == "also a link" else "nowhere"))


@pytest.mark.parametrize("kind", ["folder", "file", "also a link", "also a link to nothing"])
def test_whatever_lies_in_the_place_of_a_folder_is_replaced_or_removed_and_no_link_followed(tmp_path, kind):
    place = tmp_path / "place"
    lay(place, kind)
    with files.replacing(place) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert place.is_dir()
    assert not place.is_symlink()
    assert [path.name for path in place.iterdir()] == ["new"]
    files.remove(place)
    lay(place, kind)
    files.remove(place)
    assert [path.name for path in tmp_path.iterdir()] == (["elsewhere"] if "link" in kind else [])
    assert [path.read_text() for path in tmp_path.rglob("file")] == (["mine"] if "link" in kind else [])


# --- links in folders that came from others ---


def lock_and_release(folder: Path) -> None:
    with files.locked(folder, nothing):
        pass


def remove_an_epoch(folder: Path) -> None:
    (folder / "epoch").mkdir()
    files.remove(folder / "epoch")


def check_room(folder: Path) -> None:
    run.check_room(folder, SimpleNamespace(rank=1, model="tiny"))


IMAGE, EPOCHS = torch.zeros(1, 3, 4, 4), [{"num_images": n, "reward_mean": 0.5, "heldout": {"jpeg": 0.5}} for n in (0, 1)]
# What writes, and the name at which a link waits for it.
WRITERS = {
    "the holder of a lock": (lock_and_release, ".holder.tmp"),
    "also the holder's own place": (lock_and_release, ".holder"),
    "also the room for a checkpoint": (check_room, ".room.tmp"),
    "also the removal of a checkpoint": (remove_an_epoch, ".epoch.old.tmp"),
    "also JSON": (lambda folder: files.write_json(folder / "a.json", {"a": 1}), ".a.json.tmp"),
    "also JSON in its own place": (lambda folder: files.write_json(folder / "a.json", {"a": 1}), "a.json"),
    "also an image": (lambda folder: files.write_image(folder / "0.png", IMAGE[0], {}), "0.png"),
    "also a grid": (lambda folder: run.write_grid(folder / "grid.png", ["a"], {"base": IMAGE}), "grid.png"),
    "also a curve": (lambda folder: run.write_curve(folder / "curve.png", EPOCHS, "jpeg"), "curve.png"),
}


@pytest.mark.parametrize("name", [
    "grids", "checkpoints", "unet", "also images", "also images/base",
])  # fmt: skip
def test_a_folder_that_holds_a_link_to_another_is_not_worked_in(tmp_path, name):
    folder, elsewhere = tmp_path / "theirs", tmp_path / "elsewhere"
    link = folder / name.removeprefix("also ")
    link.parent.mkdir(parents=True)
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"output_dir: .*{link.name}' is a link, through which nothing is written"):
        lock_and_release(folder)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("case", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path, case):
    write, name = WRITERS[case]
    (tmp_path / "victim").write_text("precious")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "victim")
    write(folder)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("write", [
    lambda folder: files.append_line(folder / "place", {"a": 1}),
    lambda folder: (folder / ".lock").symlink_to(folder / "place") or lock_and_release(folder),
], ids=["lines that are added", "also a lock"])  # fmt: skip
def test_what_cannot_take_a_links_place_stops_at_it(tmp_path, write):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "place").symlink_to(tmp_path / "victim")
    with pytest.raises((OSError, InputError), match=r"symbolic links|\.lock' is a link"):
        write(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_temporary_files_are_removed_in_subfolders_but_not_beyond_links(tmp_path):
    for name in ("ours/images/base", "theirs/inner"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ".0.png.x.tmp").write_text("")
    (tmp_path / "ours" / "images" / "link").symlink_to(tmp_path / "theirs" / "inner")
    (tmp_path / "ours" / "link").symlink_to(tmp_path / "theirs")
    files.remove_temporaries(tmp_path / "ours", "images/*/", "link/*/")
    assert [path.parent.name for path in tmp_path.rglob("*.tmp")] == ["inner"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 10_000, None], ids=["also no text", "also a long text", "a link"])
def test_whatever_a_foreign_holder_says_the_message_is_short(tmp_path, content):
    (tmp_path / "secret").write_text("secret")
    with files.locked(tmp_path / "out", nothing):
        (tmp_path / "out" / files.HOLDER).unlink()
        if content is None:
            (tmp_path / "out" / files.HOLDER).symlink_to(tmp_path / "secret")
        else:
            (tmp_path / "out" / files.HOLDER).write_bytes(content)
        with pytest.raises(InputError) as caught, files.locked(tmp_path / "out", nothing):
            pytest.fail("two hold it")
    assert "secret" not in str(caught.value).partition(" in use by ")[2]
    assert len(str(caught.value)) < 600


# --- JSON and text ---


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"prompt": "ein rötliches Fähnchen 🚩", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content


def test_a_number_that_json_has_not_leaves_the_file_as_it_was(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        files.write_lines(tmp_path / "a.json", [{"a": 1}, {"a": float("nan")}])
    with pytest.raises(ValueError, match="JSON"):
        files.append_line(tmp_path / "a.json", {"a": float("inf")})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(("content", "words"), [
    (b"{", "not JSON"),
    (b"", "not JSON"),
    (b"\xff\xfe{}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "must hold a JSON object"),
    (b"null", "must hold a JSON object"),
])  # fmt: skip
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"a.json: {words}"):
        files.read_json(tmp_path / "a.json")


def test_a_json_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"there is no file .*a\.json"):
        files.read_json(tmp_path / "a.json")


def test_text_is_utf_8_with_or_without_a_mark(tmp_path):
    for content in (b"caf\xc3\xa9", b"\xef\xbb\xbfcaf\xc3\xa9"):
        (tmp_path / "a.txt").write_bytes(content)
        assert files.read_text(tmp_path / "a.txt", "prompts") == "café"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"prompts: .*a\.txt' is not UTF-8 text \(byte 3\)"):
        files.read_text(tmp_path / "a.txt", "prompts")


def test_text_that_cannot_be_read_is_named_with_its_option(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in ((".", "Is a directory"), ("absent", "No such file"), ("loop", "Too many levels")):
        with pytest.raises(InputError, match=rf"^prompts: '{tmp_path / name}' cannot be read: {words}"):
            files.read_text(tmp_path / name, "prompts")


def test_an_error_of_the_disk_while_text_is_read_stays_one(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Input/output error") as raised:
        files.read_text(tmp_path / "a.txt", "prompts")
    assert raised.value.errno == errno.EIO


@pytest.mark.parametrize("rest", [b"", b'{"a": 3', b'{"a": "caf\xc3', b"\0\0"])
def test_a_last_line_that_was_cut_off_is_removed(tmp_path, rest):
    path = tmp_path / "lines.jsonl"
    lines = [{"a": 1}, {"a": "é"}]
    for line in lines:
        files.append_line(path, line)
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert files.read_lines(path) == lines
    assert path.read_bytes() == whole
    files.append_line(path, {"a": 3})
    assert files.read_lines(path) == [*lines, {"a": 3}]


def test_a_last_line_that_was_cut_off_before_its_end_is_kept(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}]
    files.append_line(path, {"a": 3})
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'\n{"a": 1}\n  \n\r\n{"a": 2}\n\n')
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line", [b'{"a": 2', b"[2]", b"\xff", b"\0"])
def test_a_broken_line_that_is_not_the_last_is_named_and_nothing_is_rewritten(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    content = b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n{"a"'
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"lines\.jsonl, line 3: "):
        files.read_lines(path)
    assert path.read_bytes() == content


def test_a_number_that_json_has_not_is_bad_input_in_lines_of_which_the_last_was_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": NaN}\n{"a"')
    with pytest.raises(InputError, match=r"lines\.jsonl: not JSON"):
        files.read_lines(path)
    assert path.read_bytes() == b'{"a": NaN}\n{"a"'


def test_a_file_of_lines_that_is_not_there_has_none(tmp_path):
    assert files.read_lines(tmp_path / "lines.jsonl") == []
    assert not list(tmp_path.iterdir())


def test_files_are_described_by_their_names_and_sums(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.bin").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert files.sha256(tmp_path / "a" / "b" / "c.bin") == expected
    assert files.describe_files(tmp_path / "a" / "b" / "c.bin") == {"name": "c.bin", "sha256": expected}
    assert files.describe_files(tmp_path / "a") == {"name": "a", "sha256": {"b/c.bin": expected}}


# --- images ---


def test_an_image_and_its_label_come_back_and_numbers_go_on(tmp_path):
    images = torch.randint(0, 256, (3, 3, 4, 5)) / 255
    labels = [{"prompt": f"ein Würfel 🎲 {i}", "seed": i} for i in range(3)]
    first = files.write_images(tmp_path / "images", images[:2], labels[:2], files.next_number(tmp_path / "images"))
    for name in ("grid.png", "grid_00009.png", "20240101_cat.png", "00007x.png"):  # not numbered by us
        (tmp_path / "images" / name).write_bytes(b"")
    later = files.write_images(tmp_path / "images", images[2:], labels[2:], files.next_number(tmp_path / "images"))
    assert [path.name for path in first + later] == ["00000.png", "00001.png", "00002.png"]
    for path, image, label in zip(first + later, images, labels, strict=True):
        pixels, text = files.read_image(path)
        assert torch.equal(pixels, image)
        assert text == {name: str(value) for name, value in label.items()}


def test_pixels_out_of_range_are_clamped(tmp_path):
    files.write_image(tmp_path / "a.png", torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1), {})
    assert files.read_image(tmp_path / "a.png")[0].flatten().tolist() == pytest.approx([0, 128 / 255, 1])


@pytest.mark.parametrize("length", [0, 4, 6000])
def test_a_damaged_image_is_refused_by_name(tmp_path, length):
    files.write_image(tmp_path / "a.png", torch.rand(3, 64, 64), {})
    content = (tmp_path / "a.png").read_bytes()
    assert len(content) > 10_000
    (tmp_path / "a.png").write_bytes(content[:length])
    with pytest.raises(ArtifactError, match=r"a\.png: not an image that can be read; delete it"):
        files.read_image(tmp_path / "a.png")


# --- folders ---


def test_a_folder_can_be_made_where_only_files_are_not_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_writable(tmp_path)
    files.check_writable(tmp_path / "a" / "b")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(InputError, match=r"output_dir: .*file' is a file"):
            files.check_writable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_an_error_of_storage(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    with pytest.raises(StorageError, match=r"^storage: No such file or directory: /proc/texforce$"):
        files.make_folder(Path("/proc/texforce"))


def test_a_folder_that_is_not_to_be_written_to_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(PermissionError, match="Permission denied") as raised:
        files.check_writable(tmp_path / "a")
    assert raised.value.filename == str(tmp_path)


def nothing() -> None:
    """A check that passes."""


def test_a_locked_folder_is_refused_with_the_name_of_its_holder(tmp_path):
    folder = tmp_path / "out"
    with files.locked(folder, nothing):
        with (
            pytest.raises(InputError, match=f"output_dir: .*out' is in use by process {os.getpid()} on "),
            files.locked(folder, nothing),
        ):
            pytest.fail("two hold it")
        (folder / files.HOLDER).unlink()
        with pytest.raises(InputError, match="in use by another process"), files.locked(folder, nothing):
            pytest.fail("two hold it")
    with files.locked(folder, nothing):
        assert (folder / files.HOLDER).is_file()
        (folder / "kept").touch()
    assert {path.name for path in folder.iterdir()} - {files.LOCK} == {"kept"}


def test_a_folder_that_stays_empty_goes_and_one_that_was_there_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "made" / "for" / "this"):
        with contextlib.suppress(RuntimeError), files.locked(folder, nothing):
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    (tmp_path / "made").mkdir()
    with files.locked(tmp_path / "made" / "out", nothing):
        (tmp_path / "made" / "other").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["other"]


def test_a_lock_is_released_by_an_error_and_by_a_kill(tmp_path):
    with contextlib.suppress(RuntimeError), files.locked(tmp_path / "out", nothing):
        raise RuntimeError
    child = os.fork()
    if not child:
        with files.locked(tmp_path / "out", nothing):
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "out" / files.HOLDER).is_file()
    with files.locked(tmp_path / "out", nothing):
        assert str(os.getpid()) in (tmp_path / "out" / files.HOLDER).read_text()
    assert not (tmp_path / "out" / files.HOLDER).exists()


def test_nothing_is_written_into_a_folder_that_a_check_refuses(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")

    def refuse():
        raise InputError("it is not ours")

    for folder in (tmp_path / "out", tmp_path / "absent"):
        with pytest.raises(InputError, match="not ours"), files.locked(folder, refuse):
            pytest.fail("it was locked")
    assert contents(tmp_path) == {"out": None, "out/precious": b""}


def test_a_folder_is_checked_again_with_the_lock_held(tmp_path):
    checked = []
    with files.locked(tmp_path / "out", lambda: checked.append((tmp_path / "out" / files.HOLDER).exists())):
        assert checked == [False, True]


def test_the_hubs_client_does_not_print_its_tries():
    import logging

    from huggingface_hub.utils import logging as hub

    before, tries = hub.get_verbosity(), logging.getLogger("huggingface_hub.utils._http")  # which says "Retrying in 1s"
    try:
        hub.set_verbosity_warning()
        files.quiet_hub.cache_clear()
        files.quiet_hub()
        assert [tries.isEnabledFor(level) for level in (logging.WARNING, logging.ERROR)] == [False, True]
    finally:
        hub.set_verbosity(before)
        files.quiet_hub.cache_clear()
