"""Which tokens end a completion: what generation settings, tokenizer and chat template say of it."""

import json
import shutil

import pytest
import transformers
from tiny_models import CPU

from grpo.config import Config
from grpo.embedded import MODEL_DIR
from grpo.errors import UserError
from grpo.policy import load_model
from grpo.policy.stop import end_of_turn, stop_tokens

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tokenizer_with(template, eos="<|endoftext|>", special=("<|im_end|>", "<|im_end|>more", "<|eot_id|>")):
    """The embedded model's tokenizer, speaking another template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    return tokenizer


@pytest.mark.parametrize(("template", "ends"), [
    (CHATML, "<|im_end|>"),
    ("{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n <|eot_id|>{% endfor %}", "<|eot_id|>"),
    ("{% for m in messages %}{{ m.content }}<|im_end|>more{% endfor %}", "<|im_end|>more"),
    ("{% for m in messages %}{{ '<|im_end|>' if m.role == 'user' }}\n{{ m.content }}{% endfor %}", "<|im_end|>"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\nEND\n{% endfor %}<|im_end|>", None),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", None),
    ("{{ messages[0].content }}<|im_end|>", None),
    ("{{ raise_exception('never') }}", None),
    ("{{ messages[7].content.text.more }}", None),
    ("{% for", None),
    (None, None),
])  # fmt: skip
def test_the_special_token_right_behind_an_assistants_message(template, ends):
    tokenizer = tokenizer_with(template)
    assert end_of_turn(tokenizer) == (None if ends is None else tokenizer.convert_tokens_to_ids(ends))


def test_all_that_is_named_ends_a_completion():
    tokenizer = tokenizer_with(CHATML)
    eos, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert eos != turn
    assert stop_tokens(5, tokenizer, 5000) == [5, eos, turn]
    assert stop_tokens([7, 5, turn], tokenizer, 5000) == [7, 5, turn, eos]
    assert stop_tokens(None, tokenizer, 5000) == [eos, turn]
    assert stop_tokens(5, None, 5000) == [5]
    assert stop_tokens(5, tokenizer_with(None, eos=None), 5000) == [5]
    assert stop_tokens(5, tokenizer, 6) == [5]  # what the model has no row for never comes


@pytest.mark.parametrize("configured", [-1, [], True, [3, False], 100, [3, 100], 2.0, "3", [None]])
def test_what_is_no_token_is_refused(configured):
    with pytest.raises(UserError, match="have eos_token_id") as caught:
        stop_tokens(configured, tokenizer_with(CHATML), 100)
    assert repr(configured) in str(caught.value)


def test_nothing_that_ends_a_completion_is_refused():
    with pytest.raises(UserError, match="none could end"):
        stop_tokens(None, tokenizer_with(None, eos=None), 100)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def loaded(folder, tokenizer):
    return load_model(Config(model=str(folder), base="float32", device="cpu"), CPU, 64, tokenizer).stop_tokens


def test_of_a_checkpoint(folder):
    """Its generation settings, right or wrong, missing or not of this model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert loaded(folder, tokenizer) == loaded(folder, None) == [ends]
    path = folder / "generation_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"eos_token_id": 3}))
    assert loaded(folder, tokenizer) == [3, ends]
    for wrong in (-1, [], 99_999):
        path.write_text(json.dumps(fields | {"eos_token_id": wrong}))
        with pytest.raises(UserError, match="have eos_token_id"):
            loaded(folder, tokenizer)
    path.unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": None}))
    assert loaded(folder, tokenizer) == [ends]
    with pytest.raises(UserError, match="none could end"):
        loaded(folder, None)
