"""A few steps with events under torchrun or alone; rank 0 saves what must not depend on the number of processes."""

import os
import sys
from pathlib import Path

import torch

from train.world import make_trainer

world, out = map(Path, sys.argv[1:])
trainer = make_trainer(
    world,
    out,
    config={
        "max_steps": 3,
        "eval_steps": 3,
        "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1)),
        "generation_kwargs": {"do_sample": False},  # sampled completions depend on which rank draws them
        "eval_temperature": 0.7,  # validation's do not: seeds go with the batch
        "save_strategy": "steps",
        "save_steps": 2,
    },
)
trainer.train()
if trainer.is_world_process_zero():
    logs = trainer.state.log_history
    torch.save(
        {
            "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
            "loss": [r["loss"] for r in logs if "loss" in r],
            "kl": [r["eval_teacher_kl"] for r in logs if "eval_teacher_kl" in r],
            "costs": [(r["train_tokens"], r["val_tokens"]) for r in logs if "eval_teacher_kl" in r],
            "events": [(e.step, e.alpha, e.score_initial, e.score_best) for e in trainer.effopd.controller.events],
        },
        out / "result.pt",
    )
