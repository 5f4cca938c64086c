"""Segments in processes of their own: their events, their errors, and their share of the cores."""

import logging
import multiprocessing
import os
import threading
import time
from functools import partial

import pytest
import torch

from easyedit_nmke.experiments import processes
from easyedit_nmke.experiments.processes import in_processes
from easyedit_nmke.experiments.protocol import Progress, Result


class Unpicklable(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


class Unloadable(Exception):
    """Is pickled, but cannot be made again from its arguments."""

    def __init__(self, message, more):
        super().__init__(message)


def work(steps):
    for step in range(steps):
        yield Result({"step": step})


def surroundings():
    yield Result({"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"], "threads": torch.get_num_threads()})


def endless():
    yield Result({"pid": os.getpid()})
    while True:
        time.sleep(0.05)
        yield Progress(1)


def fail(error):
    yield Result({"pid": os.getpid()})
    if error == "lock":
        raise Unpicklable("the weights have worn out")
    if error == "arguments":
        raise Unloadable("the weights have worn out", 2)
    if error == "exit":
        os._exit(3)
    raise FloatingPointError("the weights have worn out")


def gone(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_all_events_of_all_segments_arrive_in_the_order_of_their_segment():
    events = list(in_processes([partial(work, steps) for steps in (3, 0, 2)], 2))
    assert sorted(event.line["step"] for event in events) == [0, 0, 1, 1, 2] and not multiprocessing.active_children()


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (
            "lock",
            RuntimeError,
            "(?s)process of the comparison failed.*Traceback.*in fail.*Unpicklable: the weights have worn out",
        ),
        ("arguments", RuntimeError, "(?s)Traceback.*Unloadable: the weights have worn out"),
        ("exit", RuntimeError, "a process of the comparison ended with exit code 3"),
        ("own", FloatingPointError, "^the weights have worn out$"),
    ],
)
def test_an_error_is_told_whatever_it_is_and_ends_the_others(error, kind, said):
    told = []
    with pytest.raises(kind, match=said) as caught:
        for event in in_processes([endless, partial(fail, error)], 2):
            told.append(event)
    pids = [event.line["pid"] for event in told if isinstance(event, Result)]
    assert pids and all(map(gone, pids)) and not multiprocessing.active_children()
    if kind is FloatingPointError:
        assert "in fail" in str(caught.value.__cause__)


def test_who_stops_listening_ends_them():
    events = in_processes([endless, endless], 2)
    pids = {next(events).line["pid"]}
    events.close()
    assert all(map(gone, pids)) and not multiprocessing.active_children()


def test_each_process_has_its_threads_from_the_start_and_this_one_keeps_its_own(monkeypatch):
    monkeypatch.setattr(processes, "threads_of", lambda jobs: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (found,) = in_processes([surroundings], 2)
    assert found.line == {"OMP_NUM_THREADS": "3", "threads": 3} and os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    list(in_processes([surroundings], 2))
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    "cores, threads, jobs, each, warned",
    [(8, 8, 2, 4, False), (8, 2, 2, 2, False), (2, 2, 4, 1, True), (4, 8, 1, 8, True), (4, 4, 1, 4, False), (2, 2, 3, 1, True)],
)
def test_threads_are_a_share_of_the_cores_and_more_than_there_are_is_said(monkeypatch, caplog, cores, threads, jobs, each, warned):
    monkeypatch.setattr(processes, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert processes.threads_of(jobs) == each
    with caplog.at_level(logging.WARNING):
        processes.warn_if_oversubscribed(jobs)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    if warned:
        assert f"{jobs} x {each} threads on {cores} cores" in said[0] and "oversubscribed" in said[0]
