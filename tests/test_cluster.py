"""What work on a cluster needs of files, counts and settings; no cluster is started here (test_ray.py does)."""

import os
import sys
from types import SimpleNamespace

import pytest

from easyedit_nmke.cli import main
from easyedit_nmke.experiments import cluster, pieces
from easyedit_nmke.experiments.compare import Plan, compare
from easyedit_nmke.experiments.methods import Method, changed, methods
from easyedit_nmke.experiments.pieces import Piece
from easyedit_nmke.experiments.protocol import Progress, Result
from easyedit_nmke.experiments.tune import Plan as Search
from easyedit_nmke.experiments.tune import base_settings, tune
from easyedit_nmke.methods import read


def write(folder, **files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_a_worker_sends_what_has_changed_and_the_driver_holds_all_of_it(tmp_path):
    here, there = tmp_path / "driver", tmp_path / "worker"
    piece = Piece(iter, here, "segments/NMKE-0", added=(here / "judge.jsonl",))
    write(here, **{"judge.jsonl": "one\n"})
    write(there / "segments/NMKE-0", **{"index.jsonl": "a\n", "edits/0.safetensors": "0", "lock": "", "lock.json": "{}"})
    write(there, **{"judge.jsonl": "one\ntwo\n", "given/data.json": "[]"})
    seen = {}
    sent = pieces._changed(there, seen)
    assert sorted(sent) == ["judge.jsonl", "segments/NMKE-0/edits/0.safetensors", "segments/NMKE-0/index.jsonl"]
    pieces._take(piece, sent)
    assert pieces._changed(there, seen) is None
    write(there / "segments/NMKE-0", **{"index.jsonl": "a\nb\n", "edits/1.safetensors": "1"})
    write(there, **{"edited-NMKE-0.safetensors": "weights"})
    sent = pieces._changed(there, seen)
    assert [name for name, content in sent.items() if content is None] == ["judge.jsonl", "segments/NMKE-0/edits/0.safetensors"]
    pieces._take(piece, sent)
    state = here / "segments/NMKE-0"
    held = {path.relative_to(state).as_posix(): path.read_text() for path in state.rglob("*") if path.is_file()}
    assert held == {"index.jsonl": "a\nb\n", "edits/0.safetensors": "0", "edits/1.safetensors": "1"}
    assert (here / "judge.jsonl").read_text() == "one\ntwo\n" and (here / "edited-NMKE-0.safetensors").read_text() == "weights"
    assert [path.name for path in (here / "segments").iterdir()] == ["NMKE-0"]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_driver_that_is_killed_while_a_state_takes_the_place_of_another_leaves_one_of_them(tmp_path, monkeypatch, last):
    state, calls, replace = tmp_path / "segments" / "x", [], os.replace
    write(state, index="old")

    def killed(source, target):
        calls.append(target)
        if len(calls) == last:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        pieces._take(Piece(iter, tmp_path, "segments/x"), {"segments/x/index": b"new"})
    pieces._mend(state)
    assert (state / "index").read_text() == ("new" if last == 3 else "old")
    assert [path.name for path in state.parent.iterdir()] == ["x"]


def test_edits_are_told_once_however_often_a_worker_is_lost(caplog):
    course = pieces._Course(Piece(iter, None, "segments/x"))
    assert [course.counted(Progress(n)).more for n in (0, 2, 3)] == [0, 2, 3]
    course.lose(OSError("the node died"))
    assert [course.counted(Progress(n)).more for n in (4, 2, 1)] == [0, 1, 1]
    result = Result({"checkpoint": 7})
    assert course.counted(result) is result
    for _ in range(cluster.LOST):
        course.counted(result)  # an old one, told again
        course.lose(OSError("the node died"))
    with pytest.raises(RuntimeError, match=f"the worker of segments/x was lost {cluster.LOST + 1} times; the last: the node died"):
        course.lose(OSError("the node died\nmore"))
    assert "another goes on" in caplog.text


def test_what_a_cluster_cannot_do_is_said_before_anything_is_begun(tmp_path, monkeypatch, capsys):
    settings = read("AlphaEdit/atlas")
    assert cluster.gpus_of(settings) == 0 and cluster.placed(settings) == {}
    assert cluster.gpus_of(changed(settings, {"device": "cuda:3"})) == 1
    assert cluster.placed(changed(settings, {"device": 3})) == {"device": 0}
    with pytest.raises(ValueError, match="model_parallel spreads"):
        cluster.gpus_of(changed(settings, {"model_parallel": True}))
    with pytest.raises(ValueError, match="model_name is a model in this process"):
        tune(Search("AlphaEdit", base_settings("AlphaEdit", (None, None)), tmp_path), on="ray")
    plan = Plan((Method("x", settings, loaded=object()),), "atlas", 1, (1,), (0,), tmp_path / "out")
    with pytest.raises(ValueError, match="x has an editor in this process"):
        compare(plan, on="ray")
    asked = Plan(tuple(methods("AlphaEdit", "atlas")), "atlas", 1, (1,), (0,), tmp_path / "out")
    with pytest.raises(ValueError, match="jobs is 2, but the room on a cluster"):
        compare(asked, 2, on="ray")
    for on in ("spark", "ray:ray://head:10001"):
        with pytest.raises(ValueError, match=f"--on is '{on}', expected ray, or ray:HOST:PORT"):
            compare(asked, on=on)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    for address in ("127.0.0.1:1", "127.0.0.1"):
        with pytest.raises(ValueError, match=f"no Ray cluster answers at {address} (.*); start one by `ray start --head`"):
            compare(asked, on=f"ray:{address}")
    monkeypatch.setitem(sys.modules, "ray", None)
    argv = ["compare", "--methods", "AlphaEdit", "--edits", "1", "--out", str(tmp_path / "out"), "--on", "ray"]
    assert main(argv) == 1
    assert '--on ray needs Ray: python -m pip install -e ".[ray]"' in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.jsonl").read_text()
