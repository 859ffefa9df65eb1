"""What the reports say of unusual checkpoints: that it is true, and that nothing contradicts it."""

from tokenizers import Tokenizer, models

from effopd_kernels.analysis.embeddings import speaker


def test_the_first_tokenizer_that_can_be_read_speaks(tmp_path):
    """Measuring is over when it is looked for: a broken one must not undo that."""
    for name, file, text in (
        ("broken", "tokenizer.json", '{"version": "9.9"'),
        ("half", "tokenizer_config.json", "{}"),
        ("foreign", "tokenizer.model", "abc"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    assert speaker(sorted(tmp_path.iterdir()))(0) == ""
    (tmp_path / "whole").mkdir()
    Tokenizer(models.WordLevel({"a b": 0}, unk_token="?")).save(str(tmp_path / "whole/tokenizer.json"))
    spoken = speaker(sorted(tmp_path.iterdir()))
    assert spoken(0) == "a␣b" and spoken(99) == ""
