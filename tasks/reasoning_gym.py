"""Reasoning Gym: any generator of the package `reasoning-gym`, by name, scored by its own `score_answer`.

    python -m grpo.run reasoning_gym --data spell_backward
    python -m grpo.run reasoning_gym --data "chain_sum:min_terms=2,max_terms=3,size=500"

Behind the colon stand the generator's own parameters, and `size`: how many prompts to train on (a fifth as many are
held out). `pip install "grpo[tasks]"` brings the package.
"""

import ast
import json
from functools import lru_cache
from zlib import crc32

from grpo import Config, Task
from grpo.errors import UserError, in_words, nearest
from grpo.rewards import XML_FORMAT, extract_answer, soft_xml

SIZE = 1000  # prompts to train on
TRIES = 20  # questions that are made for each that is kept, before there are taken to be no more
EXAMPLES = ("example_correct_answer", "possible_answer", "example_answer")  # of generators that have many right ones


def rows(split, data):
    """Questions of a generator, each once; its text decides the split."""
    name, given = parsed(data)
    size = given.pop("size", SIZE)
    if not (isinstance(size, int) and size > 0):
        raise UserError(f"--data {data}: size is {size!r}. It is how many prompts are made to train on.")
    count = size if split == "train" else max(1, size // 5)
    made, seen = generator(data, size=TRIES * max(count, 50)), set()
    for index in range(len(made)):
        entry = made[index]
        is_test = crc32(entry["question"].encode()) % 5 == 0
        if is_test != (split == "test") or entry["question"] in seen:
            continue
        seen.add(entry["question"])
        yield {
            "question": entry["question"],
            "answer": gold_answer(name, entry),
            "metadata": entry["metadata"],
            "data": data,
        }
        if len(seen) == count:
            return


def parsed(data):
    """ "chain_sum:max_terms=3" -> ("chain_sum", {"max_terms": 3})"""
    name, _, text = data.partition(":")
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(each.arg is None for each in call.keywords):
            raise ValueError("each is NAME=VALUE")
        values = {str(each.arg): value_of(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise UserError(
            f"--data {data}: what stands behind the colon cannot be read ({error}). Write such as "
            "chain_sum:min_terms=2,max_terms=3"
        ) from error
    return name, values


def value_of(node):
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@lru_cache(maxsize=64)
def generator(data, size=1):
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(
            'Task reasoning_gym needs the package reasoning-gym: pip install "grpo[tasks]" (or reasoning-gym).'
        ) from error
    name, given = parsed(data)
    if name not in DATASETS:
        raise UserError(
            f"reasoning-gym has no generator {name!r}.{nearest(name, DATASETS)} It has: {', '.join(sorted(DATASETS))}."
        )
    parameters = {"seed": 0, **given, "size": size}
    try:
        return create_dataset(name, **parameters)
    except (TypeError, ValueError, AssertionError) as error:
        known = ", ".join(f"{key}={value!r}" for key, value in vars(DATASETS[name][1]()).items())
        raise UserError(f"--data {data}: {in_words(error)}. The generator's parameters are: {known}") from error


def gold_answer(name, entry):
    example = next((entry["metadata"][key] for key in EXAMPLES if key in entry["metadata"]), None)
    answer = example if entry["answer"] is None else entry["answer"]
    if answer is None:
        raise UserError(
            f"reasoning-gym gives no right answer for {name}, and nothing here can be checked without one. Copy this "
            "task file, leave `answer` out of its rows, and say gold=None in its Task."
        )
    return answer if isinstance(answer, str) else json.dumps(answer)


def prompt(row):
    return [{"role": "system", "content": XML_FORMAT}, {"role": "user", "content": row["question"]}]


def solved(completion: str, question: str, answer: str, metadata: dict, data: str) -> float:
    """What the generator's own `score_answer` gives the text inside <answer>: 1 for a right one."""
    given = (extract_answer(completion) or "").strip()
    entry = {"question": question, "answer": answer, "metadata": metadata}
    return float(generator(data).score_answer(given, entry)) if given else 0.0


task = Task(
    name="reasoning_gym",
    rows=rows,
    prompt=prompt,
    rewards={solved: 1.0, soft_xml: 0.2},
    gold="<reasoning>\nStep by step.\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    solved=("solved", 1.0),
    data="chain_sum",
    made_up=True,
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct", base="nf4", steps=200, max_completion_tokens=512),
    embedded={
        "model": "embedded",
        "data": "leg_counting:min_animals=1,max_animals=1",
        "base": "float32",
        "steps": 40,
        "learning_rate": 1e-3,
        "max_completion_tokens": 96,
    },
)
