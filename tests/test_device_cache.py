"""What is made once on one stream and read on others, with streams that only take notes."""

from contextlib import contextmanager

import pytest
import torch

from effopd_kernels import device_cache
from effopd_kernels.launch import uploaded


class Stream:
    def __init__(self):
        self.awaited = []

    def record_event(self):
        return self

    def wait_event(self, event):
        self.awaited.append(event)


class OnDevice:
    is_cuda, device = True, torch.device("cuda", 1)

    def __init__(self):
        self.readers = []

    def record_stream(self, stream):
        self.readers.append(stream)


@pytest.fixture
def on_stream(monkeypatch):
    current = [torch.device("cuda", 0)]

    @contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    def switch(stream, capturing=False):
        capturing_on = OnDevice.device if capturing else None
        monkeypatch.setattr(torch.cuda, "device", guard)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == capturing_on)

    monkeypatch.setattr(device_cache, "captured", [])
    return switch


def test_another_stream_waits_and_its_reading_is_recorded(on_stream):
    make = device_cache.device_cache(8)(lambda key: OnDevice())
    home, other = Stream(), Stream()
    on_stream(home)
    tensor = make(1)
    assert make(1) is tensor and not tensor.readers and not home.awaited
    on_stream(other)
    assert make(1) is tensor
    assert tensor.readers == [other] and other.awaited == [home]


def test_a_captured_graph_keeps_what_it_reads(on_stream):
    make = device_cache.device_cache(1)(lambda key: OnDevice())
    on_stream(Stream())
    tensor = make(1)
    on_stream(Stream(), capturing=True)
    assert make(1) is tensor and not tensor.readers  # a capture may not wait for what is outside it
    on_stream(Stream())
    make(2)
    assert device_cache.captured == [tensor]


def test_on_the_cpu_it_is_a_cache():
    make = device_cache.device_cache(8)(torch.zeros)
    assert make(3) is make(3)


def test_a_captured_graph_reads_nothing_of_the_cpu_s(on_stream):
    """What would be other memory's at a replay; nor is a table kept that no copy has reached."""
    make = device_cache.device_cache(8)(lambda key: uploaded(torch.zeros(3), OnDevice.device))
    on_stream(Stream(), capturing=True)
    for copy in (lambda: make(1), lambda: uploaded(torch.zeros(()), OnDevice.device)):
        with pytest.raises(RuntimeError, match="cannot take numbers from the CPU"):
            copy()
    on_stream(Stream())
    assert uploaded(torch.zeros(3), torch.device("cpu")).shape == (3,)
