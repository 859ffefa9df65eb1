"""Which launch of the row kernel suits this GPU: reverse KL, value and gradient, under a grid of configurations.

    python benchmarks/tune_rows.py [--tokens 8192] [--vocab 151936] [--dtype bf16]

Prints the milliseconds of each and the fraction of the measured copy bandwidth (read s, read t, write ds), the fastest
first, beside those that `LAUNCH` in effopd_kernels/divergence/triton_kernels.py holds for this architecture. Registers
are capped at what lets `resident` programs share a multiprocessor; `python tests/aot.py` tells what that spills.
"""

import argparse
import itertools

import torch
from common import DEVICE, copy_bandwidth, race, table

from effopd_kernels.divergence import triton_kernels as kernels
from effopd_kernels.divergence.family import Spec

REGISTERS = 65536  # of a multiprocessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--slice_kb", type=int, nargs="+", default=[16, 24, 32, 64])
    parser.add_argument("--resident", type=int, nargs="+", default=[4, 5, 6, 8])
    args = parser.parse_args()

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    student, teacher = (torch.randn(args.tokens, args.vocab, device=DEVICE).mul_(3).to(dtype) for _ in range(2))
    grad = torch.empty_like(student)
    shipped, _ = kernels.launch_for(student.device)
    arch = next(name for name, launch in kernels.LAUNCH.items() if launch is shipped)
    launches = {"as shipped": shipped}
    for loads, kb, resident in itertools.product(args.loads, args.slice_kb, args.resident):
        registers = shipped.registers and REGISTERS // (shipped.lanes * resident) // 8 * 8
        stages = shipped.stages if loads == shipped.loads else 1 + (shipped.stages - 1) * shipped.loads // loads
        launch = shipped._replace(loads=loads, slice=kb << 10, resident=resident, registers=registers, stages=stages)
        launches[f"{loads} loads, {stages} stages, {kb} KB, {resident} programs"] = launch

    def run(launch):
        kernels.LAUNCH[arch] = launch
        kernels.launch_for.cache_clear()
        kernels.launch_divergence_rows(student, teacher, None, None, Spec(0.0, 1.0, 1.0), grad, False)

    times = race({name: lambda launch=launch: run(launch) for name, launch in launches.items()}, args.rounds)
    moved, bandwidth = 3 * student.nbytes, copy_bandwidth()
    rows = [
        {"launch": name, "ms": round(1e3 * t, 3), "of copy bandwidth": round(moved / t / bandwidth, 3)}
        for name, t in sorted(times.items(), key=lambda item: item[1])
    ]
    print(table(f"reverse KL, value and gradient, {args.tokens} × {args.vocab} {args.dtype}, {arch}", rows))


if __name__ == "__main__":
    main()
