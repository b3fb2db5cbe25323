"""The <reasoning>/<answer> format: how to ask for it, two rewards for the whole, one for its parts, the answer inside.

Knows nothing of what a right answer is. The format, whose reasoning may run over any number of lines:

    <reasoning>
    Half of 48 is 24.
    </reasoning>
    <answer>
    24
    </answer>
"""

from __future__ import annotations

import re

XML_FORMAT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

_STRICT = re.compile(r"<reasoning>\n(.*)\n</reasoning>\n<answer>\n(.*)\n</answer>\n?", re.DOTALL)
_SOFT = re.compile(r"\s*<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>.*", re.DOTALL)
_LINE_OF_TAG = {
    "<reasoning>": "<reasoning>\n",
    "</reasoning>": "\n</reasoning>\n",
    "<answer>": "\n<answer>\n",
    "</answer>": "\n</answer>",
}
_COST_OF_TRAILING_CHARACTER = 0.001


def extract_answer(completion: str) -> str | None:
    """The text between the last <answer> and </answer> pair, stripped; None where there is no such pair.

    >>> extract_answer("<answer> 24 </answer>")
    '24'
    >>> extract_answer("24") is None
    True
    """
    before, closing, _ = completion.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if opening and closing else None


def strict_xml(completion: str) -> float:
    r"""0.5 if the completion is exactly the format, each tag alone on its line; else 0.

    Each tag occurs once, neither block is blank, nothing stands before, between or after the blocks, and the
    final newline is optional.

    Range: 0 or 0.5.

    >>> strict_xml("<reasoning>\n48 / 2\n= 24\n</reasoning>\n<answer>\n24\n</answer>")
    0.5
    >>> strict_xml("<reasoning>48 / 2 = 24</reasoning><answer>24</answer>")
    0.0
    """
    return 0.5 * _holds_both_blocks(_STRICT, completion)


def soft_xml(completion: str) -> float:
    r"""0.5 if the completion starts with a reasoning block and then an answer block; else 0.

    Each tag occurs once and neither block is blank. Newlines are free, and anything may follow; what is not
    the format belongs to `strict_xml`, which pays for fewer completions.

    Range: 0 or 0.5.

    >>> soft_xml("<reasoning>48 / 2\n= 24</reasoning> <answer>24</answer> Done.")
    0.5
    >>> soft_xml("24")
    0.0
    """
    return 0.5 * _holds_both_blocks(_SOFT, completion)


def xml_count(completion: str) -> float:
    r"""0 to 0.5: 0.125 for each of the four tags that occurs once and alone on its line.

    Text after </answer>, its newline aside, costs 0.001 a character, down to 0. Nothing else costs anything:
    the length of the reasoning does not matter.

    Range: 0 to 0.5.

    >>> xml_count("<reasoning>\n48 / 2 = 24\n</reasoning>\n<answer>\n24\n</answer>\n")
    0.5
    >>> xml_count("<reasoning>\nI think that")
    0.125
    """
    tags = sum(completion.count(tag) == 1 and line in completion for tag, line in _LINE_OF_TAG.items())
    _, _, trailing = completion.removesuffix("\n").rpartition("</answer>")
    num_trailing = len(trailing) * ("</answer>" in completion)
    return max(0.0, 0.125 * tags - _COST_OF_TRAILING_CHARACTER * num_trailing)


def _holds_both_blocks(layout: re.Pattern[str], completion: str) -> bool:
    # Counted before matching: with one of each tag the pattern cannot match in two ways, and so not slowly.
    once = all(completion.count(tag) == 1 for tag in _LINE_OF_TAG)
    blocks = layout.fullmatch(completion) if once else None
    return blocks is not None and all(block.strip() for block in blocks.groups())
