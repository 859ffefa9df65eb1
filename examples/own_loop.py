"""On-policy distillation with EffOPD in a training loop of your own, on one process or sharded by FSDP2.

    python examples/own_loop.py                               # in the demo's world: a minute on a CPU
    torchrun --nproc_per_node 2 examples/own_loop.py
    torchrun --nproc_per_node 8 examples/own_loop.py --student Qwen/Qwen2.5-0.5B-Instruct --bf16 \
        --teacher Qwen/Qwen2.5-7B-Instruct --train train.jsonl --validation val.jsonl --max_new_tokens 512

Prompts are the lines' "prompt". A run in a folder that has a checkpoint goes on from it.
"""

import argparse
import json
import os
import random
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from effopd_kernels import EffOPDController, linear_reverse_kl_loss, share
from effopd_kernels.extrapolation import Losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="folder or hub id; without it, the world of effopd-train --demo is built")
    parser.add_argument("--teacher")
    parser.add_argument("--train", type=Path, help=".jsonl")
    parser.add_argument("--validation", type=Path, help=".jsonl, for the choice of step sizes")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/own_loop"))
    parser.add_argument("--learning_rate", type=float, default=3e-6)
    parser.add_argument("--max_steps", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=128, help="prompts a step, of all ranks")
    parser.add_argument("--max_new_tokens", type=int, default=4)
    parser.add_argument("--save_steps", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="autocast; weights and optimizer stay in fp32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def hidden_and_head(self, rollout: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (N, T, D) that predict the completions, and the head (V, D)."""
    ids, mask, attention = rollout["ids"], rollout["mask"], rollout["attention"]
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # absolute ones would be counted from the padding
    hidden = self.model(input_ids=ids, attention_mask=attention, position_ids=positions).last_hidden_state
    return hidden[:, -1 - mask.shape[1] : -1], self.lm_head.weight


def reverse_kl(self, rollout: dict, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor) -> torch.Tensor:
    hidden, head = hidden_and_head(self, rollout)
    return linear_reverse_kl_loss(hidden, head, teacher_hidden, teacher_head, mask=rollout["mask"])


def loaded(name: str, device: torch.device, *methods) -> torch.nn.Module:
    """The model with these methods. FSDP2 gathers weights for `forward` alone, and for what is registered as such; the
    loss has to be inside of it, for it uses the head.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    for method in methods:
        setattr(model, method.__name__, MethodType(method, model))
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)  # with embeddings and head, which may be one: sharded apart they would become two
        for method in methods:
            register_fsdp_forward_method(model, method.__name__)
    return model


@torch.no_grad()
def complete(model, tokenizer, prompts: list[str], max_new_tokens: int, **sampling) -> dict:
    """ids (N, L + T), attention (N, L + T) and mask (N, T): tokens up to the first end."""
    model.eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    ids = model.generate(**batch, max_new_tokens=max_new_tokens, synced_gpus=dist.is_initialized(), **sampling)
    completion = ids[:, batch["input_ids"].shape[1] :]
    end = completion == tokenizer.eos_token_id
    mask = end.cumsum(1) - end.long() == 0
    return {"ids": ids, "attention": torch.cat([batch["attention_mask"], mask], 1), "mask": mask}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if "RANK" in os.environ:
        dist.init_process_group()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.batch_size % world:
        raise SystemExit(f"--batch_size {args.batch_size} is no multiple of the {world} processes")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.student is None:
        from effopd_kernels.train.demo import build_world

        folder = args.output_dir / "world"
        if rank == 0:
            build_world(folder, args.seed)
        if world > 1:
            dist.barrier()
        args.student, args.teacher = folder / "student", folder / "teacher"
        args.train, args.validation = folder / "train.jsonl", folder / "val.jsonl"

    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student = loaded(args.student, device, reverse_kl)
    teacher = loaded(args.teacher, device, hidden_and_head).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), args.learning_rate, weight_decay=0.0)
    train, validation = (
        [json.loads(line)["prompt"] for line in path.read_text().splitlines()] for path in (args.train, args.validation)
    )
    validation = validation[: len(validation) // world * world]  # as many for every rank
    batches = [validation[i : i + args.batch_size] for i in range(0, len(validation), args.batch_size)]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    def loss_of(rollout: dict) -> torch.Tensor:
        with autocast:
            with torch.no_grad():
                target = teacher.hidden_and_head(rollout)
            return student.reverse_kl(rollout, *target)

    held = {"step": None}  # completions of the event's own step: every α is judged on the same ones

    def validation_loss() -> Losses:
        tokens = 0
        if held["step"] != step:
            own = [complete(student, tokenizer, share(b), args.max_new_tokens, do_sample=False) for b in batches]
            held.update(step=step, rollouts=own)
            tokens = sum(int(r["mask"].sum()) for r in own)
        parts = (len(b) * len(batches) / len(validation) for b in batches)  # their mean is 1
        return Losses((part * loss_of(r) for part, r in zip(parts, held["rollouts"], strict=True)), tokens)

    controller = EffOPDController(
        student,
        None,
        search="gradient",
        loss_fn=validation_loss,
        alphas=(3, 64),
        schedule="adaptive",
        optimizer=optimizer,
    )

    def state() -> dict:
        return dict(zip(("model", "optimizer"), get_state_dict(student, optimizer), strict=True))

    def save(folder: Path) -> None:
        unfinished = folder.with_name("unfinished")
        dcp.save(state(), checkpoint_id=unfinished / "training")
        controller.save(unfinished / "effopd")
        if rank == 0:
            unfinished.replace(folder)

    step = done = max((int(path.name.split("-")[1]) for path in args.output_dir.glob("checkpoint-*")), default=0)
    if done:
        saved, held_state = args.output_dir / f"checkpoint-{done}", state()
        dcp.load(held_state, checkpoint_id=saved / "training")
        set_state_dict(
            student, optimizer, model_state_dict=held_state["model"], optim_state_dict=held_state["optimizer"]
        )
        controller.load(saved / "effopd")
    for step in tqdm(range(done + 1, args.max_steps + 1), disable=rank > 0):
        prompts = random.Random(f"{args.seed}, {step}").sample(train, args.batch_size)
        torch.manual_seed(world * (args.max_steps * args.seed + step) + rank)
        rollout = complete(student, tokenizer, share(prompts), args.max_new_tokens, do_sample=True)
        student.train()
        loss = loss_of(rollout)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (event := controller.step(step)) and rank == 0:
            tqdm.write(f"step {step}: loss {loss.item():.4f}, α = {event.alpha:g}")
        if step % args.save_steps == 0:
            save(args.output_dir / f"checkpoint-{step}")

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student, options=options)
    if student.config.tie_word_embeddings:  # gathered apart, they would be saved twice
        weights.pop("lm_head.weight", None)
    if rank == 0:
        student.save_pretrained(args.output_dir / "student", state_dict=weights)
        tokenizer.save_pretrained(args.output_dir / "student")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
