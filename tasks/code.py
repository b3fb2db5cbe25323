"""Code: a Python function to write, which unit tests call in a sandbox (docs/sandbox.md).

The data are the hub's `google-research-datasets/mbpp`, anything with a `prompt` (or `text`), `tests` (or `test_list`)
and a `solution` (or `code`) in each row, or, as "embedded", made-up exercises, which try the machinery. The tiny model
writes no Python, so there is no embedded default.
"""

from random import Random
from zlib import crc32

from grpo import Config, Task
from grpo.data import read_rows
from grpo.rewards import code

INSTRUCTION = "Write Python. Give the whole program in one ```python block."
EXERCISES = {
    "{a} times its argument, plus {b}": "return {a} * x + {b}",
    "the larger one of its argument and {b}": "return max(x, {b})",
    "the sum of the numbers from {a} to its argument": "return sum(range({a}, x + 1))",
    "how often {a} goes into the absolute value of its argument": "return abs(x) // {a}",
}


def rows(split, data, count=400):
    if data == "embedded":
        yield from exercises(split, count)
        return
    for row in read_rows(data, split, name="full"):
        tests = row["test_list"] if "test_list" in row else row["tests"]
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        named = [f"Your code should pass this test: {tests[0]}"] if "test_list" in row else []  # it says the name
        yield {
            "question": "\n\n".join([row["text"] if "text" in row else row["prompt"], *named]),
            "solution": row["code"] if "code" in row else row["solution"],
            "tests": [setup, *tests] if setup else tests,
            "entry_point": row.get("entry_point"),
        }


def exercises(split, count):
    """Made up; the exercise itself decides its split."""
    random, seen = Random(f"code {split}"), set()
    while len(seen) < count:
        told, body = random.choice(list(EXERCISES.items()))
        a, b = random.randint(2, 60), random.randint(2, 60)
        question = f"Write a function `solve(x)` that returns {told.format(a=a, b=b)}."
        solution = f"def solve(x):\n    {body.format(a=a, b=b)}"
        if (crc32(question.encode()) % 5 == 0) == (split == "test") and question not in seen:
            seen.add(question)
            known = {}
            exec(solution, known)  # our own text
            tests = [f"assert solve({x}) == {known['solve'](x)}" for x in (-7, 0, 5, 100)]
            yield {"question": question, "solution": solution, "tests": tests, "entry_point": None}


def prompt(row):
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row["question"]}]


task = Task(
    name="code",
    rows=rows,
    prompt=prompt,
    rewards={code: 1.0},
    gold="```python\n{solution}\n```",
    solved=("code", 1.0),
    data="google-research-datasets/mbpp",
    config=Config(model="Qwen/Qwen2.5-Coder-1.5B-Instruct", base="nf4", steps=200, max_completion_tokens=512),
)
