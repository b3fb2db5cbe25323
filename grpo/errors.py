"""Errors that are told in a sentence. `grpo.run` prints them without a traceback and exits with code 2."""


class UserError(Exception):
    """What was given, what is allowed, what to do; full sentences, because the user reads nothing else."""


class UnsuitedEngine(UserError):
    """The rollout engine has no way to sample from this model; another one may have."""
