"""What the trainer and its validation rely on beyond the documented interfaces of TRL 1.16 and transformers 5.23.

An override that nothing calls any more, or an attribute that nothing reads, would change a run without a word: they are
all looked for when a trainer is made. What is imported by name tells of itself; loss.py looks for what it needs.
"""

import transformers
import trl

PRIVATE_API = {
    # trl.DistillationTrainer's
    "_get_train_sampler": "makes the `RepeatSampler` of a step's prompts",
    "_tokenize_prompts": "makes token ids of prompts, by the chat template",
    "_generate": "makes the completions of a rollout, second of what it returns",
    "_generate_single_turn": "completes token ids, by `generation_config` or vLLM",
    "generation_kwargs": "is what `generation_config` and vLLM sample by",
    "_last_loaded_step": "is the step whose weights vLLM holds",  # with vLLM alone
    "_forward_redirection": "runs the loss within the wrapped model's forward",
    "_metrics": "collects what the next record averages",
    "_step": "counts micro-batches",
    "_buffered_inputs": "holds the rollouts of a step",
    "_current_train_step_time": "is the time of its micro-batches so far",
    "_tokenizer": "is the tokenizer of what may be a processor",
    # transformers.Trainer's
    "_run_epoch": "trains an epoch",
    "_get_output_dir": "says where checkpoints go",
    "_save_checkpoint": "writes one",
    "_load_from_checkpoint": "reads its weights",
    "_load_best_model": "reads those of the best step",
    "_load_optimizer_and_scheduler": "reads its optimizer",
}


def check_private_api(trainer: trl.DistillationTrainer) -> None:
    """Raises RuntimeError where the installed TRL or transformers lacks one."""
    there = {*vars(trainer), *dir(trl.DistillationTrainer), *(() if trainer.use_vllm else ("_last_loaded_step",))}
    if lost := [name for name in PRIVATE_API if name not in there]:
        raise RuntimeError(
            f"TRL {trl.__version__} with transformers {transformers.__version__} has no `{lost[0]}`, which "
            f"{PRIVATE_API[lost[0]]}; effopd_kernels was tested with TRL 1.16 and transformers 5.23"
        )
