"""GSM8K: grade-school word problems, one number to get right.

The data are the hub's `openai/gsm8k`, a folder with its columns in train.jsonl and test.jsonl, or, as "embedded",
problems of the same kind from the generator that ships with the package.
"""

import re

from grpo import Config, Task
from grpo.data import read_rows
from grpo.embedded import word_problems
from grpo.rewards import XML_FORMAT, correctness, integer, soft_xml, strict_xml, xml_count

CALCULATOR = re.compile(r"<<.*?>>")  # "48/2=<<48/2=24>>24": the hub's solutions carry calculator calls


def rows(split, data, count=2000):
    problems = word_problems(split, count) if data == "embedded" else read_rows(data, split, name="main")
    for row in problems:
        solution, answer = row["answer"].rsplit("####", 1)
        yield {
            "question": row["question"],
            "solution": CALCULATOR.sub("", solution).strip(),
            "answer": answer.strip(),
        }


def prompt(row):
    return [{"role": "system", "content": XML_FORMAT}, {"role": "user", "content": row["question"]}]


task = Task(
    name="gsm8k",
    rows=rows,
    prompt=prompt,
    rewards={correctness: 1.0, integer: 1.0, strict_xml: 1.0, soft_xml: 1.0, xml_count: 1.0},
    gold="<reasoning>\n{solution}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    solved=("correctness", 2.0),
    data="openai/gsm8k",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct", base="nf4", steps=200, learning_rate=2e-5),
    embedded={
        "model": "embedded",
        "data": "embedded",
        "base": "float32",
        "steps": 50,
        "learning_rate": 1e-3,
        "max_completion_tokens": 128,
    },
)
