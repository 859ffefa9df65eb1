"""Compile every Triton kernel we ship, in the configurations we launch, for machines we need not have.

`python tests/aot.py [substring ...]` prints registers, stack (= spilled bytes), shared memory, and for each loop that
loads or computes the instructions per element and the widths of its memory accesses. tests/test_aot.py fails on a
spill. A new kernel is one more entry in `variants`.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effopd_kernels.launch import options as launch_options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a program may use
SMALL_CARD = 99 << 10  # the same of an L4, L40S or GeForce


class Variant(NamedTuple):
    """A kernel with its arguments: a type ("*bf16", "i32", "fp32"), or anything else as a constant's value."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    aligned: tuple[str, ...]  # integer arguments that are multiples of 16, as real sizes and strides are
    options: dict[str, int]
    elements: int  # per thread and turn of the inner loop


class Loop(NamedTuple):
    instructions: float  # per element
    special: float  # of these exp2, log2, reciprocal (a quarter of the rate or less)
    memory: str  # "4×LDG.128 2×STG.128"; LDGSTS copies to shared memory ahead, SHFL passes from thread to thread


class Report(NamedTuple):
    name: str
    arch: str
    registers: int
    spilled: int  # bytes
    shared: int
    loops: list[Loop]


def variants(arch: str) -> Iterator[Variant]:
    yield from _divergence(arch)
    yield from _topk(arch)
    yield from _extrapolation(arch)
    yield from _lowrank(arch)


def _divergence(arch: str) -> Iterator[Variant]:
    from effopd_kernels.divergence import triton_kernels as tk

    launch = tk.LAUNCH[arch]
    size = {"bf16": 2, "fp16": 2, "fp32": 4}
    for name, kind, student, teacher, grad, stats, capped in (
        ("reverse", tk.REVERSE, "bf16", "bf16", True, False, False),
        ("reverse, statistics", tk.REVERSE, "bf16", "bf16", True, True, False),
        ("reverse, value only, statistics", tk.REVERSE, "bf16", "bf16", False, True, False),
        ("reverse fp32, statistics", tk.REVERSE, "fp32", "fp32", True, True, False),
        ("forward fp16, capped, sequences", tk.FORWARD, "fp16", "bf16", True, False, True),
        ("mixture", tk.MIXTURE, "bf16", "bf16", True, False, False),
        ("mixture fp32/bf16, statistics, capped", tk.MIXTURE, "fp32", "bf16", True, True, True),
        ("reverse unaligned", tk.REVERSE, "bf16", "bf16", True, False, False),
        ("forward fp32 unaligned, statistics", tk.FORWARD, "fp32", "fp32", True, True, False),
        ("mixture unaligned, capped, sequences", tk.MIXTURE, "bf16", "bf16", True, False, True),
    ):
        aligned = "unaligned" not in name
        tiling = tk.tiling(launch, max(size[student], size[teacher]), aligned)
        S = triton.cdiv(151936, tiling["SLICE"])
        arguments = {
            "student_ptr": "*" + student, "teacher_ptr": "*" + teacher, "grad_ptr": "*" + student if grad else None,
            "mask_ptr": "*i1", "row_scale_ptr": "*fp32", "count_ptr": "*i32",
            **dict.fromkeys(("loss_ptr", "stats_ptr", "partial_ptr", "record_ptr"), "*fp32"),
            **dict.fromkeys(("N", "V", "Vs", "skew"), "i32"), "T": "i32" if "sequences" in name else None,
            **dict.fromkeys(("student_stride", "teacher_stride", "grad_stride"), "i32"),
            **dict.fromkeys(("student_sequence", "teacher_sequence", "grad_sequence"), "i64"),
            **dict.fromkeys(("ks", "kt", "pre_s", "pre_t", "a", "b", "pi", "rho", "chain"), "fp32"),
            "KIND": kind.value, "GRAD": grad, "STATS": stats, "CAP_S": capped, "CAP_T": capped,
            **tiling, "S": S, "S_POW2": triton.next_power_of_2(S),
            "FAST": max(size[student], size[teacher]) == 2, "LG2": arch != "gfx942",
        }  # fmt: skip
        sizes = [name for name in arguments if name in ("V", "Vs") or name.endswith(("_stride", "_sequence"))]
        sizes = tuple(sizes) if aligned else ()
        options, elements = launch.options(stats, aligned, capped), tiling["LOADS"] * tiling["VECTOR"]
        yield Variant(f"divergence {name}", tk._divergence_kernel, arguments, sizes, options, elements)
    for dtype in ("bf16", "fp32"):
        arguments = {"x_ptr": "*" + dtype, "factor_ptr": "*fp32", "numel": "i64", "BLOCK": tk.SCALE_BLOCK}
        yield Variant(f"divergence scale {dtype}", tk._scale_kernel, arguments, ("numel",), launch_options(4), 32)


def _topk(arch: str) -> Iterator[Variant]:
    from effopd_kernels.divergence import triton_kernels
    from effopd_kernels.divergence import triton_topk as tk

    launch, of_rows = triton_kernels.LAUNCH[arch], (tk._others_kernel, tk._spread_kernel)
    of_entries = tk._mark_kernel, tk._buckets_kernel, tk._chain_kernel, tk._place_kernel
    types = {
        "ids_ptr": "*i64", "mask_ptr": "*i1", "marks_ptr": "*i32",
        **dict.fromkeys(("part_ptr", "record_ptr", "bucket_ptr"), "*fp32"),
        **dict.fromkeys(("c", "pre", "chain"), "fp32"), **dict.fromkeys(("V", "k", "columns", "words"), "i32"),
        **dict.fromkeys(("student_stride", "grad_stride"), "i32"),
        **dict.fromkeys(("student_sequence", "grad_sequence"), "i64"),
    }  # fmt: skip
    for name, dtype, kernels in (
        ("bf16", "bf16", of_rows),
        ("fp32", "fp32", of_rows),
        ("fp16, capped, sequences", "fp16", of_rows + of_entries),
        ("bf16 unaligned", "bf16", of_rows),
        ("bf16, entropy", "bf16", (tk._others_kernel, tk._buckets_kernel)),
        ("fp32, entropy", "fp32", (tk._others_kernel,)),
        ("fp16 unaligned, capped, entropy", "fp16", (tk._others_kernel,)),
    ):
        capped, aligned, itemsize = "capped" in name, "unaligned" not in name, 4 if dtype == "fp32" else 2
        tiling = triton_kernels.tiling(launch, itemsize, aligned)
        S, elements = triton.cdiv(151936, tiling["SLICE"]), tiling["LOADS"] * tiling["VECTOR"]
        given = types | {
            "student_ptr": "*" + dtype, "grad_ptr": "*" + dtype, "T": "i32" if "sequences" in name else None,
            **tiling, "CAPPED": capped, "TAIL": True, "STATS": "entropy" in name,
            "S": S, "S_POW2": triton.next_power_of_2(S), "BLOCK": tk.BLOCK,
        }  # fmt: skip
        for kernel in kernels:
            arguments = {argument: given[argument] for argument in kernel.arg_names}
            sizes = tuple(n for n in arguments if n == "V" or n.endswith(("_stride", "_sequence"))) if aligned else ()
            rows = kernel in of_rows
            options = launch.options(False, aligned, capped) if rows else launch_options(4)
            label = f"top-k {kernel.__name__.strip('_').removesuffix('_kernel')} {name}"
            yield Variant(label, kernel, arguments, sizes, options, elements if rows else tk.BLOCK // 128)


def _extrapolation(arch: str) -> Iterator[Variant]:
    import triton.language as tl

    from effopd_kernels.extrapolation import triton_kernels as tk

    options, in_vectors = (tk.HIP, (2, 1)) if arch.startswith("gfx") else (tk.CUDA, (1, 4))
    block = tk.LANES * tk.PER_THREAD
    lists = {"table_ptr": "*i64", "alpha_ptr": "*fp32", "partial_ptr": "*fp32", "L": "i32"}
    for name, dtypes, master, aligned in (
        ("bf16", (tl.bfloat16, tl.bfloat16, tl.bfloat16), False, True),
        ("bf16 and fp32 masters", (tl.bfloat16, tl.bfloat16, tl.float32), True, True),
        ("fp32", (tl.float32, tl.float32, tl.float32), False, True),
        ("bf16 unaligned", (tl.bfloat16, tl.bfloat16, tl.bfloat16), False, False),
    ):
        widest = 4 if tl.float32 in dtypes else 2
        loads, stages = in_vectors if aligned else (tk.UNALIGNED_LOADS, 1)
        vector = 16 // widest if aligned else 1
        constants = {
            **dict(zip("PAC", dtypes, strict=True)), "MASTER": master, "STATS": True, "ALIGNED": aligned,
            "CHUNK": tk.CHUNK, "LOADS": loads, "LANES": tk.LANES, "VECTOR": vector, "STAGES": stages, "L_POW2": tk.MOST,
        }  # fmt: skip
        yield Variant(f"extrapolate_ {name}", tk._extrapolate_kernel, lists | constants, (), options, loads * vector)
    chunk_sums = {"row_ptr": "*i64", "stats_ptr": "*fp32", "chunks": "i32", "BLOCK": 1024}
    yield Variant("extrapolate_ sums", tk._sum_chunks_kernel, lists | chunk_sums, (), launch_options(4), 1024 // 128)
    pointers = {
        **dict.fromkeys(("w0_ptr", "delta_ptr", "out_ptr", "grad_ptr", "grad_delta_ptr"), "*bf16"),
        "alpha_ptr": "*fp32", "partial_ptr": "*fp32", "numel": "i64", "BLOCK": block,
    }  # fmt: skip
    yield Variant("extrapolate forward", tk._forward_kernel, pointers, ("numel",), options, tk.PER_THREAD)
    yield Variant("extrapolate backward", tk._backward_kernel, pointers, ("numel",), options, tk.PER_THREAD)


def _lowrank(arch: str) -> Iterator[Variant]:
    import triton.language as tl

    from effopd_kernels.lowrank import triton_kernels as tk

    amd = arch.startswith("gfx")
    precision = "ieee" if amd else "tf32x3"
    pair = {
        "address_ptr": "*i64", "scale_ptr": "*fp32", "partial_ptr": "*fp64",
        **dict.fromkeys(("B", "N", "M", "L", "x_n", "base_n"), "i32"), "x_m": 1, "base_m": 1, "ALIGNED": True,
    }  # fmt: skip
    transposed = {"x_n": 1, "base_n": 1, "x_m": "i32", "base_m": "i32"}
    half = {"X": tl.bfloat16, "BASE": tl.bfloat16}
    single = {"X": tl.float32, "BASE": tl.float32}
    sizes = ("N", "M", "L", "x_n", "x_m", "base_n", "base_m")

    def split(launch):
        tile = {key: value for key, value in launch.items() if key.isupper()}
        return tile, {key: value for key, value in launch.items() if key not in tile}

    def config(kind, types, shared):
        itemsize = (types["X"].primitive_bitwidth + types["BASE"].primitive_bitwidth) // 8
        return split(tk.HIP[kind] if amd else tk.launch_config(kind, itemsize, shared))

    for name, launch, types in (
        ("bf16, rounded, statistics", "rounded, statistics", half | {"STATS": True, "FULL": True, "scale_ptr": None}),
        (
            "fp32, rounded, statistics",
            "rounded, statistics",
            single | {"STATS": True, "FULL": False, "scale_ptr": None},
        ),
        (
            "bf16 transposed, rounded, statistics",
            "rounded, statistics",
            half | transposed | {"STATS": True, "FULL": True, "scale_ptr": None, "BY_COLUMN": True},
        ),
        ("bf16 transposed, rounded", "rounded", half | transposed | {"STATS": False, "FULL": False}),
        ("fp32, rounded", "rounded", single | {"STATS": False, "FULL": False}),
        ("bf16", "exact", half | {"STATS": False, "FULL": False}),
        ("bf16 transposed", "exact", half | transposed | {"STATS": False, "FULL": False}),
        ("bf16 and fp32", "exact", half | {"BASE": tl.float32, "STATS": False, "FULL": False}),
        ("fp32", "exact", single | {"STATS": False, "FULL": False}),
    ):
        blocks, options = config(launch, types, SHARED_MEMORY[arch])
        tile = {"SPAN": tk.SPAN, "COLUMNS": tk.COLUMNS, **blocks, "PRECISION": precision, "BY_COLUMN": False}
        q = "*bf16" if launch.startswith("rounded") else "*fp32"
        arguments = pair | tile | types | {"q_ptr": q, "y_ptr": "*fp32"}
        elements = blocks["ROWS"] * blocks["BLOCK"] // (options["num_warps"] * TARGETS[arch].warp_size)
        yield Variant(f"lowrank X·Q {name}", tk._skinny_kernel, arguments, sizes, options, elements)
        if arch == "sm_80" and "statistics" not in launch and "transposed" not in name:
            options = config(launch, types, SMALL_CARD)[1]
            yield Variant(f"lowrank X·Q {name}, small card", tk._skinny_kernel, arguments, sizes, options, elements)
    for name, types in (
        ("bf16", half | {"HALF": tl.bfloat16}),
        ("bf16 transposed", half | transposed | {"HALF": tl.bfloat16}),
        ("fp32", single | {"HALF": None}),
        ("fp32 transposed", single | transposed | {"HALF": None}),
    ):
        blocks, options = config("gram", types, SHARED_MEMORY[arch])
        arguments = pair | types | blocks | {"PRECISION": precision, "g_ptr": "*fp32", "TILE": tk.GRAM_TILE}
        elements = 2 * tk.GRAM_TILE * blocks["BLOCK"] // (options["num_warps"] * TARGETS[arch].warp_size)
        yield Variant(f"lowrank XᵀX {name}", tk._gram_kernel, arguments, sizes, options, elements)
        if arch == "sm_80":
            options = config("gram", types, SMALL_CARD)[1]
            yield Variant(f"lowrank XᵀX {name}, small card", tk._gram_kernel, arguments, sizes, options, elements)
    arguments = pair | half | {"FULL": True, "SPAN": tk.SPAN, "ROWS": tk.STATS_ROWS, "BLOCK": 256}
    elements = tk.STATS_ROWS * 256 // (tk.STATS_WARPS * TARGETS[arch].warp_size)
    yield Variant(
        "lowrank statistics bf16", tk._stats_kernel, arguments, sizes, launch_options(tk.STATS_WARPS), elements
    )
    jacobi = {"w_ptr": "*fp64", "value_ptr": "*fp64", "L": "i32", "SWEEPS": "i32", "tolerance": "fp32"}
    entries, options = tk.JACOBI["hip" if amd else "cuda"]
    elements = entries // (options["num_warps"] * TARGETS[arch].warp_size)
    for half in (tk.JACOBI_LIMIT // 8, tk.JACOBI_LIMIT // 4, tk.JACOBI_LIMIT // 2):
        tile = {"HALF": half, "BLOCK": entries // half}
        name = f"lowrank eigh fp64, up to {2 * half}"
        yield Variant(name, tk._jacobi_kernel, jacobi | tile, (), options, elements)


def _is_type(argument) -> bool:
    return isinstance(argument, str) and bool(re.fullmatch(r"\*?(i|fp|bf)\d+", argument))


def compile_variant(variant: Variant, arch: str):
    """triton.compile for a target that need not be present."""
    names = variant.kernel.arg_names
    signature = {n: a if _is_type(a := variant.arguments[n]) else "constexpr" for n in names}
    constants = {n: variant.arguments[n] for n in names if signature[n] == "constexpr"}
    aligned = [
        i for i, n in enumerate(names) if signature[n][0] == "*" or (n in variant.aligned and n not in constants)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(variant.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[arch], options=dict(variant.options))


def report(variant: Variant, arch: str) -> Report:
    compiled = compile_variant(variant, arch)
    read = _read_amdgcn if arch.startswith("gfx") else _read_cubin
    registers, spilled, body = read(compiled)
    loops = [_loop(block, variant.elements) for block in _loops(body)]
    loops = [loop for loop in loops if loop.memory and loop.instructions >= 2]
    return Report(variant.name, arch, registers, spilled, compiled.metadata.shared, loops)


def _read_cubin(compiled) -> tuple[int, int, list[tuple[Any, str]]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", "-sass", cubin]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    return registers, stack, [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", said)]


def _read_amdgcn(compiled) -> tuple[int, int, list[tuple[Any, str]]]:
    text = compiled.asm["amdgcn"]
    wanted = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):? +(\d+)"
    number = {key: int(n) for key, n in re.findall(wanted, text)}
    # scalar registers spill to lanes of vector registers, not to memory
    spilled = max(number["private_segment_fixed_size"], 4 * number["vgpr_spill_count"])
    body, label = [], 0
    for line in text.splitlines():
        if re.match(r"\.LBB\w+:", line):
            label = line.split(":")[0]
            body.append((label, "label"))
        elif re.match(r"\t[a-z]+_\w+", line):
            body.append((None, line.strip()))
    return number["vgpr_count"], spilled, body


def _loops(body) -> Iterator[list[str]]:
    """Innermost loops: the instructions between a branch and a target behind it, if no other loop lies between."""
    at = {address: i for i, (address, _) in enumerate(body) if address is not None}
    found: list[tuple[int, int]] = []
    for end, (_, line) in enumerate(body):
        branch = re.search(r"BRA\S* .*?(0x[0-9a-f]+)|s_c?branch\S* (\.\w+)", line)
        if branch:
            begin = at.get(int(branch[1], 16) if branch[1] else branch[2], end)
            if begin < end:
                found.append((begin, end))
    for begin, end in found:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found):
            yield [line for _, line in body[begin : end + 1] if line != "label"]


def _loop(block: list[str], elements: int) -> Loop:
    opcodes = [re.sub(r"^@!?U?P\w+ +", "", line).split()[0] for line in block]
    special = sum(bool(re.match(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_", op)) for op in opcodes)
    memory: dict[str, int] = {}
    for op in opcodes:
        wanted = r"(LDGSTS|LDG|STG|LDL|STL|RED|ATOM|SHFL)G?\b.*?(?:\.(64|128))?$|((?:global|buffer|scratch)_\w+)"
        if found := re.match(wanted, op):
            kind = found[3] or f"{found[1]}.{found[2] or 32}"
            memory[kind] = memory.get(kind, 0) + 1
    return Loop(len(opcodes) / elements, special / elements, " ".join(f"{n}×{kind}" for kind, n in memory.items()))


def _report_by_index(job: tuple[str, int]) -> Report:
    arch, index = job
    return report(list(variants(arch))[index], arch)


def reports(only: tuple[str, ...] = ()) -> Iterator[Report]:
    """All variants for all targets, two compilers at a time."""
    jobs = [
        (arch, i)
        for arch in TARGETS
        for i, v in enumerate(variants(arch))
        if all(w in f"{v.name} {arch}" for w in only)
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_report_by_index, jobs)


def main() -> None:
    write = partial(print, flush=True)
    write(f"triton {triton.__version__}")
    write(f"{'kernel':58} {'target':7} {'regs':>4} {'spill':>5} {'smem':>6}  instructions/element")
    for r in reports(tuple(sys.argv[1:])):
        write(f"{r.name:58} {r.arch:7} {r.registers:4} {r.spilled:5} {r.shared:6}")
        for loop in r.loops:
            write(f"{'':84} {loop.instructions:5.1f} ({loop.special:.1f} special)  {loop.memory}")


if __name__ == "__main__":
    main()
