"""Roll out: a step's prompts -> groups and what the audit read of them; at once, or a step ahead (--staleness 1). Knows
nothing of rewards, losses or how groups become a step.

    AtOnce    the policy as it is now
    Ahead     the first groups of a step are sampled while the update of the step before runs: by the adapter that it
              updates, a step older than the one that is trained on them. Only engines that run elsewhere can do that.

    step t:  its groups -> begin(t + 1): the prompts of the next step go out, to the adapter of this one
                        -> update          meanwhile
                        -> settle          waits for them; the audit reads them with the adapter that answered
                        -> sync            from now on engines have the new one, which is what is evaluated and saved

What dynamic sampling asks for beside them is sampled at once. The loss corrects for the older policy as for other
numerics, by the log-probabilities that completions came with (--correction).

A checkpoint is written after `settle`, so it keeps the groups themselves (ahead.json), unscored: a resumed run trains
on them, and asks for none of them again. What is in flight when a run ends in the middle of a step is broken off, and
sampled again from the last checkpoint. Groups that do not go with the run any more (other prompts, other settings) are
left, and sampled at once.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from grpo.clock import Clock
from grpo.config import Config
from grpo.exchange import Share
from grpo.policy import Policy
from grpo.rollout import Engine
from grpo.rollout.audit import Audit
from grpo.rollout.sampling import Finished, nobody, sample_groups
from grpo.seeds import Purpose, mix_seed
from grpo.stream import PromptStream
from grpo.types import Completion, Group, Prompt, sampled_tokens
from grpo.world import World

Read = list[float]  # what the audit read: Audit.read
NOTHING_READ: Read = [0.0, 0.0, 0.0]


@dataclass
class AtOnce:
    """Samples when it is asked, from the policy as it is."""

    config: Config
    world: World
    engine: Engine
    stream: PromptStream
    audit: Audit

    def __call__(
        self, step: int, share: Share, before: int, clock: Clock, finished: Finished
    ) -> tuple[list[Group], Read]:
        """This rank's groups for its share of some prompts, and what the audit read of them. before: prompts of the
        step that were asked for earlier. finished: see sample_groups."""
        with clock("rollout"):
            own = self.sample(step, share, before, finished)
        with clock("audit"):
            return own, self.read(step, own)

    def begin(self, step: int) -> None:
        """The groups of the step before are there, and its update comes next."""

    def settle(self, gap: float, clock: Clock) -> None:
        """The update is done. gap: its mean |log p of the policy - log p of the sampler|.

        Raises:
            UserError: the sampler is not the policy.
        """
        self.audit.check_gap(gap)

    def metrics(self, groups: list[Group], clock: Clock) -> dict[str, float]:
        """Of the groups of a step, and how they came about."""
        return {"speed/rollout_tokens_per_second": sampled_tokens(groups) / clock.seconds["rollout"]}

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {}

    def close(self) -> None:
        """The run ends."""

    def sample(self, step: int, share: Share, before: int, finished: Finished) -> list[Group]:
        """A group for each of this rank's prompts."""
        config, rows = self.config, [before + row for row in share.rows]
        seed = mix_seed(Purpose.ROLLOUT, config.seed, step)
        size, most = config.group_size, config.max_completion_tokens
        return sample_groups(self.engine, share.prompts, size, most, seed, rows, finished)

    def read(self, step: int, own: list[Group]) -> Read:
        """What the audit reads of them, by the policy as it is."""
        return self.audit.read(own, mix_seed(Purpose.AUDIT, self.config.seed, step))


@dataclass(frozen=True)
class Flight:
    """Groups on their way."""

    step: int  # that they are for
    share: Share
    adapter: list[Tensor]  # that answers: ProjectionStore.kept
    done: Future[tuple[list[Group], float]]  # this rank's, and the seconds that they took


@dataclass(frozen=True)
class Ready:
    """Groups that a step has before it begins."""

    completions: list[list[Completion]]  # of each prompt, on all ranks
    read: Read  # of all ranks together
    seconds: float


@dataclass
class Ahead(AtOnce):
    """Samples the first groups of a step while the update of the step before runs."""

    policy: Policy
    flight: Flight | None = None
    ready: Ready | None = None
    seconds: float = field(default=0.0, init=False)  # that the groups of this step took, beside an update

    def __call__(
        self, step: int, share: Share, before: int, clock: Clock, finished: Finished
    ) -> tuple[list[Group], Read]:
        """See AtOnce."""
        ready, self.ready = self.ready, None
        if ready is None:
            return super().__call__(step, share, before, clock, finished)
        self.seconds = ready.seconds
        own = [Group(prompt, ready.completions[row]) for row, prompt in zip(share.rows, share.prompts, strict=True)]
        return own, ready.read if self.world.rank == 0 else NOTHING_READ

    def begin(self, step: int) -> None:
        """See AtOnce: the groups of this step go out."""
        if step == self.config.steps:
            return
        tokens = self.config.group_size * self.config.max_completion_tokens
        share, done = Share(self.world, self.next_prompts(), tokens), Future()
        self.flight = Flight(step, share, self.policy.store.kept(), done)
        threading.Thread(target=self._sample_into, args=(done, step, share), name="ahead", daemon=True).start()

    def settle(self, gap: float, clock: Clock) -> None:
        """See AtOnce. The update's gap is that of a policy that did not sample; the audit's is of the one that did.

        Raises:
            UserError: no engine answered, or it is not the policy.
        """
        flight, self.flight = self.flight, None
        with clock("rollout"):
            own, seconds = flight.done.result() if flight else ([], 0.0)
        if flight:
            with clock("audit"), self.policy.store.with_adapter(flight.adapter):
                read = self.read(flight.step, own)
            groups, told = flight.share.exchange(own, (read, seconds))
            reads, of_ranks = zip(*told, strict=True)
            together = [float(sum(column)) for column in zip(*reads, strict=True)]
            self.ready = Ready([group.completions for group in groups], together, max(of_ranks))

    def metrics(self, groups: list[Group], clock: Clock) -> dict[str, float]:
        """See AtOnce."""
        seconds, self.seconds = self.seconds + clock.seconds.get("rollout", 0.0), 0.0
        ages = [self.policy.version - each.policy_version for group in groups for each in group.completions]
        return {
            "speed/rollout_tokens_per_second": sampled_tokens(groups) / seconds,
            "rollout/age": sum(ages) / len(ages),
        }

    def state(self) -> dict[str, Any]:
        """See AtOnce."""
        if self.ready is None:
            return {}
        columns = [
            [[c.tokens, c.sampler_logprobs, c.text, c.finish, c.policy_version, c.seed] for c in group]
            for group in self.ready.completions
        ]
        return {"key": self.key(), "read": self.ready.read, "seconds": self.ready.seconds, "completions": columns}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, where it goes with the next prompts and the settings."""
        if state.get("key") == self.key():
            completions = [[Completion(*columns) for columns in group] for group in state["completions"]]
            self.ready = Ready(completions, state["read"], state["seconds"])

    def close(self) -> None:
        """See AtOnce. What is in flight is broken off."""
        if self.flight:
            self.engine.close()

    def next_prompts(self) -> list[Prompt]:
        """Of the step that comes."""
        return self.stream.peek(self.config.prompts_per_step)

    def key(self) -> str:
        """What groups of the next step depend on beside the adapter."""
        config, prompts = self.config, [prompt.tokens for prompt in self.next_prompts()]
        how = [config.seed, config.group_size, config.max_completion_tokens, config.temperature, prompts]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()

    def _sample_into(self, done: Future[tuple[list[Group], float]], step: int, share: Share) -> None:
        began = time.perf_counter()
        try:
            own = self.sample(step, share, 0, nobody)
            done.set_result((own, time.perf_counter() - began))
        except BaseException as error:  # raised where it is waited for
            done.set_exception(error)
