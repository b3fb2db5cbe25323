"""The command line itself: which flags there are, and which of them are given. Knows nothing of tasks and folders.

It is read once. What is given is told apart from what is not, so that nothing needs to know a default before it may
read; --help alone shows the defaults.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from io import StringIO
from typing import Annotated, Any, NoReturn, TypedDict, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from grpo.config import (
    Config,
    EvalConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TeachingConfig,
    UpdateConfig,
    field_names,
    fields_of_part,
)
from grpo.errors import UserError, nearest
from grpo.recipes import METHODS, Method, Recipe, module_of

HELP = ("-h", "--help")
_MARKS = (tyro.conf.DisallowNone,)  # None means that a flag is not given, and is no word to give
_WRITTEN_SO = {"True": True, "False": False, "None": None}  # beside JSON's true, false, null

# What others call these (TRL, Unsloth, verl, transformers, vLLM), and what a hand in a hurry types.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "optimizer": "optim",
    "kl_coef": "beta kl_beta kl_loss_coef",
    "kl_estimator": "kl_loss_type",
    "group_size": "num_generations n rollout_n",
    "epochs": "num_iterations ppo_epochs mu",
    "clip_low": "epsilon cliprange clip_ratio clip_ratio_low",
    "clip_high": "epsilon_high clip_ratio_high",
    "dual_clip": "delta clip_ratio_c",
    "max_completion_tokens": "max_completion_length max_new_tokens max_tokens max_response_length",
    "max_context": "max_seq_length max_model_len max_length",
    "chat_template_kwargs": "apply_chat_template_kwargs template_kwargs enable_thinking reasoning_effort",
    "adapter": "adapter_name_or_path adapter_path lora_path lora_adapter_path peft_path",
    "reference": "ref ref_model reference_model",
    "steps": "max_steps num_steps total_training_steps",
    "prompts_per_step": "train_batch_size per_device_train_batch_size batch_size",
    "mini_batches": "ppo_mini_batch_size",
    "tokens_per_batch": "gradient_accumulation_steps max_token_len_per_gpu",
    "lora_rank": "lora_r r rank",
    "lora_alpha": "alpha",
    "normalization": "loss_type loss_agg_mode",
    "advantage": "scale_rewards adv_estimator advantage_estimator",
    "objective": "importance_sampling_level",
    "mask_truncated": "mask_truncated_completions",
    "top_entropy": "top_entropy_quantile",
    "entropy_coef": "entropy_coeff",
    "schedule": "lr_scheduler_type",
    "warmup_steps": "num_warmup_steps lr_warmup_steps",
    "max_grad_norm": "grad_clip max_norm",
    "eval_every": "eval_steps test_freq",
    "save_every": "save_steps save_freq",
    "keep": "save_total_limit",
    "run_dir": "output_dir out",
    "columns": "prompt_key answer_key input_key label_key prompt_column answer_column",
    "splits": "dataset_train_split dataset_test_split train_split test_split split",
    "held_out": "test_size val_size validation_size",
    "data": "dataset dataset_name train_files",
    "model": "model_name model_name_or_path",
    "base": "load_in_4bit",
    "engine": "use_vllm",
    "dynamic_sampling": "filter_groups",
    "recompute": "gradient_checkpointing",
    "resume": "resume_from_checkpoint",
    "eval": "evaluate",
    "recipe": "preset",
}
# What is a field of the task, because it belongs to its rows. Others have flags for it.
_OF_A_TASK = {"max_prompt_length": "max_prompt_tokens", "max_prompt_tokens": "max_prompt_tokens", "tools": "tools"}
ALIASES = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}


@dataclass(frozen=True)
class Options:
    """Train a language model with GRPO on the task of a Python file.

    Exit codes: 0 done; 2 bad input, or memory or a disk that ran out, told in a sentence; 130, 143 or 129 stopped by
    Ctrl-C, SIGTERM or SIGHUP, after the step was finished and saved (a second one stops at once).
    """

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK.py")] = ""
    """The task file, such as tasks/gsm8k.py, or the name of one that ships: gsm8k. With --resume or --eval RUN it may
    be left out."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Try the data and the rewards on every gold answer, then stop. Loads no model."""
    resume: str | None = None
    """A run's folder, or one checkpoint in it: go on with that run. Without a checkpoint it starts over there."""
    resume_or_start: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --run-dir D, for schedulers that start the same command again: go on with the run in D, or start it."""
    eval: str | None = None
    """A run's folder, a checkpoint, or a model: print its held-out scores, then stop."""
    recipe: Recipe | None = None
    """Several fields at once, as a paper means its objective: grpo (arXiv 2402.03300), dapo (2503.14476), dr_grpo
    (2503.20783), gspo (2507.18071), cispo (2506.13585). Over the task's values, under the flags; docs/algorithm.md has
    the values."""


# Which methods alone have a use for a field; of the others all have.
_OF_SAMPLED = ("group_size", "staleness", "dynamic_sampling", "max_refills", *fields_of_part(LossConfig))
_OF_PAIRS = ("dpo_loss", "dpo_beta", "label_smoothing", "sft_coef")
_OWNERS: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(_OF_SAMPLED, ("grpo",)),
    **dict.fromkeys(_OF_PAIRS, ("dpo",)),
    "train_on": ("sft",),
    "reference": ("grpo", "dpo"),
}


def owner_of(field: str, method: Method) -> Method | None:
    """Whose a field of Config is that a method has no use for; None where it has."""
    owners = _OWNERS.get(field, (method,))
    return None if method in owners else owners[0]


# The titles that --help has, each over a part of Config.
_TITLES: dict[str, type] = {
    "model": ModelConfig,
    "rollout": RolloutConfig,
    "loss": LossConfig,
    "teaching": TeachingConfig,
    "update": UpdateConfig,
    "held_out": EvalConfig,
    "run": RunConfig,
}
_WHAT_FOR: dict[Method | None, str] = {
    None: Options.__doc__ or "",
    "sft": "Fine-tune a language model on given answers: of a task's `gold`, or of rows (docs/sft.md).",
    "dpo": "Teach a language model by pairs of a better and a worse answer (docs/sft.md).",
}


def _program(method: Method | None) -> str:
    return f"python -m {module_of(method)}"


def _help(method: Method | None) -> type:
    """All that --help shows, the fields of Config by its parts. Of a command that says what teaches, what that has a
    use for, with its values."""
    own = METHODS[method] if method else {}
    parts = []
    for title, part in _TITLES.items():
        names = [each.name for each in fields(part)]
        hidden = [name for name in names if method and (owner_of(name, method) or name in ("method", "temperature"))]
        if len(hidden) < len(names):
            shown = _hiding(part, hidden)
            values = {name: value for name, value in own.items() if name in names}
            parts.append((title, tyro.conf.OmitArgPrefixes[shown], field(default_factory=partial(shown, **values))))
    options = _hiding(Options, ["recipe"] if method else [])
    made = make_dataclass("Help", parts, bases=(options,), frozen=True)
    made.__doc__ = _WHAT_FOR[method]
    return made


def _hiding(part: type, names: list[str]) -> type:
    """A dataclass of the same fields, of which --help shows all but these."""
    kinds = get_type_hints(part, include_extras=True)
    hidden = [(each.name, Annotated[kinds[each.name], tyro.conf.Suppress], each.default) for each in fields(part)]
    made = make_dataclass(part.__name__, [each for each in hidden if each[0] in names], bases=(part,), frozen=True)
    made.__doc__ = part.__doc__
    return made


_Flags = TypedDict("_Flags", {n: h for n, h in get_type_hints(Config).items() if n in field_names()}, total=False)  # pyright: ignore


@dataclass(frozen=True)
class _Given(Options):
    flags: tyro.conf.OmitArgPrefixes[_Flags] = field(default_factory=dict)  # type: ignore


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _pairs(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A dictionary is given as NAME=VALUE NAME=VALUE."""
    if kind.type is not dict:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=lambda words: dict(map(_pair, words)),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={json.dumps(each)}" for name, each in value.items()],
    )


def _pair(word: str) -> tuple[str, Any]:
    """enable_thinking=False -> its name, and its value as JSON, as Python writes it, or as text."""
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"{word!r} is not NAME=VALUE")
    try:
        return name, _WRITTEN_SO[value] if value in _WRITTEN_SO else json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def parse(argv: list[str], method: Method | None = None) -> tuple[Options, dict[str, Any]]:
    """The options, and the fields of Config that are given, each with its value. method: what teaches, where the
    command says it: its own --help is shown.

    Raises:
        UserError: a flag that does not exist, or a word that is none.
        SystemExit: after help; and code 2 after a value that cannot be read, which is told with the flag's own help.
    """
    try:
        with redirect_stderr(StringIO()):
            given, unknown = tyro.cli(
                _Given,
                args=argv,
                prog=_program(method),
                return_unknown_args=True,
                add_help=False,
                config=_MARKS,
                registry=_REGISTRY,
            )
    except SystemExit:
        _show_help(argv, method)
    if set(HELP) & set(unknown):
        _show_help(["--help"], method)
    if unknown:
        raise UserError(_unknown(unknown))
    options = {name: getattr(given, name) for name in Options.__dataclass_fields__}
    return Options(**options), dict(given.flags)


def _show_help(argv: list[str], method: Method | None) -> NoReturn:
    """Help, or what is wrong with a value beside the help of its flag."""
    tyro.cli(_help(method), args=argv, prog=_program(method), config=_MARKS, registry=_REGISTRY)
    sys.exit(2)


def known_field(name: Any) -> None:
    """A name that is given to Python is that of a field of Config.

    Raises:
        UserError: it is not.
    """
    if name in field_names():
        return
    meant = _meant(str(name))
    hint = f" Here it is `{meant}`." if meant else ""
    if name in _OF_A_TASK:
        hint = f" It is a field of the task, because it belongs to its rows: Task({_OF_A_TASK[name]}=...)."
    raise UserError(
        f"There is no field {name!r:.100}.{hint or nearest(str(name), field_names())} help(grpo.Config) lists them all."
    )


def _meant(name: str) -> str | None:
    """What somebody else's name is called here."""
    return ALIASES.get(name) or ALIASES.get(name.removeprefix("no_"))


def _unknown(words: list[str]) -> str:
    """What to say of words that are no flags."""
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        return f"There is no use for {words[0]!r}: one task file is given, and everything else is a flag. See --help."
    name = flag.partition("=")[0].lstrip("-").replace("-", "_").replace(".", "_")
    known = [*field_names(), *Options.__dataclass_fields__]
    meant = _meant(name)
    hint = f" Here it is `--{meant.replace('_', '-')}`." if meant else ""
    if name in _OF_A_TASK:
        hint = f" It is a field of the task, because it belongs to its rows: Task({_OF_A_TASK[name]}=...)."
    near = nearest("--" + name.replace("_", "-"), ["--" + each.replace("_", "-") for each in known])
    return f"There is no flag {flag.partition('=')[0]}.{hint or near} --help lists them all."
