"""Station: one server as the trainer sees it: what it must be, whether it is at work, and how an adapter gets to it and
leaves it. Knows nothing of other servers.

    meet      the model, its length, adapters allowed, processed log-probabilities: asked for at the start, and again
              when a server that was away is taken in
    load      an adapter under its name; what lies there of dead trainers goes
    score     log p of given tokens
"""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from grpo.rollout import server_protocol as vllm
from grpo.rollout.server_exchange import Exchange, Offered
from grpo.rollout.server_http import Call, Fault, Line
from grpo.rollout.server_protocol import Card, Sampling, most_bytes

# Seconds that a server may take for what is not sampling. Loading reads a file that may be hundreds of MiB.
TO_ANSWER, TO_SCORE, TO_LOAD, TO_LEAVE = 30.0, 120.0, 300.0, 5.0
SCORED_AT_ONCE = 64  # questions to one server
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM lays out memory for
NO_ADAPTER = "grpo-nothing-of-this-name"
UNKNOWN = Card("", "", "", 0)
CERTAIN = 1e-3  # of a log-probability that should be 0


@dataclass(frozen=True)
class Needs:
    """What every server must be."""

    model: str
    longest: int  # prompt and completion together, in tokens; 0: not known yet
    rank: int
    dtype: str  # as vLLM names it
    in_4_bits: bool
    probe: list[int]  # tokens of a prompt

    def command(self, line: Line) -> str:
        """How such a server is started."""
        address, rank = line.address, next((r for r in LORA_RANKS if r >= self.rank), self.rank)
        host = "127.0.0.1" if address.is_of_this_machine else address.host
        words = [
            *("vllm", "serve", shlex.quote(self.model), "--host", host, "--port", str(address.port)),
            *("--dtype", self.dtype, *(("--max-model-len", str(self.longest)) if self.longest else ())),
            *("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *(("--quantization", "bitsandbytes") if self.in_4_bits else ()),
        ]
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {' '.join(words)}"


@dataclass
class Station:
    """A server."""

    line: Line
    card: Card = UNKNOWN  # of its model
    version: str = ""  # of vLLM
    is_ready: bool = False
    told: str = ""  # why it is not
    faults: int = 0  # times that it was not there, since its last good answer
    relapses: int = 0  # times that it was lost, by the same
    failing_since: float | None = None
    next_try: float = 0.0
    seen: float = 0.0  # the last sign of life
    missed: int = 0  # questions after its health without an answer
    since: float = 0.0  # it is ready
    running: int = 0  # completions
    outstanding: int = 0  # tokens of these, at most
    calls: set[Call] = field(default_factory=set)
    is_asked_after: bool = False  # its health, or whether it is back

    def __str__(self) -> str:
        return str(self.line.address)

    def is_well(self) -> None:
        """It has answered."""
        self.faults, self.relapses, self.failing_since = 0, 0, None

    def meet(self, needs: Needs, sampling: Sampling, call: Call | None = None) -> list[Card]:
        """Make sure that it is what it must be; returns what it offers.

        Raises:
            Fault: it is not there, or not that.
        """
        cards = vllm.read_cards(self.line.get(vllm.MODELS, TO_ANSWER, call))
        self.card = vllm.base_of(cards)
        if 0 < self.card.max_model_len < needs.longest:
            raise Fault(
                f"takes {self.card.max_model_len} tokens (--max-model-len), and prompt and completion may have "
                f"{needs.longest}",
                is_answer=True,
            )
        with suppress(Fault):  # a proxy may keep it from us
            told = self.line.get(vllm.VERSION, TO_ANSWER, call)
            self.version = str(told.get("version", "")) if isinstance(told, dict) else ""
        self._check_adapters(call)
        self._check_logprobs(needs, sampling, call)
        return cards

    def load(self, offered: Offered, cards: list[Card], call: Call | None = None) -> None:
        """Let it have an adapter, if it has not. cards: what it offers."""
        if offered.name not in {card.name for card in cards}:
            body = {"lora_name": offered.name, "lora_path": offered.path}
            try:
                self.line.post(vllm.LOAD, body, TO_LOAD, call=call)
            except Fault as fault:
                if "has already been loaded" not in str(fault):  # by a try whose answer was lost
                    raise

    def offers(self, call: Call | None = None) -> list[Card]:
        """What it has now."""
        return vllm.read_cards(self.line.get(vllm.MODELS, TO_ANSWER, call))

    def unload(self, names: list[str], seconds: float = TO_ANSWER) -> None:
        """Take adapters from it, as far as it has them; in the worst case it drops them itself, for want of room."""
        for name in names:
            with suppress(Fault):
                self.line.post(vllm.UNLOAD, {"lora_name": name}, seconds)

    def tidy(self, cards: list[Card], exchange: Exchange, present: str) -> None:
        """Take from it what this process and dead ones have left there, but for the present adapter."""
        of_ours = [card.name for card in cards if card.name.startswith(f"grpo-{exchange.id}-") and card.name != present]
        self.unload(of_ours + exchange.left_behind(cards))

    def score(
        self, sampling: Sampling, model: str, contexts: list[list[int]], completions: list[list[int]],
        call: Call | None = None, at_once: int = SCORED_AT_ONCE,
    ) -> list[list[float]]:  # fmt: skip
        """log p [T] of completions [T] after contexts [P]. A question for each token, after what comes before it."""
        call = call or Call()
        cases = [
            (context + completion[:position], token)
            for context, completion in zip(contexts, completions, strict=True)
            for position, token in enumerate(completion)
        ]

        def ask(case: tuple[list[int], int]) -> float:
            answer = self.line.post(
                vllm.COMPLETIONS, sampling.score_question(model, *case), TO_SCORE, most_bytes(1), call
            )
            return sampling.read_score(answer, model, *case)

        with ThreadPoolExecutor(min(at_once, len(cases)), thread_name_prefix="score") as threads:
            try:
                found = iter(list(threads.map(ask, cases)))
            except BaseException:  # Ctrl-C too
                call.abort()
                raise
        return [[next(found) for _ in completion] for completion in completions]

    # ---- what is seen of its settings

    def _check_adapters(self, call: Call | None) -> None:
        """It can be given adapters: it refuses to unload one that it does not have by its name."""
        try:
            self.line.post(vllm.UNLOAD, {"lora_name": NO_ADAPTER}, TO_ANSWER, call=call)
        except Fault as fault:
            if NO_ADAPTER in str(fault):
                return
            if fault.status not in (404, 405):
                raise
        raise Fault(
            "takes no adapters while it runs: it was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            is_answer=True,
        )

    def _check_logprobs(self, needs: Needs, sampling: Sampling, call: Call | None) -> None:
        """Log-probabilities are those that it samples by, and of any token. Where one token alone is allowed it is
        certain; before that is heeded, two tokens cannot both be."""
        name = self.card.name
        two = [token for token in range(sampling.vocabulary) if token not in sampling.stop_tokens][:2]

        def ask(body: dict[str, Any]) -> Any:
            return self.line.post(vllm.COMPLETIONS, body, TO_SCORE, most_bytes(1), call)

        only = [
            sampling.read_only(ask(sampling.only_question(name, needs.probe, t)), name, needs.probe, t) for t in two
        ]
        if any(abs(logprob) > CERTAIN for logprob in only):
            raise Fault(
                "tells other log-probabilities than it samples by: it was started without --logprobs-mode "
                "processed_logprobs",
                is_answer=True,
            )
        try:
            sampling.read_score(ask(sampling.score_question(name, needs.probe, two[0])), name, needs.probe, two[0])
        except Fault as fault:
            version = f"is vLLM {self.version}, which" if self.version else "is a vLLM that"
            raise Fault(
                f"{version} cannot score a given token over HTTP (logprob_token_ids; 0.32 can): it {fault}",
                is_answer=True,
            ) from fault


def in_words(loading: Fault, offered: Offered, needs: Needs) -> str:
    """Why an adapter could not be loaded, a clause with what to do."""
    said = str(loading)
    if "max_lora_rank" in said:
        return f"holds adapters of a lower rank than {needs.rank} (--max-lora-rank)"
    if "LoRA" in said and "not enabled" in said:
        return "was started without --enable-lora"
    if "No adapter found" in said or "does not exist" in said or "No such file" in said:
        return (
            f"sees no folder {offered.path}, where the adapter was written. It has to see the same files: name a "
            "shared folder by --servers-folder HERE, or HERE=THERE where its path is another at the servers"
        )
    return f"did not load the adapter: it {said}"
