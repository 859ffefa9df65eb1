"""What benchmarks share: the device's name and measured ceilings, contenders timed in turns, peak memory, tables."""

import datetime
import importlib.metadata
import platform
import re
import statistics
import subprocess
import sys
import time

import torch

from effopd_kernels.divergence.head_products import TILES

PEERS = ("torch", "triton", "numpy", "scikit-learn", "transformers", "trl", "liger-kernel")
PATIENCE, ENOUGH = 30, 0.02  # seconds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Such as nvidia-h200 or cpu-amd-epyc-family-25-avx2-2cores: the folder under results/. Processors of one name
    differ in generation and in the width of their vectors, and virtual ones may hide their matrix tiles."""
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    else:
        vectors = torch.backends.cpu.get_cpu_capability() + " amx" * TILES
        name = f"cpu {_processor()} {vectors} {torch.get_num_threads()}cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            said = dict(re.findall(r"^(model name|cpu family)\s*: *(.*)$", f.read(), re.MULTILINE))
    except OSError:
        said = {}
    family = f" family {said['cpu family']}" if "cpu family" in said else ""
    return said.get("model name", platform.machine()) + family


def when_and_with_what() -> dict[str, str]:
    """The date and the versions that a result belongs to."""
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date} | {name: installed[name] for name in PEERS if name in installed}


def seconds(function) -> float:
    """Of one call; on a GPU of as many, one after the other, as take 20 ms, for launches run ahead of it in training,
    too."""
    calls = 1
    while True:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        passed = time.perf_counter() - start
        if DEVICE == "cpu" or calls > 1 or passed > ENOUGH:
            return passed / calls
        calls = 1 + int(ENOUGH / passed)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def race(contenders: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each, after one unmeasured call. They take turns, in the orders of `turns`. Of one that takes
    half a minute the first call is measured, and no other."""
    first = {name: seconds(function) for name, function in contenders.items()}
    times = {name: [t] if t > PATIENCE else [] for name, t in first.items()}
    for order in turns([name for name, t in first.items() if t <= PATIENCE], rounds):
        for name in order:
            times[name].append(seconds(contenders[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def turns(names: list[str], rounds: int) -> list[list[str]]:
    """Orders by which drift falls on all alike, and so does what a contender leaves to the next: in as many rounds as
    names, of an even number of them, each follows every other once (Williams 1949); of an odd number, twice in twice as
    many."""
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(n)]
    return [[names[(i + turn) % n] for i in (zigzag[::-1] if n * turn % 2 else zigzag)] for turn in range(rounds)]


def copy_bandwidth(nbytes: int = 1 << (32 if DEVICE == "cuda" else 28)) -> float:
    """Bytes per second, reads and writes counted, of copying a buffer larger than the caches, for longer than it takes
    to launch and to wait."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * nbytes / race({"copy": lambda: target.copy_(source)}, 5)["copy"]


def gemm_rate(M: int, N: int, K: int, dtype: torch.dtype) -> float:
    """FLOP per second of (M, K)·(N, K)ᵀ into memory already touched."""
    a, b = (torch.randn(rows, K, device=DEVICE, dtype=dtype) for rows in (M, N))
    out = torch.empty(M, N, device=DEVICE, dtype=dtype)
    return 2 * M * N * K / race({"gemm": lambda: torch.mm(a, b.T, out=out)}, 3)["gemm"]


def peak_in_child(setup: str, call: str) -> int:
    """Peak resident bytes that `call` adds to those after `setup`, in a process of its own."""
    code = f"""
import resource, torch
{setup}
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
before = resident()
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # forget the peak so far
{call}
with open("/proc/self/status") as f:
    peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
print("PEAK", peak - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.rsplit("PEAK", 1)[1])


def table(title: str, rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join([title, *lines])
