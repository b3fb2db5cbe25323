"""What is taught of a row, token by token: against transformers' own mask where a template marks what the assistant
writes, in the styles of six families, and in words where it cannot be taught."""

from dataclasses import replace

import pytest
from test_templates import CHAT, STYLES, asked, asker_of
from tokenizers.normalizers import Prepend, Replace

from grpo import Config
from grpo.cautions import caution_of_answer
from grpo.errors import UserError
from grpo.lessons import Lessons, build_lessons, build_teacher
from grpo.pairs import common_prompt
from grpo.policy.stop import end_of_turn, stop_tokens

ASSISTANT = {"role": "assistant", "content": "It is 2."}
AGAIN = {"role": "user", "content": "And 2 + 2?"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}],
}
FOUR = {"role": "assistant", "content": "That is\nfour, 4."}
# What is not cut for its thinking: plain ChatML, with the marks of transformers.
MARKED = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def teacher_of(style="qwen3", template=None, longest=400, method="sft", train_on="answer", **fields):
    asker = asker_of(style, **({"gold": None, "rewards": {}, "solved": None} | fields))
    if template:
        asker.tokenizer.chat_template = template
    stop = stop_tokens(None, asker.tokenizer, 5000)
    config = Config(method=method, train_on=train_on)
    return build_teacher(asker, config, stop, end_of_turn(asker.tokenizer), longest)


def lesson(teacher, row):
    prompt = row.get("prompt", CHAT)
    asker = replace(teacher.asker, task=replace(teacher.asker.task, prompt=lambda row: prompt))
    return teacher(asked(asker, row)[0])


def shown(teacher, tokens):
    return teacher.asker.tokenizer.decode(tokens, skip_special_tokens=False)


def mask_of(group):
    """The tokens of prompt and completion, and which of them are taught."""
    [completion] = group.completions
    return group.prompt.tokens + completion.tokens, [False] * len(group.prompt.tokens) + completion.mask


@pytest.mark.parametrize("train_on", ["answer", "assistant"])
def test_what_is_taught_is_what_transformers_marks(train_on):
    teacher = teacher_of(template=MARKED, train_on=train_on)
    messages = [*CHAT, ASSISTANT, AGAIN, FOUR]
    tokens, mask = mask_of(lesson(teacher, {"prompt": messages[:-1], "messages": messages}))
    theirs = teacher.asker.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    assert theirs["input_ids"][: len(tokens)] == tokens  # what follows the end of the last turn is left out
    marked = [bool(value) for value in theirs["assistant_masks"]]
    if train_on == "answer":
        first = marked.index(True)
        marked[first : marked.index(False, first)] = [False] * (marked.index(False, first) - first)
    assert mask == marked[: len(tokens)] and not any(marked[len(tokens) :])
    assert tokens[-1] in teacher.stop


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_that_is_a_text_is_what_a_rollout_would_be(style):
    """It goes on where the prompt ends, in all styles, and the end of the turn is learnt."""
    teacher = teacher_of(style, gold="The answer is {answer}.\n")
    group = lesson(teacher, {"messages": CHAT})
    [completion] = group.completions
    assert group.prompt.messages == CHAT and group.advantages.tolist() == [1.0]
    text = (
        teacher.asker.tokenizer.apply_chat_template(group.prompt.messages, tokenize=False, add_generation_prompt=True)
        if style != "gemma"
        else group.prompt.text
    )
    assert shown(teacher, group.prompt.tokens + completion.tokens) == text + "The answer is 2.\n" + STYLES[style][3]
    assert completion.text == "The answer is 2.\n" and completion.finish == "stop" and completion.others == ()
    assert completion.sampler_logprobs == [0.0] * len(completion.tokens)


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("deepseek", "mistral")])
def test_messages_are_taught_as_the_template_closes_them(style):
    teacher = teacher_of(style)
    messages = [*CHAT, ASSISTANT]
    tokens, mask = mask_of(lesson(teacher, {"messages": messages}))
    whole = shown(teacher, tokens)
    assert whole.endswith("It is 2." + STYLES[style][3]) and tokens[-1] in teacher.stop
    taught = [token for token, is_taught in zip(tokens, mask, strict=True) if is_taught]
    assert shown(teacher, taught).lstrip().endswith("It is 2." + STYLES[style][3])
    if style != "gemma":  # whose system text is put into the first message
        rendered = teacher.asker.tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert rendered[: len(tokens)] == tokens


# As in GLM-4, whose assistant is ended by what the next turn begins with; as in Phi-3, where the whole has another end.
OPEN = """{%- for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}
{{ m.content }}{% endfor -%}
{%- if add_generation_prompt %}<|Assistant|>
{% endif %}"""
ENDED_TWICE = MARKED + "{%- if not add_generation_prompt %}{{ eos_token }}{% endif %}"


@pytest.mark.parametrize(
    ("style", "template", "end"),
    [("deepseek", OPEN, "<|User|>"), ("llama3", ENDED_TWICE.replace("im_end", "eot_id"), "<|eot_id|>")],
)
def test_every_turn_is_taught_to_end_as_its_template_ends_it(style, template, end):
    asker = asker_of(style, gold=None, rewards={}, solved=None)
    asker.tokenizer.chat_template = template
    own = end_of_turn(asker.tokenizer)
    teacher = build_teacher(
        asker, Config(method="sft", train_on="assistant"), stop_tokens(None, asker.tokenizer, 5000), own, 400
    )
    [completion] = lesson(teacher, {"messages": [*CHAT[1:], ASSISTANT, AGAIN, FOUR], "prompt": CHAT[1:]}).completions
    [(start, stop)] = completion.others
    taught = [shown(teacher, completion.tokens[:start]), shown(teacher, completion.tokens[stop:])]
    assert taught == [f"It is 2.{end}", f"That is\nfour, 4.{end}"]


def test_the_turns_of_others_are_read_and_not_taught():
    teacher = teacher_of(template=MARKED, train_on="assistant")
    messages = [*CHAT, ASSISTANT, AGAIN, FOUR]
    group = lesson(teacher, {"prompt": messages[:-1], "messages": messages})
    assert group.prompt.messages == CHAT and group.prompt.text == shown(teacher, group.prompt.tokens)
    [completion] = group.completions
    [(start, end)] = completion.others
    assert shown(teacher, completion.tokens[:start]) == "It is 2.<|im_end|>"
    assert "And 2 + 2?" in shown(teacher, completion.tokens[start:end])
    assert completion.num_sampled == len(completion.tokens) - (end - start)


def test_what_has_no_weight_is_read_and_not_taught():
    teacher = teacher_of(template=MARKED, train_on="assistant")
    messages = [*CHAT, ASSISTANT | {"weight": 0}, AGAIN, FOUR | {"weight": 1}]
    group = lesson(teacher, {"prompt": messages[:-1], "messages": messages})
    assert group.prompt.messages == messages[:-1] and shown(teacher, group.prompt.tokens).count("It is 2.") == 1
    assert shown(teacher, group.completions[0].tokens) == "That is\nfour, 4.<|im_end|>"


def test_a_conversation_follows_its_prompt_once():
    """A prompt of the task's own may have another system text; whatever else differs would be said twice."""
    teacher, whole = teacher_of(template=MARKED), [*CHAT, ASSISTANT]
    system = {"role": "system", "content": "Count."}
    only = lesson(teacher, {"prompt": [system], "messages": [system, ASSISTANT]})
    assert only.prompt.messages == [system] and only.completions[0].text == "It is 2."
    for prompt in (CHAT, [system, *CHAT[1:]], CHAT[1:]):
        group = lesson(teacher, {"prompt": prompt, "messages": whole})
        assert group.prompt.messages == prompt and group.completions[0].text == "It is 2."
    shared = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "It is 2."}]
    group = lesson(teacher, {"prompt": CHAT, "messages": None, "conversations": shared})
    assert group.prompt.messages == CHAT and group.completions[0].text == "It is 2."
    for row in ({"messages": whole}, {"completion": whole}):
        with pytest.raises(UserError, match=r"row 0: the answer's messages begin with .* nor go on where it ends"):
            lesson(teacher, {"prompt": [{"role": "user", "content": "One and one?"}], **row})


def test_a_call_of_a_tool_is_taught():
    group = lesson(teacher_of("qwen3"), {"messages": [*CHAT, CALLS]})
    assert '"name": "add"' in group.completions[0].text


def test_a_completion_in_messages_may_have_rounds():
    rounds = [ASSISTANT, AGAIN, FOUR]
    group = lesson(teacher_of(template=MARKED), {"messages": None, "completion": rounds})
    assert len(group.completions[0].others) == 1 and group.prompt.messages == CHAT


def test_an_answer_may_begin_with_the_words_of_others():
    system = [{"role": "system", "content": "Sum."}]
    group = lesson(teacher_of(template=MARKED), {"prompt": system, "completion": [AGAIN, FOUR]})
    assert group.prompt.messages == [*system, AGAIN]
    whole = shown(teacher_of(template=MARKED), mask_of(group)[0])
    assert "And 2 + 2?" in whole and whole.endswith("That is\nfour, 4.<|im_end|>")
    teacher = teacher_of(template=MARKED, method="dpo")
    sides = {"prompt": system, "chosen": [AGAIN, FOUR], "rejected": [AGAIN, ASSISTANT]}
    of_pair = lesson(teacher, sides)
    assert of_pair.prompt.tokens == group.prompt.tokens and of_pair.completions[0].tokens == group.completions[0].tokens
    with pytest.raises(UserError, match="answer different messages"):
        lesson(teacher, sides | {"rejected": [*CHAT, ASSISTANT]})


def test_an_end_that_the_data_write_themselves_is_the_end():
    teacher = teacher_of("qwen3")
    bare, written, lines = ({"completion": text} for text in ("It is 2.", "It is 2.<|im_end|>", "It is 2.<|im_end|>\n"))
    of_messages = {"messages": [*CHAT, ASSISTANT | {"content": "It is 2.<|im_end|>"}]}
    assert mask_of(lesson(teacher, written)) == mask_of(lesson(teacher, bare)) == mask_of(lesson(teacher, lines))
    whole = [
        shown(teacher, mask_of(lesson(teacher, row))[0]) for row in (of_messages, {"messages": [*CHAT, ASSISTANT]})
    ]
    assert whole[0] == whole[1] and whole[0].count("It is 2.<|im_end|>") == 1

    with pytest.raises(UserError, match=r"has <\|im_end\|> in its text"):
        lesson(teacher, {"completion": "2<|im_end|>\n3"})


def test_a_prompt_that_is_a_text():
    teacher = teacher_of("qwen3")
    group = lesson(teacher, {"prompt": "1 + 1 =", "completion": " 2"})
    assert shown(teacher, group.completions[0].tokens) == " 2<|im_end|>"
    [again] = lesson(teacher, {"prompt": "2", "completion": "22"}).completions
    assert shown(teacher, again.tokens) == "22<|im_end|>"  # it says what it says


def test_no_blank_is_taught_that_a_tokenizer_puts_in_front_of_a_text():
    """As those made by SentencePiece do. It shows where the last token of a prompt and the first of an answer merge."""
    teacher = teacher_of("qwen3")
    tokenizer = teacher.asker.tokenizer._tokenizer
    tokenizer.normalizer = Prepend(" ")
    for prompt, completion in (("1 + 1 = ", "2"), ("Sum:\n", "\n2")):
        group = lesson(teacher, {"prompt": prompt, "completion": completion})
        assert shown(teacher, mask_of(group)[0]) == f"<s> {prompt}{completion}<|im_end|>"
    tokenizer.normalizer = Replace("= 2", "is it")  # which no tokens of parts can say
    with pytest.raises(UserError, match="cannot cut the text of row 0"):
        lesson(teacher, {"prompt": "1 + 1 = ", "completion": "2"})


@pytest.mark.parametrize(
    ("style", "train_on", "messages", "told"),
    [
        ("deepseek", "answer", [*CHAT, ASSISTANT], "otherwise in the whole"),
        ("mistral", "answer", [*CHAT, ASSISTANT], "otherwise in the whole"),  # its system text is in the last message
        ("harmony", "assistant", [*CHAT, ASSISTANT, AGAIN, FOUR], "otherwise in the whole"),
        ("qwen3", "answer", [*CHAT, ASSISTANT | {"content": "<think>two</think>2"}], "leaves out, or changes"),
        ("qwen3", "answer", [*CHAT, ASSISTANT, AGAIN], "ends with a message of the role 'user'"),
        ("qwen3", "answer", [*CHAT, ASSISTANT | {"weight": 0}], "the answer has the `weight` 0"),
        ("qwen3", "answer", [*CHAT, ASSISTANT | {"content": " \n"}], "empty message of the assistant"),
        ("qwen3", "answer", [*CHAT, ASSISTANT | {"content": 2}], "empty message of the assistant, 2"),
        ("qwen3", "answer", CHAT, "ends with a message of the role 'user', and not"),
        ("llama3", "answer", [*CHAT, CALLS], "leaves out, or changes"),
        ("llama3", "answer", [*CHAT, ASSISTANT | {"reasoning_content": "One and one."}], "leaves out, or changes"),
        ("qwen3", "answer", "hello", "row 0: `messages` must be a list of chat messages, not 'hello'"),
        ("qwen3", "answer", None, "there is no answer to learn from"),
        ("qwen3", "answer", [*CHAT, ASSISTANT | {"content": "2<|im_end|>3"}], r"has <\|im_end\|> in its text"),
        ("qwen3", "answer", [*CHAT, 3], "must be a list of chat messages"),
    ],
)
def test_what_cannot_be_taught_is_told(style, train_on, messages, told):
    teacher = teacher_of(style, train_on=train_on)
    prompts = asked(
        replace(teacher.asker, task=replace(teacher.asker.task, prompt=lambda row: CHAT)), {"messages": CHAT}
    )
    prompts = [replace(prompts[0], fields={"messages": messages})]
    with pytest.raises(UserError, match=told):
        build_lessons(teacher, prompts, "data", False, print)


def test_rows_without_any_answer_name_their_columns():
    teacher = teacher_of()
    prompts = [replace(asked(teacher.asker)[0], fields={"question": "1 + 1?"})]
    with pytest.raises(UserError, match=r"1 of 1 rows of data.*neither `completion` nor `messages`, but question"):
        build_lessons(teacher, prompts, "data", False, print)


def test_rows_that_cannot_be_taught_are_counted_named_and_left_out():
    teacher = teacher_of(longest=60)
    [prompt] = asked(teacher.asker)
    answers = ["good", "", "long " * 60, "good too", "   ", "fine"]
    prompts = [replace(prompt, index=at, fields={"completion": each}) for at, each in enumerate(answers)]
    with pytest.raises(UserError, match="2 of 6 rows of data cannot be taught: row 1: the answer is empty; row 4"):
        build_lessons(teacher, prompts, "data", False, print)
    notes = []
    lessons = build_lessons(teacher, prompts, "data", True, notes.append)
    assert [group.completions[0].text for group in lessons] == ["good", "good too", "fine"]
    assert "2 rows of data left out" in notes[0] and "row 1: the answer is empty" in notes[0]
    assert "1 row of data left out, longer than 60 tokens with the answer: row 2 with" in notes[1]
    sizes = [len(group.prompt.tokens) + len(group.completions[0].tokens) for group in lessons]
    assert lessons.longest == max(sizes) and lessons.num_tokens == sum(sizes) - 3 * len(prompt.tokens)
    with pytest.raises(UserError, match=r"1 of 1 rows.*None is left.*--held-out N takes N training rows in its place"):
        build_lessons(teacher, prompts[1:2], "data", True, print)
    with pytest.raises(UserError, match="No row of data is left"):
        build_lessons(teacher, prompts[2:3], "data", True, print)
    assert isinstance(lessons, Lessons) and len(lessons[1:]) == 2


def test_an_answer_inside_of_a_tag_that_its_prompt_opens_is_told():
    teacher = teacher_of("deepseek")  # whose prompts end with <think>
    told = []
    for said in ("Two, I think.</think>2", "2", "<think>Two.</think>2"):
        group = lesson(teacher, {"completion": said})
        told.append(caution_of_answer(group.prompt, shown(teacher, group.completions[0].tokens)))
    assert told[0] == "" and "and its answer has no </think>" in told[1] and "opens <think> again" in told[2]
    assert caution_of_answer(lesson(teacher_of("qwen3"), {"completion": "2"}).prompt, "2") == ""


def pair(teacher, **row):
    return lesson(teacher, row)


def test_a_pair_is_two_answers_to_one_prompt():
    teacher = teacher_of("qwen3", method="dpo")
    of_texts = pair(teacher, chosen="two", rejected="three")
    assert [completion.text for completion in of_texts.completions] == ["two", "three"]
    assert of_texts.advantages.tolist() == [1.0, -1.0] and of_texts.prompt.messages == CHAT
    said = [{"role": "assistant", "content": text} for text in ("two", "three")]
    of_messages = pair(teacher, chosen=[*CHAT, said[0]], rejected=[*CHAT, said[1]])  # with the prompt, as in TRL's sets
    without = pair(teacher, chosen=said[:1], rejected=said[1:])
    for other in (of_messages, without):
        assert [c.tokens for c in other.completions] == [c.tokens for c in of_texts.completions]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"chosen": "two", "rejected": "two"}, "`chosen` and `rejected` are the same, 'two'"),
        ({"chosen": "two", "rejected": " "}, "`rejected` is empty"),
        ({"chosen": "two"}, "`rejected` is None"),
        (
            {"chosen": [*CHAT, ASSISTANT], "rejected": [*CHAT, ASSISTANT, AGAIN]},
            "`rejected` ends with a message of the",
        ),
    ],
)
def test_pairs_that_teach_nothing_are_told(row, told):
    with pytest.raises(UserError, match=told):
        pair(teacher_of("qwen3", method="dpo"), **row)


def test_texts_of_a_pair_begin_with_the_prompt_where_that_is_not_said_apart():
    teacher = teacher_of("qwen3", method="dpo")
    teacher = replace(teacher, asker=replace(teacher.asker, task=replace(teacher.asker.task, prompt=lambda row: "Hi")))
    row = {"chosen": "Hi there", "rejected": "Hi you"}
    implicit = teacher(asked(teacher.asker, row)[0])
    assert [completion.text for completion in implicit.completions] == [" there", " you"]
    explicit = teacher(asked(teacher.asker, row | {"prompt": "Hi"})[0])
    assert [completion.text for completion in explicit.completions] == ["Hi there", "Hi you"]


def test_the_prompt_that_a_pair_does_not_say():
    assert common_prompt([*CHAT, ASSISTANT], [*CHAT, FOUR]) == CHAT
    assert common_prompt(CHAT, CHAT) == CHAT[:-1]  # an answer is left of each
    assert common_prompt("Human: Hi Assistant: Hello", "Human: Hi Assistant: Go") == "Human: Hi Assistant:"
    begun = "\n\nHuman: Hi\n\nAssistant: I am.\n\nHuman: What?\n\nAssistant:"
    assert common_prompt(f"{begun} I said it.", f"{begun} I did.") == begun  # and not with the I that both begin with
    for chosen, rejected in (("a", "b"), (CHAT, "b"), (None, None), ([], [])):
        with pytest.raises(UserError, match=r"begin differently|Both must be texts"):
            common_prompt(chosen, rejected)
