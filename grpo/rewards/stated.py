r"""Where a text states its answer: in a box, in <answer>, behind `####`, behind "the answer is".

Knows nothing of what is right. Models write in many ways; each function takes one of them. All look at the end of the
text, and take time in proportion to its length whatever it is: a completion may be a million characters of `\boxed{`.
"""

from __future__ import annotations

import re

from grpo.rewards.xml_format import extract_answer

_ENDS_OF_THINKING = ("</think>", "</thinking>", "<|end_of_thought|>", "[/THINK]")
# Where special tokens are left in the text: what comes behind them is not the model's turn.
_END_OF_TURN = re.compile(r"<\|(?:im_end|im_start|eot_id|endoftext|end|eos|user)\|>|</s>|<eos>|<end_of_turn>")
# A base model goes on with a problem of its own.
_NEXT_QUESTION = re.compile(r"\n[\s#*]*(?:Problem|Question|Q|User|Human)\b[^\n:.]{0,10}[:.]", re.I)
_BOX = re.compile(r"\\(?:boxed|fbox)\b\s*")
_BARE_CONTENT = re.compile(r"[-+]?\\?[\w.,/]+")  # \boxed 42
_END_OF_UNCLOSED = re.compile(r"\n|\$|\\\]|\\\)")
_LONGEST_BOX = 2000  # characters
_MOST_BOXES = 16  # that are looked at, from the end

_BEGINS_WITH_NUMBER = re.compile(r"[-+]?\\?[$€£]?\s?[-+]?\.?\d(?!\d*[.):]\s)")  # not "3. Third step"
_DISPLAYS = (("$$", "$$"), ("\\[", "\\]"))

_TAIL = 3000  # characters from the end in which "the answer is" is looked for
_STATED = re.compile(
    r"""(?ix)
    (?: \b(?:ans|answers?|final\ result)\b | (?m:^A)(?=:) | 答案 | [故应]选 )
    [*_]*
    (?: [^\n:.=?!]{0,60}? \b(?:is|are|was|be|equals)\b (?!\s+(?:not\b|(?:incorrect|wrong|correct|right)\s*[.,!]))
        (?: \s+ (?:therefore|thus|then|hence|indeed|simply|just|actually|only|about|either|option|choice)\b )*
        \s* [:：=]?
      | [^\n:.=?!]{0,60}? [:：=]
      | [是为]
      | (?<=选)
      | [ \t*_#]* \n
    )
    [\s*_]*
    """
)


def visible(completion: str) -> str:
    """What follows the last end of thinking (`</think>`), else the whole text, up to where somebody else speaks.

    >>> visible("<think>Is it 5?</think> 6"), visible("<think>Is it 5?"), visible("A: 6\\n\\nQ: Is it 5?\\nA: 4")
    (' 6', '<think>Is it 5?', 'A: 6')
    """
    text = _up_to(_END_OF_TURN, completion)
    for mark in _ENDS_OF_THINKING:
        after = text.rpartition(mark)[2]
        text = after if after.strip() else text
    asked = _up_to(_NEXT_QUESTION, text)
    return asked if asked != text and (boxes(asked) or behind_hashes(asked) or behind_words(asked)) else text


def _up_to(mark: re.Pattern[str], text: str) -> str:
    """What stands before the first mark that has something before it."""
    return next((text[: found.start()] for found in mark.finditer(text) if text[: found.start()].strip()), text)


def boxes(text: str) -> list[str]:
    r"""What stands in \boxed{} and \fbox{}, in order, blank ones left out. An unclosed one goes to the end of its line.

    >>> boxes(r"Put it in \boxed{}. So \boxed{\frac{1}{2}} or \boxed 7, and \boxed{8")
    ['\\frac{1}{2}', '7', '8']
    """
    starts = [found.end() for found in _BOX.finditer(text)][-_MOST_BOXES:]
    contents = [_content(text[start : start + _LONGEST_BOX]) for start in starts]
    return [content for content in contents if content]


def _content(text: str) -> str:
    """What a box holds whose command ends where the text begins."""
    if not text.startswith("{"):
        bare = _BARE_CONTENT.match(text)
        return bare[0].rstrip(".,") if bare else ""
    depth, escaped = 0, False
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}") if not escaped else 0
        escaped = character == "\\" and not escaped
        if depth == 0:
            return text[1:index].strip()
    return _END_OF_UNCLOSED.split(text[1:], maxsplit=1)[0].strip()


def last_box(text: str) -> str | None:
    """What stands in the last box that is not blank; None where there is none."""
    found = boxes(text)
    return found[-1] if found else None


def behind_hashes(text: str) -> str | None:
    """The line behind the last `####`, GSM8K's mark; None where there is none.

    It is also Markdown's mark of a small heading: a line counts that begins with a number, or is the last one.

    >>> behind_hashes("24 + 48 = 72\\n#### 72"), behind_hashes("#### Step 2\\nNow 24 + 48 = 72.")
    ('72', None)
    """
    pieces = text.split("####")
    for after in reversed(pieces[1:][-_MOST_BOXES:]):
        line, _, rest = after.strip().partition("\n")
        if line.strip() and (_BEGINS_WITH_NUMBER.match(line) or not rest.strip()):
            return line.strip()
    return None


def in_answer_tags(text: str) -> str | None:
    """The text of the last <answer> block that is not blank; None where there is none."""
    return extract_answer(text) or None


def behind_words(text: str) -> str | None:
    r"""The line behind the last "the answer is", "**Answer:**" or heading "# Answer"; None where there is none.

    >>> behind_words("So the final answer is: **42**."), behind_words("## Answer\n\n42 apples\n")
    ('42**.', '42 apples')
    """
    tail = text[-_TAIL:]
    for found in reversed(list(_STATED.finditer(tail))):
        rest = tail[found.end() :].strip()
        closing = next((mark for opening, mark in _DISPLAYS if rest.startswith(opening)), None)
        if closing and closing in rest[2:]:
            return rest[: rest.index(closing, 2) + 2]
        if line := rest.partition("\n")[0].strip():
            return line
    return None
