"""Whole files and folders: kept or not there, under faults, on Windows, and on file systems that sync no folders."""

import errno
import json
import os
import threading

import pytest
from safetensors import SafetensorError

from easyedit_nmke import files
from easyedit_nmke.history import journal
from easyedit_nmke.history.journal import Journal, lock
from easyedit_nmke.statistics import covariance


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "deep" / "result.json"
    files.write_json(path, {"a": "é"})
    assert path.read_bytes() == b'{\n "a": "\xc3\xa9"\n}\n' and names(path.parent) == ["result.json"]
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), files.whole(path) as temporary:
            temporary.write_text("half")
            raise error
    assert json.loads(path.read_text()) == {"a": "é"} and names(path.parent) == ["result.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Eight processes that start together make the same statistics; in containers they may well have the same process id."""
    path, both = tmp_path / "moment", threading.Barrier(2)

    def write(text):
        with files.whole(path) as temporary:
            temporary.write_text(text)
            both.wait()

    writers = [threading.Thread(target=write, args=(text * 99,)) for text in "ab"]
    [writer.start() for writer in writers], [writer.join() for writer in writers]
    assert path.read_text() in ("a" * 99, "b" * 99) and names(tmp_path) == ["moment"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_nothing_new(tmp_path, monkeypatch, call):
    path = tmp_path / "result"
    files.write_whole(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            files.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["result"]


def test_it_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls, synced = [], []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), synced.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    files.write_whole(tmp_path / "result", b"new")
    assert calls == ["fsync", "replace", "fsync"]
    assert synced == [(tmp_path / "result").stat().st_ino, tmp_path.stat().st_ino]


def test_statistics_that_cannot_be_cached_are_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert not covariance.save(tmp_path / "file" / "moment", {}, {}) and "were not cached" in caplog.text


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "out"
    (tmp_path / "deep" / ".out.partial").mkdir(parents=True)  # left by a killed attempt
    (tmp_path / "deep" / ".out.partial" / "half").write_text("half")
    with pytest.raises(ZeroDivisionError), files.whole_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        raise ZeroDivisionError
    assert names(tmp_path / "deep") == []
    path.mkdir()  # an empty one is taken
    with files.whole_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert names(path) == []
    assert names(tmp_path / "deep") == ["out"] and (path / "sub" / "a").read_text() == "a" and names(path) == ["sub"]
    for taken in (path, path / "sub" / "a"):
        with pytest.raises(ValueError, match="not an empty folder"), files.whole_folder(taken):
            pass


class Windows:
    """`os` as it is there: files are text unless told, no folder can be opened, only what can be written can be synced, and no
    folder is replaced."""

    name, O_BINARY = "nt", 1 << 40

    def __init__(self):
        self.writable = {}

    def __getattr__(self, name):
        if name in ("pread", "pwrite", "fchmod"):
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        file = os.open(path, flags & ~self.O_BINARY, *mode)
        self.writable[file] = flags & (os.O_RDWR | os.O_WRONLY), flags & self.O_BINARY
        return file

    def write(self, file, data):
        return os.write(file, data if self.writable[file][1] else bytes(data).replace(b"\n", b"\r\n"))

    def fsync(self, file):
        if not self.writable[file][0]:
            raise OSError(errno.EBADF, "Bad file descriptor")
        os.fsync(file)

    def replace(self, one, other):
        if os.path.isdir(other):
            raise PermissionError(errno.EACCES, "Access is denied")
        os.replace(one, other)


@pytest.fixture
def windows(monkeypatch):
    for module in (files, journal, lock):
        monkeypatch.setattr(module, "os", Windows())
    for module in (files, journal):
        monkeypatch.setattr(module, "BINARY", Windows.O_BINARY)
    shared = files.os
    monkeypatch.setattr(journal, "os", shared), monkeypatch.setattr(lock, "os", shared)


@pytest.mark.usefixtures("windows")
def test_files_and_folders_on_windows(tmp_path):
    files.write_json(tmp_path / "a.json", [1])
    files.write_json(tmp_path / "a.json", [2])
    assert (tmp_path / "a.json").read_bytes() == b"[\n 2\n]\n"
    (tmp_path / "out").mkdir()
    with files.whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("a")
    assert names(tmp_path) == ["a.json", "out"] and names(tmp_path / "out") == ["a"]


@pytest.mark.usefixtures("windows")
def test_a_journal_on_windows(tmp_path):
    with Journal.create(tmp_path, {"model": "m"}, {}) as found:
        for number in range(2):
            found.append({"id": number}, {})
        with pytest.raises(BlockingIOError, match="in this process"):
            Journal.open(tmp_path)
    with Journal.open(tmp_path) as found:
        assert [record.content["id"] for record in found.records()] == [0, 1]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_file_systems_that_sync_no_folders(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def only_files(file):
        if os.fstat(file).st_ino == tmp_path.stat().st_ino:
            raise OSError(code, os.strerror(code))
        fsync(file)

    monkeypatch.setattr(os, "fsync", only_files)
    files.write_whole(tmp_path / "a", b"a")
    assert (tmp_path / "a").read_bytes() == b"a"


@pytest.mark.parametrize("make", [files.whole, files.whole_folder])
def test_a_disk_that_is_too_full_for_tensors_is_an_oserror(make, tmp_path):
    with pytest.raises(OSError, match=r"out could not be written \(no space\)"), make(tmp_path / "out"):
        raise SafetensorError("no space")
    assert not list(tmp_path.iterdir())
