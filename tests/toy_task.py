"""A toy task file and flags that make a run of it small: what the tests of whole runs share. No test is here."""

TASK = '''
import random
from grpo import Config, Task

def rows(split, data):
    numbers = range(8) if split == "train" else range(8, 14)
    return [{{"question": f"Sara has {{n}} apples and buys {{n + 2}}.", "answer": str(2 * n + 2)}} for n in numbers]

def prompt(row):
    return [{{"role": "user", "content": row["question"]}}]

def letters(completion):
    """Something that varies from sample to sample; it draws from the global generator, which a resume must restore."""
    return len(set(completion)) / 10 + random.random() / 100

def says(completion, answer):
    return float(answer in completion)

{extra}

task = Task(
    name="toy",
    rows=rows,
    prompt=prompt,
    rewards={rewards},
    gold="The answer is {{answer}}.",
    solved=("says", 1.0),
    data="embedded",
    config=Config(model="org/does-not-exist"),
    embedded=dict(model="embedded", base="float32"),
)
'''

SMALL = """--prompts-per-step 2 --group-size 4 --max-completion-tokens 7 --eval-prompts 4 --eval-samples 2 --eval-k 2
--eval-every 4 --save-every 3 --learning-rate 1e-3 --lora-rank 4 --no-mask-truncated --threads 1""".split()
