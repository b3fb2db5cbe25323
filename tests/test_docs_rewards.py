"""docs/rewards.md and docs/sandbox.md: blocks of Python give what they show; every reward is told, with its range."""

import doctest
import re
from pathlib import Path

import pytest

import grpo.rewards
from grpo.rewards.catalogue import installed, makers
from grpo.rewards.shipped import SHIPPED

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "rewards.md").read_text()
BLOCKS = [
    (document, text)
    for document in ("rewards.md", "sandbox.md")
    for text in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / document).read_text(), re.M | re.S)
]


@pytest.mark.parametrize(("document", "block"), BLOCKS)
def test_the_blocks_give_what_they_show(document, block):
    if ">>>" not in block:
        exec(compile(block, document, "exec"), {})
        return
    examples = doctest.DocTestParser().get_doctest(block, {}, document, document, 0)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_every_reward_stands_in_the_tables_with_the_range_that_it_states():
    told = dict(re.findall(r"^\| `(\w+)(?:\(.*?\))?` \| ([^|]+?) \|", TEXT, re.M))
    stated = {entry.key: entry.range for entry in [*installed(), *makers()] if entry.source == "ships with grpo"}
    assert told == stated
    assert set(SHIPPED) <= set(told)


def test_every_reward_has_an_example():
    examples = "\n".join(block for _, block in BLOCKS)
    for name in (*SHIPPED, *(entry.key for entry in makers())):
        assert re.search(rf"\b{name}\(", examples), name


def test_what_others_names_mean_here_is_here():
    table = TEXT.partition("## Coming from")[2]
    columns = ("completion", "solution", "verification_info")
    here = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ") and not row.startswith("| there")]
    for cell in here:
        for name in re.findall(r"`([a-z_]+)(?:\(|`)", cell):
            assert hasattr(grpo.rewards, name) or name in columns, name
