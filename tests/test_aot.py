"""No shipped kernel configuration spills a register, or asks for more shared memory than there is, on any architecture
we launch it on; and rows are addressed in 64 bits."""

import re

import pytest

pytest.importorskip("triton")

import aot
import triton
import triton.language as tl
from aot import SHARED_MEMORY, SMALL_CARD


def test_no_configuration_spills_or_lacks_shared_memory():
    reports = list(aot.reports())
    assert {r.arch for r in reports} == set(aot.TARGETS)
    limits = [SMALL_CARD if "small card" in r.name else SHARED_MEMORY[r.arch] for r in reports]
    bad = [r for r, limit in zip(reports, limits, strict=True) if r.spilled or r.shared > limit]
    assert not bad, "\n".join(f"{r.name} on {r.arch}: {r.spilled} bytes spilled, {r.shared} shared" for r in bad)


def test_hot_loops_copy_ahead_in_vectors_and_add_up_within_threads():
    """Of the passes that are as fast as memory or not at all."""
    passes = {"divergence reverse": 2, "divergence mixture": 3, "extrapolate_ bf16": 1, "extrapolate_ fp32": 1}
    checked = 0
    for arch in ("sm_80", "sm_90", "sm_100"):
        for variant in aot.variants(arch):
            if variant.name in passes:
                loops = [loop for loop in aot.report(variant, arch).loops if "LDGSTS" in loop.memory]
                assert len(loops) == passes[variant.name]
                assert all(set(re.findall(r"×(\S+)", loop.memory)) <= {"LDGSTS.128", "STG.128"} for loop in loops)
                checked += 1
    assert checked == 3 * len(passes)


def narrow_uses_of_strides(variant) -> list[str]:
    """Where a 32-bit stride enters arithmetic without being widened first."""
    ir = aot.compile_variant(variant, "sm_90").asm["ttir"]
    strides = {name for name, kind in variant.arguments.items() if name.endswith(("_stride", "_n")) and kind == "i32"}
    body = [line for line in ir.splitlines() if "tt.func" not in line and not line.startswith("#")]
    uses = [line for line in body for stride in strides if re.search(rf"%{stride}\b", line)]
    assert uses, "no use of a stride found: this test looks for the wrong names"
    return [line for line in uses if not re.search(r"arith\.extsi %\w+ : i32 to i64", line)]


ADDRESSED = (
    "divergence reverse",
    "divergence mixture",
    "top-k others bf16",
    "top-k spread bf16",
    "lowrank X·Q bf16",
    "lowrank statistics bf16",
)


@triton.jit
def _careless_kernel(x_ptr, x_stride):
    tl.store(x_ptr + tl.program_id(0) * x_stride, 0.0)


def test_rows_are_addressed_in_64_bits():
    careless = aot.Variant("", _careless_kernel, {"x_ptr": "*fp32", "x_stride": "i32"}, (), aot.launch_options(1), 1)
    assert narrow_uses_of_strides(careless)
    checked = 0
    for variant in aot.variants("sm_90"):
        if variant.name in ADDRESSED:
            assert not narrow_uses_of_strides(variant)
            checked += 1
    assert checked == len(ADDRESSED)
