"""The embedded default: a world small enough for two CPU cores in which EffOPD can be watched.

Two-digit addition with characters as tokens and the digits of the sum reversed (so that carries flow left to right):
"07+85=" → "290". One 100,000-parameter Qwen3 learns it from labels; an early snapshot becomes the student, the last
one the teacher. OPD and EffOPD then run through `run`, as any user's models would.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from ..errors import UserError
from .config import OPDConfig
from .options import parse
from .output_dir import check_output_dir
from .report import compare, run_summary, write_report
from .run import run

NAMES = {"opd": "OPD", "effopd": "EffOPD"}
PAD, EOS = "<pad>", "<eos>"
EVAL_SIZE, VAL_SIZE = 1024, 256
BATCH, WARMUP, MAX_STEPS, PROBE_EVERY = 128, 20, 2000, 10
STUDENT_ACCURACY, TEACHER_ACCURACY = 0.5, 0.98  # of 512 training problems, exact, at the first probe that reaches it
DEFAULTS = {
    "learning_rate": 3e-6,  # small against the weights, as in post-training: there the gain is
    "max_steps": 256,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "max_completion_length": 4,
    "eval_steps": 16,
    "eval_at_powers_of_two": True,
    "eval_on_start": True,
    "logging_steps": 32,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "dtype": "float32",
}


def problem(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"[::-1]}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Fourteen tokens: padding, end, and one for each character."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, "+", "=", *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def build_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3, 64 wide and two layers deep unless ``sizes`` say otherwise."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        **{"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 16} | sizes,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def build_world(folder: Path, seed: int) -> None:
    """Student, teacher, train.jsonl, val.jsonl and eval.jsonl in `folder`; what is there already is kept."""
    marker = folder / "world.json"
    if marker.is_file() and json.loads(marker.read_text())["seed"] == seed:
        return
    set_seed(seed)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    train = write_problems([problem(*pair) for pair in pairs], folder)
    tokenizer = build_tokenizer()
    wanted = {"student": STUDENT_ACCURACY, "teacher": TEACHER_ACCURACY}
    train_on_labels(build_model(tokenizer), tokenizer, train, wanted, folder, seed)
    marker.write_text(json.dumps({"seed": seed}) + "\n")


def write_problems(rows: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """Share them out as eval.jsonl, val.jsonl and, the rest, train.jsonl, which is returned."""
    parts = {
        "eval": rows[:EVAL_SIZE],
        "val": rows[EVAL_SIZE : EVAL_SIZE + VAL_SIZE],
        "train": rows[EVAL_SIZE + VAL_SIZE :],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return parts["train"]


def train_on_labels(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    wanted: dict[str, float],
    folder: Path,
    seed: int,
) -> None:
    """Supervised training. The model is saved as `folder/name` at the first probe that reaches the accuracy of each
    wanted name, in ascending order.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    picker, left = random.Random(seed), list(wanted.items())
    with tqdm(desc=f"training on labels: {', then '.join(wanted)}", unit=" steps") as bar:
        for step in range(1, MAX_STEPS + 1):
            batch_rows = picker.sample(rows, BATCH)
            batch = tokenizer([r["prompt"] + r["answer"] + EOS for r in batch_rows], return_tensors="pt")
            labels = batch["input_ids"].clone()
            labels[:, : len(batch_rows[0]["prompt"])] = -100
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            if step % PROBE_EVERY == 0:
                accuracy = exact_match(model, tokenizer, rows[:512])
                bar.set_postfix(exact=f"{accuracy:.3f}")
                while left and accuracy >= left[0][1]:
                    for part in (model, tokenizer):
                        part.save_pretrained(folder / left[0][0])
                    left.pop(0)
                if not left:
                    return
    raise RuntimeError(f"the {left[0][0]} did not reach {left[0][1]:.0%} in {MAX_STEPS} steps (seed {seed})")


def exact_match(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    batch = tokenizer([r["prompt"] for r in rows], return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=len(rows[0]["answer"]), do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(t == r["answer"] for t, r in zip(texts, rows, strict=True)) / len(rows)


def run_demo(argv: list[str], args: OPDConfig) -> dict:
    """Build the world, run OPD and EffOPD in it, print and write the comparison. Returns the summary."""
    if args.distributed_state.num_processes > 1:
        raise UserError("--demo runs in one process; torchrun is for runs of your own models")
    # "trainer_output" is what transformers fills in when no output_dir was given.
    output = Path("outputs/demo" if args.output_dir == "trainer_output" else args.output_dir)
    if args.resume_from_checkpoint:
        raise UserError("--demo runs from its beginning: pass --overwrite_output_dir, not --resume_from_checkpoint")
    check_output_dir(output, args.overwrite_output_dir)
    torch.set_num_threads(1)  # matrices 64 wide: threads cost more to wake than they do, far more on a busy machine
    build_world(output / "world", args.seed)
    world = {
        "model_name_or_path": output / "world/student",
        "teacher_model_name_or_path": output / "world/teacher",
        "dataset_name": output / "world/train.jsonl",
        "val_dataset_name": output / "world/val.jsonl",
        "eval_dataset_name": output / "world/eval.jsonl",
    }
    runs = []
    for method in NAMES:
        own = {"output_dir": output / method, "effopd_enabled": method == "effopd"}
        flags = [f"--{k}={v}" for k, v in world.items()] + argv + [f"--{k}={v}" for k, v in own.items()]
        print(f"\n{NAMES[method]}")
        runs.append(run_summary(run(*parse(flags, **DEFAULTS))))
    summary = compare(*runs)
    write_report(summary, output)
    print_comparison(summary)
    print(f"\nsummary.json and curves.png are in {output}")
    return summary


def print_comparison(summary: dict) -> None:
    """Score by step for both, the events, and what reaching OPD's final score took."""
    from rich.console import Console
    from rich.table import Table

    opd, effopd = summary["runs"]
    console = Console()
    events = {e["step"]: e for e in effopd["events"]}
    theirs = {p["step"]: p for p in opd["curve"]}
    table = Table(title=f"Held-out {opd['eval_metric']} (learning rate {opd['learning_rate']:g}, seed {opd['seed']})")
    for name in ("step", "OPD", "EffOPD", "α", "OPD tokens", "EffOPD tokens", "OPD s", "EffOPD s"):
        table.add_column(name, justify="right")
    for ours in effopd["curve"]:
        step = ours["step"]
        if step not in theirs or not (step in events or step in (0, effopd["curve"][-1]["step"])):
            continue
        event, base = events.get(step), theirs[step]
        alpha = "" if event is None else "none" if event["alpha"] == 1 else f"{event['alpha']:g}"
        tokens = [f"{p['train_tokens'] + p['val_tokens']:,}" for p in (base, ours)]
        seconds = [f"{p['seconds']:.1f}" for p in (base, ours)]
        table.add_row(str(step), f"{base['score']:.3f}", f"{ours['score']:.3f}", alpha, *tokens, *seconds)
    console.print(table)

    def cost(of: str) -> str:
        mine, base = summary[of]["effopd"], summary[of]["opd"]
        return f"OPD {base:,}, EffOPD " + ("never" if mine is None else f"{mine:,}")

    def ratio(of: str) -> str:
        return "" if summary[of] is None else f"  (OPD / EffOPD = {summary[of]:.2f})"

    console.print(f"To OPD's final score {summary['target_score']:.3f}:")
    console.print(f"  steps  {cost('steps_to_target')}{ratio('step_acceleration')}")
    console.print(
        f"  tokens {cost('tokens_to_target')}{ratio('token_acceleration')}, validation of candidates included"
    )
