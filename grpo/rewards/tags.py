"""A format of tags: any names, in order, each block once and not empty. Knows nothing of what stands in the blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo.errors import UserError

_NAME = re.compile(r"[A-Za-z_][\w.-]*")


def tags(*names: str, text_after: bool = False, open_in_prompt: bool = False) -> Tags:
    r"""A reward that pays 1.0 for a completion of these blocks in this order, else 0; to be given to a Task.
    Without names it is `think_format`.

    Each tag occurs once, no block is blank, and nothing but white space stands before, between or behind the blocks.

    text_after      anything may stand behind the last block, if something does: an answer behind <think> ... </think>
    open_in_prompt  the chat template has opened the first block already, as those of thinking models do; the completion
                    begins inside it

    The reward is called `tags_` and the names; set its `__name__` for another name.

    Range: 0 or 1.

    >>> plan_code = tags("plan", "code")
    >>> plan_code("<plan>\nadd\n</plan>\n<code>\na + b\n</code>"), plan_code("<code>a + b</code>")
    (1.0, 0.0)
    """
    if not names:
        names, text_after = ("think",), True
    wrong = [name for name in names if not (isinstance(name, str) and _NAME.fullmatch(name))]
    if wrong or len(set(names)) < len(names):
        told = f"{wrong[0]!r}" if wrong else "one twice"
        raise UserError(f'tags() was given {told}. It takes the names of tags, each once: tags("think", "answer").')

    return Tags(names, text_after, open_in_prompt)


@dataclass(eq=False)
class Tags:
    """What `tags` makes: an object and no function in a function, so that worker processes can be given it."""

    names: tuple[str, ...]
    text_after: bool
    open_in_prompt: bool

    def __post_init__(self) -> None:
        self.__name__ = "tags_" + "_".join(re.sub(r"\W", "_", name) for name in self.names)
        blocks = "".join(f"<{name}>...</{name}>" for name in self.names)
        behind = " and text behind it" * self.text_after
        self.__doc__ = f"1.0 if the completion is {blocks}{behind}, else 0.\n\nRange: 0 or 1."

    def __call__(self, completion: str) -> float:
        opened = f"<{self.names[0]}>" * self.open_in_prompt + completion
        return float(_is_written(opened, self.names, self.text_after))


def _is_written(text: str, names: tuple[str, ...], text_after: bool) -> bool:
    for name in names:
        if text.count(f"<{name}>") != 1 or text.count(f"</{name}>") != 1:
            return False
    for name in names:
        before, opening, text = text.partition(f"<{name}>")
        block, closing, text = text.partition(f"</{name}>")
        if before.strip() or not (opening and closing and block.strip()):
            return False
    return bool(text.strip()) == text_after


_think = tags("think", text_after=True)
_think_answer = tags("think", "answer")


def think_format(completion: str) -> float:
    r"""1.0 if the completion is one <think> block with an answer behind it, else 0: TRL's `think_format_reward`.

    Unlike TRL's, an empty block and an empty answer do not pay.

    Range: 0 or 1.

    >>> think_format("<think>24 + 48</think>\n72"), think_format("<think>24 + 48"), think_format("<think></think>72")
    (1.0, 0.0, 0.0)
    """
    return _think(completion)


def think_answer(completion: str) -> float:
    r"""1.0 if the completion is one <think> block and one <answer> block, else 0: Open-R1's `format_reward`.

    White space between the blocks is free, and an empty block does not pay.

    Range: 0 or 1.

    >>> think_answer("<think>\n24 + 48\n</think>\n<answer>\n72\n</answer>"), think_answer("<answer>72</answer>")
    (1.0, 0.0)
    """
    return _think_answer(completion)
