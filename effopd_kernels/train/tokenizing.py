"""What a tokenizer makes of prompts: whether they fit the models, leave room to go on, and mean the same to both."""

from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .data import innermost


def check_open(dataset: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises UserError where the tokenizer ends text prompts with its EOS token, as some do by themselves."""
    prompt, end = next(iter(dataset))["prompt"], tokenizer.eos_token
    if end is None or not isinstance(prompt, str) or prompt.rstrip().endswith(end):  # where it is written, it is meant
        return
    last, of_text = (tokenizer(text=prompt, add_special_tokens=own)["input_ids"][-1:] for own in (True, False))
    if last == [tokenizer.eos_token_id] != of_text:
        raise UserError(
            f"the tokenizer ends the prompts in {where} with {end!r}, beyond which nothing is to be "
            "completed: load and save it with add_eos_token=False, or take that out of tokenizer.json's post_processor"
        )


def prompt_length(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **chat_kwargs: Any) -> int:
    """Length of one prompt in tokens, with the chat template and generation prompt for messages."""
    if isinstance(prompt, str):
        return len(tokenizer(text=prompt)["input_ids"])
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_kwargs
    )
    return len(ids["input_ids"])


def fit_context(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    overlong: str,
    where: str,
    **chat_kwargs: Any,
) -> tuple[datasets.Dataset, int]:
    """Keep the prompts of at most `limit` tokens, None for any number; returns the dataset and how many were dropped.

    Raises:
        UserError: prompts are too long and `overlong` is "error", none is left, one has no tokens, the chat template
            refuses one, or the tokenizer ends them.
    """
    if limit is not None and limit < 1:
        raise UserError(
            "--max_completion_length leaves no room for a prompt in the models' context, of which each of the two "
            "takes a multiple of --pad_to_multiple_of, where it is given"
        )
    check_open(dataset, tokenizer, f"'{where}'")
    keep = []
    for row, prompt in enumerate(dataset["prompt"]):
        try:
            length = prompt_length(prompt, tokenizer, **chat_kwargs)
        except Exception as e:  # whatever the template's own code comes to
            raise UserError(f"the chat template cannot be applied to row {row} of '{where}': {innermost(e)}") from e
        if length == 0:
            raise UserError(f"the prompt in row {row} of '{where}' has no tokens to begin a completion with")
        if limit is None or length <= limit:
            keep.append(row)
    dropped = len(dataset) - len(keep)
    if dropped and overlong == "error":
        raise UserError(
            f"{dropped} of {len(dataset)} prompts in '{where}' are longer than the {limit} tokens that the context "
            "leaves beside --max_completion_length; shorten them, or pass --overlong_prompts drop"
        )
    if not keep:
        raise UserError(
            f"all {len(dataset)} prompts in '{where}' are longer than the {limit} tokens the context leaves"
        )
    return (dataset.select(keep) if dropped else dataset), dropped


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, shared: int) -> None:
    """Student and teacher must mean the same by every token id, and use no id beyond the shared vocabulary.

    Args:
        shared: rows that both heads have, min(V_student, V_teacher).

    Raises:
        UserError: naming the first id at which the two tokenizers differ, or the first token beyond `shared`; no EOS.
    """
    if student.eos_token is None:
        raise UserError("the student's tokenizer has no EOS token to end a completion with: set eos_token and save it")
    ours, theirs = ({i: t for t, i in tok.get_vocab().items()} for tok in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise UserError(
                f"the tokenizers differ: id {i} is {ours.get(i)!r} for the student and {theirs.get(i)!r} for the "
                "teacher; distillation compares distributions id by id and needs one tokenizer"
            )
    beyond = [i for i in ours if i >= shared]
    if beyond:
        first = min(beyond)
        raise UserError(
            f"token {ours[first]!r} (id {first}) lies beyond the {shared} ids that both models' heads have; "
            "resize the smaller model's embeddings or remove the token"
        )
