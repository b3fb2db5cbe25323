"""Chat templates as models bring them: six styles, what they read beside the messages, what they leave open, what ends
their turns, and prompts that are too long."""

import json

import jinja2
import pytest
from tokenizers.processors import TemplateProcessing
from transformers.utils.chat_template_utils import get_json_schema

from grpo import Config, Task
from grpo.cautions import cautions, opened_in
from grpo.command import parse
from grpo.config import from_dict
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.policy.stop import stop_tokens
from grpo.prompts import Asker, Survey, build_prompts
from grpo.questions import build_questions

# In the styles of Qwen3, DeepSeek-R1's distillations, gpt-oss, Llama 3, Gemma and Mistral: what is special in each.
QWEN3 = """
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\n\n' if messages[0].role == 'system' else '' }}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- for m in messages if m.role != 'system' -%}
<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] | trim if m.content is string else '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
DEEPSEEK = """{{ bos_token }}
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>{{ m.content }}
{%- else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""
HARMONY = """{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif -%}
<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>
{%- for m in messages -%}
{%- if m.role == 'system' %}<|start|>developer<|message|># Instructions

{{ m.content }}<|end|>
{%- elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>
{%- elif loop.last and not add_generation_prompt -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
LLAMA3 = """{{ bos_token }}
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for m in messages -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% else %}{% set first = '' %}
{%- endif -%}
{%- for m in messages if m.role != 'system' -%}
{%- if m.role == 'user' %}[INST] {{ first if loop.last else '' }}{{ m.content }}[/INST]
{%- else %} {{ m.content | trim }}{{ eos_token }}{% endif -%}
{%- endfor %}"""

# style -> (template, the tokenizer's own end, what else it knows as one token, what ends an assistant's turn)
STYLES = {
    "qwen3": (QWEN3, "<|im_end|>", ["<|im_start|>"], "<|im_end|>"),
    "deepseek": (DEEPSEEK, "<|end_of_sentence|>", ["<|User|>", "<|Assistant|>"], "<|end_of_sentence|>"),
    "harmony": (
        HARMONY,
        "<|return|>",
        ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"],
        "<|return|>",
    ),
    "llama3": (LLAMA3, "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>", ["[INST]", "[/INST]"], "</s>"),
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


def tokenizer_of(style):
    """The embedded tokenizer, speaking another template, with its special tokens; it begins every text with <s>."""
    template, end, special, _ = STYLES[style]
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": end, "additional_special_tokens": special})
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.chat_template = template
    return tokenizer


def right(completion, answer):
    return float(completion == answer)


def asker_of(style, variables=(), longest=400, **fields):
    good = dict(
        name="small",
        rows=lambda split, data: [],
        prompt=lambda row: row["messages"],
        rewards={right: 1.0},
        gold="{answer}",
        solved=("right", 1.0),
        data="embedded",
    )
    return Asker(Task(**(good | fields)), tokenizer_of(style), longest, 5000, dict(variables))


def asked(asker, *rows):
    rows = [{"messages": CHAT, "answer": "2"} | row for row in rows or ({},)]
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    return build_prompts(asker, rows, survey, range(len(rows)))[0]


@pytest.mark.parametrize("style", STYLES)
def test_prompt_tokens_are_those_that_transformers_makes(style):
    """Of one question, of a conversation, and of an answer that is begun; a template's own first token comes once."""
    answer = {"role": "assistant", "content": "<think>two</think>It is 2."}
    chats = [
        CHAT[1:],
        [*CHAT[1:], answer, {"role": "user", "content": "And\n2 + 2?"}],
        [CHAT[1], {"role": "assistant", "content": "<think>\nIt"}],
    ]
    if style != "gemma":
        chats.append(CHAT)
    asker = asker_of(style, continue_final_message=True)
    for chat, prompt in zip(chats, asked(asker, *({"messages": chat} for chat in chats)), strict=True):
        goes_on = chat[-1]["role"] == "assistant"
        how = dict(add_generation_prompt=not goes_on, continue_final_message=goes_on)
        expected = asker.tokenizer.apply_chat_template(chat, tokenize=True, **how)["input_ids"]
        assert prompt.tokens == expected
        assert prompt.tokens.count(asker.tokenizer.bos_token_id) == STYLES[style][0].startswith("{{ bos_token }}")
        assert prompt.text == asker.tokenizer.apply_chat_template(chat, tokenize=False, **how)


@pytest.mark.parametrize("style", STYLES)
def test_a_system_message_reaches_the_model_in_every_style(style):
    [prompt] = asked(asker_of(style))
    assert "Be brief." in prompt.text and prompt.messages == CHAT
    assert list(cautions(asker_of(style), [prompt])) == []


@pytest.mark.parametrize("style", STYLES)
def test_what_ends_a_turn(style):
    """Beside what the generation settings name. Of harmony not <|end|>, which ends the thinking before an answer."""
    tokenizer = tokenizer_of(style)
    *named, turn = tokenizer.convert_tokens_to_ids([STYLES[style][1], STYLES[style][3]])
    assert stop_tokens([7, 9], tokenizer, 5000) == list(dict.fromkeys([7, 9, *named, turn]))
    assert stop_tokens(turn, tokenizer, 5000) == list(dict.fromkeys([turn, *named]))


# ---- what a template reads beside the messages


def test_variables_of_the_task_of_a_row_and_of_the_configuration():
    [prompt] = asked(asker_of("qwen3", chat_template_kwargs={"enable_thinking": False}))
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    [prompt] = asked(asker_of("qwen3", {"enable_thinking": True}, chat_template_kwargs={"enable_thinking": False}))
    assert prompt.text.endswith("<|im_start|>assistant\n")
    by_row = asker_of("harmony", chat_template_kwargs=lambda row: {"reasoning_effort": row["effort"]})
    prompts = asked(by_row, *({"effort": effort} for effort in ("low", "high")))
    assert "Reasoning: low<|end|>" in prompts[0].text and "Reasoning: high<|end|>" in prompts[1].text
    expected = by_row.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, reasoning_effort="high")
    assert prompts[1].tokens == expected["input_ids"]


def test_on_the_command_line_and_in_the_file_of_a_run():
    words = "enable_thinking=False reasoning_effort=low budget=12 names=[1,null] empty= text=a=b yes=true"
    given = parse(["toy.py", "--chat-template-kwargs", *words.split(), "--steps", "3"])[1]
    assert given == {
        "chat_template_kwargs": {
            "enable_thinking": False, "reasoning_effort": "low", "budget": 12, "names": [1, None], "empty": "",
            "text": "a=b", "yes": True,
        },
        "steps": 3,
    }  # fmt: skip
    config = Config(**given)
    assert from_dict(json.loads(json.dumps(vars(config)))) == config


@pytest.mark.parametrize("word", ["enable_thinking", "=3", "toy.py"])
def test_a_word_that_is_no_pair_is_told(word, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--chat-template-kwargs", word])
    assert stopped.value.code == 2 and f"'{word}' is not NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"tools": []}, "tools, which have a field of their own"),
        ({"add_generation_prompt": False}, "add_generation_prompt, which the run decides itself"),
        ({"chat_template": "x"}, "chat_template, which the run decides itself"),
        ({"a-b": 1}, "'a-b', which is no name of a variable"),
        ({3: 1}, "3, which is no name of a variable"),
        ("enable_thinking", "'enable_thinking'"),
        (None, "None"),
    ],
)
def test_what_cannot_be_given_to_a_template_is_refused(kwargs, told):
    for make in (
        lambda: Config(chat_template_kwargs=kwargs),
        lambda: asker_of("qwen3", chat_template_kwargs=kwargs),
        lambda: asked(asker_of("qwen3", chat_template_kwargs=lambda row: kwargs)),
    ):
        with pytest.raises(UserError, match="chat_template_kwargs") as caught:
            make()
        assert told in str(caught.value)


def test_what_config_json_cannot_hold_is_refused():
    for value in (float("nan"), {1, 2}, object(), (1, 2), {1: 2}):
        with pytest.raises(UserError, match=r"config\.json cannot hold"):
            Config(chat_template_kwargs={"x": value})


def test_a_variable_that_the_template_never_reads_is_told():
    def told(style, **fields):
        asker = asker_of(style, **fields)
        return list(cautions(asker, asked(asker)))

    assert told("qwen3", chat_template_kwargs={"enable_thinking": False}) == []
    [sentence] = told("qwen3", chat_template_kwargs={"enable_thinkin": False})
    assert "does not read enable_thinkin: it changes nothing. Did you mean `enable_thinking`?" in sentence
    [sentence] = told("llama3", tools=[{"type": "function"}], chat_template_kwargs={"enable_thinking": False})
    assert "does not read tools: it changes nothing." in sentence and "does not read enable_thinking" in sentence
    [sentence] = told("qwen3", chat_template_kwargs={"enable_thinking": False}, prompt=lambda row: "a text")
    assert "gives text, which goes through no chat template: enable_thinking changes nothing" in sentence
    assert told("qwen3", prompt=lambda row: "a text") == []


# ---- tools


def add(left: int, right: int) -> int:
    """Add two numbers.

    Args:
        left: The one.
        right: The other.
    """
    return left + right


SCHEMA = {"type": "function", "function": {"name": "ask", "description": "Ask.", "parameters": {"type": "object"}}}


def test_tools_are_shown_as_transformers_shows_them():
    asker = asker_of("qwen3", tools=[add, SCHEMA])
    [prompt] = asked(asker)
    expected = asker.tokenizer.apply_chat_template(CHAT, tools=[add, SCHEMA], add_generation_prompt=True)
    assert prompt.tokens == expected["input_ids"]
    assert json.dumps(get_json_schema(add)) in prompt.text and '"name": "ask"' in prompt.text
    by_row = asker_of("qwen3", tools=lambda row: row["tools"])
    with_one, without = asked(by_row, {"tools": [SCHEMA]}, {"tools": []})
    assert '"name": "ask"' in with_one.text and "# Tools" not in without.text


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ('[{"type": "function"}]', "json.loads makes it one"),
        ([3], "neither a function nor a JSON schema"),
        (None, "It must be a list of functions"),
        ([lambda x: x], "A function needs types and a docstring"),
    ],
)
def test_tools_that_are_none_are_told(tools, told):
    for given in (tools, lambda row: tools):
        with pytest.raises(UserError, match="`tools`") as caught:
            asked(asker_of("qwen3", tools=given))
        assert told in str(caught.value)


def test_an_answer_that_calls_tools_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"left": 1}}]}
    chat = [*CHAT, call, {"role": "tool", "content": "2"}]
    [prompt] = asked(asker_of("qwen3"), {"messages": chat})
    assert '<tool_call>{"name": "add"' in prompt.text
    for wrong in (
        [*CHAT, call],
        [CHAT[0], call | {"role": "user"}, CHAT[1]],
        [*CHAT, call | {"tool_calls": []}, CHAT[1]],
    ):
        with pytest.raises(UserError, match="a message whose content is None"):
            asked(asker_of("qwen3", continue_final_message=True), {"messages": wrong})


WANTS_NONE = """{% for m in messages %}<{{ m.role }}>
{%- if m.content is not none %}{{ m.content + '.' }}{% endif %}{{ m.tool_calls | tojson if m.tool_calls }}
{%- endfor %}"""


def test_a_template_that_looks_for_a_content_of_none_is_given_one():
    """As DeepSeek-R1's does. Where transformers itself gives no template any, it is refused."""
    asker = asker_of("qwen3")
    asker.tokenizer.chat_template = WANTS_NONE
    chat = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [3]}, {"role": "tool", "content": "2"}]
    try:
        expected = asker.tokenizer.apply_chat_template(chat, tokenize=False)
    except jinja2.UndefinedError:
        with pytest.raises(UserError, match="refuses the messages of row 0: UndefinedError"):
            asked(asker, {"messages": chat})
    else:
        assert asked(asker, {"messages": chat})[0].text == expected == "<user>1 + 1?.<assistant>[3]<tool>2."


DATED = """{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
Today: {{ date_string }}
{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"""


def test_a_date_is_told_and_may_be_given():
    def told(template, **fields):
        asker = asker_of("qwen3", **fields)
        asker.tokenizer.chat_template = template
        return list(cautions(asker, asked(asker)))

    [sentence] = told(DATED)
    assert "today's date" in sentence and "--chat-template-kwargs date_string='26 Jul 2024' gives it one" in sentence
    assert told(DATED, chat_template_kwargs={"date_string": "26 Jul 2024"}) == []
    [sentence] = told("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "today's date" in sentence and "date_string" not in sentence


# ---- a prompt that ends inside of an opened tag


@pytest.mark.parametrize(
    ("style", "chat", "opened"),
    [
        ("deepseek", CHAT, "<think>"),
        ("qwen3", CHAT, ""),
        ("gemma", CHAT, ""),
        ("harmony", CHAT, ""),
        ("llama3", [CHAT[0], {"role": "user", "content": "Think in <think>."}], ""),
        ("llama3", [*CHAT, {"role": "assistant", "content": "<think>\nLet me see: 1 <"}], "<think>"),
        ("llama3", [*CHAT, {"role": "assistant", "content": "<think>x</think>\n<answer>"}], "<answer>"),
        ("llama3", [*CHAT, {"role": "assistant", "content": "<think>x</think> It"}], ""),
    ],
)
def test_the_tag_that_a_completion_begins_inside_of(style, chat, opened):
    asker = asker_of(style, continue_final_message=True, gold=opened + "x</think>{answer}")
    [prompt] = asked(asker, {"messages": chat})
    assert opened_in(prompt) == opened
    told = [sentence for sentence in cautions(asker, [prompt]) if "ends inside" in sentence]
    assert len(told) == bool(opened) and all(opened in sentence for sentence in told)


# ---- prompts that are too long


def long_rows(split, data):
    sizes = [1, 60, 2, 3, 70, 4] if split == "train" else [1, 50]
    return [{"messages": [{"role": "user", "content": f"{split} {place} " + "word " * size}], "answer": "2"}
            for place, size in enumerate(sizes)]  # fmt: skip


CONFIG = Config(model="embedded", base="float32", device="cpu", eval_prompts=5, max_completion_tokens=64)


def test_rows_that_are_too_long_are_left_out_and_counted(monkeypatch):
    def questions(most, **changes):
        notes = []
        task = asker_of("qwen3", rows=long_rows, max_prompt_tokens=most).task
        return build_questions(task, Config(**(vars(CONFIG) | changes)), note=notes.append), "\n".join(notes)

    whole, notes = questions(None)
    assert len(whole.train) == 6 and len(whole.test) == 2 and "left out" not in notes
    lengths = [len(prompt.tokens) for prompt in whole.train]
    assert min(lengths[1], lengths[4]) > 60 > max(lengths[0], *lengths[2:4], lengths[5])
    some, notes = questions(60)
    assert [prompt.index for prompt in some.train] == [0, 2, 3, 5] and [prompt.index for prompt in some.test] == [0]
    assert "of embedded (train) 2 of 6 rows are left out, whose prompts have more than 60 tokens" in notes
    assert f"the first of them row 1 with {lengths[1]}" in notes and "of embedded (test) 1 of 2 rows" in notes
    assert some.longest <= 60
    exactly, notes = questions(lengths[1])  # as long as may be
    assert [prompt.index for prompt in exactly.train] == [0, 1, 2, 3, 5]
    monkeypatch.setattr("grpo.prompts.MADE_AT_ONCE", 2)  # many rows, a few at once
    monkeypatch.setattr("grpo.prompts.LONGEST_MADE", 1)
    monkeypatch.setattr("grpo.prompts.MEASURED_AT_ONCE", 2)
    assert list(questions(60)[0].train) == some.train
    with pytest.raises(UserError, match=r"6 of 6 rows are left out.*none is left. Raise `max_prompt_tokens`"):
        questions(3)
    with pytest.raises(UserError, match=r"row 4 has \d+ tokens, but only 66 fit .*`max_prompt_tokens=66` in the Task"):
        questions(None, max_context=130)


@pytest.mark.parametrize("most", [0, -1, True, 2.5, "100"])
def test_a_limit_is_a_number_of_tokens(most):
    with pytest.raises(UserError, match=r"`max_prompt_tokens` is .*a number of tokens, 1 or more, or None"):
        asker_of("qwen3", max_prompt_tokens=most)


@pytest.mark.parametrize("flag", ["--max-prompt-length", "--max-prompt-tokens"])
def test_who_looks_for_it_on_the_command_line_is_told_where_it_is(flag):
    with pytest.raises(UserError, match=r"It is a field of the task.*Task\(max_prompt_tokens=\.\.\.\)"):
        parse(["toy.py", flag, "512"])


# ---- a tokenizer that makes tokens of messages itself


def test_tokens_of_a_template_that_is_code_are_its_own():
    """As mistral-common's are: no text has its special tokens, so the text's tokens would be others."""
    plain = tokenizer_of("mistral")

    class Own(type(plain)):
        def apply_chat_template(self, conversation, tokenize=True, return_dict=True, add_generation_prompt=False,
                                continue_final_message=False, tools=None):  # fmt: skip
            if not tokenize:
                return "".join(f"{message['content']}</s>" for message in conversation)
            said = [self(message["content"], add_special_tokens=False)["input_ids"] for message in conversation]
            return [self.bos_token_id, *(token for tokens in said for token in [*tokens, 7])]

    plain.__class__ = Own
    plain.chat_template = None
    asker = Asker(asker_of("mistral").task, plain, 400, 5000)
    [prompt] = asked(asker)
    assert prompt.tokens == plain.apply_chat_template(CHAT)
    assert prompt.text == plain.decode(prompt.tokens) and prompt.text.startswith("<s>Be brief.")
    assert list(cautions(asker, [prompt])) == []
    assert stop_tokens(7, plain, 5000) == [7, plain.eos_token_id]
