"""The forms of rows that public data sets have: what each asks and answers, as the messages that templates read.

What cannot be read is told with its column.
"""

import json

import pytest

from grpo.conversations import answer_in, asked_in, asked_of_pair, messages_of, side_in, tools_in
from grpo.errors import UserError
from grpo.trees import joined

SYSTEM, USER, SAID, AGAIN, LAST, WORSE = (
    {"role": role, "content": text}
    for role, text in [
        ("system", "Be brief."),
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("assistant", "5"),
    ]
)
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def shared(*messages):
    """Messages as ShareGPT has them."""
    return [{"from": NAMES[message["role"]], "value": message["content"]} for message in messages]


CHAT = [SYSTEM, USER, SAID, AGAIN, LAST]
OPEN_HERMES = {"conversations": shared(*CHAT), "source": "airoboros", "system_prompt": None, "idx": None, "model": None}


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        (OPEN_HERMES, CHAT),
        ({"conversations": CHAT}, CHAT),
        ({"messages": shared(*CHAT)}, CHAT),
        ({"conversation": CHAT, "model": "vicuna"}, CHAT),
        ({"messages": None, "conversations": shared(*CHAT)}, CHAT),
        ({"messages": CHAT, "conversations": shared(*CHAT)}, CHAT),  # the same twice
        ({"conversations": [{"from": "user", "value": "1 + 1?"}, {"from": "bing", "value": "2"}]}, [USER, SAID]),
        ({"conversations": [{"role": "human", "content": "1 + 1?"}, {"role": "model", "content": "2"}]}, [USER, SAID]),
        (
            {"conversations": [{**USER, "from": "human", "value": None}, {**SAID, "from": "gpt", "value": "2"}]},
            [USER, SAID],
        ),
        ({"conversations": ["1 + 1?", "2", "2 + 2?", "4"], "source": "wikihow"}, CHAT[1:]),  # LIMA
        ({"conversations": shared(*CHAT[1:]), "system": "Be brief.", "tools": ""}, CHAT),  # LLaMA-Factory
        ({"conversations": shared(*CHAT), "system": "Be long."}, CHAT),  # its own, as LLaMA-Factory takes it
        ({"messages": json.dumps(CHAT)}, CHAT),  # of a CSV
        ({"text": "### Human: 1 + 1?### Assistant: 2### Human: 2 + 2?\n### Assistant: 4"}, CHAT[1:]),  # guanaco
        ({"messages": [USER | {"content": [{"type": "text", "text": "1 + 1?"}]}, SAID]}, [USER, SAID]),
    ],
)
def test_a_conversation_is_read_in_all_its_forms(row, chat):
    assert asked_in(row) == chat[:-1] and answer_in(row) == chat


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Add.", "input": "1 and 1", "output": "2"}, [{"role": "user", "content": "Add.\n\n1 and 1"}]),
        ({"instruction": "1 + 1?", "input": "", "output": "2", "text": "Below is an instruction"}, [USER]),
        ({"instruction": "1 + 1?", "output": "2", "system": "Be brief."}, [SYSTEM, USER]),
        (
            {"instruction": "2 + 2?", "input": None, "output": "2", "history": [["1 + 1?", "2"]]},
            [USER, SAID, AGAIN],
        ),
        (
            {"instruction": "Sum?", "context": "1 and 1.", "response": "2", "category": "closed_qa"},  # Dolly
            [{"role": "user", "content": "Sum?\n\n1 and 1."}],
        ),
        ({"prompt": "1 + 1?", "completion": "2"}, "1 + 1?"),
        ({"prompt": "1 + 1?", "completion": "2", "system": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": "1 + 1?", "completion": "2", "system": ""}, [USER]),  # as the rows beside it that have one
        ({"prompt": shared(USER), "completion": "2"}, [USER]),
        ({"prompt": json.dumps([USER]), "completion": "2"}, [USER]),
    ],
)
def test_an_instruction_is_asked_with_all_that_belongs_to_it(row, asked):
    assert asked_in(row) == asked and answer_in(row) == "2"


def test_of_a_tree_of_messages_the_best_ranked_path_is_a_chat():
    """As OpenAssistant's rows: in any order, ranked or not, with a last message of the user's that nobody answered."""
    said = [
        ("e", "d", "prompter", "Thanks.", None, False),
        ("b", "a", "assistant", "3", 1.0, False),
        ("a", None, "prompter", "1 + 1?", None, False),
        ("x", "a", "assistant", "1", 0.0, True),
        ("c", "a", "assistant", "2", 0.0, False),
        ("k", "c", "prompter", "2 + 2?", None, False),
        ("f", "b", "prompter", "No.", None, False),
        ("d", "k", "assistant", "4", None, False),
        ("lonely", None, "prompter", "Hello?", None, False),
        ("loop", "loop", "assistant", "Again", None, False),
    ]
    names = ("message_id", "parent_id", "role", "text", "rank", "deleted")
    rows = [dict(zip(names, each, strict=True)) for each in said]
    [chat] = joined(rows)
    assert asked_in(chat) == [USER, SAID, AGAIN] and answer_in(chat) == CHAT[1:]
    as_text = [
        {name: "" if value is None else str(value) for name, value in zip(names, each, strict=True)} for each in said
    ]
    assert joined(as_text) == [chat]  # of a CSV
    rows = [{"prompt": "1 + 1?", "completion": "2"}]
    assert joined(rows) is rows and joined([]) == []


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}


def test_calls_of_tools_are_the_assistants_and_their_results_the_tools():
    call = json.dumps(CALL["function"])
    spoken = [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    read = messages_of(spoken, "conversations")
    assert read == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        SAID,
    ]
    two = messages_of([{"from": "function_call", "value": f"[{call}, {call}]"}], "conversations")
    assert two[0]["tool_calls"] == [CALL, CALL]
    as_text = {"function": {"name": "add", "arguments": json.dumps({"a": 1, "b": 1})}, "type": "function", "id": "1"}
    [of_openai] = messages_of([{"role": "assistant", "content": None, "tool_calls": [as_text]}], "messages")
    assert of_openai == {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "1"}]}
    assert tools_in({"tools": json.dumps([CALL])}) == tools_in({"tools": [CALL]}) == [CALL]
    assert tools_in({"tools": [CALL | {"strict": None, "of": [{"x": None}]}]}) == [CALL | {"of": [{}]}]  # of a table
    assert tools_in({}) == tools_in({"tools": None}) == tools_in({"tools": ""}) == []


def test_a_role_of_the_models_own_template_stays():
    own = [{"role": "developer", "content": "Be brief."}, USER, {**SAID, "weight": 1}]
    assert messages_of(own, "messages") == own


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, r"`conversations\[0\]` is of 'narrator'.*human"),
        ({"conversations": [{"value": "x"}]}, r"`conversations\[0\]` has neither `role` nor `from`, but value"),
        ({"conversation": [{"input": "x", "output": "y"}]}, "but input, output. `rows` of a task file"),
        ({"messages": str(CHAT)}, "how Python shows a list: write it by json.dumps"),
        ({"prompt": "q", "completion": str([SAID])}, "`completion` must be a list of chat.*how Python shows a list"),
        ({"conversations": [*shared(USER), {"from": "gpt", "value": 2}]}, r"`conversations\[1\]` says 2 \(int\)"),
        ({"conversations": [*shared(USER), {"from": "gpt", "value": None}]}, r"`conversations\[1\]` says None"),
        (
            {"conversations": [{"from": "gpt", "role": "user", "value": "x"}]},
            "`role` 'user' and `from` 'gpt'.*different",
        ),
        ({"conversations": [{"from": "gpt", "value": "x", "content": "y"}]}, "`content` 'y' and `value` 'x'"),
        ({"conversations": [{"from": "function_call", "value": "add(1, 1)"}]}, r"calls a tool by 'add\(1, 1\)'.*JSON"),
        ({"conversations": {"from": ["human"], "value": ["x"]}}, "must be a list of chat messages"),
        ({"conversations": ["x", {"from": "gpt"}]}, "must be a list of chat messages"),
        ({"conversations": "human: hello"}, "must be a list of chat messages, not 'human: hello'"),
        ({"messages": CHAT, "conversations": CHAT[1:3]}, "`messages` and `conversations` are different"),
        ({"messages": CHAT[1:], "system": 3}, "`system` is 3. It must be text"),
        ({"messages": CHAT[1:], "system": "a", "system_prompt": "b"}, "`system` and `system_prompt` are different"),
        ({"instruction": "a", "output": "b", "history": ["q", "a"]}, "must be a list of .question, answer."),
        ({"instruction": "a", "output": "b", "response": "c"}, "these have instruction, output, response"),
        ({"instruction": 3, "output": "b"}, "`instruction` is 3"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "`input` and `context` are both filled"),
        ({"prompt": ["a", "b"], "completion": "c"}, "`prompt` must be a list of chat messages"),
        ({"instruction": "a", "input": {"n": 1}, "output": "b"}, "It must be text"),
        ({"conversations": shared(SAID)}, "the assistant's message alone"),
        ({"conversations": None}, "these have nothing"),
        ({"prompt": "a", "completion": "b", "label": False}, "`label` is False.*KTO"),
        ({"message_id": "1", "parent_id": None, "text": "x", "role": "prompter"}, "messages of a tree.*OpenAssistant"),
        *(({"prompt": "a", "completion": "b", "label": bad}, "`label` is .*KTO") for bad in (0, "False", 0.0)),
        ({"text": "### Human: x### Human: y"}, "in turn, but Human, Human.*`rows` of a task file"),
        ({"text": "Human: x Assistant: y"}, "whole conversations in one text.*`rows` of a task file"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_column(row, told):
    with pytest.raises(UserError, match=told):
        asked_in(row)


WHOLE = {"chosen": [USER, SAID, AGAIN, LAST], "rejected": [USER, SAID, AGAIN, WORSE]}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({name: shared(*side) for name, side in WHOLE.items()}, CHAT[1:4]),
        (WHOLE | {"prompt": "1 + 1?", "messages": CHAT, "score_chosen": 9.0}, CHAT[1:4]),  # UltraFeedback, binarized
        (WHOLE | {"system": "Be brief."}, CHAT[:4]),
        (WHOLE | {"prompt": shared(*CHAT[1:4])}, CHAT[1:4]),
        (
            {
                "conversations": shared(*CHAT[:4]),
                "chosen": shared(LAST)[0],
                "rejected": shared(WORSE)[0],
            },  # LLaMA-Factory
            CHAT[:4],
        ),
        ({"messages": CHAT[:4], "chosen": "4", "rejected": "5"}, CHAT[:4]),
        ({"system": "Be brief.", "question": "1 + 1?", "chosen": "It is 2", "rejected": "It is 3"}, CHAT[:2]),  # orca
        ({"system": "", "input": "1 + 1?", "chosen": "It is 2", "rejected": "It is 3"}, [USER]),
        (
            {"instruction": "Add.", "input": "1", "chosen": "2", "rejected": "3"},
            [{"role": "user", "content": "Add.\n\n1"}],
        ),
        ({"prompt": "1 + 1?", "chosen": [SAID], "rejected": [WORSE], "system": "Be brief."}, CHAT[:2]),
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "1 + 1?"),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
            "\n\nHuman: Hi\n\nAssistant:",
        ),
    ],
)
def test_what_a_pair_answers_is_read_in_all_its_forms(row, asked):
    assert asked_of_pair(row) == asked


def test_a_side_is_messages_or_text():
    assert side_in({"chosen": shared(SAID)[0]}, "chosen") == side_in({"chosen": shared(SAID)}, "chosen") == [SAID]
    assert side_in({"chosen": json.dumps([SAID])}, "chosen") == [SAID]
    assert side_in({"chosen": "2"}, "chosen") == "2" and side_in({}, "chosen") is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a", "query": "b", "chosen": "c", "rejected": "d"}, "Both `question` and `query` may be"),
        ({"question": ["a"], "chosen": "c", "rejected": "d"}, "`question` is .'a'.*It must be text"),
        ({"chosen": [{"from": "who", "value": "c"}], "rejected": "d"}, r"`chosen\[0\]` is of 'who'"),
        ({"chosen": shared(SAID), "rejected": shared(WORSE)}, "there is no `prompt`"),
        ({"prompt": "p", "chosen": str([USER, SAID]), "rejected": str([USER, WORSE])}, "how Python shows a list"),
        ({"chosen": [1, 2], "rejected": [1, 3]}, r"`chosen` is \[1, 2\]. It must be a text or chat messages"),
        ({"chosen": "a", "rejected": 3}, "`rejected` is 3. It must be"),
        ({"prompt": "p", **WHOLE, "rejected": []}, r"`rejected` is \[\]. It must be"),
        ({"conversations": CHAT, "chosen": SAID, "rejected": WORSE}, "ends with the assistant's message, and `chosen`"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "begin differently"),
        ({"prompt": "p", "completion": "c", "label": True}, "thumb up or down, as KTO's.*chosen=NAME"),
    ],
)
def test_pairs_that_cannot_be_read_are_told(row, told):
    with pytest.raises(UserError, match=told):
        asked_of_pair(row)
