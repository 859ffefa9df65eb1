"""`effopd-analyze updates`: everything that the weights alone tell, read once. Under torchrun rank 0 writes."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checks import FLOATS
from ..commands import EXIT_USER_ERROR, leave_process_group
from ..errors import UserError
from ..extrapolation.distributed import RankFailed, Ranks
from .analyse import analyse, estimate
from .comparison import Comparison, compare
from .findings import Findings
from .matrix import Options
from .output import answer, check_free, say, terminated_as_interrupted, whole_folder
from .painter import Painter
from .report import PARTS, REPORT_NAME, Section, write_report
from .wording import counted, listed, printable

ALONE = "training"  # the name of the only trajectory


def main(args: argparse.Namespace, painter: Painter | None = None) -> Path:
    """The sub-command, with what `arguments.parser` understood. Returns the path of the report.

    Raises:
        UserError: before any work; see `compare`, `check_free` and `trajectories_of`.
    """
    trajectories = trajectories_of(args.checkpoints, args.trajectory)
    if args.rank < 1 or min(args.ks) < 1:
        raise UserError(f"--rank and --ks must be positive, got {args.rank} and {args.ks}")
    ks = tuple(sorted({min(k, args.rank) for k in args.ks}))
    with _ranks() as ranks, terminated_as_interrupted():  # while torch waits for ranks, none of Python's runs
        options = Options(args.rank, ks, args.exact_spectrum, seed=args.seed, device=_device(args.device, ranks))
        comparison = _checked(args, trajectories, ranks)
        if ranks.rank == 0 and options.exact:
            say([f"exact spectra: about {estimate(comparison, ranks.size):.0f} s more"])
        began = time.perf_counter()
        found = analyse(comparison, options, ranks)
        if found is None:
            return Path(args.output_dir) / REPORT_NAME
        seconds = time.perf_counter() - began
        with whole_folder(args.output_dir, PARTS) as folder:
            write_all(found, folder, {"seconds to read and measure": round(seconds, 1), "ranks": ranks.size}, painter)
    path = Path(args.output_dir) / REPORT_NAME
    answer(printable(path))
    return path


def trajectories_of(checkpoints: Sequence[str] | None, named: Sequence[str]) -> dict[str, list[str]]:
    """name → folders, from --checkpoints and every --trajectory NAME=DIR,DIR."""
    if bool(checkpoints) == bool(named):
        raise UserError("give either --checkpoints DIR [DIR ...] or one or more --trajectory NAME=DIR,DIR")
    if checkpoints:
        return {ALONE: list(checkpoints)}
    out: dict[str, list[str]] = {}
    for text in named:
        name, _, folders = text.partition("=")
        name = printable(name)
        paths = [path for path in folders.split(",") if path]
        if not name or not paths:
            raise UserError(f"--trajectory '{text}' must be NAME=DIR,DIR")
        if name.startswith("_") or "$" in name or "/" in name:  # left out of figures; a formula; a folder
            raise UserError(f"--trajectory {name}: a name has no $ and no / and begins with another sign than _")
        if name == "base":
            raise UserError("--trajectory base: that is what the reports call the model of --base; name it otherwise")
        if name in out:
            raise UserError(f"--trajectory {name} is given twice; list its folders in one, separated by commas")
        out[name] = paths
    return out


def write_all(found: Findings, folder: Path, settings: dict[str, Any], painter: Painter | None = None) -> None:
    """Tables, figures and the report of one analysis into ``folder``."""
    from .allocation import allocation
    from .embeddings import embeddings
    from .spectra import spectra
    from .subspaces import subspaces

    parts = [part(found) for part in (allocation, spectra, subspaces, embeddings)]
    if len(found.trajectories) == 1:  # a column of one word
        parts = [replace(part, sections=[_alone(section) for section in part.sections]) for part in parts]
    comparison, options = found.comparison, found.options
    notes = list(dict.fromkeys([*comparison.notes, *_warnings(found)]))  # once of a folder in two trajectories
    say(notes)
    compared = {
        "base": comparison.base.path,
        **{f"trajectory {t}": ", ".join(str(c.path) for c in many) for t, many in comparison.trajectories.items()},
    }
    asked = {
        "rank of the factors": options.rank,
        "subspaces followed": ", ".join(map(str, options.ks)),
        "spectra": "exact" if options.exact else "leading factors, the rest sampled; exact where that is no slower",
        "error bounds of norms": "hold with probability 1 − 1e−9 for each matrix",
        "seed": options.seed,
        "device": options.device or "cpu",
    }
    write_report(
        folder, "What training did to the weights", parts, {**compared, **asked, **settings},
        lead=_lead(comparison), notes=notes, painter=painter,
    )  # fmt: skip


@contextmanager
def _ranks() -> Iterator[Ranks]:
    """This process among those torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks()
    except RankFailed:  # which says itself why
        dist.destroy_process_group()
        sys.exit(EXIT_USER_ERROR)
    except BaseException:
        dist.destroy_process_group()
        raise
    leave_process_group()


def _checked(args: argparse.Namespace, trajectories: dict[str, list[str]], ranks: Ranks) -> Comparison:
    """Every rank opens the folders and finds the same faults; the first looks at the output's and tells the others."""

    def look() -> None:
        inputs = [args.base, *itertools.chain(*trajectories.values())]
        if ranks.rank == 0:
            check_free(args.output_dir, args.overwrite_output_dir, inputs)

    ranks.attempt(look)
    return compare(args.base, trajectories)


def _device(name: str | None, ranks: Ranks) -> str | None:
    """None for the CPU; of several GPUs each rank has its own."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and ranks.size > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from error
    return None if device.type == "cpu" else str(device)


def _alone(section: Section) -> Section:
    return replace(section, table=[{k: v for k, v in row.items() if k != "trajectory"} for row in section.table or ()])


def _lead(comparison: Comparison) -> str:
    shapes = [comparison.base.shapes[name] for name in comparison.names]
    parameters = sum(torch.Size(shape).numel() for shape, _ in shapes)
    dtypes = " and ".join(str(d).removeprefix("torch.") for d in FLOATS if any(d == dtype for _, dtype in shapes))
    runs = "; ".join(
        f"{t}: {c[-1].label}" if len(c) == 1 else f"{t}: {len(c)} checkpoints, {c[0].label} to {c[-1].label}"
        for t, c in comparison.trajectories.items()
    )
    kind = comparison.base.config.get("model_type")
    return (
        f"ΔW = W − W₀ with W₀ = {comparison.base.label}{f' ({kind})' if kind else ''}: {parameters:,} parameters "
        f"in {counted(shapes, 'tensor')}, {dtypes}. {runs}."
    )


def _warnings(found: Findings) -> list[str]:
    """What a reader must know: checkpoints that equal the base, tensors that are not finite."""
    out = []
    for trajectory, position, checkpoint in found.comparison.checkpoints():
        progress = found.comparison.progress[trajectory][position]
        own = [r for r in found.rows if r["trajectory"] == trajectory and r["progress"] == progress]
        if bad := [r["tensor"] for r in own if r["non_finite"]]:
            out.append(f"NaN or infinite in {checkpoint.path}, so left out of its numbers: {listed(bad)}.")
        elif not any(r["update_norm"] for r in own):
            out.append(f"{checkpoint.path} equals the base: every entry of every tensor is the same.")
    return out
