"""Trains the tiny model that ships in grpo/embedded/model: tokenizer, half-taught weights, held-out scores.

Knows nothing of reinforcement learning: it imitates demonstrations, and leaves the model half-taught on purpose.
The demonstrations come from a class of students, careful and careless (half_teaching.py). What the model learns is the
mixture, so it can do the tasks and does so only part of the time: the rest is what GRPO has to teach.

    python scripts/train_embedded.py                                                   the model that ships
    python scripts/train_embedded.py --steps 20 --problems 500 --batch 16 --out FOLDER    a quick look
    python scripts/train_embedded.py --steps 0                                         only the scores
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from half_teaching import (
    IGNORED,
    Encoded,
    Example,
    Notes,
    Student,
    build_model,
    careful,
    chatty,
    encode,
    guessing,
    notes_of_word_problem,
    save,
    slipping,
    squeezed,
    train,
    unfinished,
    untagged,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from grpo.embedded import MODEL_DIR
from grpo.evaluate import pass_at_k
from grpo.rewards import integer, soft_xml, strict_xml
from grpo.task import Row, Task, load_task

TASKS = Path(__file__).parents[1] / "tasks"
MAX_COMPLETION = 160  # tokens
ROWS_AT_ONCE = 16  # held-out prompts sampled together
MAX_VOCABULARY = 1536
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tasks = {name: load_task(TASKS / f"{name}.py") for name in TASK_SHARES}
    if arguments.steps > 0:
        torch.manual_seed(arguments.seed)
        examples = make_examples(tasks, arguments.problems, arguments.demonstrations, arguments.seed)
        tokenizer = train_tokenizer(examples[:50_000])
        model = build_model(tokenizer, SHAPE).to(device)
        print(f"{model.num_parameters():,} parameters, {len(examples):,} examples, on {device}", flush=True)
        shuffled = batches(encode(examples, tokenizer), arguments.batch, model.config.pad_token_id)
        factor = warm_up_and_cosine(arguments.steps)
        train(model, shuffled, factor, arguments.learning_rate, report_every=max(1, arguments.steps // 20))
        save(model, tokenizer, arguments.out)
    model, tokenizer = load(arguments.out, device)
    torch.manual_seed(arguments.seed)
    for name, task in tasks.items():
        rows = rows_of(task, "test", arguments.prompts)
        scores = evaluate(model, tokenizer, task, rows, arguments.samples)
        print(f"{name:10}", "  ".join(f"{key} {value:.3f}" for key, value in scores.items()), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps; 0 only scores the model in --out")
    parser.add_argument("--batch", type=int, default=256, help="examples of one step")
    parser.add_argument("--problems", type=int, default=60_000, help="word problems to make up")
    parser.add_argument("--demonstrations", type=int, default=3, help="students that answer each problem")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts of each task")
    parser.add_argument("--samples", type=int, default=16, help="completions for each of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


TASK_SHARES = {"gsm8k": 0.65, "countdown": 0.23, "reverse": 0.12}  # of the demonstrations


STUDENTS: dict[Student, float] = {
    careful: 0.29,
    squeezed: 0.06,
    chatty: 0.35,
    untagged: 0.14,
    unfinished: 0.06,
    guessing: 0.08,
    slipping: 0.02,
}


def make_examples(tasks: dict[str, Task], problems: int, demonstrations: int, seed: int) -> list[Example]:
    """`demonstrations` students answer each word problem; the other tasks come on top, by TASK_SHARES."""
    random = Random(seed)
    total = problems * demonstrations / TASK_SHARES["gsm8k"]
    examples = []
    for name, task in tasks.items():
        # Of countdown puzzles there are only some 16,000.
        rows = rows_of(task, "train", problems if name == "gsm8k" else problems // 6)
        for i in range(round(total * TASK_SHARES[name])):
            row = rows[i % len(rows)]
            [student] = random.choices(list(STUDENTS), list(STUDENTS.values()))
            messages = task.prompt(row)
            assert isinstance(messages, list), f"{name} has a plain-text prompt; the students answer chats"
            examples.append(Example(messages, student(NOTES[name](row, random))))
    random.shuffle(examples)
    return examples


def rows_of(task: Task, split: str, count: int) -> list[Row]:
    """More rows, or fewer, than the task files that ship give on their own."""
    return list(task.rows(split, "embedded", count=count))  # pyright: ignore[reportCallIssue]


def notes_of_letters(row: Row, random: Random) -> Notes:
    letters = row["answer"].split()
    place = random.randrange(len(letters) - 1)
    letters[place], letters[place + 1] = letters[place + 1], letters[place]
    working = "From the last to the first."
    return Notes(working, row["answer"], working, " ".join(letters))


def notes_of_countdown(row: Row, random: Random) -> Notes:
    """The working tries a few ways that miss the target before the one that reaches it."""
    attempts = [attempt(row["numbers"], random) for _ in range(random.randint(0, 4))]
    missed = [f"{working}, no" for working, _, value in attempts if value != row["target"]]
    _, wrong, _ = attempt(row["numbers"], random)
    return Notes("\n".join([*missed, row["solution"]]), row["expression"], "\n".join([*missed, "no"]), wrong)


def attempt(numbers: list[int], random: Random) -> tuple[str, str, int]:
    """Some way to combine the numbers from left to right: the working, the expression and its value."""
    value, *others = random.sample(numbers, len(numbers))
    working, expression = [], str(value)
    for i, number in enumerate(others):
        choices = [("+", value + number), ("*", value * number), ("-", value - number)]
        sign, result = random.choice([(s, v) for s, v in choices if 0 < v < 100] or choices[:1])
        working.append(f"{value} {sign} {number} = {result}")
        expression = f"{expression if i == 0 else f'({expression})'} {sign} {number}"
        value = result
    return ", ".join(working), expression, value


NOTES: dict[str, Callable[[Row, Random], Notes]] = {
    "gsm8k": notes_of_word_problem,
    "countdown": notes_of_countdown,
    "reverse": notes_of_letters,
}

# Words with the space before them, digits one at a time, runs of signs, line ends.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"
TAG = re.compile("</?(?:reasoning|answer)>")
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(examples: list[Example]) -> Any:
    """Byte-level BPE: any text can be written, and the words of the tasks are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(TAGS) - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["\nsystem\nuser\nassistant"] * 2 + [m["content"] for e in examples for m in e.messages]
    texts += [example.completion for example in examples]
    bpe.train_from_iterator((piece for text in texts for piece in TAG.split(text)), trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def warm_up_and_cosine(steps: int) -> Callable[[int], float | None]:
    """A short warm-up, then a cosine to zero at `steps`; None from there on."""
    warmup = max(1, steps // 50)

    def factor(step: int) -> float | None:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)) if step < steps else None

    return factor


def batches(examples: list[Encoded], size: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels, each [size, longest], epoch after epoch."""
    assert len(examples) >= size, f"{len(examples)} examples do not fill a batch of {size}"
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield pad_batch([examples[i] for i in order[start : start + size]], pad)


def pad_batch(examples: list[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    tokens = pad_sequence([example.tokens for example in examples], batch_first=True, padding_value=pad).long()
    place = torch.arange(tokens.shape[1])
    start = torch.tensor([[example.num_prompt] for example in examples])
    end = torch.tensor([[len(example.tokens)] for example in examples])
    return tokens, torch.where((place >= start) & (place < end), tokens, IGNORED)


def load(folder: Path, device: str) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


def evaluate(model: Any, tokenizer: Any, task: Task, rows: list[Row], samples: int) -> dict[str, float]:
    """Shares at temperature 1 (pass@k, formats, truncated), the mean length in tokens, and greedy accuracy."""
    texts, lengths = sample(model, tokenizer, task, rows, samples)
    greedy, _ = sample(model, tokenizer, task, rows, 0)
    repeated = [row for row in rows for _ in range(samples)]
    right = torch.tensor([is_right(task, text, row) for text, row in zip(texts, repeated, strict=True)])
    right = right.view(len(rows), samples)
    return {
        **{
            f"pass@{k}": mean(pass_at_k(samples, c, k) for c in right.sum(1).tolist())
            for k in (1, 8, 16)
            if k <= samples
        },
        "greedy": mean(is_right(task, text, row) for text, row in zip(greedy, rows, strict=True)),
        "strict": 2 * mean(map(strict_xml, texts)),
        "soft": 2 * mean(map(soft_xml, texts)),
        "integer": 2 * mean(map(integer, texts)),
        "careful_right": share_right_when_careful(texts, right.flatten().tolist()),
        "length": mean(lengths),
        "truncated": mean(length >= MAX_COMPLETION for length in lengths),
    }


def is_right(task: Task, completion: str, row: Row) -> bool:
    """Whether the reward that measures success pays its full value."""
    assert task.solved is not None
    name, full = task.solved
    [reward] = [reward for reward in task.rewards if callable(reward) and reward.__name__ == name]
    columns = {"completion": completion, **row}
    return reward(**{argument: columns[argument] for argument in signature(reward).parameters}) >= full


def share_right_when_careful(texts: list[str], right: list[bool]) -> float:
    """Of the completions in the full format with the working shown and the answer alone between the tags."""
    careless = ("This looks easy", "The answer is")
    careful = [
        is_right
        for text, is_right in zip(texts, right, strict=True)
        if strict_xml(text) and not any(phrase in text for phrase in careless)
    ]
    return sum(careful) / max(1, len(careful))


@torch.no_grad()
def sample(model: Any, tokenizer: Any, task: Task, rows: list[Row], samples: int) -> tuple[list[str], list[int]]:
    """`samples` completions a row at temperature 1, row by row; a greedy one if it is 0. Texts and lengths."""
    greedy = {"do_sample": False}
    drawn = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": samples}
    texts, lengths = [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        messages = [task.prompt(row) for row in rows[start : start + ROWS_AT_ONCE]]
        chats = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(chats, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, **(drawn if samples else greedy), max_new_tokens=MAX_COMPLETION)
        output = output[:, inputs["input_ids"].shape[1] :]  # [rows * samples, longest completion]
        lengths += (output != tokenizer.pad_token_id).sum(1).tolist()
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts, lengths


if __name__ == "__main__":
    main()
