"""Word problems answered in a format that the model which ships has not been taught: a task for a warm start.

It was taught to open <reasoning> first. Here the working stands bare, and the number behind it in <answer>. As data,
"embedded" has 2,000 problems to train on and "few" the first 16 of them, as if somebody had written so many answers.
"""

import re

from grpo import Config, Task
from grpo.embedded import word_problems
from grpo.rewards.correctness import same_answer

FORMAT = """Respond in the following format:
...
<answer>
...
</answer>"""
BARE = re.compile(r"[^<>]+\n<answer>\n([^<>]+)\n</answer>\n?")


def rows(split, data):
    for row in word_problems(split, 16 if data == "few" and split == "train" else 2000):
        solution, answer = row["answer"].rsplit("####", 1)
        yield {"question": row["question"], "solution": solution.strip(), "answer": answer.strip()}


def prompt(row):
    return [{"role": "system", "content": FORMAT}, {"role": "user", "content": row["question"]}]


def solved(completion, answer):
    """1.0 if the completion is working and then the right answer in its tags, and nothing else; else 0.

    Range: 0 or 1.
    """
    found = BARE.fullmatch(completion)
    return 1.0 if found and same_answer(found[1], answer) else 0.0


task = Task(
    name="warm_start",
    rows=rows,
    prompt=prompt,
    rewards={solved: 1.0},
    gold="{solution}\n<answer>\n{answer}\n</answer>\n",
    solved=("solved", 1.0),
    data="embedded",
    config=Config(model="embedded", base="float32", steps=50, learning_rate=1e-3, max_completion_tokens=128),
)
