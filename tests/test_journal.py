"""The journal under faults: kills at every call that writes, full and read-only disks, cut and flipped files, two writers."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_nmke import files as whole_files
from easyedit_nmke.history import journal
from easyedit_nmke.history.journal import Journal, disk, lock

COUNT = 4
CHANGES = ("open", "write", "pwrite", "fsync", "replace", "ftruncate", "unlink", "makedirs")


class Faulty:
    """`os` as the journal sees it, but `fault(name)` is asked before every call that can change the disk.

    The fault may raise, or return "half": then a write takes half of its bytes before `after` is called.
    """

    def __init__(self, fault, after=None):
        self.fault, self.after = fault, after

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def call(*args, **kwargs):
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
                return real(*args, **kwargs)
            if self.fault(name) == "half":
                real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                self.after()
            return real(*args, **kwargs)

        return call


@contextmanager
def faulty(*args):
    with pytest.MonkeyPatch.context() as patch:
        for module in (journal, whole_files, lock):
            patch.setattr(module, "os", Faulty(*args))
        yield


def at(number, action, half=False):
    """A fault before the call of this number, counted from 1; with `half`, after half of the write of this number."""
    calls = 0

    def fault(name):
        nonlocal calls
        calls += not half or name in ("write", "pwrite")
        if calls != number or (half and name not in ("write", "pwrite")):
            return None
        return "half" if half else action()

    return fault, action


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code):
    def action():
        raise OSError(code, os.strerror(code))

    return action


def content(number):
    return {"id": f"e{number}", "request": {"prompt": f'"Zoë", {number}?', "subject": "Zoë"}, "when": 1.5 * number}


def tensors(number):
    generator = torch.Generator().manual_seed(number)
    return {
        "left": torch.randn(7, 1, generator=generator),
        "right": torch.randn(1, 9, generator=generator).bfloat16(),
        "rows": torch.randint(0, 9, (number,), generator=generator),
        "mask": torch.randn(9, generator=generator) > 0,
    }


def base():
    return {"basis": torch.arange(12.0).reshape(3, 4).T, "scale": torch.tensor(2.5)}


def build(folder, count=COUNT):
    """Start the journal or go on with it, up to `count` records."""
    made = Journal.exists(folder)
    with Journal.open(folder) if made else Journal.create(folder, {"model": "m", "layers": [0, 1]}, base()) as found:
        for number in range(len(found), count):
            found.append(content(number), tensors(number))


def same(got, expected):
    return sorted(got) == sorted(expected) and all(
        torch.equal(got[k], v) and got[k].dtype == v.dtype and got[k].shape == v.shape for k, v in expected.items()
    )


def check_prefix(found):
    """Whatever records there are, they are the first ones, bit for bit."""
    for number, record in enumerate(found.records()):
        assert record.number == number and record.content == content(number)
        assert same(record.tensors, tensors(number))
    return len(found)


def files(folder):
    """All bytes of a journal but its lock."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("lock", "lock.json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def started(run):
    """A child process that runs this; cheaper by seconds than one that imports torch."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    return child


def forked(run):
    """How a child process that ran this ended (0: well)."""
    return os.waitpid(started(run), 0)[1]


@pytest.fixture(autouse=True, scope="module")
def no_waiting():
    """A killed process loses nothing that it has written: only a power cut does, and none comes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "journal"
    build(folder)
    return folder


def copy(sound, tmp_path, name="journal"):
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    return shutil.copytree(sound, tmp_path / name)


def test_what_was_written_is_read(sound):
    with Journal.open(sound) as found:
        assert found.header == {"model": "m", "layers": [0, 1]} and found.libraries["torch"] == torch.__version__
        assert same(found.tensors(), base()) and found.tensors()["basis"].is_contiguous()
        assert check_prefix(found) == COUNT
        assert [record.number for record in found.records(start=2)] == [2, 3]
    assert all(json.loads(line)["content"]["id"] for line in (sound / "index.jsonl").read_text().splitlines())


numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8])
shapes = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(), plain), st.dictionaries(st.from_regex(r"[a-z.0-9]{1,9}", fullmatch=True), st.tuples(dtypes, shapes))
)
def test_any_content_and_tensors_come_back(tmp_path_factory, text, kinds):
    made = {name: (torch.rand(shape, dtype=torch.float64) * 99).to(dtype) for name, (dtype, shape) in kinds.items()}
    folder = tmp_path_factory.mktemp("any")
    with Journal.create(folder, text, made) as found:
        found.append(text, made)
    with Journal.open(folder) as found:
        (record,) = found.records()
        assert found.header == record.content == text
        for got in (found.tensors(), record.tensors):
            assert same(got, made)
    shutil.rmtree(folder)


@pytest.mark.parametrize("half", [False, True], ids=["before", "half-written"])
def test_killed_at_every_write(tmp_path, sound, half):
    for number in range(1, 999):
        folder = tmp_path / f"{number}"

        def run(number=number, folder=folder):
            with faulty(*at(number, die, half)):
                build(folder)

        status = forked(run)
        if Journal.exists(folder):
            with Journal.open(folder, write=False) as found:
                seen = check_prefix(found)
            with Journal.open(folder) as found:
                assert check_prefix(found) == seen
        build(folder)
        assert files(folder) == files(sound)
        shutil.rmtree(folder)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert number > (3 + 2 * COUNT if half else 10 * COUNT)


def test_everything_is_on_the_disk_before_it_counts(tmp_path):
    """What a power cut could show and a kill cannot: no rename before its file and the index are synced, nor an end before."""
    build(tmp_path, 1)
    calls = []
    with Journal.open(tmp_path) as found, faulty(lambda name: calls.append(name)):
        found.append(content(1), tensors(1))
    assert calls == ["open", "write", "fsync", "write", "fsync", "replace", "fsync"]


def test_killed_while_it_is_repaired(tmp_path, sound):
    for number in range(1, 99):
        folder = copy(sound, tmp_path)
        path = folder / "edits/000001.safetensors"
        damaged = flipped(path.read_bytes(), 99)
        path.write_bytes(damaged)

        def run(number=number, folder=folder):
            with faulty(*at(number, die)):
                Journal.open(folder, repair=True).close()

        status = forked(run)
        with Journal.open(folder, repair=True) as found:
            assert check_prefix(found) == 1
        kept = list(files(folder).values())
        assert damaged in kept and all((sound / f"edits/00000{i}.safetensors").read_bytes() in kept for i in (0, 2, 3))
        build(folder)
        assert {k: v for k, v in files(folder).items() if not k.startswith("dropped")} == files(sound)
        if status == 0:
            break
    assert number > 8


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("half", [False, True], ids=["before", "half-written"])
def test_a_disk_that_fails_at_every_write(tmp_path, sound, code, lasting, half):
    for number in range(1, 99):
        folder, broken = tmp_path / f"{number}", False
        build(folder, 2)
        once, after = at(number, fail(code), half)

        def fault(name, once=once, after=after):
            nonlocal broken
            if broken and lasting:
                after()
            try:
                outcome = once(name)
            except OSError:
                broken = True
                raise
            broken = broken or outcome == "half"
            return outcome

        with Journal.open(folder) as found:
            failed = False
            with faulty(fault, after):
                try:
                    found.append(content(2), tensors(2))
                except OSError as error:
                    failed = True
                    assert error.errno == code and os.strerror(code) in str(error) and "id 'e2', prompt" in str(error)
                    assert ("make room" in str(error)) == (code == errno.ENOSPC)
            assert failed == broken and len(found) == 3 - failed
            if failed and not lasting:
                assert files(folder).keys() == files(sound).keys() - {f"edits/00000{i}.safetensors" for i in (2, 3)}
                assert (sound / "index.jsonl").read_bytes().startswith(files(folder)["index.jsonl"])
            kept = len(found)
            if number % 2:  # go on in this process, or in the next
                found.append(content(kept), tensors(kept))
                kept += 1
        with Journal.open(folder, write=False) as found:
            assert check_prefix(found) in ((kept,) if number % 2 or not lasting else (2, 3))
        build(folder)
        assert files(folder) == files(sound)
        shutil.rmtree(folder)
        if not failed:
            break
    assert number > (2 if half else 7)


def test_a_disk_that_is_full_when_it_starts(tmp_path, sound):
    for number in range(1, 99):
        folder = tmp_path / f"{number}"
        try:
            with faulty(*at(number, fail(errno.ENOSPC))):
                Journal.create(folder, {"model": "m", "layers": [0, 1]}, base()).close()
        except OSError as error:
            assert f"no journal could be made in {folder}: No space left on device; make room" in str(error)
        else:
            break
        build(folder)
        assert files(folder) == files(sound)
    assert number > 8


def test_a_limit_that_the_system_sets(tmp_path):
    """The kernel itself cuts a write short."""
    build(tmp_path / "journal", 1)

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Journal.open(tmp_path / "journal") as found:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match="nothing of it counts: File too large"):
                found.append(content(1), {"big": torch.zeros(9999)})
            found.append(content(1), tensors(1))

    assert forked(run) == 0
    with Journal.open(tmp_path / "journal") as found:
        assert check_prefix(found) == 2


def test_an_interrupt_in_the_middle_adds_nothing(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    build(tmp_path / "journal", 1)
    with Journal.open(tmp_path / "journal") as found:
        before = files(tmp_path / "journal")
        for number in range(1, 8):
            with faulty(*at(number, interrupt)), pytest.raises(KeyboardInterrupt):
                found.append(content(1), tensors(1))
            assert files(tmp_path / "journal") == before


def test_what_json_or_safetensors_cannot_hold_changes_nothing(tmp_path):
    build(tmp_path / "journal", 1)
    with Journal.open(tmp_path / "journal") as found:
        before, shared = files(tmp_path / "journal"), torch.zeros(3)
        for bad in ((({"id": {1}}), {}), ({}, {"a": shared, "b": shared}), ({}, {"a": 1})):
            with pytest.raises((TypeError, RuntimeError, AttributeError)):
                found.append(*bad)
        assert files(tmp_path / "journal") == before
        found.append(content(1), tensors(1))
        assert check_prefix(found) == 2


def test_a_read_only_directory_can_be_read(tmp_path, sound):
    folder = copy(sound, tmp_path)
    path = folder / "index.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    before = files(folder)
    with faulty(lambda name: fail(errno.EROFS)()):
        with pytest.raises(OSError, match=r"for writing \(write=False reads it\): Read-only file system; make it writable"):
            Journal.open(folder)
        with Journal.open(folder, write=False) as found:
            assert check_prefix(found) == COUNT - 1
            with pytest.raises(ValueError, match="open it with write=True"):
                found.append({}, {})
    assert files(folder) == before


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]


def cut(data, position):
    return data[:position]


def check_damage(folder, name, caplog):
    """Open a journal with one damaged file: it is told which file or record, and what is given is right; records left."""
    caplog.clear()
    record = int(name[6:12]) if name.startswith("edits") else None
    try:
        with Journal.open(folder) as found:
            assert same(found.tensors(), base())
            left = check_prefix(found)
    except ValueError as error:
        assert "backup" in str(error) or "format version" in str(error)
        if "repair=True" not in str(error):
            assert name in ("header.json", "base.safetensors") and name in str(error)
            return None
        assert name in str(error) and f"{folder}: record {record if record is not None else ''}" in str(error)
        with Journal.open(folder, repair=True) as found:
            left = check_prefix(found)
        assert f"keeps the {left} records before" in str(error) and left < COUNT - 1
    else:
        assert left == COUNT - 1, "the damage was not noticed"
    assert record in (None, left) and f"dropped record {left}" in caplog.text
    assert "id 'e" in caplog.text or "index" in name
    return left


def damage_everywhere(sound, tmp_path, caplog, damage, positions):
    folder = copy(sound, tmp_path)
    for name, data in files(sound).items():
        for position in positions(name, len(data)):
            (folder / name).write_bytes(damage(data, position))
            left = check_damage(folder, name, caplog)
            if left is not None:
                kept = files(folder).values()
                assert all(edit in kept for file, edit in files(sound).items() if file.startswith("edits") and file != name)
                folder = copy(sound, tmp_path)
            (folder / name).write_bytes(data)


def test_a_flipped_bit_is_found_wherever_it_is(sound, tmp_path, caplog):
    damage_everywhere(sound, tmp_path, caplog, flipped, lambda name, size: range(0, size, 1 if name == "header.json" else 7))


def test_a_flipped_end_of_line_is_found(sound, tmp_path, caplog):
    data = (sound / "index.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    damage_everywhere(sound, tmp_path, caplog, flipped, lambda name, size: ends if name == "index.jsonl" else ())


def test_a_cut_file_is_found_wherever_it_is_cut(sound, tmp_path, caplog):
    def positions(name, size):
        ends = [i + 1 for i, byte in enumerate((sound / name).read_bytes()) if byte == ord("\n")][:-1]
        return sorted({*range(0, size - 1, 17), size - 2, *(ends if name == "index.jsonl" else ())})

    damage_everywhere(sound, tmp_path, caplog, cut, positions)


@pytest.mark.parametrize("name", ["index.jsonl", "base.safetensors", "edits/000000.safetensors", "edits/000002.safetensors"])
def test_a_missing_file_is_named(sound, tmp_path, name, caplog):
    folder = copy(sound, tmp_path)
    (folder / name).unlink()
    check_damage(folder, name, caplog)


def test_the_last_record_without_its_file_is_dropped(sound, tmp_path, caplog):
    folder = copy(sound, tmp_path)
    (folder / "edits/000003.safetensors").unlink()
    assert check_damage(folder, "edits/000003.safetensors", caplog) == 3
    assert "dropped record 3 (id 'e3', prompt '\"Zoë\", 3?'): edits/000003.safetensors is missing; 3 sound records" in caplog.text
    build(folder)
    assert files(folder) == files(sound)


def test_lines_of_another_journal_are_refused(sound, tmp_path):
    """Each line is sound by itself; the checksums tie it to the lines before and to the header."""
    folder = tmp_path / "other"
    with Journal.create(folder, {"model": "other"}, {}) as found:
        for number in range(COUNT):
            found.append(content(number), tensors(number))
    (folder / "index.jsonl").write_bytes((sound / "index.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"record 0 .* is damaged: line 1 of index"):
        Journal.open(folder)
    folder = copy(sound, tmp_path)
    one, two, three, four = (folder / "index.jsonl").read_bytes().splitlines(keepends=True)
    for lines in ([two, one, three, four], [one, three, four], [one, two, two, three, four]):
        (folder / "index.jsonl").write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match="is damaged: line"):
            Journal.open(folder)


@pytest.mark.parametrize("number", [0, 1, "2.5"])
def test_another_format_version_is_refused(sound, tmp_path, number):
    folder = copy(sound, tmp_path)
    header = json.loads((folder / "header.json").read_text())
    text, _ = disk.seal({**header, "version": number}, "")
    (folder / "header.json").write_bytes(text)
    before = files(folder)
    with pytest.raises(ValueError, match=f"format version {number!r}, expected 2; open it with the release"):
        Journal.open(folder)
    assert files(folder) == before


def test_what_is_nested_too_deep_is_damage(sound, tmp_path):
    deep = b'{"record": ' + b"[" * 100_000
    folder = copy(sound, tmp_path)
    (folder / "header.json").write_bytes(deep)
    with pytest.raises(ValueError, match=r"header\.json"):
        Journal.open(folder)
    mark = hashlib.sha256(deep).hexdigest()  # even where it was sealed
    assert disk.unseal(deep + f', "checksum": "{mark}"}}'.encode(), "") == (None, "")


def test_a_journal_starts_only_in_an_empty_directory(sound, tmp_path):
    folder = copy(sound, tmp_path)
    with pytest.raises(ValueError, match="already holds a journal; open it"):
        Journal.create(folder, {}, {})
    assert files(folder) == files(sound)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(it holds thesis.txt\)"):
        Journal.create(tmp_path / "full", {}, {})
    with pytest.raises(ValueError, match=r"holds no journal \(header.json is missing\)"):
        Journal.open(tmp_path / "full")
    (folder / "header.json").unlink()
    with pytest.raises(ValueError, match=r"is not empty \(it holds edits, index.jsonl"):
        Journal.create(folder, {}, {})


def test_other_files_among_the_records_stay(sound, tmp_path):
    folder = copy(sound, tmp_path)
    (folder / "edits" / "notes.txt").write_text("mine")
    (folder / "edits" / "000003.safetensors").write_bytes(b"")
    build(folder)
    assert (folder / "edits" / "notes.txt").read_text() == "mine"


def test_one_writer_and_any_number_of_readers(sound, tmp_path, caplog):
    folder = copy(sound, tmp_path)
    ready, told = os.pipe()

    def hold():
        with Journal.open(folder):
            os.write(told, b"!")
            signal.pause()

    child = started(hold)
    try:
        os.read(ready, 1)
        with pytest.raises(BlockingIOError, match=rf"written by process {child} on {socket.gethostname()} .since 20.*wait for it"):
            Journal.open(folder)
        with Journal.open(folder, write=False) as found:
            assert check_prefix(found) == COUNT
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with caplog.at_level(logging.INFO), Journal.open(folder) as found:
        assert check_prefix(found) == COUNT
    assert f"took over the lock of process {child} on {socket.gethostname()}, which is gone" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO), Journal.open(folder) as found:
        with pytest.raises(BlockingIOError, match="already open for writing in this process; close"):
            Journal.open(folder)
        assert "took over" not in caplog.text


def test_a_journal_that_nobody_holds_can_be_opened_again(sound, tmp_path):
    folder = copy(sound, tmp_path)
    found = Journal.open(folder)
    del found
    Journal.open(folder).close()
    code = "import sys; from easyedit_nmke.history.journal import Journal; found = Journal.open(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and not (folder / "lock.json").exists()


def test_a_forked_process_does_not_give_the_lock_back(sound, tmp_path):
    folder = copy(sound, tmp_path)
    with Journal.open(folder) as found:
        assert forked(found.close) == 0
        with pytest.raises(BlockingIOError, match="in this process"):
            Journal.open(folder)

        def contend():
            with pytest.raises(BlockingIOError, match=f"written by process {os.getppid()} on"):
                Journal.open(folder)

        assert forked(contend) == 0
        found.append(content(COUNT), tensors(COUNT))
    Journal.open(folder).close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_locks_in_the_file_system_the_process_decides(sound, tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = copy(sound, tmp_path)

    def leave():
        with Journal.open(folder):
            os._exit(0)  # without closing it

    gone = started(leave)
    os.waitpid(gone, 0)
    assert json.loads((folder / "lock.json").read_text())["pid"] == gone
    with Journal.open(folder) as found:
        assert len(found) == COUNT
        with pytest.raises(BlockingIOError, match="in this process"):
            Journal.open(folder)
    for holder in ({"pid": gone, "host": "elsewhere"}, {"pid": os.getppid(), "host": socket.gethostname()}):
        (folder / "lock.json").write_text(json.dumps(holder))
        with pytest.raises(BlockingIOError, match=rf"process {holder['pid']} on {holder['host']} .*remove .*lock.json"):
            Journal.open(folder)
    (folder / "lock.json").write_text("garbage")
    Journal.open(folder).close()
    assert not [path for path in folder.iterdir() if path.name.startswith("lock.")]


def test_a_reader_beside_a_busy_writer_sees_a_prefix(tmp_path):
    folder, count = tmp_path / "journal", 60
    build(folder, 0)
    child, seen = started(lambda: build(folder, count)), [0]
    while not os.waitpid(child, os.WNOHANG)[0]:
        with Journal.open(folder, write=False) as found:
            seen.append(check_prefix(found))
    with Journal.open(folder, write=False) as found:
        assert check_prefix(found) == count
    assert seen == sorted(seen)


def test_a_record_costs_its_tensors_and_little_more(tmp_path):
    folder = tmp_path / "journal"
    made = {f"{layer}.{part}": torch.zeros(10_000) for layer in range(5) for part in ("left", "right")}
    with Journal.create(folder, {}, {}) as found:
        before = sum(map(len, files(folder).values()))
        found.append({}, made)
    assert sum(map(len, files(folder).values())) - before <= 400_000 + 300 + 100 * len(made)


def test_tensors_damaged_after_opening_are_refused(sound, tmp_path):
    folder = copy(sound, tmp_path)
    path = folder / "edits/000002.safetensors"
    with Journal.open(folder, write=False) as found:
        path.write_bytes(flipped(path.read_bytes(), 300))
        with pytest.raises(ValueError, match=r"000002.safetensors \(record 2\) is not what was written"):
            _ = [record.tensors for record in found.records()]
