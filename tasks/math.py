r"""MATH: competition mathematics, an answer in \boxed{} to get right, compared by what it means.

The data are the hub's `nlile/hendrycks-MATH-benchmark`, anything with the columns `problem` and `solution`, or
`problem` and `answer`, or, as "embedded", word problems from the generator that ships with the package, asked in the
format that the tiny model knows.
"""

from grpo import Config, Task
from grpo.data import read_rows
from grpo.embedded import word_problems
from grpo.rewards import XML_FORMAT, extract_answer, math
from grpo.rewards.stated import last_box

BOXED = "Reason step by step, and put the final answer into \\boxed{}."


def rows(split, data, count=2000):
    if data == "embedded":
        for row in word_problems(split, count):
            solution, answer = row["answer"].rsplit("\n#### ", 1)
            yield {"problem": row["question"], "solution": solution, "answer": answer, "format": XML_FORMAT}
        return
    for row in read_rows(data, split):
        solution = row.get("solution") or ""
        answer = row.get("answer") or last_box(solution)
        yield {"problem": row["problem"], "solution": solution, "answer": answer, "format": BOXED}


def vote(completion):
    return extract_answer(completion) or last_box(completion)


def prompt(row):
    return [{"role": "system", "content": row["format"]}, {"role": "user", "content": row["problem"]}]


task = Task(
    name="math",
    rows=rows,
    prompt=prompt,
    rewards={math: 1.0},
    gold="{solution}\n\nThe final answer is $\\boxed{{{answer}}}$.",
    solved=("math", 1.0),
    answer=vote,
    data="nlile/hendrycks-MATH-benchmark",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct", base="nf4", steps=200, max_completion_tokens=1024),
    embedded={
        "model": "embedded",
        "data": "embedded",
        "base": "float32",
        "steps": 50,
        "learning_rate": 1e-3,
        "max_completion_tokens": 128,
    },
)
