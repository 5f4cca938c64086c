"""Work on a cluster of two workers on this machine: what serial runs give, bit for bit, also when workers are killed."""

import argparse
import dataclasses
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import write_tiny
from safetensors.torch import load_file

from easyedit_nmke import atlas as embedded
from easyedit_nmke.experiments import compare, methods
from easyedit_nmke.experiments.compare import Plan
from easyedit_nmke.experiments.methods import Method
from easyedit_nmke.experiments.protocol import Progress, Result
from easyedit_nmke.scores import kept
from easyedit_nmke.statistics import covariance

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

QUICK = dict(
    device="cpu", v_num_grad_steps=2, v_lr=0.1, mom2_n_samples=200, template_prefixes=["The"], layers=[0, 1], v_loss_layer=None
)
TOKENS = kept.TOKENS  # before it is less for other tests: workers do not know of that
MEASURED = ("seconds", "startup_seconds", "peak_memory_mb")  # of a line: what depends on the machine's moment


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model with atlas' tokenizer, records to edit it with, and a place for statistics; and the cluster."""
    home = tmp_path_factory.mktemp("ray")
    write_tiny(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "workers"))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # which would write a token to the user's home
        patch.setenv("RAY_worker_niceness", "0")  # 15 is to wait for everything else that the machine does
        ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    yield home
    ray.shutdown()


@pytest.fixture
def plan(home, tmp_path):
    """Workers have statistics of their own."""

    def make(*names, folder="out", stats="workers", **changes):
        quick = {**QUICK, "model_name": str(home / "model"), "stats_dir": str(home / stats)}
        short = []
        for method in methods.methods(",".join(names), "atlas"):
            known = {field.name for field in dataclasses.fields(method.settings)}
            changes_of = {name: value for name, value in quick.items() if name in known}
            short.append(Method(method.label, methods.changed(method.settings, changes_of)))
        values = dict(
            source=str(home / "data.json"), edits=3, checkpoints=(1, 3), seeds=(0, 1), directory=tmp_path / folder,
            text="A short text that is kept an eye on.", keep_weights=True,
        )  # fmt: skip
        return Plan(tuple(short), **{**values, **changes})

    return make


def told_of(lines):
    """What lines say but for times and places, by method, seed and checkpoint."""
    found = {}
    for line in lines:
        kept = {name: value for name, value in line.items() if name not in MEASURED}
        kept["protocol"] = {**line["protocol"], "hparams": {**line["protocol"]["hparams"], "stats_dir": None}}
        found[line["method"], line["seed"], line["checkpoint"]] = kept
    return found


def same(one, other):
    """Two finished folders hold the same lines, and files of weights of the same bytes."""
    assert told_of(compare.read_lines(one / "results.jsonl")) == told_of(compare.read_lines(other / "results.jsonl"))
    names = sorted(file.name for file in one.glob("ed*"))
    assert names == sorted(file.name for file in other.glob("ed*"))
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert not any((one / "segments").iterdir()) and not any((other / "segments").iterdir())
    return names


def at_work(what="_at_work"):
    """The processes that work on segments, or on something else."""
    return [process for process in psutil.Process().children(recursive=True) if what in "".join(process.cmdline())]


def kill(processes):
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    return processes


def test_a_comparison_on_two_workers_is_the_serial_one(plan):
    told = []
    compare.compare(plan("NMKE", "FT"), tell=told.append, on="ray")
    edits = sum(event.more for event in told if isinstance(event, Progress))
    assert edits == 12
    compare.compare(plan("NMKE", "FT", folder="serial", stats="stats"))
    names = same(plan("NMKE", "FT").directory, plan("NMKE", "FT", folder="serial").directory)
    assert len(names) == 8


def test_a_killed_worker_costs_what_it_did_since_its_last_result(plan):
    asked, told, killed = plan("AlphaEdit", edits=8, checkpoints=(2, 8), seeds=(0,)), [], []

    def tell(event):
        told.append(event)
        if isinstance(event, Result) and event.line["checkpoint"] == 2 and not killed:
            assert compare.read_lines(asked.directory / "results.jsonl")[-1]["checkpoint"] == 2
            killed.extend(kill(at_work()))

    compare.compare(asked, tell=tell, on="ray")
    assert killed and sum(event.more for event in told if isinstance(event, Progress)) == 8
    compare.compare(dataclasses.replace(asked, directory=asked.directory.with_name("serial")))
    same(asked.directory, asked.directory.with_name("serial"))


def test_a_stopped_comparison_goes_on_from_its_last_result_without_the_cluster(plan):
    asked = plan("AlphaEdit", edits=8, checkpoints=(2, 8), seeds=(0,))

    def stop(event):
        if isinstance(event, Result) and event.line["checkpoint"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.compare(asked, tell=stop, on="ray")
    assert not at_work()
    (state,) = (asked.directory / "segments").iterdir()
    assert len(list((state / "edits").glob("*.safetensors"))) >= 2
    made = []
    method = asked.methods[0]
    again = dataclasses.replace(asked, methods=(Counting(method.label, method.settings, base=made),))
    compare.compare(again)
    assert len(made) == 6
    compare.compare(dataclasses.replace(asked, directory=asked.directory.with_name("serial")))
    same(asked.directory, asked.directory.with_name("serial"))


class Counting(Method):
    """Tells `base`, a list, of its edits."""

    def editor(self, seed, state_dir):
        editor = super().editor(seed, state_dir)
        apply = editor.apply
        editor.apply = lambda requests: self.base.extend(requests) or apply(requests)
        return editor


def test_an_error_in_a_worker_ends_the_comparison_with_its_message(plan):
    with pytest.raises(ValueError, match="99 edits were asked for, but 12 records"):
        compare.compare(plan("AlphaEdit", edits=99, checkpoints=(1,), seeds=(0,)), on="ray")
    assert not at_work()


def test_threads_are_the_drivers(plan):
    threads = torch.get_num_threads()
    lines = compare.compare(plan("FT", edits=1, checkpoints=(1,), seeds=(0,)), on="ray")
    assert {line["protocol"]["threads"] for line in lines} == {threads}


# ---- the analysis of settings


def test_settings_of_several_streams_are_the_serial_ones(home, tmp_path, plan, monkeypatch):
    from easyedit_nmke.experiments.analyses import settings
    from easyedit_nmke.experiments.analyses.record import Notebook, read

    monkeypatch.setattr(kept, "TOKENS", TOKENS)
    (method,) = plan("NMKE").methods
    (tmp_path / "nmke.yaml").write_text(yaml.safe_dump(method.settings.to_dict()))

    def lines(on):
        out, killed = tmp_path / f"on {on}", []
        given = {"hparams": str(tmp_path / "nmke.yaml"), "model": None, "device": None, "data": str(home / "data.json"), "edits": 2}
        args = argparse.Namespace(**given, seeds=2, only="MPC", on=on, out=out)

        class Killing(Notebook):
            def once(self, *key, make):
                line = super().once(*key, make=make)
                if on and not killed:
                    killed.extend(kill(at_work()))
                return line

        settings.ANALYSIS.run(
            args, lambda told, model: Killing.open(out / "settings.jsonl", {"analysis": "settings", "settings": told})
        )
        assert bool(killed) == bool(on)
        found = {tuple(line.pop("key")): line for line in read(out / "settings.jsonl")[1:]}
        return {key: {name: v for name, v in line.items() if name not in ("seconds", "phases")} for key, line in found.items()}

    serial = lines(None)
    assert set(serial) == {("default", 0), ("default", 1), ("MPC", 0), ("MPC", 1)}
    assert lines("ray") == serial


# ---- tuning, and the covariance of keys


def test_a_search_on_two_workers_is_the_serial_one_with_as_many_trials_at_a_time(home, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from easyedit_nmke.experiments import tune as room

    for name, value in {"STREAM": 4, "REAL": 3, "TOKENS_PER_NEURON": 2}.items():
        monkeypatch.setattr(room, name, value)
    monkeypatch.setattr(kept, "TOKENS", TOKENS)
    monkeypatch.setattr(covariance, "SHARD", 5)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(embedded.corpus(400)), encoding="utf-8")
    base = room.base_settings("NMKE", str(home / "model"), device="cpu")

    def found(on):
        cache, killed = tmp_path / f"cache {on}", []
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        asked = room.Plan("NMKE", base, tmp_path / f"on {on}", "atlas", str(text), 3600.0, trials=(3, 2, 2), at_a_time=2)

        def tell(stage, note):
            if on and stage == "values" and not killed:
                killed.extend(kill(at_work("_Worker")[:1]))

        with monkeypatch.context() as patch:
            if on:
                patch.setattr(covariance, "shard_sums", lambda *_: pytest.fail("summed here"))
            outcome = room.tune(asked, tell, on)
        assert not outcome.interrupted and bool(killed) == bool(on)
        lines = [{name: value for name, value in line.items() if name != "seconds"} for line in outcome.lines()]
        moments = {file.name: load_file(file) for file in Path(cache).rglob("moment_*")}
        return lines, {**outcome.settings.to_dict(), "model_name": ""}, moments

    lines, settings, moments = found(None)
    told, chosen, summed = found("ray")
    assert [line["stage"].split(" ")[0] for line in lines] == ["values"] * 3 + ["NMKE"] * 2 + ["streams"] * 2
    assert told == lines and chosen == settings
    assert moments and moments.keys() == summed.keys()
    assert all(torch.equal(moments[name][strip], summed[name][strip]) for name in moments for strip in moments[name])
