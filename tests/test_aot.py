"""No shipped kernel configuration spills a register on any architecture we launch it on."""

import pytest

pytest.importorskip("triton")

import aot


def test_no_configuration_spills():
    reports = list(aot.reports())
    assert {r.arch for r in reports} == set(aot.TARGETS)
    spilled = [f"{r.name} on {r.arch}: {r.spilled} bytes" for r in reports if r.spilled]
    assert not spilled, "\n".join(spilled)
