"""Devices: their memory, waiting for them, and leaving those alone that nobody uses."""

import mmap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from easyedit_nmke.attribution import cached
from easyedit_nmke.bench import engines, machine, shapes
from easyedit_nmke.models import device
from easyedit_nmke.statistics import covariance


class Gpus:
    """`torch.cuda` of four GPUs, of which torch has used the second; `opened` are those whose context a call opens."""

    def __init__(self):
        self.reserved, self.peaks = {1: 900}, {1: 700}
        self.opened, self.reset, self.started = set(), set(), True

    def is_available(self):
        return True

    def is_initialized(self):
        return self.started

    def device_count(self):
        return 4

    def max_memory_reserved(self, number):
        return self.reserved.get(number, 0)

    def max_memory_allocated(self, number):
        return self.peaks.get(number, 0)

    def reset_peak_memory_stats(self, number):
        self.reset.add(number)

    def synchronize(self, number):
        self.opened.add(number)

    def mem_get_info(self, number):
        self.opened.add(number)
        return 5000, 9000


@pytest.fixture
def gpus(monkeypatch):
    made = Gpus()
    monkeypatch.setattr(device.torch, "cuda", made)
    return made


def test_only_gpus_in_use_are_waited_for(gpus):
    device.synchronise()
    assert gpus.opened == {1}
    assert device.peak_memory(reset=True) == 700 / 1e6 and gpus.opened == gpus.reset == {1}


@pytest.mark.parametrize("started", [True, False])
def test_a_model_on_the_cpu_opens_no_gpu(gpus, started):
    gpus.reserved, gpus.started = {}, started
    device.synchronise()
    held = psutil.Process().memory_info().rss / 1e6
    assert device.peak_memory() > 0.5 * held and not gpus.opened | gpus.reset


def test_free_memory_of_a_gpu_counts_what_torch_holds_unused(gpus):
    gpus.memory_reserved, gpus.memory_allocated = (lambda which: 900 * which.index), (lambda which: 600 * which.index)
    assert [device.free_memory(torch.device("cuda", number)) for number in (0, 1)] == [5000, 5300]


def test_one_free_memory_for_all():
    free = device.free_memory(torch.device("cpu"))
    assert isinstance(free, float) and 0 < free <= psutil.virtual_memory().total
    for module in (cached, covariance, engines, machine, shapes):
        assert module.free_memory is device.free_memory


def test_peak_memory_of_the_process(monkeypatch):
    before = device.peak_memory(reset=True)
    with mmap.mmap(-1, 80_000_000) as big:  # new pages, where an allocator may have some left that are held already
        big[:: mmap.PAGESIZE] = bytes(len(range(0, len(big), mmap.PAGESIZE)))
    assert device.peak_memory() > before + 60
    assert device.peak_memory(reset=True) < before + 60

    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing), monkeypatch.setattr(Path, "write_text", missing)
    assert device.peak_memory(reset=True) == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.2)
    info = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1_000_000, peak_wset=3_000_000))
    monkeypatch.setattr(psutil, "Process", lambda: info)
    assert device.peak_memory() == 3.0


def test_kernels_run_on_the_gpu_of_their_operands(gpus):
    gpus.device = lambda which: ("on", which)
    assert device.current(torch.device("cuda:1")) == ("on", torch.device("cuda:1"))
    with device.current(torch.device("cpu")):
        pass


def test_a_gpu_that_is_not_there_is_refused_by_its_number(gpus):
    assert device.device_of(3) == torch.device("cuda:3") and device.device_of("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="device is 4, but there are 4 CUDA devices here, numbered from 0"):
        device.device_of(4)
