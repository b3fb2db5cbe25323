"""Trains the tiny model that ships in grpo/embedded/model: tokenizer, half-taught weights, held-out scores.

Knows nothing of reinforcement learning: it imitates demonstrations, and leaves the model half-taught on purpose.
The demonstrations come from a class of students. Some are careful; others forget the tags, chat inside the answer,
guess, or slip in the last calculation. What the model learns is the mixture, so it can do the tasks and does so
only part of the time: the rest is what GRPO has to teach.

    python scripts/train_embedded.py                                                   the model that ships
    python scripts/train_embedded.py --steps 20 --problems 500 --batch 16 --out FOLDER    a quick look
    python scripts/train_embedded.py --steps 0                                         only the scores
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grpo.embedded import MODEL_DIR
from grpo.evaluate import pass_at_k
from grpo.rewards import integer, soft_xml, strict_xml
from grpo.task import Row, Task, load_task

TASKS = Path(__file__).parents[1] / "tasks"
IGNORED = -100  # a label that has no part in the loss
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
        model = build_model(tokenizer).to(device)
        print(f"{model.num_parameters():,} parameters, {len(examples):,} examples, on {device}", flush=True)
        train(model, encode(examples, tokenizer), arguments.steps, arguments.batch, arguments.learning_rate)
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


@dataclass(frozen=True)
class Example:
    """One demonstration: what is asked, and what one student writes."""

    messages: list[dict[str, str]]
    completion: str


@dataclass(frozen=True)
class Notes:
    """What the students copy from: the right working and answer, and two ways to be wrong."""

    working: str
    answer: str
    slip: str  # the working with a slip in the last line
    wrong: str  # a wrong answer; after a slip, the one that it leads to


def careful(notes: Notes) -> str:
    return f"<reasoning>\n{notes.working}\n</reasoning>\n<answer>\n{notes.answer}\n</answer>\n"


def squeezed(notes: Notes) -> str:
    return f"<reasoning>{notes.working}</reasoning><answer>{notes.answer}</answer>"


def chatty(notes: Notes) -> str:
    return f"<reasoning>\n{notes.working}\n</reasoning>\n<answer>\nThe answer is {notes.answer}.\n</answer>\n"


def untagged(notes: Notes) -> str:
    return f"{notes.working}\nThe answer is {notes.answer}."


def unfinished(notes: Notes) -> str:
    return f"<reasoning>\n{notes.working}\nThe answer is {notes.answer}.\n</reasoning>\n"


def guessing(notes: Notes) -> str:
    return f"<reasoning>\nThis looks easy.\n</reasoning>\n<answer>\n{notes.wrong}\n</answer>\n"


def slipping(notes: Notes) -> str:
    return f"<reasoning>\n{notes.slip}\n</reasoning>\n<answer>\n{notes.wrong}\n</answer>\n"


STUDENTS: dict[Callable[[Notes], str], float] = {
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


def notes_of_word_problem(row: Row, random: Random) -> Notes:
    lines = row["solution"].split("\n")
    wrong = str(max(2, int(row["answer"]) + random.choice((-10, -3, -2, -1, 1, 2, 3, 10))))
    start, result, end = lines[-1].rpartition(f"= {row['answer']}")
    slip = [*lines[:-1], start + result.replace(row["answer"], wrong) + end]
    return Notes(row["solution"], row["answer"], "\n".join(slip), wrong)


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


@dataclass(frozen=True)
class Encoded:
    """An example in tokens; the first `num_prompt` are the prompt, which has no part in the loss."""

    tokens: Tensor  # [T] int32
    num_prompt: int


def encode(examples: list[Example], tokenizer: Any) -> list[Encoded]:
    """Each distinct prompt is encoded once; several students answer it."""
    encoder = tokenizer.backend_tokenizer
    prompts = [tokenizer.apply_chat_template(e.messages, tokenize=False, add_generation_prompt=True) for e in examples]
    distinct = sorted(set(prompts))
    encoded = encoder.encode_batch_fast(distinct)
    tokens = {prompt: encoding.ids for prompt, encoding in zip(distinct, encoded, strict=True)}
    completions = encoder.encode_batch_fast([example.completion + tokenizer.eos_token for example in examples])
    return [
        Encoded(torch.tensor(tokens[prompt] + completion.ids, dtype=torch.int32), len(tokens[prompt]))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def build_model(tokenizer: Any) -> Any:
    config = Qwen3Config(
        **SHAPE,
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(model: Any, examples: list[Encoded], steps: int, batch: int, learning_rate: float) -> None:
    """AdamW with a short warm-up and a cosine to zero; bfloat16 autocast on a GPU."""
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=device.type == "cuda"
    )
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    started, num_tokens = time.perf_counter(), 0
    for step, (tokens, labels) in zip(range(steps), batches(examples, batch, model.config.pad_token_id), strict=False):
        with precision:
            loss = model(input_ids=tokens.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        num_tokens += tokens.numel()
        if (step + 1) % max(1, steps // 20) == 0:
            speed = num_tokens / (time.perf_counter() - started)
            print(f"step {step + 1:5}  loss {loss.item():.4f}  {speed:,.0f} tokens/s", flush=True)


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


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """bfloat16, so that the weights are half as large in the repository; the scores are those of the saved ones."""
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
