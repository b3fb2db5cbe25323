"""ServerEngine: completions by one or more stock `vllm serve`, on other cards or other hosts. Knows nothing of rewards
or gradients.

    build      every server is what it must be (server_station.py), takes the adapter, and computes what the policy
               computes: the canary, on each of them
    sample     whole groups to servers, by how much these have to write (server_pool.py)
    take_up    the adapter is written where servers see it (server_exchange.py) and loaded by each under a new name, so
               that nothing cached from an older one is ever met; then the old one is unloaded
    sync       that, and the canary on each server

No server is asked for anything by two versions at a time: one that does not take the new adapter is left out until it
does. At the start that ends the run, and no server keeps the adapter. docs/servers.md says how servers are started.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any

import torch

from grpo.addresses import read_addresses
from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import Policy
from grpo.policy.adapter import adapter_files
from grpo.rollout import server_protocol as vllm
from grpo.rollout.canary import Canary, build_canary
from grpo.rollout.engine import Finished, completion_of, nobody
from grpo.rollout.server_canary import Proof, ServersCanary, View
from grpo.rollout.server_exchange import Exchange, Offered
from grpo.rollout.server_http import Call, Fault, Line
from grpo.rollout.server_pool import Pool, Task, Timing
from grpo.rollout.server_protocol import Sampled, Sampling, most_bytes
from grpo.rollout.server_station import TO_ANSWER, TO_LEAVE, Needs, Station, in_words
from grpo.types import Completion, Request

KEYS = ("GRPO_SERVER_KEY", "VLLM_API_KEY")  # variables that may have the key, the first of them first
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Of the canary, after each of its prompts.
CANARY_COMPLETIONS, CANARY_TOKENS = 4, 8

# vLLM takes this instead of anything lower, and the log-probabilities would be another distribution's.
LOWEST_TEMPERATURE = 0.01


class ServerEngine:
    """Samples from a Policy by servers."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        canary_prompts: list[list[int]],
        config: Config,
        longest: int,
        note: Callable[[str], object] = print,
        timing: Timing | None = None,
    ):
        """canary_prompts: tokens [P] of prompts that the canary's completions are written after; longest: prompt and
        completion together, in tokens; note: told what becomes of the servers.

        Raises:
            UserError: a server is not there, or is not one that can sample from this policy.
        """
        if config.temperature < LOWEST_TEMPERATURE:
            raise UserError(
                f"--temperature is {config.temperature}, but vLLM samples at none below {LOWEST_TEMPERATURE}. "
                "Raise it, or use --engine torch."
            )
        self.policy, self.tokenizer, self.tell = policy, tokenizer, note
        self.sampling = Sampling(config.temperature, tuple(policy.stop_tokens), policy.model.head.shape[0])
        dtype = DTYPES[policy.store.compute_dtype]
        in_4_bits = config.base == "nf4"
        self.needs = Needs(policy.source, longest, policy.store.rank, dtype, in_4_bits, canary_prompts[0])
        self.exchange = open_exchange(config.servers_folder)
        self.present: Offered | None = None  # None: the base model, which is the reference policy
        self.version = policy.version  # of the policy that servers have
        self.proof: Proof | None = None
        stations = [Station(line) for line in lines(config)]
        self.pool = Pool(
            stations, timing or Timing(config.servers_patience), self._revive, lambda text: self.tell(text)
        )
        self._leave = weakref.finalize(self, leave, stations, self.exchange, os.getpid())
        try:
            self._open(canary_prompts)
        except BaseException:
            self.close()
            raise

    @property
    def told(self) -> str:
        """Who samples, in words."""
        versions = sorted({station.version for station in self.pool.stations if station.version})
        which = f"vLLM {', '.join(versions)}" if versions else "vLLM"
        return f"{which}, at {', '.join(map(str, self.pool.stations))}"

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """See Engine.sample. Requests of one context that follow each other are a group."""
        tasks: list[Task] = []
        for group, (context, same) in enumerate(groupby(requests, key=lambda request: request.context)):
            read = len(context)  # once for all of a group
            for request in same:
                tasks.append(Task(group, read + request.max_tokens, partial(self._ask, request)))
                read = 0
        completions: dict[int, Completion] = {}

        def take(index: int, written: Sampled) -> None:
            completion = completion_of(written.tokens, written.logprobs, written.stopped, self.tokenizer, self.version)
            completions[index] = completion
            finished(index, completion)

        self.pool.run(tasks, take)
        return [completions[index] for index in range(len(requests))]

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See Engine.logprobs. By whichever servers are free."""
        tasks = [
            Task(row, len(context) + len(completion), partial(self._score, context, completion))
            for row, (context, completion) in enumerate(zip(contexts, completions, strict=True))
        ]
        return self.pool.run(tasks)

    def take_up(self) -> None:
        """See Engine.take_up. Servers that are away take it up when they are back."""
        self.present = self._offer()
        if self.proof:
            self.proof = self.canary.expected()
        self._give(self.pool.stations)
        if self.present:
            self.exchange.keep_only(self.present.name)

    def sync(self) -> dict[str, float]:
        """See Engine.sync."""
        self.take_up()
        return self.canary.check()

    def release(self) -> None:
        """See Engine.release. Nothing of it is on this machine."""

    def close(self) -> None:
        """See Engine.close. Nothing of this run stays at the servers, and nobody waits for them any longer."""
        self.pool.break_off()
        self._leave()

    # ---- the start

    def _open(self, canary_prompts: list[list[int]]) -> None:
        """Meet all servers, give them the adapter, and prove each."""
        self.exchange.remove_dead()
        for station in self.pool.stations:
            self._strictly(station, partial(self._meet, station))
        self._all_take(self._offer())
        self.canary = self._build_canary(canary_prompts)
        self.proof = self.canary.expected()
        for told in self.canary.unusual():
            if self.policy.config.correction == "none":
                raise UserError(f"{told} Without a --correction that is trained on as if it were the policy's.")
            self.tell(f"note: {told} The loss corrects for it (--correction), and mismatch/kl shows it.")
        for line in (station.line for station in self.pool.stations):
            if line.shows_the_key:
                self.tell(
                    f"note: whoever is on the way to {line.address} can read the key. Use https://, or ssh -L (see "
                    "docs/servers.md)."
                )

    def _meet(self, station: Station) -> None:
        station.tidy(station.meet(self.needs, self.sampling), self.exchange, "")

    def _all_take(self, offered: Offered | None) -> None:
        """Every server takes the first adapter, or none keeps it.

        Raises:
            UserError: one does not take it, or is the same as another one.
        """
        self.present = offered
        for station in self.pool.stations:
            self._strictly(station, partial(self._load_first, station))
            station.is_ready = True

    def _load_first(self, station: Station) -> None:
        assert self.present
        cards = station.offers()
        if self.present.name in {card.name for card in cards}:
            others = ", ".join(map(str, self.pool.ready))
            raise UserError(f"servers has {station}, which is the same as one of {others}. Name each server once.")
        self._load(station, self.present, cards)

    def _strictly(self, station: Station, do: Callable[[], None]) -> None:
        try:
            do()
        except Fault as fault:
            raise unusable(station.line, fault, self.needs) from fault

    def _build_canary(self, canary_prompts: list[list[int]]) -> ServersCanary:
        canaries: dict[int, Canary] = {}
        first: Canary | None = None
        for station in self.pool.stations:
            view = View(self, station)
            try:
                if first is None:
                    first = build_canary(view, self.policy, canary_prompts, CANARY_COMPLETIONS, CANARY_TOKENS)
                    canaries[id(station)] = first
                else:
                    canaries[id(station)] = view.canary_like(first)
            except Fault as fault:
                raise unusable(station.line, fault, self.needs) from fault
            except UserError as error:
                raise UserError(
                    f"The server at {station}, which serves {station.card.root}: {error} Started for this run it is: "
                    f"{self.needs.command(station.line)}"
                ) from error
        return ServersCanary(self.pool, canaries)

    # ---- adapters

    def _offer(self) -> Offered | None:
        """The policy as it is now, written where servers see it; None where it is the reference policy, which has no
        adapter."""
        store, self.version = self.policy.store, self.policy.version
        if float(store.scale[0]) == 0:
            return None
        return self.exchange.write(self.policy.version, adapter_files(self.policy, store.compute_dtype))

    def _give(self, stations: list[Station]) -> None:
        """Let servers have the present adapter; those that do not take it are away."""
        now = time.monotonic()
        asked = [each for each in stations if each.is_ready or now >= each.next_try]
        if not asked:
            return
        calls = {id(station): Call() for station in asked}
        with ThreadPoolExecutor(len(asked), thread_name_prefix="adapter") as threads:
            try:
                futures = [
                    threads.submit(self._renew if each.is_ready else self._revive, each, calls[id(each)])
                    for each in asked
                ]
                done = [(station, future.exception()) for station, future in zip(asked, futures, strict=True)]
            except BaseException:  # Ctrl-C
                for call in calls.values():
                    call.abort()
                raise
        for station, error in done:
            if isinstance(error, Fault) and station.is_ready:
                self.pool.fail(station, error)
            elif isinstance(error, Fault):
                self.pool.still_away(station, error)
            elif error:
                raise error
            elif not station.is_ready:
                self.pool.take_in(station)

    def _renew(self, station: Station, call: Call) -> None:
        """The present adapter instead of the one before."""
        if self.present:
            cards = station.offers(call)
            self._load(station, self.present, cards, call)
            station.tidy(cards, self.exchange, self.present.name)

    def _load(self, station: Station, offered: Offered, cards: list[vllm.Card], call: Call | None = None) -> None:
        try:
            station.load(offered, cards, call)
        except Fault as fault:
            raise Fault(in_words(fault, offered, self.needs), fault.status, fault.is_answer) from fault

    def _revive(self, station: Station, call: Call) -> None:
        """A server that was away is what it must be, and computes what the policy computes.

        Raises:
            Fault: it is not, or does not.
        """
        station.meet(self.needs, self.sampling, call)
        self._renew(station, call)
        if self.proof:
            self.proof.check(station, self.sampling, self._name(station), call)

    def _name(self, station: Station) -> str:
        """What the policy is called there."""
        return self.present.name if self.present else station.card.name

    # ---- tasks, in threads

    def _ask(self, request: Request, station: Station, call: Call) -> Sampled:
        name = self._name(station)
        body = self.sampling.question(name, request)
        answer = station.line.post(vllm.COMPLETIONS, body, None, most_bytes(request.max_tokens), call)
        return self.sampling.read(answer, name, request)

    def _score(self, context: list[int], completion: list[int], station: Station, call: Call) -> list[float]:
        return station.score(self.sampling, self._name(station), [context], [completion], call, at_once=1)[0]


def open_exchange(setting: str) -> Exchange:
    """The folder for the adapters.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        return Exchange(setting)
    except OSError as error:
        raise UserError(
            f"The adapter cannot be written where servers would read it: {error.strerror or error} "
            f"({error.filename}). Name a folder by --servers-folder that can be written to."
        ) from error


def lines(config: Config) -> list[Line]:
    """The ways to the servers.

    Raises:
        UserError: an address is none, or the key is not one that can be sent.
    """
    variable, key = next(((name, os.environ[name]) for name in KEYS if os.environ.get(name)), ("", ""))
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"The variable {variable} has a key with characters that no header can carry. Check it.")
    return [Line(address, key) for address in read_addresses(config.servers)]


def check_reachable(config: Config, model: str) -> None:
    """Every server answers and lets us in: asked before a model is loaded, which takes minutes.

    Raises:
        UserError: one does not.
    """
    needs = Needs(model, 0, config.lora_rank, "auto", config.base == "nf4", [])
    for line in lines(config):
        try:
            vllm.base_of(vllm.read_cards(line.get(vllm.MODELS, TO_ANSWER)))
        except Fault as fault:
            raise unusable(line, fault, needs) from fault


def unusable(line: Line, fault: Fault, needs: Needs) -> UserError:
    """Why a server cannot be used, and what to do."""
    if fault.status in (401, 403):
        return UserError(
            f"The server at {line.address} refuses the key, or wants one: put the one that it was started with "
            f"(VLLM_API_KEY there) into the variable {KEYS[0]}."
        )
    return UserError(f"The server at {line.address} {fault}. For this run it is started by: {needs.command(line)}")


def leave(stations: list[Station], exchange: Exchange, process: int) -> None:
    """Take this process's adapters from servers that are there, and from the disk. In a forked copy: nothing."""
    if os.getpid() != process:
        return
    for station in stations:
        if station.is_ready or station.card.name:
            try:
                cards = station.line.get(vllm.MODELS, TO_LEAVE)
                names = [card.name for card in vllm.read_cards(cards) if card.name.startswith(f"grpo-{exchange.id}-")]
            except Fault:
                continue
            station.unload(names, TO_LEAVE)
    exchange.close()
