r"""How models write an answer -> LaTeX that can be compared: signs of Unicode, plain-text formulas, units, wrappings.

Knows nothing of what is equal. Everything is text in, text out.
"""

from __future__ import annotations

import re
import unicodedata

from grpo.rewards.stated import behind_hashes, behind_words, boxes, in_answer_tags, visible

_TAIL = 3000  # characters from the end in which formulas and numbers are looked for
_NOT_BETWEEN = re.compile(r"\\text\s*\{|\\quad|[A-Za-z]\w?\s*=|[\s${}\\;]")  # beside "and" of two boxes
_SHORT_LINE = 60  # characters of what states an answer, also in words
_STATES = re.compile(r"[\d$\\]")
_UNFINISHED = re.compile(r"[^\W\d_]$|[,:;+*/=<>(\[{\\^_&-]$")
_SHORT = 200  # characters of a text that may be nothing but its answer
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$(?!\$|<<|\d[\d,.]*[^\w\s$\\^{}]?\s?[A-Za-z]{2})((?:[^$\\\n]|\\.)+)\$",
    re.DOTALL,
)
_JOINED = re.compile(r"\s*(?:,|,?\s*(?:and|or)\b|;)\s*")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.])[-+\N{MINUS SIGN}]?[$€£]?\d[\d,]*(?:\.\d+)?(?:(?:\s\d+)?\s*/\s*\d+)?\s?%?|(?<![\w.\d])-?\.\d+", re.ASCII
)
_END_OF_SENTENCE = re.compile(r"[.;!?](?=\s|$|\*)|[。；！？]|,?\s(?:because|since|which|where|so|as|when|for)\b")


def answers(completion: str) -> list[list[str]]:
    r"""What a completion may be giving as its answer: readings of the place where it states it, the likeliest first.

    The place is one: the last <answer> block, else the last \boxed{}, else the line behind the last `####`, else what
    stands behind the last "the answer is", else the last formula or number of a text that is not cut off. Only what
    comes behind `</think>` counts, if anything does. Two boxes, or "$3$ or $5$", are a reading of several answers.
    """
    text = visible(completion)
    if marked := in_answer_tags(text):
        return [*_of_boxes(marked), *_of_line(marked)]
    if boxed := _of_boxes(text):
        return _of_final_answer(text) or boxed
    if line := behind_hashes(text):
        return _of_line(line)
    if (line := behind_words(text)) and (len(line) <= _SHORT_LINE or _STATES.search(line[:_SHORT_LINE])):
        return _of_line(line)
    if _is_cut_off(text):
        return []
    tail = text[-_TAIL:]
    whole = [[text.strip()]] if 0 < len(text.strip()) <= _SHORT else []
    return [*whole, *([_inside(found)] for found in _latest(tail))]


def gold_of(answer: str) -> str:
    r"""The answer of a gold text, which may be a whole solution: its boxes, the line behind `####`, or "Answer: n".

    >>> gold_of(r"So $x = \boxed{1}$ or $\boxed{2}$."), gold_of("24 + 48 = 72\n#### 72"), gold_of(r"\frac{1}{2}")
    ('1, 2', '72', '\\frac{1}{2}')
    """
    if boxed := _of_boxes(answer):
        return ", ".join(boxed[-1] if _are_joined(answer, boxed[-1]) else boxed[0])
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    return ("\n" in answer and behind_words(answer)) or answer


def _are_joined(text: str, boxed: list[str]) -> bool:
    """Whether nothing but "and", "or" or a comma stands between the last boxes of a text, if these are several."""
    pieces = text.split("\\boxed")[-len(boxed) : -1]
    between = (piece[len(content) + 2 :] for piece, content in zip(pieces, boxed, strict=False))
    return len(boxed) > 1 and all(_NOT_BETWEEN.sub("", each) in (",", "and", "or", ",and", ",or") for each in between)


def _is_cut_off(text: str) -> bool:
    """A long text that ends in the middle of a sentence or a formula has not come to an answer."""
    last_line = text.rstrip().rpartition("\n")[2]
    opened = re.search(r"\$(?!\d|<<)", _FORMULA.sub("", last_line))  # $5 is no formula that begins
    return len(text) > _SHORT and bool(_UNFINISHED.search(last_line) or opened)


def _of_boxes(text: str) -> list[list[str]]:
    """The last box; else those of its paragraph together, where it has several."""
    last = boxes(text)
    if not last:
        return []
    in_paragraph = [boxes(part) for part in re.split(r"\n\s*\n", text[-_TAIL:])]
    together = next((found for found in reversed(in_paragraph) if found), last)
    return [last[-1:], *([together] if len(together) > 1 else [])]


def _of_line(line: str) -> list[list[str]]:
    """A line that states an answer: the formulas that it begins with, else its words, or what its first sentence has
    last (the largest $n$ is 34)."""
    line = line.replace("**", "").replace("__", "").strip(" *_`")
    plain = line.removesuffix(".") if not line.endswith("..") else line
    found = list(_FORMULA.finditer(line))
    if found and found[0].start() == 0:
        together = [found[0]]
        for formula in found[1:]:
            if _JOINED.fullmatch(line[together[-1].end() : formula.start()]):
                together.append(formula)
        return [[_inside(each) for each in together], [plain]]
    sentence = _first_sentence(line, found)
    last = _latest(sentence)
    counted = len(_NUMBER_IN_TEXT.findall(sentence)) == 1 or not _NUMBER_IN_TEXT.match(sentence)
    return [[plain], [sentence], *([_inside(last)] for last in last[:counted])]


def _first_sentence(line: str, formulas: list[re.Match[str]]) -> str:
    masked = line
    for found in formulas:
        masked = masked[: found.start()] + "x" * len(found[0]) + masked[found.end() :]
    ended = _END_OF_SENTENCE.search(masked)
    return line[: ended.start()] if ended else line


def _latest(text: str) -> list[re.Match[str]]:
    """The last formula or number of a text; none where it has none."""
    last = [list(pattern.finditer(text))[-1:] for pattern in (_FORMULA, _NUMBER_IN_TEXT)]
    return sorted((found for of_kind in last for found in of_kind), key=lambda found: (found.end(), -found.start()))[
        -1:
    ]


def _of_final_answer(text: str) -> list[list[str]]:
    """What a text says in so many words to be its final answer, behind its last box: the Minerva format."""
    _, said, line = text[text.rfind("\\boxed") :].rpartition("final answer is")
    line = line.lstrip(" :*").partition("\n")[0]
    begins = _FORMULA.match(line) or _NUMBER_IN_TEXT.match(line)
    return _of_line(line) if said and begins else []


def _inside(found: re.Match[str]) -> str:
    """A formula without its marks; a number as it is."""
    return next((group for group in found.groups() if group is not None), found[0]).strip()


# ---- into plain LaTeX

_SIGNS = {
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{digit}" for digit in range(10)), strict=True)),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", (f"_{digit}" for digit in range(10)), strict=True)),
    **dict.fromkeys("−–‒﹣－", "-"),
    **dict(zip("×·⋅÷∞π±≤≥≠≈∪∩∈∅°′", (
        r"\times ", r"\cdot ", r"\cdot ", "/", r"\infty ", r"\pi ", r"\pm ", r"\le ", r"\ge ", r"\ne ", r"\approx ",
        r"\cup ", r"\cap ", r"\in ", r"\emptyset ", r"^\circ ", "'"), strict=True)),
    **dict(zip("αβγδθλμφω", (
        rf"\{name} " for name in ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega")
    ), strict=True)),
    "ℝ": r"\mathbb{R}",
}  # fmt: skip
_OF_SIGNS = re.compile("[" + "".join(_SIGNS) + "]")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\(([^()]*)\))")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:!> ]|quad\b|qquad\b|displaystyle\b|limits\b|left\.|right\.|[bB]ig[glr]*\b)|(?<!\\)~"
)
_STYLES = re.compile(r"\\(?:mathbf|boldsymbol|mathit|mathsf|bm|underline|ensuremath|color\{\w+\})\s*\{([^{}]*)\}")
_WRAPPINGS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("{", "}"))
_WORDS_ALONE = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


def _repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction: 16 - 1 over 90."""
    whole, once, again = found[1] or "0", found[2], found[3]
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{'9' * len(again)}{'0' * len(once)}}}"


_RULES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\[dtc]frac\b", r"\\frac"),
        (r"\\(le|ge|ne)(?:q|slant|qslant)\b", r"\\\1"),
        (r"\\varnothing\b", r"\\emptyset"),
        (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)\b", ""),
        (r"(?:\\text\s*\{)?\s*\ball real numbers\s*\}?", r"\\mathbb{R}"),
        (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", _repeating),
        (r"<=|=<", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\*\*", "^"),
        (r"(?<=\d)(?:\s?\{\s?,\s?\}|\\,|,\\!|\\!|,\s?\\!\s?)(?=\d{3}(?!\d))", ""),
        (r"\b(?:USD?|CAD?|AUD?)\s?\\?\$|\\?\$|[€£₹]|\\(?:pounds|euro|textdollar)\b(?:\{\})?", ""),
        (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(pi|infty|theta|alpha|beta)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp)(?=[\s(^_]|\d)", r"\\\1 "),
        (r"\\text\w*\s*\{([^A-Za-z{}]*)\}", r"\1"),
        (r"(?<![\\A-Za-z])(?:inf|infinity|oo)(?![A-Za-z])", r"\\infty "),
        (r"\^\(([^()]*)\)", r"^{\1}"),
        (r"([_^])\{(\w)\}(?!\d)", r"\1\2"),
        (r"\\(?:overline|overrightarrow)\s*\{([A-Z]{2,})\}", r"\1"),
        (r"\\langle\b", "("),
        (r"\\rangle\b", ")"),
        (r"\^(-?\d{2,}|-\d)", r"^{\1}"),
        (r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),
        (r"(?<=\d)[eE]([+-]?\d+)(?![\w.])", r"\\times 10^{\1}"),
        (r"\\(?:text|mbox|mathrm|textrm)\s*\{\s*(?:or|and)\s*\}|\s\b(?:or|and)\b\s", ", "),
        (r"(?<=\d)\s*(?:\\%|%|\\?\s*\\text\s*\{\s*(?:\\?%|percent)\s*\}|\s*(?:percent(?:age)?|pct)\b)", r"\\%"),
    )
]  # fmt: skip
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mbox|mathrm|operatorname|rm|bf|text\w+)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_UNIT = re.compile(
    r"""(?x)
    (?: (?<=[\d})!]) | (?<=\\pi) ) (?: \s | \\\s | \\, | ~ )*
    (?: \^ \s* \{? \\circ \}? \s* [CF]?
      | \^ \s* \{? \s* (?: \\\w+\{ )? \s* (?:st|nd|rd|th) \s* \}{0,2}
      | \(? \\?p?mod \s* \{? \s* \d+ \s* \}? \s* \)?
      | \\(?:text|mathrm|mbox|textrm) \s* \{ [^{}]* \} (?: \s* \^ \s* \{? \d \}? )?
      | \s (?: [A-Za-z]{3,} | cm|mm|km|kg|mg|ml|mL|ft|in|lb|oz|hr|m|g|s|h|L ) (?: \s* \^ \s* \{? \d \}? )?
        (?: [\s/-]+ [A-Za-z]+ (?: \s* \^ \s* \{? \d \}? )? )*
    ) \.? \s* $
    """
)
_END = re.compile(r"(?:\\\\|[\s.,;:!。，；！])+$")


def cleaned(text: str) -> str:
    r"""An answer in plain LaTeX: without wrappings, spaces of typesetting, currency, a final point.

    >>> cleaned(r"$\dfrac{1}{2}$."), cleaned("√2 ≤ x"), cleaned("1{,}080"), cleaned("2 1/2"), cleaned("2**10")
    ('\\frac{1}{2}', '\\sqrt{2} \\le x', '1080', '2\\frac{1}{2}', '2^{10}')
    """
    text = _OF_SIGNS.sub(lambda found: _SIGNS[found[0]], text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[2] or found[1]}}}", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").strip()
    text = _unwrapped(text)
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    text = _SPACES.sub(" ", _STYLES.sub(r"\1", text))
    text = " ".join(text.split())
    return _unwrapped(text if text.endswith("!") else _END.sub("", text))


def _unwrapped(text: str) -> str:
    for _ in range(4):
        alone = _WORDS_ALONE.fullmatch(text)
        text = alone[1].strip() if alone else text
        text = text if text.endswith((r"\.", "!")) else _END.sub("", text)
        for opening, closing in _WRAPPINGS:
            inner = text[len(opening) : len(text) - len(closing)]
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                if opening not in inner and not inner.endswith("\\"):
                    text = inner.strip()
    return text


def without_unit(text: str) -> str:
    r"""A cleaned answer without the unit behind it, and without a sign of degrees.

    >>> without_unit(r"42 \text{ cm}^2"), without_unit("42 square units"), without_unit(r"90^\circ")
    ('42', '42', '90')
    """
    return _UNIT.sub("", text).strip()


_THOUSANDS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_IN_THOUSANDS = re.compile(
    rf"(\d[\d,]*)(?:\.(\d+))?\s*(?:\\text\w*\s*\{{\s*)?({'|'.join(_THOUSANDS)})s?\b\s*\}}?", re.IGNORECASE
)


def in_full(text: str) -> str:
    r"""A cleaned answer whose thousands and millions are written out.

    >>> in_full("1.5 million"), in_full(r"5 \text{ thousand}"), in_full("5")
    ('1500000', '5000', '5')
    """
    return _IN_THOUSANDS.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    zeros, behind_point = _THOUSANDS[found[3].lower()], found[2] or ""
    digits = found[1].replace(",", "") + behind_point.ljust(zeros, "0")
    return (
        digits
        if len(behind_point) <= zeros
        else f"{digits[: zeros - len(behind_point)]}.{digits[zeros - len(behind_point) :]}"
    )


def words_of(text: str) -> str:
    r"""A cleaned answer as plain words, in small letters: what stands in \text{} and beside it.

    >>> words_of(r"\text{Evelyn}"), words_of("The Evelyn.")
    ('evelyn', 'evelyn')
    """
    text = _TEXT.sub(lambda found: f" {found[1]} ", text)
    words = re.sub(r"[^\w%+/:.-]+", " ", text.replace("\\", " ")).casefold().split()
    return " ".join(word.strip(".") for word in words if word not in ("the", "a", "an"))


def plain_of(text: str) -> str | None:
    r"""A cleaned answer of words and figures that is no formula, in small letters without spaces; else None.

    >>> plain_of(r"12:30 \text{ PM}"), plain_of("(1, 2)")
    ('12:30pm', None)
    """
    plain = re.sub(r"(?<=[^\W\d_])\.", "", _TEXT.sub(lambda found: found[1], text).casefold())
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", plain)  # 4 2 is not 42
    return plain if re.search(r"[^\W\d_]{2}", plain) and not re.search(r"[\\^_=<>+*{}|()\[\]]", plain) else None


def is_words(text: str) -> bool:
    r"""Whether a cleaned answer is words and no formula: \text{even}, "Evelyn", "June 20".

    >>> is_words(r"\text{even}"), is_words("x + y"), is_words("xy"), is_words(r"\frac{1}{2} \text{ cm}")
    (True, False, False, False)
    """
    rest = _TEXT.sub(lambda found: f" {found[1]} ", text)
    return bool(re.search(r"[^\W\d_]{3,}", rest)) and not re.search(r"[\\^_=<>+*{}|]|\d\s*[/(]", rest)
