"""Files and directories that appear whole, with one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_slim.errors import SlimError
from megatron_slim.files import check_space, new_directory, sole_writer, write_atomic

Write = Callable[[Path], None]


def write_directory(path: Path) -> None:
    with new_directory(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("new")


def write_file(path: Path) -> None:
    write_atomic(path, "new")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[write_directory, write_file])
def write(request: pytest.FixtureRequest) -> Write:
    """A way to write "new": as a directory, or as a file."""
    function: Write = request.param
    return function


@pytest.fixture
def umask() -> Iterator[None]:
    """Puts the umask back."""
    before = os.umask(0)
    os.umask(before)
    yield
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, umask: None, mask: int) -> None:
    os.umask(mask)
    write_directory(tmp_path / "out")
    write_file(tmp_path / "out.json")
    assert mode(tmp_path / "out") == mode(tmp_path / "out" / "inner") == 0o777 & ~mask
    assert mode(tmp_path / "out.json") == mode(tmp_path / "out" / "inner" / "file") == 0o666 & ~mask


def test_a_group_s_directory_stays_the_group_s(tmp_path: Path) -> None:
    tmp_path.chmod(0o2755)
    write_directory(tmp_path / "out")
    assert mode(tmp_path / "out") & stat.S_ISGID


def test_all_is_flushed_before_the_rename_and_the_parent_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fsync(descriptor: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def rename(source: Path, target: Path, real: Callable[[Path, Path], None] = os.rename) -> None:
        done.append("rename")
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_directory(tmp_path / "out")
    assert done == [".out.partial/inner/file", ".out.partial/inner", ".out.partial", "rename", "."]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_directory_that_cannot_be_flushed_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if code == errno.EINVAL else pytest.raises(OSError, match=str(tmp_path / "out")):
        write_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == (["out"] if code == errno.EINVAL else [])


@pytest.mark.parametrize("error", [ValueError(), SystemExit(143), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_error_without_a_name_gets_the_output_s(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "out"):
            os.write(-1, b"")

    with pytest.raises(OSError) as caught:
        fail()
    assert caught.value.filename == str(tmp_path / "out")


def test_leftovers_of_a_killed_run_go_and_nothing_else(tmp_path: Path, write: Write) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("precious")
    for kind in ("file", "directory", "link"):
        leftover = tmp_path / f".{kind}.partial"
        if kind == "directory":
            (leftover / "release").mkdir(parents=True)
            (leftover / "release" / "__0_0.distcp").write_text("half")
            (leftover / "link").symlink_to(tmp_path / "model")
        elif kind == "link":
            leftover.symlink_to(tmp_path / "model")
        else:
            leftover.write_text("half")
        (tmp_path / f".{kind}.lock").touch()
        write(tmp_path / kind)
    assert sorted(os.listdir(tmp_path)) == ["directory", "file", "link", "model"]
    assert (tmp_path / "model" / "file").read_text() == "precious"


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, write: Write) -> None:
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.out\.lock"):
        write(tmp_path / "out")
    assert not (tmp_path / "victim").exists()


def test_one_writer_at_a_time(tmp_path: Path, write: Write) -> None:
    out = tmp_path / "out"
    with sole_writer(out) as temporary:
        temporary.mkdir()
        with pytest.raises(SlimError, match=rf"^{out}: another process is writing it; wait for it"):
            write(out)
        assert temporary.is_dir()
        write(tmp_path / "another")
    assert os.listdir(tmp_path) == ["another"]


def test_a_lock_file_that_its_holder_has_just_removed_locks_nothing(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = []

    def flock(descriptor: int, operation: int, real: Callable[[int, int], None] = fcntl.flock) -> None:
        real(descriptor, operation)
        locked.append(os.fstat(descriptor).st_ino)
        if len(locked) <= 2:  # the previous writer ends between our opening the file and our locking it
            (tmp_path / ".out.lock").unlink()
        if len(locked) == 2:  # and the next one is faster than we are
            (tmp_path / ".out.lock").touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "out")
    assert len(locked) == 3 and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_every_writer_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "out"
    with pytest.raises(SlimError, match="already exists"), new_directory(out) as slow:
        (slow / "file").write_text("slow")
        with new_directory(out) as quick:
            (quick / "file").write_text("quick")
    assert (out / "file").read_text() == "quick" and os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    for kind in ("file", "empty", "full"):
        out = tmp_path / kind
        with pytest.raises(SlimError, match="already exists"), new_directory(out):
            if kind == "file":
                out.write_text("theirs")
            else:
                out.mkdir()
            if kind == "full":
                (out / "theirs").touch()
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]
    assert os.listdir(tmp_path / "empty") == [] and os.listdir(tmp_path / "full") == ["theirs"]


@pytest.mark.parametrize("replaced", [False, True])
def test_what_was_removed_is_not_published(tmp_path: Path, replaced: bool) -> None:
    with pytest.raises(SlimError, match="was removed while"), new_directory(tmp_path / "out") as partial:
        partial.rename(tmp_path / "elsewhere")  # kept, so that its inode is not used again
        if replaced:
            partial.mkdir()
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_a_file_has_its_old_content_until_it_has_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(os, "fsync", fail)
        write_atomic(file, "new")
    assert file.read_text() == "old"
    write_atomic(file, b"new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["plan.json"]


def test_a_relative_path_is_that_of_the_start(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("out"))
    with sole_writer(Path("other")) as temporary:
        assert temporary == tmp_path / ".other.partial"
    assert os.listdir(tmp_path) == ["out"]


def test_space_is_that_of_the_disk_for_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, asked = 4096, []

    def statvfs(path: Path) -> os.statvfs_result:
        asked.append(path)
        #                         bsize  frsize blocks free available
        return os.statvfs_result((1 << 20, block, 1000, 900, 500, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    check_space(tmp_path / "out", 500 * block)
    with pytest.raises(SlimError, match=r"out: needs 0\.1 GB, 0\.0 GB are free; make space"):
        check_space(tmp_path / "out", 100_000_000)
    with pytest.raises(SlimError, match="are free"):
        check_space(tmp_path, 500 * block + 1)
    assert asked == [tmp_path] * 3


def test_what_a_killed_run_has_left_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = tmp_path / ".out.partial" / "release"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"x" * 1_000_000)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 1000, 0, 0, 0, 0, 0, 0, 255)))
    check_space(tmp_path / "out", 1_000_000)
    with pytest.raises(SlimError, match="are free"):
        check_space(tmp_path / "out", 1_100_000)
    with pytest.raises(SlimError, match="are free"):
        check_space(tmp_path / "other", 1)
