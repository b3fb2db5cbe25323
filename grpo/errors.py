"""UserError: bad input, told in a sentence. `grpo.run` prints it without a traceback and exits with code 2."""


class UserError(Exception):
    """What was given, what is allowed, what to do; full sentences, because the user reads nothing else."""
