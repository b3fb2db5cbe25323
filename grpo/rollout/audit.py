"""The audit: were the completions of a step drawn from the policy, and are the log-probabilities that came with them
its own? Knows nothing of how an engine samples.

The canary asks the engine for log-probabilities; this looks at what was sampled. Each step the policy reads a few
completions, chosen by their indices before anything was drawn, and ranks every token among all that could have come:

    u = sum of p over the likelier tokens + v * (sum of p over those as likely), v uniform in [0, 1)

which is uniform in [0, 1) where tokens are drawn from p, whatever p is (Rosenblatt 1952, the probability integral
transform of a ranking), and bounded, so that rare tokens make no false alarm. Greedy or truncated sampling, another
temperature or another model move its mean. Over the last steps, with weights w = 1 - max p that give tokens without a
choice no say,

    z = sum w (u - 1/2) / sqrt(sum w^2 / 12)

is a standard normal number; ALARM deviations are an alarm. Two ways to compute one model move the mean by some
noise^2 (tokens that rounding makes likely are overrated), which is allowed for.
"""

from __future__ import annotations

from collections import deque

import torch

from grpo.errors import UserError
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.rollout.canary import GAP_GROWTH
from grpo.seeds import uniforms
from grpo.types import Group

# Groups of a step whose first completion is read: one of 32 completions of a usual step.
AUDITED = 2
WINDOW = 100  # steps
ALARM = 5.0  # deviations
# No verdict on less than this sum of w^2: the sum of a few bounded numbers is not normal.
LEAST = 20.0
# What noise may move the mean rank by, over its square.
BIAS = 2.0


class Audit:
    """Reads a step's completions with the policy that they should be drawn from, before that policy is updated."""

    def __init__(self, policy: Policy, noise: float, state: list[list[float]] | None = None):
        """noise: of the engine's log-probabilities (see canary.py). state: of the run that is resumed."""
        self.policy, self.noise = policy, noise
        self.window: deque[list[float]] = deque(state or [], maxlen=WINDOW)  # [sum w (u - 1/2), sum w^2, sum w] a step

    def __call__(self, groups: list[Group], seed: int) -> dict[str, float]:
        """`read`, and `judge` of that alone."""
        return self.judge([self.read(groups, seed)])

    def read(self, groups: list[Group], seed: int) -> list[float]:
        """[sum w (u - 1/2), sum w^2, sum w] of some of these completions.

        Raises:
            UserError: the log-probabilities are not the policy's.
        """
        read = [Group(group.prompt, group.completions[:1]) for group in groups[:AUDITED]]
        batch = lay_out_to_read(read, self.policy.device)
        draws = torch.from_numpy(uniforms([seed], int(batch.mask.sum()))[0])
        logprobs, ranks, doubts = (values.cpu().double() for values in self.policy.ranks(batch, draws))
        gap = logprobs - batch.sampler_logprobs[batch.mask].cpu()
        self.check_gap(float(gap.abs().mean()))
        off = ranks - 0.5
        return [float(doubts @ off), float(doubts @ doubts), float(doubts.sum())]

    def judge(self, read: list[list[float]]) -> dict[str, float]:
        """What `read` gave on each rank -> metrics of the completions read: mismatch/rank, the weighted mean of u.

        Raises:
            UserError: the tokens are not drawn from the policy.
        """
        self.window.append([sum(column) for column in zip(*read, strict=True)])
        self._check_ranks()
        off, _, weights = self.window[-1]
        return {"mismatch/rank": 0.5 + off / weights}

    def check_gap(self, gap: float) -> None:
        """gap: mean |log p of the policy - log p of the sampler|; NaN, of no tokens, passes.

        Raises:
            UserError: noise does not explain it.
        """
        if gap > GAP_GROWTH * self.noise:
            raise UserError(
                f"The log-probabilities of the sampled tokens differ from the policy's by {gap:.2g} on average, where "
                f"{GAP_GROWTH * self.noise:.2g} is allowed and the noise measured at the start is {self.noise:.2g}. "
                "The rollout engine does not sample from the policy that is trained, or reports other numbers than it "
                "samples by. Please report this, with the model's name and the engine's version."
            )

    def state(self) -> list[list[float]]:
        """What a resumed run must know to go on as the uninterrupted one."""
        return list(self.window)

    def _check_ranks(self) -> None:
        off, squares, weights = (sum(column) for column in zip(*self.window, strict=True))
        explained = ALARM * (squares / 12) ** 0.5 + BIAS * self.noise**2 * weights
        if squares >= LEAST and abs(off) > explained:
            kind = "likelier" if off < 0 else "less likely"
            raise UserError(
                f"The sampled tokens are not drawn from the policy: over the last {len(self.window)} steps they are "
                f"{kind} than its own draws would be (mean rank {0.5 + off / weights:.3f} where 0.5 is right, "
                f"{abs(off) / (squares / 12) ** 0.5:.1f} deviations). The rollout engine samples by another "
                "distribution than the one whose log-probabilities it reports: greedily, cut to the top, or at "
                "another temperature. "
                "Please report this, with the engine's version."
            )
