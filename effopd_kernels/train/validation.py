"""How good is the student now? The same prompts and the same seeds every time, shared out over the ranks.

Prompts are cut into batches once, batch i belongs to rank i mod world size and is sampled with seed + i: a score does
not depend on how many ranks computed it, and two candidates differ by their weights alone. The caller's random state
is left as it was, so that validating does not change training.
"""

import time
from dataclasses import dataclass

import datasets
import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig
from trl.trainer.utils import pad

from .grading import is_correct


@dataclass
class Validation:
    """Per-prompt results in prompt order, the same on every rank; each list is None when it was not asked for."""

    accuracy: list[float] | None
    teacher_kl: list[float] | None  # mean over the prompt's completion tokens, nats
    tokens: int  # generated, all ranks
    seconds: float

    def mean(self, metric: str) -> float:
        values = getattr(self, metric)
        return sum(values) / len(values)


class Validator:
    """Generates for fixed prompts with a trainer's student and grades what comes.

    Args:
        trainer: an `OPDTrainer`.
        dataset: prompts, and answers where `accuracy` is measured.
        metrics: which of "accuracy" and "teacher_kl" to measure.
        batch_size: prompts per generate call.
        temperature: of sampling; 0 is greedy.
    """

    def __init__(
        self, trainer, dataset: datasets.Dataset, metrics: tuple[str, ...], batch_size: int, temperature: float
    ):
        self.trainer = trainer
        self.metrics = metrics
        self.prompts = list(dataset["prompt"])
        self.answers = list(dataset["answer"]) if "accuracy" in metrics else None
        rows = range(len(self.prompts))
        self.batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        self.generation_config = GenerationConfig(**{**trainer.generation_kwargs, **sampling}, disable_compile=True)

    def __call__(self) -> Validation:
        """Everything, on every rank."""
        start = time.perf_counter()
        results = self.share()
        if self.trainer.accelerator.num_processes > 1:
            results = gather_object(results)
        results.sort()  # rows are unique, so this is prompt order
        _, tokens, accuracy, kl = zip(*results, strict=True)
        return Validation(
            accuracy=list(accuracy) if "accuracy" in self.metrics else None,
            teacher_kl=list(kl) if "teacher_kl" in self.metrics else None,
            tokens=sum(tokens),
            seconds=time.perf_counter() - start,
        )

    def share(self) -> list[tuple[int, int, float, float]]:
        """This rank's part: (row, tokens generated, correct, teacher KL) per prompt."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        was_training = trainer.model.training
        trainer.model.eval()
        results = []
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                # Every rank makes the same number of calls (sharded models communicate inside them); a rank that has
                # run out of batches repeats the last one and throws the result away.
                for index in range(rank, -(-len(self.batches) // world) * world, world):
                    torch.manual_seed(trainer.args.seed + index)
                    graded = self._grade_batch(self.batches[min(index, len(self.batches) - 1)])
                    if index < len(self.batches):
                        results += graded
        finally:
            trainer.model.train(was_training)
        return results

    def _grade_batch(self, rows: range) -> list[tuple[int, int, float, float]]:
        """(row, tokens generated, correct, teacher KL) for each prompt of one batch."""
        trainer = self.trainer
        prompt_ids, _, fields = trainer._tokenize_prompts([self.prompts[r] for r in rows])
        completion_ids = self._generate(prompt_ids, fields)
        correct = [0.0] * len(rows)
        if self.answers is not None:
            texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
            correct = [float(is_correct(t, self.answers[r])) for t, r in zip(texts, rows, strict=True)]
        kl = self._teacher_kl(prompt_ids, completion_ids) if "teacher_kl" in self.metrics else [0.0] * len(rows)
        return list(zip(rows, map(len, completion_ids), correct, kl, strict=True))

    def _generate(self, prompt_ids: list[list[int]], fields: dict) -> list[list[int]]:
        """TRL's own generation (transformers or vLLM), with the validation's sampling in place of training's."""
        trainer = self.trainer
        saved = trainer.generation_config
        vllm = getattr(trainer, "vllm_generation", None)
        saved_temperature = vllm.temperature if vllm is not None else None
        trainer.generation_config = self.generation_config
        if vllm is not None:
            vllm.temperature = self.generation_config.temperature or 0.0
        try:
            return trainer._generate_single_turn(prompt_ids, None, fields)
        finally:
            trainer.generation_config = saved
            if vllm is not None:
                vllm.temperature = saved_temperature

    def _teacher_kl(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        """Mean KL(student ‖ teacher) per completion token of each prompt, in nats."""
        trainer = self.trainer

        def padded(rows, value, side):
            return pad([torch.tensor(r) for r in rows], padding_value=value, padding_side=side).to(
                trainer.accelerator.device
            )

        pad_id = trainer._tokenizer.pad_token_id
        inputs = {
            "prompt_ids": padded(prompt_ids, pad_id, "left"),
            "prompt_mask": padded([[1] * len(r) for r in prompt_ids], 0, "left"),
            "completion_ids": padded(completion_ids, pad_id, "right"),
            "completion_mask": padded([[1] * len(r) for r in completion_ids], 0, "right"),
        }
        seen = []
        student = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        with (
            trainer.fused_loss.measuring(lambda stats, mask: seen.append((stats, mask))),
            trainer.compute_loss_context_manager(),
        ):
            trainer._forward_redirection(trainer.model_wrapped, student, trainer._compute_loss, student, inputs, None)
        ((stats, mask),) = seen
        return (stats.divergence.sum(-1) / mask.sum(-1)).tolist()
