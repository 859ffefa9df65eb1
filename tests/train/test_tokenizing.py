import datasets
import pytest
from tokenizers.processors import TemplateProcessing

from effopd_kernels.train import UserError
from effopd_kernels.train.tokenizing import check_tokenizers, fit_context
from train import world as tiny


def test_overlong_prompts_are_counted_dropped_or_refused():
    rows = tiny.problems()[:6]
    tokenizer = tiny.tokenizer_for([r["prompt"] for r in rows])
    rows[2]["prompt"] *= 5
    rows[4]["prompt"] *= 5
    dataset = datasets.Dataset.from_list(rows)
    longest = max(len(tokenizer(r["prompt"])["input_ids"]) for i, r in enumerate(rows) if i not in (2, 4))
    with pytest.raises(UserError, match="2 of 6 prompts in 'd' are longer than"):
        fit_context(dataset, tokenizer, longest, "error", "d")
    kept, dropped = fit_context(dataset, tokenizer, longest, "drop", "d")
    assert (len(kept), dropped) == (4, 2)
    with pytest.raises(UserError, match="all 6 prompts"):
        fit_context(dataset, tokenizer, 1, "drop", "d")
    with pytest.raises(UserError, match="no room"):
        fit_context(dataset, tokenizer, 0, "drop", "d")


def test_a_prompt_that_no_completion_can_follow_is_named_whatever_the_context():
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "")]
    dataset, tokenizer = datasets.Dataset.from_list(rows), tiny.tokenizer_for(["a"])
    for template, says in (
        ("{{ messages[0]['content'] }}", "the prompt in row 1 of 'd' has no tokens"),
        ("{{ 'a' * (1 // (messages[0]['content'] | length)) }}", "cannot be applied to row 1 of 'd': .*zero"),
        ("{{ 'a' ~ (messages[0]['content'] and 'a' or 'a' + 1) }}", "cannot be applied to row 1 of 'd': .*str"),
    ):
        tokenizer.chat_template = template
        for limit in (None, 8):
            with pytest.raises(UserError, match=says):
                fit_context(dataset, tokenizer, limit, "error", "d")


def test_a_prompt_that_the_tokenizer_ends_is_refused():
    """Where it does so by itself, to text; what a prompt says is what is meant."""
    tokenizer = tiny.tokenizer_for(["a"])
    texts, chat = ["Tom"], [[{"role": "user", "content": "Tom"}]]
    for prompts in texts, ["Tom<eos>"], chat:
        fit_context(datasets.Dataset.from_dict({"prompt": prompts}), tokenizer, None, "error", "d")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    fit_context(datasets.Dataset.from_dict({"prompt": chat}), tokenizer, None, "error", "d")
    with pytest.raises(UserError, match="the tokenizer ends the prompts in 'd' with '<eos>', beyond which nothing is"):
        fit_context(datasets.Dataset.from_dict({"prompt": texts}), tokenizer, None, "error", "d")


def test_tokenizers_must_agree_and_fit():
    texts = [r["prompt"] for r in tiny.problems()]
    ours, theirs = tiny.tokenizer_for(texts), tiny.tokenizer_for(texts, eos_token="<end>")
    check_tokenizers(ours, tiny.tokenizer_for(texts), shared=len(ours))
    with pytest.raises(UserError, match=rf"id {len(ours)} is None for the student and '<end>' for the teacher"):
        check_tokenizers(ours, theirs, shared=1000)
    last = max(ours.get_vocab(), key=ours.get_vocab().get)
    with pytest.raises(UserError) as error:
        check_tokenizers(ours, ours, shared=len(ours) - 1)
    assert repr(last) in str(error.value) and f"{len(ours) - 1} ids" in str(error.value)
