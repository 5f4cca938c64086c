"""Every byte of a journal checked: each damage is named, none is made up, and what was found is remembered."""

import errno
import json
import os
import random
import shutil
from functools import partial

import pytest
from test_journal import COUNT, at, build, copy, die, faulty, files, flipped, forked, no_waiting, sound, started  # noqa: F401

from easyedit_nmke.history.journal import Journal, Problem, last_verified, verification, verify


def told(folder):
    return [(problem.record, problem.file) for problem in verify(folder).problems]


def test_a_sound_journal_and_what_is_remembered(sound, tmp_path):  # noqa: F811
    folder = copy(sound, tmp_path)
    assert last_verified(folder) is None
    found = verify(folder)
    assert (found.records, found.problems) == (COUNT, ()) and last_verified(folder) == found
    (folder / "verified.json").write_text("garbage")
    assert last_verified(folder) is None
    with Journal.open(folder) as held:  # beside its writer
        held.append({"id": 9}, {})
        assert verify(folder).records == COUNT + 1 and not told(folder)
    assert len(Journal.open(folder, write=False)) == COUNT + 1


def test_sixty_files_of_the_same_length_with_another_content(tmp_path):
    """What a listing, which reads sizes only, does not notice."""
    build(tmp_path, 70)
    damaged = sorted(random.Random(0).sample(range(70), 60))
    for number in damaged:
        path = tmp_path / f"edits/{number:06d}.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:99] + bytes(len(data) - 99) if number % 2 else flipped(data, len(data) // 2))
    (tmp_path / "base.safetensors").write_bytes(flipped((tmp_path / "base.safetensors").read_bytes(), 70))
    with Journal.open(tmp_path, write=False) as found:
        assert len(found) == 70
    names = [(number, f"edits/{number:06d}.safetensors") for number in damaged]
    assert told(tmp_path) == [(None, "base.safetensors"), *names]
    assert {problem.reason for problem in last_verified(tmp_path).problems} == {"is not what was written (other checksum)"}


def test_a_flipped_bit_is_named_wherever_it_is(sound, tmp_path):  # noqa: F811
    """And alone: a damaged line does not take the lines after it along."""
    folder = copy(sound, tmp_path)
    for name, data in files(sound).items():
        for position in range(0, len(data), 7):
            damaged = flipped(data, position)
            if data[position] == ord("\n") or (name == "header.json" and b'"version": 2' not in damaged):
                continue  # the line after it is told as well; a header of another version is refused
            (folder / name).write_bytes(damaged)
            record = data[:position].count(b"\n") if name == "index.jsonl" else int(name[6:12]) if "/" in name else None
            assert told(folder) == [(record, name)], position
        (folder / name).write_bytes(data)
        if name in ("header.json", "index.jsonl"):
            for position in (i for i, byte in enumerate(data) if byte == ord("\n")):
                (folder / name).write_bytes(flipped(data, position))
                assert name in [file for _, file in told(folder)]
            (folder / name).write_bytes(data)
    assert not told(folder)


@pytest.mark.parametrize(
    ("damage", "problems"),
    [
        (lambda lines: lines[:2], [(2, "edits/000002.safetensors"), (3, "edits/000003.safetensors")]),
        (lambda lines: [*lines[:3], lines[3][:-1]], [(3, "index.jsonl")]),
        (lambda lines: [*lines[:3], lines[3][:50]], [(3, "index.jsonl")]),
        (lambda lines: [lines[0], *lines[2:]], [(1, "index.jsonl"), (2, "edits/000002.safetensors")]),
        (lambda lines: [lines[0], lines[1], *lines[1:]], [(2, "index.jsonl")]),
    ],
    ids=["two lines short", "end of line lost", "cut line", "lost line", "doubled line"],
)
def test_lines_that_are_not_as_they_were(sound, tmp_path, damage, problems):  # noqa: F811
    folder = copy(sound, tmp_path)
    lines = (folder / "index.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "index.jsonl").write_bytes(b"".join(damage(lines)))
    assert told(folder) == problems


def test_missing_and_cut_files(sound, tmp_path):  # noqa: F811
    folder = copy(sound, tmp_path)
    (folder / "edits/000003.safetensors").unlink()
    (folder / "edits/000001.safetensors").write_bytes(b"short")
    size = (sound / "edits/000001.safetensors").stat().st_size
    assert verify(folder).problems == (
        Problem(1, "edits/000001.safetensors", f"has 5 bytes instead of {size}"),
        Problem(3, "edits/000003.safetensors", "is missing"),
    )
    (folder / "header.json").unlink()
    with pytest.raises(ValueError, match="holds no journal"):
        verify(folder)


@pytest.mark.parametrize("half", [False, True], ids=["before", "half-written"])
def test_a_killed_writer_leaves_no_damage(tmp_path, half):
    for number in range(1, 99):
        folder = tmp_path / f"{number}"

        def run(number=number, folder=folder):
            with faulty(*at(number, die, half)):
                build(folder, 2)

        status = forked(run)
        assert not Journal.exists(folder) or not verify(folder).problems
        shutil.rmtree(folder, ignore_errors=True)
        if status == 0:
            break
    assert number > (6 if half else 20)


def test_beside_a_busy_writer(tmp_path):
    build(tmp_path, 0)
    child, records = started(partial(build, tmp_path, 60)), []
    while not os.waitpid(child, os.WNOHANG)[0]:
        found = verify(tmp_path)
        records.append(found.records)
        assert not found.problems
    assert verify(tmp_path).records == 60 and records == sorted(records)


def test_a_folder_that_cannot_be_written_is_verified_too(sound, tmp_path, monkeypatch):  # noqa: F811
    folder = copy(sound, tmp_path)
    before = files(folder)

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(verification, "write_json", refused)
    assert not told(folder) and last_verified(folder) is None and files(folder) == before


def test_what_is_remembered_is_no_part_of_what_is_checked(sound, tmp_path):  # noqa: F811
    folder = copy(sound, tmp_path)
    verify(folder)
    assert json.loads((folder / "verified.json").read_text())["records"] == COUNT
    with Journal.open(folder) as found:
        assert len(found) == COUNT
