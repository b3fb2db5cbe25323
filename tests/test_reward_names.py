"""Rewards that are named: a module's, an installed package's; and what is told where there is none."""

import pickle
import re
import sys
import types

import pytest

from grpo.errors import UserError
from grpo.rewards import Scorer, build_rewards, resolve_reward, think_format
from grpo.rewards.failures import Tolerance
from grpo.rewards.names import name_of, reward_of
from grpo.types import Completion, Group, Prompt


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make packages that offer rewards; they count as installed while the test runs."""
    module = types.ModuleType("my_rewards")
    module.shouting = lambda completion: float(completion.isupper())
    module.LIMIT = 5

    def maker(numbers, key):
        def made(completion):
            return float(len(numbers))

        return made

    module.maker = maker

    class Family:
        @staticmethod
        def one(completion):
            return 1.0

    module.Family = Family
    monkeypatch.setitem(sys.modules, "my_rewards", module)

    def offer(package, *entries):
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("[grpo.rewards]\n" + "".join(f"{entry}\n" for entry in entries))
        return module

    monkeypatch.syspath_prepend(tmp_path)
    return offer


def names(rewards):
    return [reward.name for reward in build_rewards(rewards, ["answer"], chat=False)]


def test_a_name_finds_a_modules_function_and_a_packages(installed):
    module = installed("plugin", "loud = my_rewards:shouting", "very-loud = my_rewards:shouting")
    assert resolve_reward("my_rewards:shouting") is resolve_reward("loud") is module.shouting
    assert resolve_reward("my_rewards:Family.one") is module.Family.one
    assert names({"my_rewards:shouting": 1.0, "loud": 1.0, "very-loud": 1.0, "my_rewards:Family.one": 0.5}) == [
        "shouting",
        "loud",
        "very-loud",
        "one",
    ]
    assert name_of("correctness") == "correctness" and callable(reward_of("correctness"))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lowd", r"No installed package offers a reward `lowd`\. Did you mean `loud`\?"),
        ("my_rewards.shouting", "Between module and function stands a colon"),
        (
            "my_rewards:shoutin",
            r"my_rewards has no `shoutin`\. Did you mean `shouting`\? It has: shouting, maker, Family",
        ),
        ("my_rewards:Family.two", r"my_rewards has no `Family\.two`"),
        ("my_rewards:LIMIT", "`my_rewards:LIMIT` names 5, which is no function"),
        ("limit", "`limit` names 5, which is no function"),
        (":shouting", "there must be a module before the colon"),
        ("my_rewards:", "a function after it"),
        ("no_such_module_of_mine:f", "importing no_such_module_of_mine raised ModuleNotFoundError"),
        ("gone", "Loading the installed reward `gone` raised ModuleNotFoundError .* Mend its package"),
        ("twice", "Several .* `twice`: `my_rewards:Family.one` and `my_rewards:shouting`. Name the one"),
        (5, "A reward of the task is 5, which is no function"),
        (None, "A reward of the task is None, which is no function"),
    ],
)
def test_what_is_not_there_is_told(key, told, installed):
    installed("plugin", "loud = my_rewards:shouting", "gone = no_such_module_of_mine:f", "limit = my_rewards:LIMIT")
    installed("first", "twice = my_rewards:shouting")
    installed("second", "twice = my_rewards:Family.one")
    with pytest.raises(UserError, match=told):
        build_rewards({key: 1.0}, ["answer"], chat=False)


def test_a_reward_that_is_made_by_a_call_goes_by_the_call(installed):
    installed("plugin", "loud = my_rewards:shouting")
    spelled = {
        "tags": "tags_think",
        "tags('plan', 'code', text_after=True)": "tags_plan_code",
        "overlong": "overlong",
        "cosine(exact_match, 100)": "cosine",
        "short_when_right(math, threshold=0.5)": "short_when_right",
        "judge('qwen', name='kind')": "kind",
        "my_rewards:maker([1, -2], key={'a': None})": "made",
    }
    assert [name_of(key) for key in spelled] == list(spelled.values())
    assert names(dict.fromkeys(spelled, 1.0)) == list(spelled.values())
    text = "<think>a</think>b"
    assert reward_of("tags")(text) == reward_of("tags()")(text) == think_format(text) == 1.0
    assert reward_of("tags('a')")("<a>1</a>") == 1.0
    assert reward_of("cosine(exact_match, 100)")("1", [0] * 50, "1") == 0.75
    assert reward_of("my_rewards:maker([1, -2], key={'a': None})")("") == 2.0
    for pickled in ("tags", "cosine(exact_match, 100)"):  # so that workers can call it
        assert pickle.loads(pickle.dumps(reward_of(pickled))).__name__ == name_of(pickled)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("tags(", "cannot be read"),
        ("tags('a'", "cannot be read"),
        ("tags(__import__('os'))", "cannot be read"),
        ("tags(**{'names': 1})", "cannot be read"),
        ("tags('a')('b')", "cannot be read"),
        ("tags('a') + 1", "cannot be read"),
        ("tags('a', 'a')", "one twice"),
        ("judge", "missing a required argument: 'model'"),
        ("cosine(math)", "missing a required argument: 'max_completion_tokens'"),
        ("cosine(matth, 5)", "No installed package offers a reward `matth`"),
        ("exact_match('a', 'b')", "is 0.0, which is no function"),
        ("cosine('x', 'y')", "`cosine` raised TypeError"),
        ("no_such(1)", "No installed package offers a reward `no_such`"),
        ("overlong(" * 3000, "cannot be read"),
    ],
)
def test_a_call_that_makes_nothing_is_told(key, told, installed):
    with pytest.raises(UserError, match=re.escape(told)):
        build_rewards({key: 1.0}, ["answer"], chat=False)


def test_overlong_by_its_name_is_of_the_runs_own_length():
    group = Group(Prompt(0, "", [1], {}), [Completion([0] * n, [0.0] * n, "", "stop", 0) for n in (80, 90, 100, 120)])
    Scorer(build_rewards({"overlong": 1.0}, [], chat=False), Tolerance(), max_tokens=100)([group])
    assert group.rewards.tolist() == [0.0, -0.5, -1.0, -1.0]


def test_the_same_reward_from_two_copies_of_a_package_is_one(installed):
    installed("first", "loud = my_rewards:shouting")
    installed("second", "loud = my_rewards:shouting")
    assert names({"loud": 1.0}) == ["loud"]
