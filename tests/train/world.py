"""A world for the trainer's tests: word problems, a BPE tokenizer trained on them, a narrow student and a wider teacher
whose vocabularies are padded to different lengths."""

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
NAMES, THINGS = ("Tom", "Ana", "Kim", "Raj"), ("apples", "books", "stamps")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def problems() -> list[dict[str, str]]:
    """Sixty of them."""
    numbers = itertools.cycle([(3, 4), (7, 5), (12, 9), (2, 6), (10, 15)])
    pairs = itertools.product(NAMES, THINGS, range(5))
    return [
        {"prompt": f"{n} has {a} {t} and gets {b} more. How many {t} does {n} have?", "answer": str(a + b)}
        for (n, t, _), (a, b) in zip(pairs, numbers, strict=False)
    ]


def tokenizer_for(texts: list[str], **kwargs) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>"} | kwargs
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    fast.chat_template = CHAT
    return fast


def tiny_qwen(tokenizer, hidden: int, layers: int, vocab: int, seed: int, **kwargs) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        **{"tie_word_embeddings": True, **kwargs},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def save(folder: Path, *parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(folder: Path) -> Path:
    rows = problems()
    tokenizer = tokenizer_for([r["prompt"] + r["answer"] for r in rows])
    student = tiny_qwen(tokenizer, hidden=32, layers=2, vocab=len(tokenizer) + 4, seed=0)
    teacher = tiny_qwen(tokenizer, hidden=48, layers=3, vocab=len(tokenizer) + 12, seed=1, tie_word_embeddings=False)
    save(folder / "student", student, tokenizer)
    save(folder / "teacher", teacher, tokenizer)
    write_jsonl(folder / "train.jsonl", rows[:40])
    write_jsonl(folder / "val.jsonl", rows[40:50])
    write_jsonl(folder / "eval.jsonl", rows[50:])
    return folder


FLAGS = {
    "max_completion_length": 6,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_metric": "teacher_kl",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
}


def make_trainer(world: Path, out: Path, *, config: dict | None = None, student=None, teacher=None, **kwargs):
    """An OPDTrainer on this world; `config` overrides FLAGS."""
    from effopd_kernels.train import OPDConfig, OPDTrainer
    from effopd_kernels.train.report import MetricsFile

    return OPDTrainer(
        str(world / "student") if student is None else student,
        str(world / "teacher") if teacher is None else teacher,
        OPDConfig(output_dir=str(out), **{**FLAGS, **(config or {})}),
        **{f"{kind}_dataset": load(world / f"{kind}.jsonl") for kind in ("train", "eval", "val")},
        callbacks=[MetricsFile()],
        **kwargs,
    )


def load(path: Path):
    from effopd_kernels.train.data import load_prompts

    return load_prompts(str(path))


def tokenizer_of(world: Path):
    return PreTrainedTokenizerFast.from_pretrained(world / "student", padding_side="left")
