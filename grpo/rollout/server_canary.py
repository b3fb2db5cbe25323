"""The canary on each of several servers, seen as one. Knows nothing of how servers are asked.

Each server has a canary of its own (canary.py) on the same completions: noise is a matter of its card and its kernels,
and one that stood still among eight would hardly show in their mean. A server that is away is not asked; before it is
taken in again, its log-probabilities are compared with those that the policy has by now (`Proof`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from grpo.errors import UserError
from grpo.policy import Policy
from grpo.rollout.canary import LARGEST_NOISE, Canary
from grpo.rollout.server_http import Call, Fault
from grpo.rollout.server_pool import Pool
from grpo.rollout.server_protocol import Sampling
from grpo.rollout.server_station import Station
from grpo.types import Completion, Request

UNUSUAL = 0.25  # of the largest noise that kernels explain: more is told


class Servers(Protocol):
    """What a view needs of the engine."""

    policy: Policy
    sampling: Sampling

    def sample(self, requests: list[Request]) -> list[Completion]: ...

    def take_up(self) -> None: ...

    def _name(self, station: Station) -> str: ...


class View:
    """One server as an engine, for its canary."""

    def __init__(self, engine: Servers, station: Station):
        self.engine, self.station = engine, station
        self.sample, self.take_up = engine.sample, engine.take_up

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See Engine.logprobs. Raises Fault."""
        name = self.engine._name(self.station)
        return self.station.score(self.engine.sampling, name, contexts, completions)

    def canary_like(self, first: Canary) -> Canary:
        """A canary of this server on the completions of another one's."""
        completions = [Completion(tokens, [0.0] * len(tokens), "", "stop", 0) for tokens in first.completions]
        return Canary(self.engine.policy, self.logprobs, first.contexts, [[each] for each in completions])


class Proof(NamedTuple):
    """What a server must say of the policy as it is now."""

    contexts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[float]  # the policy's, of all tokens of the completions
    bounds: dict[int, float]  # of the root mean square difference, by the id of the station

    def check(self, station: Station, sampling: Sampling, name: str, call: Call) -> None:
        """Compare.

        Raises:
            Fault: it computes something else.
        """
        rows = station.score(sampling, name, self.contexts, self.completions, call)
        gap = torch.tensor([p for row in rows for p in row]) - torch.tensor(self.logprobs)
        size, bound = float(gap.square().mean().sqrt()), self.bounds[id(station)]
        if not size <= bound:
            raise Fault(
                f"is back, but is not the policy: its log-probabilities differ by {size:.2g} (root mean square), where "
                f"{bound:.2g} is allowed. Is it the same model, started the same way?",
                is_answer=True,
            )


class ServersCanary:
    """The canaries of all servers."""

    def __init__(self, pool: Pool, canaries: dict[int, Canary]):
        """canaries: by the id of the station."""
        self.pool, self.canaries = pool, canaries
        self.one = next(iter(canaries.values()))

    @property
    def noise(self) -> float:
        """Of the noisiest server."""
        return max(canary.noise for canary in self.canaries.values())

    def check(self) -> dict[str, float]:
        """See Canary.check. The worst of the servers.

        Raises:
            UserError: a server is not the policy, or none is there for longer than the patience.
        """
        while True:
            found = [metrics for station in self.pool.ready if (metrics := self._check(station))]
            if found:
                worst = {"sync/gap": max, "sync/moved": min, "sync/unproved": max}
                return {name: choose(metrics[name] for metrics in found) for name, choose in worst.items()}
            self.pool.wait_for(lambda: bool(self.pool.ready))

    def expected(self) -> Proof:
        """What servers must say of the policy as it is now."""
        logprobs = self.one.policy.read(self.one.batch)[0][self.one.batch.mask].tolist()
        bounds = {station: canary.bound for station, canary in self.canaries.items()}
        return Proof(self.one.contexts, self.one.completions, logprobs, bounds)

    def state(self) -> dict[str, Any]:
        """See Canary.state."""
        return {"servers": [canary.state() for canary in self.canaries.values()]}

    def restore(self, state: dict[str, Any]) -> bool:
        """See Canary.restore. Of as many servers, in their order."""
        states, canaries = state.get("servers", []), list(self.canaries.values())
        fits = len(states) == len(canaries) and all(
            each.get("key") == canary.key for each, canary in zip(states, canaries, strict=True)
        )
        if fits:
            for each, canary in zip(states, canaries, strict=True):
                canary.restore(each)
        return fits

    def unusual(self) -> Iterator[str]:
        """Servers whose numbers are further from the policy's than other kernels usually are, a sentence each."""
        for station in self.pool.stations:
            canary = self.canaries[id(station)]
            if canary.noise > UNUSUAL * LARGEST_NOISE[canary.policy.store.compute_dtype]:
                yield (
                    f"The log-probabilities of the server at {station} differ from the policy's by {canary.noise:.2g} "
                    "(root mean square) before any update, more than other kernels usually do: its weights may be of "
                    "another revision, or rounded otherwise (--base here, --quantization and --dtype there)."
                )

    def _check(self, station: Station) -> dict[str, float] | None:
        """Of one server; None if it was lost meanwhile."""
        try:
            return self.canaries[id(station)].check()
        except Fault as fault:
            self.pool.fail(station, fault)
            return None
        except UserError as error:
            raise UserError(f"The server at {station}: {error}") from error
