"""The task files: their gold answers get full marks, and hostile answers get nothing and harm nothing."""

import subprocess
import sys
from random import random

import pytest
import torch
from small_task import exact, task_with
from tokenizers.processors import TemplateProcessing

from grpo.cautions import cautions
from grpo.data import Rows
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.prompts import Asker, Prompts, Survey, build_prompts
from grpo.seeds import mix_seed
from grpo.stream import PromptStream
from grpo.task import load_task
from grpo.watchdog import Limit

# ---- prompts


def prompts_of(content, template=None, rows=1):
    """build_prompts of rows for which `prompt` gives `content`."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = template or tokenizer.chat_template
    task = task_with(prompt=content if callable(content) else lambda row: content)
    return prompts_for(
        Asker(task, tokenizer, longest_prompt=200, vocabulary=2000), [{"answer": str(n)} for n in range(rows)]
    )


def prompts_for(asker, rows):
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    return build_prompts(asker, rows, survey, range(len(rows)))[0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": None}, "`name` is None, which is no text."),
        ({"rows": []}, "`rows` is []. It must be a function."),
        ({"rewards": [exact]}, "It must be {reward: weight}"),
        ({"rewards": None}, "`rewards` is None"),
        ({"solved": ("exact",)}, "`solved` is ('exact',)"),
        ({"solved": "ab"}, "`solved` is 'ab'"),
        ({"solved": ("exact", "1")}, "`solved` is ('exact', '1')"),
        ({"gold": 5}, "`gold` is 5"),
        ({"gold": str}, "`gold` is <class 'str'>"),
        ({"gold": "{answer}}"}, "Single '}' encountered"),
        ({"gold": "{} {answer}"}, "where a field has no name"),
        ({"gold": "{answer:>1000000000}"}, "not as long as that"),
        ({"config": {"steps": 3}}, "`config` is {'steps': 3}. It must be a Config"),
        ({"embedded": {"modle": "embedded"}}, "`embedded` has modle"),
        ({"embedded": {"base": "fp32"}}, "base is 'fp32'"),
        ({"embedded": None}, "`embedded` is None"),
    ],
)
def test_a_malformed_task_is_refused(fields, told):
    with pytest.raises(UserError) as caught:
        task_with(**fields)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("gold", "answer", "told"),
    [
        ("{answer.foo}", "2", "has no attribute 'foo'"),
        ("{answer:d}", "2", "Unknown format code 'd'"),
        ('{"answer": "{answer}"}', "2", "a brace that is meant as such is written twice"),
        ("{answer}", "bad \ud83d", "half a surrogate pair"),
    ],
)
def test_gold_that_a_row_does_not_fill_is_told(gold, answer, told):
    with pytest.raises(UserError) as caught:
        task_with(gold=gold).gold_text({"answer": answer})
    assert told in str(caught.value)


@pytest.mark.parametrize("row", ["text", ("q", "a"), 3, None])
def test_a_row_is_a_dict(row):
    with pytest.raises(UserError, match="as row 1 of embedded"):
        list(Rows(task_with(rows=lambda split, data: [{"answer": "2"}, row]), "train", "embedded"))


async def rows_of_a_coroutine(split, data):
    return [{"answer": "2"}]


async def rows_one_after_the_other(split, data):
    yield {"answer": "2"}


@pytest.mark.parametrize("rows", [lambda split, data: None, rows_of_a_coroutine, rows_one_after_the_other])
def test_rows_are_rows(rows):
    with pytest.raises(UserError, match=r"`rows` of task \w+ gave .* for embedded \(train\)\. Write it with `def`"):
        Rows(task_with(rows=rows), "train", "embedded")


@pytest.mark.parametrize(("answer", "told"), [(lambda text: 1 / 0, "ZeroDivisionError"), (list, "(list)")])
def test_an_answer_that_fails_is_told(answer, told):
    with pytest.raises(UserError) as caught:
        task_with(answer=answer).vote("some text")
    assert told in str(caught.value)


def test_a_task_file_that_is_no_python_file(tmp_path):
    (tmp_path / "task.txt").write_text("x = 1")
    with pytest.raises(UserError, match=r"is not a Python file\. .* ends in \.py"):
        load_task(tmp_path / "task.txt")


WITH_HELPERS = """
from grpo import Task
from helpers import prompt, rows

def reward(completion):
    return 1.0

task = Task(name="t", rows=rows, prompt=prompt, rewards={reward: 1.0}, gold=None, solved=None, data="embedded")
"""
SPAWNS = """
import multiprocessing, sys
from grpo.task import load_task
if __name__ == "__main__":
    task = load_task(sys.argv[1])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(next(iter(task.rewards)), ["a completion"]))
"""


def test_modules_beside_a_task_file_and_processes_that_a_reward_starts(tmp_path):
    """From another folder, as a run is resumed; a new process unpickles the reward by its module's name."""
    tasks, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    tasks.mkdir(), elsewhere.mkdir()
    (tasks / "helpers.py").write_text("def rows(split, data): return []\ndef prompt(row): return 'x'\n")
    (tasks / "mine.py").write_text(WITH_HELPERS)
    (elsewhere / "spawns.py").write_text(SPAWNS)
    command = [sys.executable, str(elsewhere / "spawns.py"), str(tasks / "mine.py")]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[1.0]\n", "")


REFUSAL = "{{ raise_exception('System role not supported') }}"
PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
GEMMA = "{% if messages[0]['role'] == 'system' %}" + REFUSAL + "{% endif %}" + PLAIN


def test_a_template_without_an_end_is_told_in_time(monkeypatch):
    monkeypatch.setattr("grpo.chat_template.TEMPLATE_LIMIT", Limit(0.05, "the longest that it may take", "Mend it."))
    many = "{% for i in range(99999) %}"
    with pytest.raises(UserError, match=r"refuses the messages of row 0: TimeoutError \(no result in 0.05 s"):
        prompts_of([{"role": "user", "content": "x"}], many * 4 + "{% endfor %}" * 4)


def test_where_the_template_refuses_a_system_message_the_user_says_it():
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    [prompt] = prompts_of(messages, GEMMA)
    assert prompt.text == "<user>Think.\n\n1 + 1?"
    assert prompt.messages == messages
    [prompt] = prompts_of(messages, PLAIN)
    assert prompt.text == "<system>Think.<user>1 + 1?"


@pytest.mark.parametrize("roles", [["system"], ["system", "system"], ["user"]])
def test_messages_that_the_template_refuses_are_told(roles):
    template = REFUSAL if roles == ["user"] else GEMMA
    with pytest.raises(UserError, match=f"row 0: .*System role not supported.* Their roles are {', '.join(roles)}"):
        prompts_of([{"role": role, "content": "x"} for role in roles], template)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "gave an empty text for row 0"),
        (None, "gave None (NoneType) for row 0"),
        ([], "gave [] (list)"),
        (7, "gave 7 (int)"),
        ({"role": "user", "content": "x"}, "(dict)"),
        (("a", "b"), "(tuple)"),
        (["a", "b"], "the message 'a' (str)"),
        ([{"role": "user", "content": None}], "a message whose content is None"),
        ([{"role": "user", "content": 5}], "a message whose content is 5"),
        ([{"role": "user"}], "a message whose content is None"),
        ([{"content": "x"}], "a message whose role is None"),
        ([{"role": "user", "content": ""}], "an empty text"),
        ([{"role": "user", "content": "bad \ud83d"}], "half a surrogate pair, '\\ud83d', at character 4"),
        ("bad \ud83d", "half a surrogate pair"),
        (lambda row: "text" if row["answer"] == "3" else [{"role": "user", "content": "x"}], "rows 0 and 3 differ"),
    ],
)
def test_what_is_asked_must_be_text(content, told):
    with pytest.raises(UserError) as caught:
        prompts_of(content, rows=5)
    assert told in str(caught.value)


# ---- names


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "", "  ", "x\0y", "a\nb", "a" * 101, "tab\there", "\x1b[31m", "x "]
)
def test_a_name_makes_a_safe_folder(name):
    with pytest.raises(UserError, match="A run's folder is named after it"):
        task_with(name=name)
    assert task_with(name="gsm8k-größer_2").name == "gsm8k-größer_2"


# ---- tokens


def tokenizer_with_bos(kind="llama"):
    """The embedded tokenizer, but it begins every text with <|endoftext|>, and ends it so too if kind is "both"."""
    tokenizer = load_tokenizer("embedded")
    bos = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    single = "<|endoftext|> $A <|endoftext|>" if kind == "both" else "<|endoftext|> $A"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[bos])
    return tokenizer, bos[1]


@pytest.mark.parametrize("kind", ["llama", "both"])
def test_a_text_gets_the_tokenizer_s_first_tokens_once(kind):
    tokenizer, bos = tokenizer_with_bos(kind)
    bare = tokenizer("1 + 1?", add_special_tokens=False)["input_ids"]
    for text in ("1 + 1?", "<|endoftext|>1 + 1?"):
        asker = Asker(task_with(prompt=lambda row, text=text: text), tokenizer, 200, 2000)
        assert prompts_for(asker, [{"answer": "2"}])[0].tokens == [bos, *bare]


@pytest.mark.parametrize("begins", ["", "<|endoftext|>"])
def test_a_chat_has_the_tokens_that_the_template_writes(begins):
    """Also where both the tokenizer and the template begin with the same token."""
    tokenizer, _ = tokenizer_with_bos()
    tokenizer.chat_template = begins + tokenizer.chat_template
    messages = [{"role": "user", "content": "1 + 1?", "tool_calls": None}]
    [prompt] = prompts_for(Asker(task_with(prompt=lambda row: messages), tokenizer, 200, 2000), [{"answer": "2"}])
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert prompt.tokens == expected
    assert prompt.messages == messages


def test_a_token_that_the_model_cannot_read_is_told():
    tokenizer = load_tokenizer("embedded")
    text = "1 + 1?"
    largest = max(tokenizer(text)["input_ids"])
    task = task_with(prompt=lambda row: text)
    assert prompts_for(Asker(task, tokenizer, 200, largest + 1), [{"answer": "2"}])
    with pytest.raises(UserError, match=f"makes the token {largest} of row 0, .* only {largest}"):
        prompts_for(Asker(task, tokenizer, 200, largest), [{"answer": "2"}])


CALLS = "{% if m.tool_calls is defined %}{{ m.tool_calls | length }}{% endif %}"
TOOLS = "{% for m in messages %}<{{ m.role }}>" + CALLS + "{{ m.content }}{% endfor %}"


def test_a_field_of_a_message_that_is_none_is_not_there():
    [prompt] = prompts_of([{"role": "user", "content": "x", "tool_calls": None}], TOOLS)
    assert prompt.text == "<user>x"


ANSWERED = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is"}]


def test_a_conversation_that_ends_with_an_answer_is_refused_or_gone_on_with():
    with pytest.raises(UserError, match="ends with the assistant's own answer"):
        prompts_of(ANSWERED)
    tokenizer = load_tokenizer("embedded")
    task = task_with(prompt=lambda row: ANSWERED, continue_final_message=True)
    [prompt] = prompts_for(Asker(task, tokenizer, 200, 2000), [{"answer": "2"}])
    assert prompt.text == tokenizer.apply_chat_template(ANSWERED, tokenize=False, continue_final_message=True)
    assert prompt.text.endswith("It is")


# ---- what is told and stops nothing


def cautions_of(prompt, template=None, gold="{answer}"):
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    asker = Asker(task_with(prompt=prompt, gold=gold), tokenizer, 200, 2000)
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(3)]
    return list(cautions(asker, prompts_for(asker, rows)))


def both_say(row):
    return [{"role": "system", "content": "Think."}, {"role": "user", "content": row["question"]}]


def tool_says(row):
    """A conversation with a call of a tool, and what came of it."""
    called = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    calls = {"role": "assistant", "content": "", "tool_calls": called}
    return [*both_say(row), calls, {"role": "tool", "content": '{"sum": "\\u00e4"}'}]


CALLS_SHOWN = PLAIN.replace("{% endfor", "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}{% endfor")
USER_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + PLAIN
DATED_IF_ASKED = "{% if date is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"template": USER_ONLY}, ["leaves out, or changes, what the system says in row 0: 'Think.'"]),
        ({"prompt": tool_says}, ["leaves out what message 2 of row 0, of the role 'assistant'"]),
        ({"prompt": tool_says, "template": CALLS_SHOWN}, []),
        (
            {"prompt": tool_says, "template": CALLS_SHOWN.replace("in messages", "in messages if m.role != 'tool'")},
            ["leaves out what message 3 of row 0, of the role 'tool'"],
        ),
        ({"template": DATED}, ["writes today's date into every prompt"]),
        ({"template": DATED_IF_ASKED}, []),
        ({"template": PLAIN + "<think>\n", "gold": "<think>x</think>{answer}"}, ["ends inside <think>, and its gold"]),
        ({"template": PLAIN + "<think>\n", "gold": "x</think>{answer}"}, []),
        ({"gold": "<answer>{answer}</answer>"}, ["<answer> of the gold completion are special tokens"]),
        ({"prompt": lambda row: str(random())}, ["gives something else for row 0 each time"]),
        ({"prompt": lambda row: row.pop("question")}, []),
    ],
)
def test_what_may_not_be_expected_is_told_once(fields, told):
    found = cautions_of(**({"prompt": both_say} | fields))
    assert len(found) == len(told)
    assert all(expected in sentence for expected, sentence in zip(told, found, strict=True))


# ---- many rows


def test_many_prompts_are_those_that_few_are(monkeypatch):
    """Made when they are asked for, as if made at once; no longer than said, and the longest is looked at first."""
    tokenizer = load_tokenizer("embedded")
    rows = [{"question": f"{number} apples and {'more ' * (number % 7)}", "answer": "2"} for number in range(50)]
    asker = Asker(task_with(), tokenizer, 200, 2000)
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    few, longest = build_prompts(asker, rows, survey, range(50))
    assert longest == max(len(prompt.tokens) for prompt in few)
    monkeypatch.setattr("grpo.prompts.MADE_AT_ONCE", 10)
    monkeypatch.setattr("grpo.prompts.LONGEST_MADE", 8)
    many, bound = build_prompts(asker, rows, survey, range(50))
    assert isinstance(many, Prompts) and list(many) == few and many[3:5] == few[3:5] and many[-1] == few[-1]
    assert longest <= bound <= max(len(prompt.text.encode()) for prompt in few) + 8
    taken = PromptStream(many, seed=3).take(120)
    assert taken == PromptStream(few, seed=3).take(120)
    assert PromptStream(many, seed=3, cursor=100).take(20) == taken[100:]
    rows[31]["question"] = "too long " * 200
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    with pytest.raises(UserError, match=r"row 31 has .* tokens, but only 200 fit"):
        build_prompts(asker, rows, survey, range(50))


def test_the_order_of_prompts_is_that_of_torch():
    generator = torch.Generator().manual_seed(mix_seed(9, 0))
    order = torch.randperm(6, generator=generator).tolist()
    assert PromptStream(list("abcdef"), seed=9).take(6) == ["abcdef"[place] for place in order]
