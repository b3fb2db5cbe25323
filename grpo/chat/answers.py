"""Answers: prompts of whoever asks, many at once -> what the policy says to each. Knows no screen and no history."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.chat.trained import Trained
from grpo.chat.voice import Sampler
from grpo.chat_template import ChatTemplate
from grpo.errors import UserError
from grpo.seeds import Purpose, mix_seed
from grpo.types import Message, Request

Asked = str | list[Message]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class Sampled:
    """A completion: text without and tokens with the stop token, log p of each token at the sampling temperature (at
    temperature 0, where there is no chance, at 1)."""

    prompt: Asked
    text: str
    finish: str  # "stop", or "length": cut off
    tokens: list[int] = field(repr=False)
    logprobs: list[float] = field(repr=False)


def answer(
    trained: Trained, prompts: Sequence[Asked], system: str, temperature: float, max_tokens: int, seed: int
) -> list[Sampled]:
    """A completion of each prompt. system: put in front of those that are texts. seed: the draws follow from it and
    from the place in the list.

    Raises:
        UserError: a prompt is none, or longer than the model's context.
    """
    template = ChatTemplate(trained.tokenizer)
    contexts = [_context(trained, template, each, system, number) for number, each in enumerate(prompts)]
    requests = [
        Request(context, mix_seed(Purpose.EVALUATION, seed, number), min(max_tokens, trained.context - len(context)))
        for number, context in enumerate(contexts)
    ]
    sampler = Sampler(trained.policy, trained.tokenizer, temperature)
    made = sampler.sample(requests)
    logprobs = [each.sampler_logprobs for each in made]
    if temperature == 0 and made:
        sampler.temperature = 1.0
        logprobs = sampler.logprobs(contexts, [each.tokens for each in made])
    return [
        Sampled(prompt, each.text, each.finish, each.tokens, values)
        for prompt, each, values in zip(prompts, made, logprobs, strict=True)
    ]


def several(prompts: Any) -> list[Asked]:
    """What was given as prompts: a text, the messages of one conversation, or a list of these.

    Raises:
        UserError: it is something else.
    """
    alone = isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], dict))
    listed = [prompts] if alone else prompts
    if not isinstance(listed, Sequence) or isinstance(listed, bytes):
        raise UserError(
            f"prompts is {reprlib.repr(prompts)}. It must be a list of texts, or of conversations such as "
            '[{"role": "user", "content": "What is 3 + 4?"}].'
        )
    for number, each in enumerate(listed):
        if fault := _fault_of(each):
            raise UserError(f"Prompt {number} is {fault}.")
    return [each if isinstance(each, str) else list(each) for each in listed]


def _fault_of(prompt: Any) -> str:
    """Why something is no prompt, in words; empty if it is one."""
    if isinstance(prompt, str):
        return "" if prompt.strip() else "an empty text: write something"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        return f"{reprlib.repr(prompt)}, which is neither a text nor a list of messages"
    for message in prompt:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            return f'{reprlib.repr(prompt)}, whose messages must be {{"role": "user", "content": "..."}}'
    return ""


def _context(trained: Trained, template: ChatTemplate, asked: Asked, system: str, number: int) -> list[int]:
    """The tokens of a prompt."""
    said = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if isinstance(asked, str) and system:
        said = [{"role": "system", "content": system}, *said]
    tokens = tokens_of(trained, template, said, number)
    if len(tokens) >= trained.context:
        raise UserError(
            f"Prompt {number} is {len(tokens):,} tokens long, and the model's context has {trained.context:,}."
        )
    return tokens


def tokens_of(trained: Trained, template: ChatTemplate, said: list[Message], number: int) -> list[int]:
    """Messages through the chat template; of a model without one their texts behind each other."""
    tokenizer: Any = trained.tokenizer
    if not template.is_there:
        return list(tokenizer("\n".join(str(message["content"]) for message in said))["input_ids"])
    rendered = template.render(number, said, trained.config.chat_template_kwargs)
    makes_text = isinstance(rendered, str)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"] if makes_text else rendered)
