"""Countdown: make a target from three or four small numbers. The expression is checked by a parser, never run."""

import ast
import re
from fractions import Fraction
from operator import add, mul, sub, truediv
from random import Random
from zlib import crc32

from grpo import Config, Task
from grpo.rewards import XML_FORMAT, extract_answer, soft_xml

OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,100}")  # short enough that no nesting can exhaust the parser


def rows(split, data, count=1000):
    """Made up, whatever `data` says, each with a solution; numbers and target decide the split.

    There are some 16,000 puzzles to train on and 4,000 to test on; a larger `count` would never end.
    """
    random, seen = Random(f"countdown {split}"), set()
    while len(seen) < count:
        numbers = [random.randint(1, 9) for _ in range(random.choice((3, 3, 3, 4)))]
        working, expression, target = _combine(numbers, random)
        puzzle = (*sorted(numbers), target)
        is_test = crc32(repr(puzzle).encode()) % 5 == 0
        if is_test == (split == "test") and puzzle not in seen:
            seen.add(puzzle)
            yield {"numbers": numbers, "target": target, "solution": ", ".join(working), "expression": expression}


def prompt(row):
    numbers = ", ".join(map(str, row["numbers"]))
    question = f"Use each of the numbers {numbers} once, with + - * / and brackets, to make {row['target']}."
    return [{"role": "system", "content": XML_FORMAT}, {"role": "user", "content": question}]


def reaches_target(completion: str, numbers: list[int], target: int) -> float:
    """1 when the answer is an expression over exactly the given numbers that equals the target."""
    expression = (extract_answer(completion) or "").strip()
    return float(evaluate(expression, numbers) == target)


def evaluate(expression: str, numbers: list[int]) -> Fraction | None:
    """The value of an expression that uses each of the numbers exactly once; None for anything else."""
    if not EXPRESSION.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression, mode="eval").body
        used = [int(digits) for digits in re.findall(r"[0-9]+", expression)]
        return _value(tree) if sorted(used) == sorted(numbers) else None
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None


def _value(node):
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATIONS:
            return OPERATIONS[type(sign)](_value(left), _value(right))
    raise TypeError(f"{type(node).__name__} is no part of a countdown expression")


def _combine(numbers, random):
    """Two terms at a time become one, until one is left: the working, the expression and its value."""
    terms, working = [(str(number), number) for number in numbers], []
    while len(terms) > 1:
        first, second, *rest = random.sample(terms, len(terms))
        (right, b), (left, a) = sorted((first, second), key=lambda term: term[1])
        choices = [("+", a + b), ("*", a * b), ("-", a - b), ("/", Fraction(a, b))]
        sign, value = random.choice([(s, int(v)) for s, v in choices if v > 0 and v == int(v) and v < 100])
        working.append(f"{a} {sign} {b} = {value}")
        terms = [(f"({left} {sign} {right})" if rest else f"{left} {sign} {right}", value), *rest]
    return working, *terms[0]


task = Task(
    name="countdown",
    rows=rows,
    prompt=prompt,
    rewards={reaches_target: 1.0, soft_xml: 0.2},
    gold="<reasoning>\n{solution}\n</reasoning>\n<answer>\n{expression}\n</answer>\n",
    solved=("reaches_target", 1.0),
    data="embedded",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct", base="nf4", steps=200, max_completion_tokens=256),
    embedded={
        "model": "embedded",
        "data": "embedded",
        "base": "float32",
        "steps": 40,
        "learning_rate": 1e-3,
        "max_completion_tokens": 160,
    },
)
