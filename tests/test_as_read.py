"""--check shows prompts token by token, whatever is in them, and what ends a completion."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.policy import load_tokenizer
from grpo.policy.load import ends_of_completion
from grpo.run import main
from grpo.verbs.as_read import HEAD, TAIL, as_read, pieces, shown

TASK = r"""
from grpo import Task

def rows(split, data):
    for number in range(3):
        yield {"question": f"{split} {number}" + " more" * number + "\x1b[31m \u202e?", "answer": "2"}

def exact(completion, answer):
    return float(completion == answer)

task = Task(
    name="shows", rows=rows, prompt=lambda row: [{"role": "user", "content": row["question"]}], rewards={exact: 1.0},
    gold="{answer}", solved=("exact", 1.0), data="embedded",
)
"""


def metaspace():
    """A tokenizer in the style of SentencePiece, which drops the space in front of a text's first word."""
    words = ["<unk>", "▁How", "▁many", "▁", "s", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", ["<|im_start|>user\n 1  +\t1?\n\n<|im_end|>\n", " [x] \\n\r\n", "plain"])
def test_the_pieces_are_the_text(text):
    tokenizer = load_tokenizer("embedded")
    tokens = tokenizer(text)["input_ids"]
    assert len(list(pieces(tokenizer, tokens))) == len(tokens)
    assert "".join(pieces(tokenizer, tokens)) == text == tokenizer.decode(tokens)


def test_spaces_that_a_decoder_drops_are_shown():
    tokenizer = metaspace()
    assert list(pieces(tokenizer, tokenizer("How many How")["input_ids"])) == ["How", " many", " How"]


def test_parts_of_a_letter_have_their_own_names():
    """In a vocabulary of bytes é is two tokens, neither of which is text."""
    tokenizer = load_tokenizer("embedded")
    tokens = tokenizer("aé b")["input_ids"]
    found = list(pieces(tokenizer, tokens))
    assert found == ["a", "Ã", "©", " b"]


def test_what_cannot_be_seen_is_written_and_nothing_is_obeyed():
    text = "\x1b[31m\u202e\u200b\xa0\n\t\\n\ud800 é日"
    assert shown(text) == r"\x1b[31m\u202e\u200b\xa0\n\t\\n\ud800 é日"


def test_a_long_prompt_is_cut_in_its_middle():
    tokenizer = load_tokenizer("embedded")
    tokens = tokenizer("\n" * 300 + " and" * 700)["input_ids"]
    text = as_read(tokenizer, tokens).plain
    assert text.count("[") == HEAD + TAIL
    assert f"\n... {len(tokens) - HEAD - TAIL:,} more tokens ...\n[ and]" in text
    assert as_read(tokenizer, tokens[:5]).plain.count("[") == 5


def test_check_shows_three_prompts_and_what_ends_a_completion(tmp_path, capsys):
    path = tmp_path / "shows.py"
    path.write_text(TASK)
    assert main([str(path), "--check", "--model", "embedded", "--chat-template-kwargs", "enable_thinking=false"]) == 0
    told = capsys.readouterr().out
    tokenizer = load_tokenizer("embedded")
    for title, question in (
        ("the first training prompt, row 0", "train 0"),
        ("the longest training prompt, row 2", "train 2 more more"),
        ("the first held-out prompt, row 0", "test 0"),
    ):
        assert title in told
        messages = [{"role": "user", "content": question + "\x1b[31m \u202e?"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        read = as_read(tokenizer, tokens).plain
        assert read in told and f"as the model reads it: {len(tokens)} tokens" in told
        assert read.replace("\n", "") == "".join(f"[{shown(piece)}]" for piece in pieces(tokenizer, tokens))
        assert text.startswith("<|im_start|>user") and read.startswith("[<|im_start|>][")
    assert "\x1b" not in told and "\u202e" not in told
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert f"tokens that end a completion: <|im_end|> ({ends})" in told
    assert "does not read enable_thinking: it changes nothing" in told
    assert ends_of_completion("embedded", tokenizer) == [ends]
