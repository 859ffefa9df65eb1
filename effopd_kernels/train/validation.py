"""How good is the student now? The same prompts and the same seeds every time, shared out over the ranks.

Prompts are cut into batches once, batch i belongs to rank i mod world size and is sampled with seed + i: a score does
not depend on how many ranks computed it, and two candidates differ by their weights alone. The caller's random state
is left as it was, so that validating does not change training.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig
from trl.trainer.utils import pad

from ..errors import UserError
from ..extrapolation.randomness import modes_kept
from ..extrapolation.records import Losses
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

    Raises:
        UserError: the trainer has tools or the prompts have images: validation looks at one turn of text.
    """

    def __init__(self, trainer, dataset: datasets.Dataset, metrics: tuple[str, ...]):
        if trainer.tools or {"image", "images"} & set(dataset.column_names):
            raise UserError(
                "validation neither calls tools nor shows images, so its scores would be of another task: train "
                "without eval_dataset and with effopd_enabled=False"
            )
        self.trainer = trainer
        self.metrics = metrics
        self.prompts = list(dataset["prompt"])
        self.answers = list(dataset["answer"]) if "accuracy" in metrics else None
        rows, batch_size = range(len(self.prompts)), trainer.args.per_device_eval_batch_size
        self.batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        sampling |= {"repetition_penalty": 1.0, "num_beams": 1}
        if (temperature := trainer.args.validation_temperature) > 0:
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
        trainer, device = self.trainer, self.trainer.accelerator.device
        devices = [device] if device.type == "cuda" else []
        results = []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(trainer.model):
            for index in self.indices():
                graded = self._grade_batch(index)
                if index < len(self.batches):
                    results += graded
        return results

    def indices(self) -> range:
        """This rank's batches. Every rank gets the same number, because sharded models communicate in each; an index
        beyond the last batch stands for the last one again, whose result is then thrown away."""
        world, rank = self.trainer.accelerator.num_processes, self.trainer.accelerator.process_index
        return range(rank, -(-len(self.batches) // world) * world, world)

    def complete(self, index: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of batch `index`'s prompts and of the student's completions, sampled with the batch's own seed."""
        prompts = [self.prompts[r] for r in self._rows(index)]
        prompt_ids, _, fields = self.trainer._tokenize_prompts(prompts)
        torch.manual_seed(self.trainer.args.seed + index)
        return prompt_ids, self._generate(prompt_ids, fields)

    def _rows(self, index: int) -> range:
        return self.batches[min(index, len(self.batches) - 1)]

    def _grade_batch(self, index: int) -> list[tuple[int, int, float, float]]:
        """(row, tokens generated, correct, teacher KL) for each prompt of one batch."""
        trainer, rows = self.trainer, self._rows(index)
        prompt_ids, completion_ids = self.complete(index)
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
        trainer.generation_config = self.generation_config
        if vllm is not None:
            saved_sampling = vllm.temperature, vllm.repetition_penalty
            vllm.temperature = self.generation_config.temperature or 0.0
            vllm.repetition_penalty = self.generation_config.repetition_penalty
        try:
            return trainer._generate_single_turn(prompt_ids, None, fields)
        finally:
            trainer.generation_config = saved
            if vllm is not None:
                vllm.temperature, vllm.repetition_penalty = saved_sampling

    def _teacher_kl(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        """Mean KL(student ‖ teacher) per completion token of each prompt, in nats."""
        _, stats, mask = self.reverse_kl(prompt_ids, completion_ids)
        return (stats.divergence.sum(-1) / mask.sum(-1)).tolist()

    def reverse_kl(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]):
        """`OPDTrainer.reverse_kl` of these."""
        trainer = self.trainer

        def padded(rows, value, side):
            rows = [torch.tensor(r, dtype=torch.long) for r in rows]  # of no tokens, too
            return pad(rows, padding_value=value, padding_side=side).to(trainer.accelerator.device)

        pad_id = trainer._tokenizer.pad_token_id
        inputs = {
            "prompt_ids": padded(prompt_ids, pad_id, "left"),
            "prompt_mask": padded([[1] * len(r) for r in prompt_ids], 0, "left"),
            "completion_ids": padded(completion_ids, pad_id, "right"),
            "completion_mask": padded([[1] * len(r) for r in completion_ids], 0, "right"),
        }
        return trainer.reverse_kl(inputs)


class TeacherLoss:
    """KL(student ‖ teacher) on completions that stay the same during one event: what `search="gradient"` descends.

    The first call at a step generates them with the weights of that step, for this rank's share of the prompts; later
    calls at the same step, with other weights, cost forward and backward passes only.
    """

    def __init__(self, validator: Validator):
        self.validator = validator
        self.step: int | None = None
        self.completions: list[tuple[list[list[int]], list[list[int]]]] = []

    def __call__(self) -> Losses:
        trainer, tokens = self.validator.trainer, 0
        if self.step != trainer.state.global_step:
            with evaluating(trainer.model), torch.no_grad():
                self.completions = [self.validator.complete(index) for index in self.validator.indices()]
            self.step = trainer.state.global_step
            tokens = sum(len(c) for _, completion_ids in self.completions for c in completion_ids)
        return Losses(self._losses(), tokens)

    def _losses(self):
        """A batch's mean counts by its prompts, and one that stands in for a missing batch counts nothing (see
        `Validator.indices`), so that the mean over all of all ranks is that of the batches."""
        validator, world = self.validator, self.validator.trainer.accelerator.num_processes
        with evaluating(validator.trainer.model):
            for index, completions in zip(validator.indices(), self.completions, strict=True):
                prompts = len(validator.batches[index]) if index < len(validator.batches) else 0
                share = prompts / len(validator.prompts) * len(self.completions) * world
                loss, *_ = validator.reverse_kl(*completions)
                yield share * loss


@contextmanager
def evaluating(model: torch.nn.Module):
    """`model.eval()` for the duration; TRL files metrics by the mode it finds the model in."""
    with modes_kept(model):
        model.eval()
        yield
