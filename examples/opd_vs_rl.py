"""The same student trained by OPD and by RL, and what each did to its weights.

    python examples/opd_vs_rl.py            # under two minutes on a CPU; reports in outputs/opd_vs_rl

In the world of `effopd-train --demo` (two-digit addition) one student is distilled from its teacher, and trained by
TRL's GRPO with exact match as the reward, at the same learning rate and batch. RL gets four times the steps: about what
it needs for OPD's score. Both keep eight checkpoints, which `effopd-analyze updates` and `effopd-analyze interventions`
then compare. What is there already is not made again.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd_kernels.analysis.cli import main as analyze
from effopd_kernels.train.demo import DEFAULTS, build_world, exact_match
from effopd_kernels.train.options import parse
from effopd_kernels.train.run import run

BATCH, GROUP = 128, 8  # completions per step, and of those per prompt in RL


def train_opd(world: Path, out: Path, steps: int, save_steps: int, args: argparse.Namespace) -> None:
    options = {
        **DEFAULTS,
        "model_name_or_path": world / "student",
        "teacher_model_name_or_path": world / "teacher",
        "dataset_name": world / "train.jsonl",
        "output_dir": out,
        "overwrite_output_dir": True,
        "effopd_enabled": False,
        "eval_strategy": "no",
        "eval_steps": None,
        "eval_at_powers_of_two": False,
        "eval_on_start": False,
        "per_device_train_batch_size": BATCH,
        "learning_rate": args.learning_rate,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_only_model": True,
        "seed": args.seed,
    }
    run(*parse([f"--{name}={value}" for name, value in options.items() if value is not None]))


def train_rl(world: Path, out: Path, steps: int, save_steps: int, args: argparse.Namespace) -> None:
    def exact(completions, answer, **_):
        return [float(given == right) for given, right in zip(completions, answer, strict=True)]

    config = trl.GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        num_generations=GROUP,
        max_completion_length=DEFAULTS["max_completion_length"],
        beta=0.0,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=save_steps,
        save_strategy="steps",
        save_steps=save_steps,
        save_only_model=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        seed=args.seed,
    )
    trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(world / "student"),
        reward_funcs=exact,
        args=config,
        train_dataset=load_dataset("json", data_files=str(world / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(world / "student", padding_side="left"),
    ).train()


def print_scores(world: Path, trajectories: dict[str, list[Path]]) -> None:
    """Held-out exact match of every checkpoint."""
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    for name, folders in {"student": [world / "student"], **trajectories, "teacher": [world / "teacher"]}.items():
        models = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
        print(f"{name:8}", *(f"{exact_match(model, tokenizer, rows):.3f}" for model in models))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/opd_vs_rl"))
    parser.add_argument("--opd_steps", type=int, default=128)
    parser.add_argument("--rl_steps", type=int, default=512)
    parser.add_argument("--checkpoints", type=int, default=8, help="kept of each run, evenly spaced")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args, analysis = parser.parse_known_args(argv)  # the rest goes to `effopd-analyze interventions`
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    torch.set_num_threads(1)  # matrices 64 wide: a second thread only waits

    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    marker = args.output_dir / "settings.json"
    if marker.is_file() and json.loads(marker.read_text()) != settings:
        parser.error(
            f"{args.output_dir} holds a comparison with other settings, see {marker}; give another --output_dir"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings) + "\n")

    world, trajectories = args.output_dir / "world", {}
    build_world(world, args.seed)
    for name, train, steps in (("opd", train_opd, args.opd_steps), ("rl", train_rl, args.rl_steps)):
        every = steps // args.checkpoints
        folders = [args.output_dir / name / f"checkpoint-{every * (i + 1)}" for i in range(args.checkpoints)]
        if not all((folder / "model.safetensors").is_file() for folder in folders):
            train(world, args.output_dir / name, every * args.checkpoints, every, args)
        trajectories[name] = folders
    print_scores(world, trajectories)

    pair = ["--base", str(world / "student")]
    pair += [f"--trajectory={name}={','.join(map(str, folders))}" for name, folders in trajectories.items()]
    evaluation = {
        "teacher_model_name_or_path": world / "teacher",
        "dataset_name": world / "eval.jsonl",
        "eval_metric": "accuracy",
        "max_completion_length": DEFAULTS["max_completion_length"],
        "per_device_eval_batch_size": 512,
        "output_dir": args.output_dir / "interventions",
    }
    code = analyze(["updates", *pair, "--output_dir", str(args.output_dir / "updates"), "--overwrite_output_dir"])
    return code or analyze(["interventions", *pair, *(f"--{k}={v}" for k, v in evaluation.items()), *analysis])


if __name__ == "__main__":
    raise SystemExit(main())
