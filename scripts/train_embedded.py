"""Trains the tiny model that ships in grpo/embedded/model: tokenizer, half-taught weights, held-out scores.

Knows nothing of reinforcement learning: it imitates demonstrations, and leaves the model half-taught on purpose.
The demonstrations come from a class of students. A few are careful; the others forget the tags, chat inside the
answer, guess, or slip in the last calculation. What the model learns is the mixture, so it *can* do the tasks and
does so only part of the time: what is left is exactly what GRPO teaches.

    python scripts/train_embedded.py                      # the model that ships, on a GPU or a CPU
    python scripts/train_embedded.py --steps 20 --problems 500 --out /somewhere      # a quick look
    python scripts/train_embedded.py --steps 0            # scores of the model in --out
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grpo.embedded import MODEL_DIR
from grpo.rewards import integer, soft_xml, strict_xml
from grpo.task import Row, Task, load_task

TASKS = Path(__file__).parents[1] / "tasks"
IGNORED = -100  # a label that has no part in the loss
MAX_COMPLETION = 160


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    tasks = {name: load_task(TASKS / f"{name}.py") for name in TASK_SHARES}
    if arguments.steps > 0:
        examples = make_examples(tasks, arguments.problems, arguments.demonstrations, arguments.seed)
        tokenizer = train_tokenizer(examples[:50_000], arguments.vocabulary)
        model = build_model(arguments, tokenizer).to(device)
        print(f"{model.num_parameters():,} parameters, {len(examples):,} examples, on {device}", flush=True)
        train(model, encode(examples, tokenizer), arguments.steps, arguments.batch, arguments.learning_rate)
        save(model, tokenizer, arguments.out)
    model, tokenizer = load(arguments.out, device)
    for name, task in tasks.items():
        rows = list(task.rows("test", "embedded", count=arguments.prompts))
        scores = evaluate(model, tokenizer, task, rows, arguments.samples)
        print(f"{name:10}", "  ".join(f"{key} {value:.3f}" for key, value in scores.items()), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps; 0 only scores the model in --out")
    parser.add_argument("--batch", type=int, default=256, help="examples of one step")
    parser.add_argument("--problems", type=int, default=60_000, help="word problems to make up")
    parser.add_argument("--demonstrations", type=int, default=3, help="students that answer each problem")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts of each task")
    parser.add_argument("--samples", type=int, default=16, help="completions for each of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# The demonstrations

TASK_SHARES = {"gsm8k": 0.65, "countdown": 0.23, "reverse": 0.12}


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
    students, shares = list(STUDENTS), list(STUDENTS.values())
    examples = []
    for name, task in tasks.items():
        rows = list(task.rows("train", "embedded", count=problems if name == "gsm8k" else problems // 6))
        for i in range(round(total * TASK_SHARES[name])):
            row = rows[i % len(rows)]
            student = random.choices(students, shares)[0]
            examples.append(Example(task.prompt(row), student(NOTES[name](row, random))))  # type: ignore[arg-type]
    random.shuffle(examples)
    return examples


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

# The tokenizer

# Words with the space before them, digits one at a time, runs of signs, line ends.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"
TAG = re.compile("</?(?:reasoning|answer)>")
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(examples: list[Example], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, and the words of the tasks are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(TAGS) - len(SPECIAL),
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
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Encoded:
    """An example in tokens; the first `num_prompt` are the prompt, which has no part in the loss."""

    tokens: Tensor  # [T] int32
    num_prompt: int


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
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


# The model


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, examples: list[Encoded], steps: int, batch: int, learning_rate: float) -> None:
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


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bfloat16, so that the weights are half as large in the repository; the scores are those of the saved ones."""
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path, device: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


# The held-out scores


def evaluate(model: Any, tokenizer: Any, task: Task, rows: list[Row], samples: int) -> dict[str, float]:
    """Shares at temperature 1 (pass@k, formats, truncated), the mean length in tokens, and greedy accuracy."""
    texts, lengths = sample(model, tokenizer, task, rows, samples)
    [reward] = [r for r in task.rewards if callable(r) and r.__name__ == task.solved[0]]
    names = reward.__code__.co_varnames[: reward.__code__.co_argcount]

    def is_right(text: str, row: Row) -> bool:
        return reward(**{name: {"completion": text, **row}[name] for name in names}) >= task.solved[1]

    repeated = [row for row in rows for _ in range(samples)]
    right = torch.tensor([is_right(text, row) for text, row in zip(texts, repeated, strict=True)])
    right = right.view(len(rows), samples)
    greedy, _ = sample(model, tokenizer, task, rows, 0)
    return {
        "pass@1": right.float().mean().item(),
        "pass@8": pass_at(8, right) if samples >= 8 else math.nan,
        f"pass@{samples}": right.any(1).float().mean().item(),
        "greedy": sum(is_right(text, row) for text, row in zip(greedy, rows, strict=True)) / len(rows),
        "strict": 2 * sum(map(strict_xml, texts)) / len(texts),
        "soft": 2 * sum(map(soft_xml, texts)) / len(texts),
        "integer": 2 * sum(map(integer, texts)) / len(texts),
        "careful_right": share_right_when_careful(texts, right.flatten().tolist()),
        "length": sum(lengths) / len(lengths),
        "truncated": sum(length >= MAX_COMPLETION for length in lengths) / len(lengths),
    }


def share_right_when_careful(texts: list[str], right: list[bool]) -> float:
    """Of the completions that show their working in the full format, answer alone between the tags."""
    careful = [
        r
        for text, r in zip(texts, right, strict=True)
        if strict_xml(text) and "looks easy" not in text and "answer is" not in text
    ]
    return sum(careful) / max(1, len(careful))


def pass_at(k: int, right: Tensor) -> float:
    """Unbiased pass@k (Chen et al. 2021, equation 1) of `right` [prompts, samples]."""
    n = right.shape[1]
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right.sum(1).tolist()) / len(right)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, task: Task, rows: list[Row], samples: int) -> tuple[list[str], list[int]]:
    """`samples` completions a row at temperature 1, row by row; greedy ones if it is 0. Texts and lengths."""
    chats = [
        tokenizer.apply_chat_template(task.prompt(row), tokenize=False, add_generation_prompt=True) for row in rows
    ]
    inputs = tokenizer(chats, return_tensors="pt", padding=True).to(model.device)
    drawing = (
        dict(do_sample=True, top_k=0, top_p=1.0, num_return_sequences=samples) if samples else dict(do_sample=False)
    )
    output = model.generate(**inputs, **drawing, max_new_tokens=MAX_COMPLETION)[:, inputs["input_ids"].shape[1] :]
    lengths = (output != tokenizer.pad_token_id).sum(1).tolist()
    return tokenizer.batch_decode(output, skip_special_tokens=True), lengths


if __name__ == "__main__":
    main()
