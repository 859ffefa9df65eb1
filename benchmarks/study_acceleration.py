"""How many steps, tokens and seconds does EffOPD save, at which learning rate, and what does it cost?

    python benchmarks/study_acceleration.py --output_dir outputs/study            (resumable: finished runs are kept)
    python benchmarks/study_acceleration.py --world sorting                       (another task, an unrelated teacher)
    python benchmarks/study_acceleration.py --quick

The demo's world (two-digit addition, students of about 50 % exact, teachers of 98 %) or that of `sorting.py`, a bare
on-policy distillation loop around `EffOPDController`, the same student, prompts and seeds for every method. The curve
is exact match on 1,024 held-out problems, which no method ever sees; validation uses 256 others. Costs of a method
count every token it generated, validation included; seconds are CPU seconds of its one thread, so that neighbours do
not count. For each learning rate and seed, the target is what plain OPD ends at; "for good" counts to the step from
which the score stays there or above.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import sorting
import torch
from common import device_name, when_and_with_what
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from effopd_kernels.extrapolation import EffOPDController, Losses, Scores
from effopd_kernels.train import demo

WORLDS = {"addition": demo.build_world, "sorting": sorting.build_world}
BATCH = 128
KL = dict(score="kl", accept="paired")
LOSS = dict(score="loss", search="gradient", alphas=(3, 64))
METHODS = {
    "opd": ("OPD", None),
    "published": ("candidates by accuracy, strict > (published)", dict(score="accuracy")),
    "paired": ("candidates by −KL, paired, 84 %", dict(**KL, confidence=0.84)),
    "gradient": ("gradient, α ≤ 11; −KL, paired, 84 %", dict(**KL, confidence=0.84, search="gradient")),
    "gradient-far": (
        "gradient, α ≤ 64; −KL, paired, 97.5 %",
        dict(**KL, confidence=0.975, search="gradient", alphas=(3, 64)),
    ),
    "gradient-loss": ("gradient, α ≤ 64; the loss itself", LOSS),
    "adaptive": ("gradient, α ≤ 64; the loss itself; adaptive schedule", dict(**LOSS, schedule="adaptive")),
}


class World:
    """Models and problems of one seed, as tensors."""

    def __init__(self, name: str, folder: Path, seed: int):
        WORLDS[name](folder, seed)
        self.folder, self.seed = folder, seed
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
        self.teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
        self.prompts, self.answers = {}, {}
        for part in ("train", "val", "eval"):
            rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
            self.prompts[part] = self._encode(row["prompt"] for row in rows)
            self.answers[part] = self._encode(row["answer"] + self.tokenizer.eos_token for row in rows)
        self.prompt, self.answer = self.prompts["eval"].shape[1], self.answers["eval"].shape[1]  # tokens of each

    def student(self):
        return AutoModelForCausalLM.from_pretrained(self.folder / "student").eval()  # no dropout in it anyway

    def _encode(self, texts) -> torch.Tensor:
        return torch.tensor([self.tokenizer(text)["input_ids"] for text in texts])

    @torch.no_grad()
    def complete(self, model, prompts):
        """One sample per prompt: ids (N, prompt + answer), and which tokens of the answer count: up to and including
        the end.
        """
        ids = prompts
        for _ in range(self.answer):
            probabilities = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1)], 1)
        end = ids[:, self.prompt :] == self.tokenizer.eos_token_id
        return ids, end.cumsum(1) - end.long() == 0

    def kl(self, model, ids, mask):
        """Reverse KL to the teacher, (N, answer), zero where a token does not count. Plain: there are 14 tokens."""
        with torch.no_grad():
            teacher = self.teacher(ids[:, :-1]).logits[:, self.prompt - 1 :].log_softmax(-1)
        student = model(ids[:, :-1]).logits[:, self.prompt - 1 :].log_softmax(-1)
        return (student.exp() * (student - teacher)).sum(-1) * mask

    @torch.no_grad()
    def exact_match(self, model) -> float:
        """Greedy exact match on the held-out problems; greedy is right iff it is right after every right prefix."""
        ids = torch.cat([self.prompts["eval"], self.answers["eval"]], 1)
        greedy = model(ids[:, :-1]).logits[:, self.prompt - 1 :].argmax(-1)
        return (greedy == ids[:, self.prompt :]).all(1).float().mean().item()


def run(world: World, options: dict | None, learning_rate: float, steps: int, seed: int, bar: tqdm) -> dict:
    """One training run; returns its curve and events."""
    set_seed(seed)
    student, started = world.student(), time.process_time()
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    options = dict(options or {})
    scored_by = options.pop("score", None)
    val, fixed = world.prompts["val"], {}

    def score():
        ids, mask = world.complete(student, val)
        if scored_by == "accuracy":
            wrong = (ids[:, world.prompt :] != world.answers["val"]) & mask
            values = 1.0 - wrong.any(1).float()
        else:
            with torch.no_grad():
                values = -world.kl(student, ids, mask).sum(1)
        return Scores(values, tokens=int(mask.sum()))

    def loss_of_fixed_batch():
        """KL on completions of W_t, generated once per event; it depends on α through the student alone."""
        tokens = 0
        if not fixed:
            fixed["batch"] = world.complete(student, val)
            tokens = int(fixed["batch"][1].sum())
        return Losses(world.kl(student, *fixed["batch"]).sum() / len(val), tokens)

    controller = None
    if scored_by:
        loss_fn = loss_of_fixed_batch if options.get("search") == "gradient" else None
        controller = EffOPDController(student, None if scored_by == "loss" else score, loss_fn=loss_fn, **options)
    curve, train_tokens, evaluating = [], 0, 0.0
    picker = torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        if step:
            chosen = torch.randint(len(world.prompts["train"]), (BATCH,), generator=picker)
            ids, mask = world.complete(student, world.prompts["train"][chosen])
            optimizer.zero_grad()
            (world.kl(student, ids, mask).sum() / mask.sum()).backward()
            optimizer.step()
            train_tokens += int(mask.sum())
            if controller:
                fixed.clear()
                controller.step(step)
            bar.update()
        if step & (step - 1) == 0 or step % 8 == 0:
            before = time.process_time()
            value = world.exact_match(student)
            evaluating += time.process_time() - before
            curve.append(
                {
                    "step": step,
                    "score": value,
                    "train_tokens": train_tokens,
                    "val_tokens": controller.val_tokens if controller else 0,
                    "seconds": round(time.process_time() - started - evaluating, 3),
                }
            )
    events = [e.to_dict() for e in controller.events] if controller else []
    return {"learning_rate": learning_rate, "seed": seed, "curve": curve, "events": events}


def cost_to(curve: list[dict], target: float) -> dict | None:
    """Steps, tokens and seconds at the first point of the curve that reaches target; None if none does."""
    point = next((p for p in curve if p["score"] >= target and p["step"] > 0), None)
    return point and {
        "steps": point["step"],
        "tokens": point["train_tokens"] + point["val_tokens"],
        "seconds": point["seconds"],
    }


def steps_for_good(curve: list[dict], target: float) -> int | None:
    """The first step from which on no point of the curve is below target; None if the last one is."""
    below = [i for i, p in enumerate(curve) if p["score"] < target]
    return next((p["step"] for p in curve[below[-1] + 1 if below else 0 :] if p["step"] > 0), None)


def summarize(runs: dict[tuple[str, float, int], dict]) -> list[dict]:
    """Per learning rate and method: how many times fewer steps, tokens and seconds than OPD, over seeds."""
    rows = []
    for method, rate in sorted({(m, r) for m, r, _ in runs}, key=lambda k: (k[1], list(METHODS).index(k[0]))):
        factors = {"steps": [], "tokens": [], "seconds": [], "steps for good": []}
        finals, gaps = [], []
        for seed in sorted({s for m, r, s in runs if (m, r) == (method, rate)}):
            own, opd = runs[method, rate, seed]["curve"], runs["opd", rate, seed]["curve"]
            target = opd[-1]["score"]
            base, reached = cost_to(opd, target), cost_to(own, target) or {}
            base["steps for good"], reached["steps for good"] = (steps_for_good(c, target) for c in (opd, own))
            for key, values in factors.items():
                values.append(round(base[key] / reached[key], 2) if reached.get(key) else None)
            finals.append(own[-1]["score"])
            gaps.append(round(own[-1]["score"] - target, 4))
        rows.append({"learning_rate": rate, "method": method, **factors, "final": finals, "final - OPD": gaps})
    return rows


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def spread(values: list[float | None]) -> str:
    """Median and range; what never reached the target counts as 0."""
    numbers = [v or 0.0 for v in values]
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}–{max(numbers):.2f})"


def table(rows: list[dict]) -> str:
    costs = [key for key in ("steps", "tokens", "seconds", "steps for good") if key in rows[0]]
    head = ["learning rate", "method", *(f"× fewer {key}" for key in costs), "final", "worst final − OPD"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [spread(row[k]) for k in costs]
        final, worst = statistics.median(row["final"]), min(row["final - OPD"])
        cells += [f"{final:.3f}", f"{worst:+.3f}"]
        lines.append(f"| {row['learning_rate']:g} | {METHODS[row['method']][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_factors(rows: list[dict], path: Path) -> None:
    """The table as a picture: medians as lines, every seed as a dot, 0 for one that never reached OPD's score."""
    plt = pyplot()
    panels = {"steps": "× fewer steps", "tokens": "× fewer tokens", "final - OPD": "final score − OPD's"}
    fig, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for (key, label), axis in zip(panels.items(), axes, strict=True):
        even = 0 if key == "final - OPD" else 1
        axis.axhline(even, color="black", linewidth=0.8)
        for method, (name, _) in METHODS.items():
            own = [(row["learning_rate"], [v or 0.0 for v in row[key]]) for row in rows if row["method"] == method]
            if method == "opd" or not own:
                continue
            (line,) = axis.plot([r for r, _ in own], [statistics.median(v) for _, v in own], label=name)
            dots = [(rate, value) for rate, values in own for value in values]
            axis.plot(*zip(*dots, strict=True), ".", color=line.get_color(), alpha=0.5)
        axis.set(title=label, xlabel="learning rate", xscale="log")
        if even:
            axis.set_yscale("symlog", base=2, linthresh=1)
            axis.set_ylim(bottom=-0.15)
            axis.yaxis.set_major_formatter("{x:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_curves(runs: dict[tuple[str, float, int], dict], path: Path) -> None:
    """Median curve over seeds and their range, against steps (above) and all tokens (below)."""
    plt = pyplot()
    rates = sorted({rate for _, rate, _ in runs})
    fig, axes = plt.subplots(2, len(rates), figsize=(4 * len(rates), 7), squeeze=False, sharey="col")
    for column, rate in enumerate(rates):
        for method, (label, _) in METHODS.items():
            curves = [run["curve"] for (m, r, _), run in runs.items() if (m, r) == (method, rate)]
            if not curves:
                continue
            points = list(zip(*curves, strict=True))
            scores = [[p["score"] for p in point] for point in points]
            tokens = [statistics.median(p["train_tokens"] + p["val_tokens"] for p in point) for point in points]
            for axis, x in ((axes[0][column], [point[0]["step"] for point in points]), (axes[1][column], tokens)):
                (line,) = axis.plot(x[1:], [statistics.median(s) for s in scores[1:]], label=label)
                low, high = [min(s) for s in scores[1:]], [max(s) for s in scores[1:]]
                axis.fill_between(x[1:], low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes[0][column].set(title=f"learning rate {rate:g}", xlabel="steps", xscale="log")
        axes[1][column].set(xlabel="tokens generated, validation included", xscale="log")
    for row in axes:
        row[0].set_ylabel("held-out exact match")
    axes[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"), help="worlds and finished runs")
    parser.add_argument("--results_dir", type=Path, help="where table, figure and summary go (default: output_dir)")
    parser.add_argument("--world", choices=list(WORLDS), default="addition")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-6, 1e-5, 3e-5, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--without_seconds", action="store_true", help="for runs on a machine shared with other work")
    parser.add_argument("--quick", action="store_true", help="two rates, one seed, 64 steps: under 5 minutes")
    args = parser.parse_args()
    if args.quick:
        args.learning_rates, args.seeds, args.steps = [3e-6, 1e-4], args.seeds[:1], 64
    if "opd" not in args.methods:
        args.methods.insert(0, "opd")  # the target
    return args


def main() -> None:
    args = parse()
    transformers_logging.disable_progress_bar()
    device = device_name()
    torch.set_num_threads(1)  # a 100,000-parameter model: a second thread only waits
    todo = [(m, r, s) for s in args.seeds for r in args.learning_rates for m in args.methods]
    runs, world = {}, None
    folder = args.output_dir if args.world == "addition" else args.output_dir / args.world
    with tqdm(total=len(todo) * args.steps, unit=" steps") as bar:
        for method, rate, seed in todo:
            path = folder / f"runs-{args.steps}" / f"{method}-{rate:g}-{seed}.json"
            bar.set_description(f"{method}, {rate:g}, seed {seed}")
            if path.exists():
                bar.update(args.steps)
            else:
                if world is None or world.seed != seed:
                    world = World(args.world, folder / f"world-{seed}", seed)
                result = run(world, METHODS[method][1], rate, args.steps, seed, bar)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".tmp").write_text(json.dumps(result))
                path.with_suffix(".tmp").replace(path)
            runs[method, rate, seed] = json.loads(path.read_text())
    folder = args.results_dir or folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = summarize(runs)
    if args.without_seconds:
        for row in rows:
            del row["seconds"]
    about = {"world": args.world, "device": device, "written": when_and_with_what(), "steps": args.steps}
    (folder / "acceleration.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (folder / "acceleration.md").write_text(table(rows))
    draw_factors(rows, folder / "acceleration-factors.png")
    draw_curves(runs, folder / "acceleration.png")
    print(table(rows))


if __name__ == "__main__":
    main()
