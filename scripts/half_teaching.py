"""Half-teaching: a class of students, careful and careless, and a language model that learns to imitate all of them.
Knows nothing of any one model, of its data, or of reinforcement learning.

A student turns notes into a completion. Some students are careful; others forget the tags, chat inside the answer,
guess, or slip in the last calculation. A model that imitates the class can do a task and does so part of the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo.task import Row

IGNORED = -100  # a label that has no part in the loss


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


Student = Callable[[Notes], str]


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


def notes_of_word_problem(row: Row, random: Random) -> Notes:
    """Notes on a row of the gsm8k task. A last line that does not end in "= answer" (the hub has some) has no slip."""
    lines = row["solution"].split("\n")
    wrong = str(max(2, int(row["answer"].replace(",", "")) + random.choice((-10, -3, -2, -1, 1, 2, 3, 10))))
    start, result, end = lines[-1].rpartition(f"= {row['answer']}")
    slip = [*lines[:-1], start + result.replace(row["answer"], wrong) + end]
    return Notes(row["solution"], row["answer"], "\n".join(slip), wrong)


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


def build_model(tokenizer: Any, shape: dict[str, Any]) -> Any:
    """A Qwen3 model with fresh weights; its vocabulary is rounded up to a multiple of 64."""
    config = Qwen3Config(
        **shape,
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


@dataclass
class Trained:
    """What a training came to; `tokens` counts padding too."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan  # of the last step


def train(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    factor: Callable[[int], float | None],
    learning_rate: float,
    report_every: int,
) -> Trained:
    """AdamW with bfloat16 autocast on a GPU.

    batches: tokens and labels, [examples, longest] each, padded at the end.
    factor: step -> what the learning rate is multiplied by, or None when the training is over.
    """
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=device.type == "cuda"
    )
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    done, started, loss = Trained(), time.perf_counter(), torch.tensor(math.nan)
    for step, (tokens, labels) in enumerate(batches):
        rate = factor(step)
        if rate is None:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        with precision:
            loss = model(input_ids=tokens.to(device), labels=labels.to(device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done.steps, done.tokens = step + 1, done.tokens + tokens.numel()
        if done.steps % report_every == 0:
            speed = done.tokens / (time.perf_counter() - started)
            print(f"step {done.steps:5}  loss {loss.item():.4f}  {speed:,.0f} tokens/s", flush=True)
    done.loss, done.seconds = loss.item(), time.perf_counter() - started
    return done


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """bfloat16, so that the weights are half as large; the scores are those of the saved ones."""
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
