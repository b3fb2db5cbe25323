"""vLLM's HTTP: what is asked for a completion, a score, an adapter, and what the answers mean. Knows nothing of who
asks when, nor of connections.

Prompts go as token ids and completions come as token ids: nothing is ever tokenised again. Every sampling setting is
sent, because a server has defaults of its own (those of the model's generation_config.json), and the end-of-text token
is a stop token like the others, as in the engines of this process. An answer that is not what was asked for is a Fault.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo.rollout.server_http import Fault
from grpo.types import Request

COMPLETIONS, MODELS, HEALTH, VERSION = "/v1/completions", "/v1/models", "/health", "/version"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

# Of an answer, for each token: its id, its log-probability, its name in two lists.
BYTES_PER_TOKEN, BYTES_BESIDE = 1024, 1 << 20
LEAST_LOGPROB = -9999.0  # what vLLM writes for minus infinity
ROUNDING = 1e-3  # that a log-probability may be above 0


class Sampled(NamedTuple):
    """A completion as a server tells it."""

    tokens: list[int]  # [T]
    logprobs: list[float]  # [T]
    stopped: bool


class Card(NamedTuple):
    """A model that a server offers."""

    name: str
    root: str  # name or folder that it was loaded from
    parent: str  # of an adapter, the name of its base; else empty
    max_model_len: int  # 0 where it is not said


@dataclass(frozen=True)
class Sampling:
    """How a policy is sampled from, the same for all requests."""

    temperature: float
    stop_tokens: tuple[int, ...]
    vocabulary: int  # tokens that the model knows

    def question(self, model: str, request: Request) -> dict[str, Any]:
        """The body that asks for a completion."""
        return self._body(model, request.context, request.max_tokens) | {
            "seed": request.seed,
            "stop_token_ids": list(self.stop_tokens),
            "logprobs": 0,
        }

    def score_question(self, model: str, context: list[int], token: int) -> dict[str, Any]:
        """The body that asks for log p of a token after a context."""
        return self._body(model, context, 1) | {"seed": 0, "logprobs": 1, "logprob_token_ids": [token]}

    def only_question(self, model: str, context: list[int], token: int) -> dict[str, Any]:
        """The body that asks for a token where no other is allowed: its processed log-probability is 0."""
        return self._body(model, context, 1) | {"seed": 0, "logprobs": 0, "allowed_token_ids": [token]}

    def read(self, answer: Any, model: str, request: Request) -> Sampled:
        """The completion in an answer.

        Raises:
            Fault: it is another than was asked for.
        """
        choice = _choice(answer, model, request.context)
        tokens, logprobs = self._tokens(choice), _logprobs(choice)
        end = choice.get("finish_reason")
        _check(len(tokens) == len(logprobs), f"gives {len(logprobs)} log-probabilities of {len(tokens)} tokens")
        _check(0 < len(tokens) <= request.max_tokens, f"wrote {len(tokens)} tokens of at most {request.max_tokens}")
        early = next((t for t in tokens[:-1] if t in self.stop_tokens), None)
        _check(early is None, f"went on after the stop token {early}")
        stops = tokens[-1] in self.stop_tokens
        _check(end in ("stop", "length"), f"ended a completion for {end!r}")
        _check(end == "length" or stops, f"stopped at token {tokens[-1]}, which is no stop token of the policy")
        full = len(tokens) == request.max_tokens
        _check(stops or full, f"cuts completions off after {len(tokens)} tokens, where {request.max_tokens} were asked")
        return Sampled(tokens, logprobs, stops)

    def read_score(self, answer: Any, model: str, context: list[int], token: int) -> float:
        """log p of a token, in an answer to `score_question`.

        Raises:
            Fault: it is not there.
        """
        choice = _choice(answer, model, context)
        _logprobs(choice)
        top = choice["logprobs"].get("top_logprobs")
        found = top[0].get(f"token_id:{token}") if isinstance(top, list) and top and isinstance(top[0], dict) else None
        if found is None or not _is_logprob(found):
            raise Fault(f"does not tell the log-probability of a token that is asked for ({token})", is_answer=True)
        return float(found)

    def read_only(self, answer: Any, model: str, context: list[int], token: int) -> float:
        """The log-probability in an answer to `only_question`."""
        choice = _choice(answer, model, context)
        tokens, logprobs = self._tokens(choice), _logprobs(choice)
        _check(tokens == [token] and len(logprobs) == 1, f"sampled {tokens} where {token} alone was allowed")
        return logprobs[0]

    def _body(self, model: str, context: list[int], max_tokens: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": context,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "n": 1,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stream": False,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _tokens(self, choice: dict[str, Any]) -> list[int]:
        tokens: Any = choice.get("token_ids")
        _check(isinstance(tokens, list) and len(tokens) > 0, "gives no token ids (return_token_ids)")
        wrong = [t for t in tokens if type(t) is not int or not 0 <= t < self.vocabulary]
        _check(not wrong, f"gives {wrong[:1]} as a token, and the model knows {self.vocabulary}")
        return tokens


def most_bytes(max_tokens: int) -> int:
    """Of an answer with so many tokens."""
    return BYTES_BESIDE + BYTES_PER_TOKEN * max_tokens


def read_cards(answer: Any) -> list[Card]:
    """The models in an answer of MODELS.

    Raises:
        Fault: it is no list of vLLM's.
    """
    data = answer.get("data") if isinstance(answer, dict) else None
    cards: list[Any] = data if isinstance(data, list) else [None]
    if not all(isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards):
        raise Fault("gives no list of models: it is no vLLM server", is_answer=True)
    if not all(card.get("owned_by", "vllm") == "vllm" for card in cards):
        raise Fault(f"serves {cards[0]['id']!r} by something else than vLLM", is_answer=True)
    return [_card(card) for card in cards]


def base_of(cards: Collection[Card]) -> Card:
    """The model itself among what a server offers.

    Raises:
        Fault: there is none.
    """
    base = next((card for card in cards if not card.parent), None)
    if base is None:
        raise Fault("offers no model", is_answer=True)
    return base


def _choice(answer: Any, model: str, context: list[int]) -> dict[str, Any]:
    """The one completion in an answer, of the model and the prompt that were meant."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Fault("gives no completion", is_answer=True)
    _check(answer.get("model") == model, f"answered by {answer.get('model')!r}, where {model!r} was asked")
    read = choices[0].get("prompt_token_ids")
    _check(read == context, "read another prompt than it was sent" if read else "does not tell which prompt it read")
    return choices[0]


def _logprobs(choice: dict[str, Any]) -> list[float]:
    told = choice.get("logprobs")
    found = told.get("token_logprobs") if isinstance(told, dict) else None
    _check(isinstance(found, list) and bool(found), "gives no log-probabilities")
    wrong = [p for p in found if not _is_logprob(p)] if isinstance(found, list) else []
    _check(not wrong, f"gives {wrong[:1]} as the log-probability of a token that it sampled")
    return [min(0.0, float(p)) for p in found or []]


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and LEAST_LOGPROB < value <= ROUNDING


def _card(told: dict[str, Any]) -> Card:
    length = told.get("max_model_len")
    root, parent = str(told.get("root") or told["id"]), str(told.get("parent") or "")
    return Card(told["id"], root, parent, length if isinstance(length, int) else 0)


def _check(holds: bool, told: str) -> None:
    if not holds:
        raise Fault(told, is_answer=True)
