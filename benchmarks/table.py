"""The README's table of CPU measurements, from what is saved: `python benchmarks/table.py`."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MACHINES = {
    "Zen 5": "cpu-amd-epyc-family-26-avx512-2cores",
    "Zen 4": "cpu-amd-epyc-family-25-avx512-2cores",
    "Xeon, AMX": "cpu-intel-r-xeon-r-processor-family-6-avx512-amx-2cores",
    "Xeon, AMX hidden": "cpu-intel-r-xeon-r-processor-family-6-avx512-2cores",
    "Zen 3": "cpu-amd-epyc-family-25-avx2-2cores",
}
LOGITS, HIDDEN = (
    "reverse KL from logits, {}, 256 × 151936 {}",
    "reverse KL from hidden states, 512 tokens, D 896, V 151936, {}",
)
TOKENS = "log-probabilities of tokens, {} head, from hidden states, 512 tokens, D 896, V 151936, {}"
TOPK = "reverse KL, top 20 of the teacher known, from {}, {}"
FASTER = "ours is × faster"


def short(x: float) -> str:
    return f"{x:.1f}" if x < 10 else f"{x:.0f}"


def seconds(ms: float) -> str:
    return f"{short(ms / 1000)} s" if ms >= 1000 else f"{short(ms)} ms"


def times(*factors: float) -> str:
    return ", ".join(f"{short(factor)}×" for factor in factors)


def span(values: list[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low}–{high}"


def divergence(name: str, *peers: str, ours: str = "ours", faster: str = FASTER):
    def cell(results: dict) -> str:
        of = {row["contender"]: row for row in results["divergence"][name]}
        extra = f"; {of[ours]['extra MB']} MB" if "extra MB" in of[ours] and "hidden" in name else ""
        return f"{seconds(of[ours]['ms'])}; {times(*(of[peer][faster] for peer in peers))}{extra}"

    return cell


def masked(results: dict) -> str:
    tables = [results["divergence"].get(HIDDEN.format(dtype)) for dtype in ("fp32", "bf16")]
    return ", ".join(f"{t[-1][FASTER]:.2f}" for t in tables if t)


def extrapolation(dtype: str):
    def cell(results: dict) -> str:
        table = next(rows for name, rows in results["extrapolate"].items() if name.startswith("Qwen") and dtype in name)
        of = {row["contender"]: row["ms"] for row in table}
        ours = of["ours_with_statistics"]
        return f"{seconds(ours)}; {times(of['lerp_out'] / ours, of['naive'] / ours)}"

    return cell


def triplets(results: dict) -> str:
    rows = results["lowrank"]["top 64 of 4 × (1024 × 3072)"]
    ours, faster = rows[0], "ours is faster by"
    of = {row["contender"].split("(")[0]: row[faster] for row in rows}
    # scikit-learn's at the least time of those that err no more
    sklearn = min(r[faster] for r in rows if "sklearn" in r["contender"] and float(r["worst σ error"]) <= 4.0e-4)
    return f"{seconds(ours['ms'])}; {times(of['torch.svd_lowrank'], sklearn, of['torch.linalg.svd'])}"


def metrics(results: dict) -> str:
    rows = [rows[0] for name, rows in results["lowrank"].items() if name.startswith("all metrics")]
    return f"{span([row['ms'] for row in rows])} ms; {span([r['faster than svdvals by'] for r in rows])}×"


def update_svd(results: dict) -> str:
    (row,) = results["lowrank"]["update_svd, rank 64, 168 matrices in two folders"]
    return f"{row['seconds']} s; {row['reading alone']} s; {row['peak memory, GB']} GB"


def analysis(results: dict) -> str:
    (rows,) = results["analysis"].values()
    parts = (span([row[key] for row in rows]) for key in ("read and measure s", "whole command s", "reading, cold s"))
    return f"{' s; '.join(parts)} s"


LOGITS_FP32, LOGITS_BF16 = (LOGITS.format("value and gradient", dtype) for dtype in ("fp32", "bf16"))
IN_PLACE = {"ours": "ours, in place", "faster": "in place is × faster"}
COMPILED = ("eager", "torch.compile")
ROWS = [
    (
        "**reverse KL from logits**, value + gradient, 256 × 151936 fp32; eager, torch.compile",
        divergence(LOGITS_FP32, *COMPILED),
    ),
    ("the same, in place", divergence(LOGITS_FP32, *COMPILED, **IN_PLACE)),
    ("value alone", divergence(LOGITS.format("value", "fp32"), *COMPILED)),
    ("value + gradient, bf16", divergence(LOGITS_BF16, *COMPILED)),
    ("the same, in place", divergence(LOGITS_BF16, *COMPILED, **IN_PLACE)),
    (
        "JSD, value + gradient, fp32; eager",
        divergence("JSD from logits, value and gradient, 256 × 151936 fp32", "eager"),
    ),
    (
        "**from hidden states**, 512 tokens, D 896, V 151936, fp32; eager, TRL 1.16; extra memory",
        divergence(HIDDEN.format("fp32"), "eager", "TRL chunked"),
    ),
    ("the same in bf16", divergence(HIDDEN.format("bf16"), "eager", "TRL chunked")),
    ("share of that time with 60 % of the tokens masked, fp32, bf16", masked),
    (
        "**top 20 of the teacher**, from logits, 256 × 151936, value + gradient, fp32; eager, torch.compile",
        divergence(TOPK.format("logits", "value and gradient, 256 × 151936 fp32"), *COMPILED),
    ),
    ("the same in bf16", divergence(TOPK.format("logits", "value and gradient, 256 × 151936 bf16"), *COMPILED)),
    (
        "the same from hidden states, 512 tokens, D 896, fp32; eager, TRL 1.16",
        divergence(TOPK.format("hidden states", "512 tokens, D 896, V 151936, fp32"), "eager", "TRL chunked"),
    ),
    (
        "**log-probabilities of tokens** and their gradient, from hidden states, 512 tokens, D 896, V 151936, head "
        "trained, fp32; eager, TRL 1.16; extra memory",
        divergence(TOKENS.format("trained", "fp32"), "eager", "TRL chunked"),
    ),
    ("the same in bf16", divergence(TOKENS.format("trained", "bf16"), "eager", "TRL chunked")),
    ("the same, head frozen, fp32", divergence(TOKENS.format("frozen", "fp32"), "eager", "TRL chunked")),
    ("the same in bf16", divergence(TOKENS.format("frozen", "bf16"), "eager", "TRL chunked")),
    (
        "**`extrapolate_`**, a 0.5B model's weights, bf16, with statistics; `torch.lerp(out=)` without, "
        "`w0 + a*(w - w0)`",
        extrapolation("bfloat16"),
    ),
    ("the same in fp32", extrapolation("float32")),
    (
        "**top 64** of 4 × (1024 × 3072), worst σ within 4.0e-4; `torch.svd_lowrank(q=128, niter=2)`, scikit-learn at "
        "no larger error, `torch.linalg.svd`",
        triplets,
    ),
    ("all spectral metrics, exact, of one such matrix; `torch.linalg.svdvals`", metrics),
    ("`update_svd`, rank 64, the body of a 0.5B bf16 pair; reading alone, cached; peak memory", update_svd),
    (
        "**`effopd-analyze updates`**, 0.5B bf16 pair, rank 64: reading and measuring; whole command; reading alone, "
        "cold",
        analysis,
    ),
]


def main() -> None:
    machines = {}
    for name, folder in MACHINES.items():
        saved = {file.stem: json.loads(file.read_text()) for file in (RESULTS / folder).glob("*.json")}
        machines[name] = {stem: found["results"] for stem, found in saved.items() if "results" in found}  # no studies
    print(f"| | {' | '.join(machines)} |\n|---|{'---|' * len(machines)}")
    for title, cell in ROWS:
        cells = []
        for results in machines.values():
            try:
                cells.append(cell(results))
            except KeyError:
                cells.append("–")
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
