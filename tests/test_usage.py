"""The README beside what was trained has commands that are as they should be, whatever the names in them are."""

import ast
import re
import shlex
import shutil

import peft
import pytest
import torch
import transformers
from test_checkpoint import flipped

from grpo.folder import leave_later, list_checkpoints
from grpo.run import main
from grpo.usage import README, usage_of_adapter, usage_of_gguf, usage_of_model

HOSTILE = [
    "a b; rm -rf ~ $(reboot) `id` 'x' \"y\"",
    "two\nlines\n```\n# heading",
    "<script>alert(1)</script> [a](javascript:alert(1)) ![x](http://x/y.png) **b** ~~c~~",
    "\u202etxt.exe \x1b[31m\x07",
    "--flag-like",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("page", [
    lambda name: usage_of_adapter(name, name, name, 8, True),
    lambda name: usage_of_model(name, name, name, True),
    lambda name: usage_of_gguf(name, name, name),
], ids=["adapter", "model", "gguf"])  # fmt: skip
def test_names_are_text_and_words(page, name):
    text = page(name)
    seen = "".join(letter if letter.isprintable() else " " for letter in name)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    program = re.search(r"^```python\n(.*?)^```$", text, re.S | re.M)
    commands = re.search(r"^```bash\n(.*?)^```$", text, re.S | re.M)[1].splitlines()
    assert len(re.findall(r"^```", text, re.M)) == (4 if program else 2)
    if program:
        strings = {node.value for node in ast.walk(ast.parse(program[1])) if isinstance(node, ast.Constant)}
        assert strings == {seen}
    assert any(seen in word for command in commands for word in shlex.split(command))
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    assert not re.search(r"(?<!\\)[<>\[\]`*!~]", outside)


def test_a_checkpoint_opens_by_itself(trained):
    last = list_checkpoints(trained)[-1]
    assert (trained / "best").read_text() in {f"checkpoints/{path.name}\n" for path in list_checkpoints(trained)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(last)
    assert tokenizer.chat_template
    program = re.search(r"```python\n(.*?)```", (last / README).read_text(), re.S)[1]
    there = {}
    exec(program, there)
    assert isinstance(there["model"], peft.PeftModel)
    with torch.no_grad():
        asked = there["tokenizer"]("2 + 2", return_tensors="pt")["input_ids"]
        assert there["model"](input_ids=asked).logits.isfinite().all()


def test_best_is_the_checkpoint_that_eval_scores(toy_run, capsys):
    assert main(["--eval", str(toy_run)]) == 0
    scored = re.search(r"adapter of (.*)", capsys.readouterr().out)[1]
    assert scored == str(toy_run / (toy_run / "best").read_text().strip())


def test_what_is_for_other_programs_may_be_changed_or_gone(toy_run):
    """Another chat template is served, a README is filled in: the run goes on."""
    last = list_checkpoints(toy_run)[-1]
    (last / README).write_bytes(flipped((last / README).read_bytes(), 100))
    (last / "chat_template.jinja").unlink()
    shutil.rmtree(list_checkpoints(toy_run)[0])
    assert main(["--resume", str(toy_run), "--steps", "5"]) == 0
    assert (toy_run / (toy_run / "best").read_text().strip()).is_dir()


@pytest.mark.parametrize("names", [2, 4])
def test_best_never_names_a_checkpoint_that_was_left(names, toy_run):
    (toy_run / "best").write_text(f"checkpoints/step-{names:06d}\n")
    leave_later(toy_run, 2)
    assert (toy_run / "best").exists() == (names == 2)


def test_a_tokenizer_is_on_the_disk_once(trained, toy_run):
    first, last = list_checkpoints(trained)
    assert (first / "tokenizer.json").samefile(last / "tokenizer.json")
    assert not (first / README).samefile(last / README)
    changed = list_checkpoints(toy_run)[-1] / "chat_template.jinja"
    changed.unlink()
    changed.write_text("another")
    assert main(["--resume", str(toy_run), "--steps", "5"]) == 0
    new = list_checkpoints(toy_run)[-1]
    assert (new / "chat_template.jinja").read_text() != "another"
    assert (new / "tokenizer.json").samefile(list_checkpoints(toy_run)[-2] / "tokenizer.json")
