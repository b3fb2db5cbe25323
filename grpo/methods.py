"""Methods: what a run learns from, as objects of the loop: rollouts that rewards score, given answers, or pairs.

Knows nothing of how the policy and its engine are built. What differs between GRPO, SFT and DPO is here, in
`OBJECTIVES` (grpo/objectives.py) and in `PACKERS` (grpo/packing.py); the loop is the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from grpo.advantages import ESTIMATORS, earned
from grpo.ahead import Ahead, AtOnce
from grpo.config import Config
from grpo.evaluate import Evaluator
from grpo.lessons import Lessons
from grpo.loss import Loss
from grpo.metrics import HEADLINES
from grpo.objectives import Preference
from grpo.packing import Packer, any_group, has_advantage
from grpo.policy import Policy
from grpo.questions import Questions
from grpo.rewards import Scorer
from grpo.rollout import Engine
from grpo.rollout.audit import Audit
from grpo.rollouts import Rollouts
from grpo.seeds import Purpose, mix_seed
from grpo.stream import PromptStream, Stream
from grpo.task import Task
from grpo.taught import (
    AskedToo,
    HeldOutAnswers,
    Taught,
    mark_answers,
    mark_pairs,
    measure_likelihood,
    measure_preference,
    read_answers,
    read_pairs,
)
from grpo.types import Group
from grpo.world import World


def build_rollouts(
    config: Config,
    questions: Questions,
    policy: Policy,
    engine: Engine,
    score: Scorer,
    pack: Packer,
    cursor: int,
    audited: list[list[float]],
    ahead: dict[str, Any],
    world: World,
) -> Rollouts:
    """What GRPO learns from. cursor: prompts that were handed out; audited: the last steps' sums (Audit.state); ahead:
    groups that were sampled already (Ahead.state)."""
    stream = PromptStream(questions.train, mix_seed(Purpose.ORDER, config.seed), cursor)
    audit = Audit(policy, engine.canary.noise, audited)
    roll_out = AtOnce(config, world, engine, stream, audit)
    if config.staleness:
        roll_out = Ahead(config, world, engine, stream, audit, policy)
        roll_out.restore(ahead)
    return Rollouts(
        config=config,
        world=world,
        roll_out=roll_out,
        score=score,
        estimator=earned if config.has_values else ESTIMATORS[config.advantage],
        admits=has_advantage if config.dynamic_sampling else admit_all,
        max_rollouts=1 + config.max_refills * config.dynamic_sampling,
        trains=pack.trains,
        teaches=any_group if config.has_values else has_advantage,
    )


def build_taught(config: Config, lessons: Lessons, cursor: int) -> Taught:
    """What SFT and DPO learn from."""
    return Taught(Stream(lessons, mix_seed(Purpose.ORDER, config.seed), cursor), config.prompts_per_step)


def build_examiner(
    config: Config, questions: Questions, policy: Policy, loss: Loss, asked: Evaluator
) -> HeldOutAnswers | AskedToo:
    """The held-out score of what SFT and DPO teach; where somebody samples and there are rewards, theirs too."""
    assert questions.held_out
    lessons = list(questions.held_out)
    if isinstance(loss, Preference):
        mark, measure = partial(mark_pairs, loss), partial(measure_preference, loss)
        given = HeldOutAnswers(lessons, policy, policy.fit.limit, read_pairs, mark, measure)
    else:
        given = HeldOutAnswers(lessons, policy, policy.fit.limit, read_answers, mark_answers, measure_likelihood)
    return given if config.engine == "none" else AskedToo(asked, given)


def planned_for(config: Config, questions: Questions) -> Config:
    """What memory is planned for: no more held-out prompts than there are; of lessons, that all are as long as the
    longest."""
    config = replace(config, eval_prompts=min(config.eval_prompts, max(1, len(questions.test))))
    if not (questions.lessons and questions.held_out):
        return config
    longest = max(questions.lessons.longest_completion, questions.held_out.longest_completion)
    answers = {"sft": 1, "dpo": 2}[config.method]  # that a prompt has
    return replace(config, group_size=answers, max_completion_tokens=max(longest, questions.max_completion_tokens))


def headline_of(task: Task, config: Config) -> str:
    """The held-out score that the step line shows."""
    of_given = {"sft": "eval/logprob", "dpo": "eval/accuracy"}
    if config.engine == "none":
        return of_given[config.method]
    return HEADLINES[0 if task.solved else 1]


def admit_all(group: Group) -> bool:
    """Without dynamic sampling every group is part of the step."""
    return True
