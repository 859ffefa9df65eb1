"""`effopd-analyze updates` on a synthetic pair of the shapes of Qwen2.5-0.5B in bf16, against reading both files.

    pytest benchmarks/bench_analysis.py --benchmark-only [--quick] [--save-results]

Reading is what the command's own reader does, tensor by tensor; cold means that the system was told to drop the files
from its cache (advice: a host may keep them in its own). The command runs in a process of its own, so its time includes
imports, tables, figures and the report, and its peak memory is the process's. Reading alone too is done in a process of
its own, after the same imports: memory that dropping files sets free a virtual machine soon gives back to its host, and
reading into it pays for that. So there are three ratios: to reading alone that of reading and measuring and that of the
whole command, and of one whole process to the other. --quick takes a quarter of the layers.
"""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from common import DEVICE
from safetensors.torch import save_file

for name in ("matplotlib", "pyarrow", "sklearn"):  # the command's
    pytest.importorskip(name)

HIDDEN, INTERMEDIATE, KEYS, LAYERS, VOCABULARY = 896, 4864, 128, 24, 151936


def shapes(layers):
    block = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (KEYS, HIDDEN),
        "self_attn.k_proj.bias": (KEYS,),
        "self_attn.v_proj.weight": (KEYS, HIDDEN),
        "self_attn.v_proj.bias": (KEYS,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    layered = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    return {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), **layered, "model.norm.weight": (HIDDEN,)}


def write_pair(folder, layers):
    """Weights of size 0.02, and updates with σ ∝ i^-0.7 of 3e-3 of their norm."""
    generator = torch.Generator().manual_seed(0)
    pair = {}, {}
    for name, shape in shapes(layers).items():
        weight = 0.02 * torch.randn(shape, generator=generator)
        if name.endswith("_proj.weight"):
            rank = min(shape)
            u = torch.randn(shape[0], rank, generator=generator) * torch.arange(1, rank + 1) ** -0.7
            update = u @ torch.randn(rank, shape[1], generator=generator)
            update *= 3e-3 * weight.norm() / update.norm()
        else:
            update = 1e-5 * torch.randn(shape, generator=generator)
        pair[0][name], pair[1][name] = weight.bfloat16(), (weight + update).bfloat16()
    paths = folder / "base" / "model.safetensors", folder / "checkpoint-100" / "model.safetensors"
    for path, tensors in zip(paths, pair, strict=True):
        path.parent.mkdir(parents=True)
        save_file(tensors, path)
    return paths


def drop(paths):
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


READ = """
import sys
import time
from effopd_kernels.analysis import updates
from effopd_kernels.tensor_files import FileCheckpoint
for turn in range(2):
    began = time.perf_counter()
    files = [FileCheckpoint(path) for path in sys.argv[1:]]
    for name in files[0].shapes:
        for file in files:
            file.read(name)
    print(time.perf_counter() - began)
"""


def read(paths):
    """Seconds to read both files as the command does, again, and of a whole process that reads them once."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    cold, cached = map(float, done.stdout.split())
    return cold, cached, seconds - cached


COMMAND = """
import sys
from effopd_kernels.analysis.cli import main
status = main(sys.argv[1:])
with open("/proc/self/status") as file:  # not rusage, which still counts what this process was forked from
    print("PEAK", next(line.split()[1] for line in file if line.startswith("VmHWM")))
sys.exit(status)
"""


def command(paths, out):
    """Seconds in all, of them reading and measuring, and peak bytes, of the command in its own process."""
    arguments = ["updates", "--base", paths[0].parent, "--checkpoints", paths[1].parent, "--output_dir", out]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - began
    measuring = re.search(r"seconds to read and measure</dt><dd>([\d.,]+)", (out / "report.html").read_text())
    return seconds, float(measuring[1].replace(",", "")), 1024 * int(done.stdout.rsplit("PEAK", 1)[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="the command measures on the CPU: its results belong to one")
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to drop files from the cache")
def test_updates(benchmark, request, report, tmp_path):
    layers = LAYERS // 4 if request.config.getoption("--quick") else LAYERS
    paths = write_pair(tmp_path, layers)
    rows = []

    def turn():
        drop(paths)
        cold, cached, reader = read(paths)
        drop(paths)
        seconds, measuring, peak = command(paths, tmp_path / f"out{len(rows)}")
        rows.append(
            {
                "GB read": round(sum(path.stat().st_size for path in paths) / 1e9, 2),
                "reading, cold s": round(cold, 2),
                "reading, cached s": round(cached, 2),
                "read and measure s": round(measuring, 1),
                "whole command s": round(seconds, 1),
                "measure / cold": round(measuring / cold, 1),
                "command / cold": round(seconds / cold, 1),
                "measure / cached": round(measuring / cached, 1),
                "reading process s": round(reader, 1),
                "command / process": round(seconds / reader, 1),
                "peak GB": round(peak / 1e9, 2),
            }
        )

    benchmark.pedantic(turn, rounds=1 if request.config.getoption("--quick") else 3)
    report(f"updates of a bf16 pair with the shapes of Qwen2.5-0.5B, {layers} layers, rank 64", rows)
