"""What holds for every reward that ships: a name that a task can use, a range that is kept, examples that are true."""

import doctest
import importlib
import pickle
import re
import sys
import tomllib
from pathlib import Path

import pytest

import grpo.rewards
from grpo.rewards.names import name_of

ROOT = Path(__file__).parents[1]
NAMES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["grpo.rewards"]
REWARDS = {name: getattr(grpo.rewards, name) for name in NAMES}
MODULES = sorted(
    {function.__module__ for function in REWARDS.values()}
    | {"grpo.rewards.gold", "grpo.rewards.judge", "grpo.rewards.stated"}
)

TEXTS = [
    "",
    " ",
    "72",
    "B",
    "The answer is (B).",
    "<reasoning>\n1\n</reasoning>\n<answer>\n72\n</answer>\n",
    "<think>x</think> \\boxed{72}",
    "<think>",
    "\\boxed{72",
    "\\frac{1}{0}",
    "so it is " * 300,
    "\x00\x1b[31m\ud800\N{ARABIC-INDIC DIGIT FIVE}１２",
    "```python\nprint(72)\n```",
]


def call(name, text):
    given = {"completion": text, "answer": "B" if name == "choice" else "72", "completion_ids": list(text[:2000])}
    given["tests"] = "assert True"
    function = REWARDS[name]
    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    return function(**{key: given[key] for key in wanted if key in given})


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_the_docstrings_hold(module):
    importlib.import_module(module)
    failed, tried = doctest.testmod(sys.modules[module])
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_its_function(name):
    assert NAMES[name] == f"grpo.rewards:{name}"
    assert REWARDS[name].__name__ == name


def test_what_is_made_by_a_call_can_be_sent_to_workers():
    from grpo.rewards import cosine, exact_match, overlong, repetition_penalty, short_when_right, tags

    for made, name, given in (
        (tags("a", "b"), "tags_a_b", ["<a>1</a><b>2</b>"]),
        (overlong(10, 5), "overlong", ["", [0] * 8]),
        (short_when_right(exact_match), "short_when_right", [["?"] * 2, ["1"] * 2, [[0], [0] * 2], ["1"] * 2]),
        (cosine(exact_match, 10), "cosine", ["1", [0] * 5, "1"]),
        (repetition_penalty(1), "repetition_penalty", ["a a"]),
    ):
        sent = pickle.loads(pickle.dumps(made))
        assert sent(*given) == made(*given) != 0
        assert sent.__name__ == made.__name__
        assert name_of(made) == name
    for name, function in REWARDS.items():
        assert pickle.loads(pickle.dumps(function)) is function, name


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_keeps_the_range_that_it_states(name):
    stated = re.search(r"^ *Range: (-?[\d.]+) (or|to) (-?[\d.]+)\.$", REWARDS[name].__doc__, re.M)
    assert stated, "its docstring has no line `Range: a to b.` or `Range: a or b.`"
    low, high = float(stated[1]), float(stated[3])
    for text in TEXTS:
        value = call(name, text)
        assert value in (low, high) if stated[2] == "or" else low <= value <= high


@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"similarity", "code", "code_share"})
)  # quadratic; a process of its own
def test_a_text_without_an_end_is_scored(name):
    for text in (
        "1",
        "1,",
        "- ",
        "answer ",
        "\\boxed{",
        "####",
        "$",
        "<answer>",
        "\\frac",
        "(A) ",
        "{",
        " ",
        "answer is\n",
    ):
        assert abs(call(name, text * (200_000 // len(text)))) <= 2.0
