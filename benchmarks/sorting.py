"""A second world for the acceleration study, without what flatters extrapolation in the demo's.

There the teacher is what the student itself would have become: from the first step on, W − W₀ points at it. Here it is
a wider and deeper model that never shared a weight with the student, and the problems are others: five digits, sorted.
"""

import json
import random
from pathlib import Path

from transformers import set_seed

from effopd_kernels.train import demo

COUNT = 10_000  # problems, as many as the demo's world has
TEACHER = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 6}


def problem(number: int) -> dict[str, str]:
    digits = f"{number:05d}"
    return {"prompt": f"{digits}=", "answer": "".join(sorted(digits))}


def build_world(folder: Path, seed: int) -> None:
    """As `effopd_kernels.train.demo.build_world`."""
    marker = folder / "world.json"
    if marker.is_file() and json.loads(marker.read_text())["seed"] == seed:
        return
    numbers = random.Random(seed).sample(range(10**5), COUNT)
    train = demo.write_problems([problem(number) for number in numbers], folder)
    tokenizer = demo.build_tokenizer()
    models = {"student": ({}, demo.STUDENT_ACCURACY, seed), "teacher": (TEACHER, demo.TEACHER_ACCURACY, seed + 1000)}
    for name, (sizes, accuracy, own_seed) in models.items():
        set_seed(own_seed)
        model = demo.build_model(tokenizer, **sizes)
        demo.train_on_labels(model, tokenizer, train, {name: accuracy}, folder, own_seed)
    marker.write_text(json.dumps({"seed": seed}) + "\n")
