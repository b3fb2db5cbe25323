"""Rewards that are named: a module's, an installed package's; and what is told where there is none."""

import sys
import types

import pytest

from grpo.errors import UserError
from grpo.rewards import build_rewards, resolve_reward
from grpo.rewards.names import name_of, reward_of


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make packages that offer rewards; they count as installed while the test runs."""
    module = types.ModuleType("my_rewards")
    module.shouting = lambda completion: float(completion.isupper())
    module.LIMIT = 5

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
        ("my_rewards:shoutin", r"my_rewards has no `shoutin`\. Did you mean `shouting`\? It has: shouting, Family"),
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


def test_the_same_reward_from_two_copies_of_a_package_is_one(installed):
    installed("first", "loud = my_rewards:shouting")
    installed("second", "loud = my_rewards:shouting")
    assert names({"loud": 1.0}) == ["loud"]
