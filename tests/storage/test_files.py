"""A file is written as a whole or not at all, and a folder is written to by one process at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from batchshaping.storage.files import created, only_writer, quoted, replaced

WRITERS = pytest.mark.parametrize("write", [replaced, created])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(write: Any, path: Path) -> None:
    with write(path) as partial:
        partial.write_text("half")
        raise RuntimeError


def test_a_file_is_replaced_once_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert files(tmp_path) == ["file"]


def test_a_file_is_created_once_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with created(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(FileExistsError), created(path) as partial:
        partial.write_text("second")
    assert path.read_text() == "first"
    assert files(tmp_path) == ["file"]


@WRITERS
def test_an_error_leaves_the_old_file_and_nothing_else(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(RuntimeError):
        fail_half_way(write, path)
    assert files(tmp_path) == []
    path.write_text("old")
    with pytest.raises(RuntimeError):
        fail_half_way(write, path)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["file"]


# What else is in the folder


def test_two_writers_of_one_file_do_not_see_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replaced(path) as first, replaced(path) as second:
        assert first != second
        second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first"
    assert files(tmp_path) == ["file"]


@WRITERS
def test_a_file_that_is_in_the_way_is_not_written_to(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    # Even if somebody guessed the name.
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    for make in (lambda at: at.symlink_to(victim), lambda at: os.link(victim, at)):
        make(tmp_path / ".guessed.partial")
        with pytest.raises(FileExistsError), write(tmp_path / "file"):
            pass
        assert victim.read_text() == "kept"
        assert files(tmp_path) == [".guessed.partial", "victim"]
        (tmp_path / ".guessed.partial").unlink()


def test_of_a_symbolic_link_the_link_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("kept")
    for target_is_there in (True, False):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        if not target_is_there:
            target.unlink()
        with pytest.raises(FileExistsError), created(link):
            pass
        with replaced(link) as partial:
            partial.write_text("new")
        assert link.read_text() == "new" and not link.is_symlink()
        assert target.exists() == target_is_there


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe", "device"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        path = Path(os.devnull)
    before = stat.S_IFMT(path.lstat().st_mode)
    expected = "Is a directory" if kind == "folder" else "Not a regular file"
    with pytest.raises(OSError, match=expected), replaced(path):
        pass
    assert stat.S_IFMT(path.lstat().st_mode) == before


@WRITERS
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any_new_file(write: Any, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with write(tmp_path / "new") as partial:
            partial.write_text("new")
        (tmp_path / "plain").write_text("plain")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "plain")]
    assert modes[0] == modes[1] == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    with replaced(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_without_hard_links_a_file_is_created_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", fail)
    test_a_file_is_created_once_and_never_replaced(tmp_path)


# Several processes

FORK = multiprocessing.get_context("fork")


def write_at_once(write: Any, path: Path, letter: str, barrier: Any, said: Any) -> None:
    barrier.wait()
    try:
        with write(path) as partial:
            partial.write_text(letter * 100_000)
        said.put("wrote " + letter)
    except FileExistsError:
        said.put("refused " + letter)


@WRITERS
def test_of_writers_at_once_one_wins_whole(write: Any, tmp_path: Path) -> None:
    for attempt in range(10):
        path = tmp_path / f"file{attempt}"
        barrier, said = FORK.Barrier(4), FORK.Queue()
        for letter in "abcd":
            FORK.Process(target=write_at_once, args=(write, path, letter, barrier, said), daemon=True).start()
        words = sorted(said.get(timeout=60).split() for _ in "abcd")
        text = path.read_text()
        assert text in {letter * 100_000 for letter in "abcd"}
        assert len(files(tmp_path)) == attempt + 1
        wrote = [letter for word, letter in words if word == "wrote"]
        assert wrote == ([text[0]] if write is created else [*"abcd"])


def hold(folder: Path, forks: bool, ready: Any) -> None:
    with only_writer(folder), replaced(folder / "file") as partial:
        partial.write_text("half")
        child = os.fork() if forks else 0
        if child or not forks:
            ready.put(child)
        time.sleep(60)


@contextmanager
def holder(folder: Path, forks: bool) -> Iterator[Any]:
    """A process that holds a folder, perhaps with a child that outlives it."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(folder, forks, ready), daemon=True)
    process.start()
    child = ready.get(timeout=60)
    try:
        yield process
    finally:
        process.kill()
        process.join()
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.signals
@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a child"])
def test_a_folder_is_held_until_its_process_ends(forks: bool, tmp_path: Path) -> None:
    with holder(tmp_path, forks) as process:
        (half,) = files(tmp_path)
        with pytest.raises(BlockingIOError), only_writer(tmp_path):
            pass
        assert files(tmp_path) == [half]
        process.kill()
        process.join()
        # What it left half written goes with the next one that holds the folder.
        with only_writer(tmp_path):
            assert files(tmp_path) == []


def test_a_folder_is_held_in_one_process_too(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(BlockingIOError), only_writer(tmp_path):
        pass
    with pytest.raises(RuntimeError), only_writer(tmp_path):
        raise RuntimeError
    with only_writer(tmp_path):
        pass


def test_where_there_are_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    (tmp_path / ".x.partial").write_text("half")
    with only_writer(tmp_path):
        pass
    assert files(tmp_path) == [".x.partial"]
    with pytest.raises(FileNotFoundError), only_writer(tmp_path / "missing"):
        pass


# What errors quote


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    "make",
    [
        lambda: "a\nb" * 1000,
        lambda: list(range(10**5)),
        lambda: 10**5000,
        lambda: nested(10**5),
        lambda: "\x1b[31m",
    ],
    ids=["text", "list", "int", "nested", "escape"],
)
def test_what_is_quoted_fits_in_a_line(make: Callable[[], object]) -> None:
    text = quoted(make())
    assert text.isprintable() and 0 < len(text) <= 80


@pytest.mark.parametrize("value", [3, "a", None, (0.6,), float("nan")])
def test_what_is_short_is_quoted_as_it_is(value: object) -> None:
    assert quoted(value) == repr(value)
