"""Config: every number and choice of a run, each with its reason. Knows nothing of files, models or tasks.

Each field is a flag of `python -m grpo.run` (`learning_rate` is `--learning-rate`). A task file gives its own defaults
by building a Config; flags override them. The sentence under a field is its help text. Defaults that the literature
supports are argued in docs/algorithm.md.

A Config is flat for its users. It is made of parts, one for each part of the program, which takes its own: a Config is
each of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo.addresses import EXAMPLE, read_addresses, read_shared_folder
from grpo.errors import UserError

MAY_BE_INFINITE = ("dual_clip", "off_policy_mask", "value_clip")  # inf means: no bound
LONGEST_TIMER = 1e9  # seconds
LARGEST = 3.4028234663852886e38  # that float32 holds, in which all of it is computed
MOST_COMPLETIONS = 1_000_000  # in one rollout
TINY = 5e-324  # the least number above 0
# What a chat template is given by the run itself, or that is no variable of it but an argument of what renders it.
OF_THE_RUN = {
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
Check = tuple[bool, str]  # is it broken, and what to say


@dataclass(frozen=True)
class Part:
    """Some of the numbers of a run, checked when they are put together."""

    def __post_init__(self) -> None:
        for name, annotation in _annotations(type(self)).items():
            if get_origin(annotation) is tuple and isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
            check_type(name, getattr(self, name), annotation)
        for broken, sentence in self.checks():
            if broken:
                raise UserError(sentence)

    def checks(self) -> list[Check]:
        """Everything that can be known from the numbers alone. Each part adds its own to those of the parts before."""
        values = [(name, kind, getattr(self, name)) for name, kind in _annotations(type(self)).items()]
        numbers = [(n, v) for n, kind, v in values if kind is float and not (n in MAY_BE_INFINITE and v == math.inf)]
        texts = [(n, v) for n, kind, v in values if kind is str]
        texts += [(n, each) for n, kind, v in values if get_origin(kind) is tuple for each in v]
        return [
            *((not abs(v) <= sys.float_info.max, f"{n} is {_shown(v)}. Use a finite number.") for n, v in numbers),
            *((abs(v) > LARGEST, f"{n} is {_shown(v)}. Use a number that float32 can hold.") for n, v in numbers),
            *(("\0" in v, f"{n} is {v!r}. No name of a file or a model has a NUL character in it.") for n, v in texts),
        ]

    def between(self, least: float, most: float, *names: str) -> list[Check]:
        """The checks that fields are neither less nor more."""
        low = "a number above 0" if least == TINY else f"{least:g} or more"
        highest = f"{most:,}" if isinstance(most, int) else f"{most:g}"
        too_small = [(not getattr(self, n) >= least, f"{n} is {_shown(getattr(self, n))}. Use {low}.") for n in names]
        too_large = [
            (not getattr(self, n) <= most, f"{n} is {_shown(getattr(self, n))}. Use at most {highest}.") for n in names
        ]
        return [*too_small, *too_large]


@dataclass(frozen=True)
class ModelConfig(Part):
    """The model and its adapter."""

    model: str = "embedded"
    """Hugging Face name or folder of a causal language model, or "embedded" for the tiny one that ships here."""
    base: Literal["float32", "bf16", "nf4"] = "nf4"
    """How the frozen base weights are kept: float32, bf16, or 4-bit NF4 (bitsandbytes' format)."""
    quantization: Literal["uniform", "dynamic"] = "uniform"
    """Of an NF4 base: every linear in 4 bits, or dynamic: those whose rounding changes the next token most, measured on
    a few prompts, stay in 16 bits."""
    dynamic_allowance: float = 0.1
    """Memory that --quantization dynamic may take more, as a share of that of the linears in NF4."""
    double_quant: Literal["auto", "on", "off"] = "auto"
    """Of an NF4 base: the scales of its blocks in 8 bits too, 0.37 bits a weight less and slower rollouts. auto: as the
    checkpoint has them, or where the GPU's memory does not hold the run otherwise."""
    shard_base: bool = False
    """Of several processes: each keeps a part of the base's layers, for a base larger than a GPU (docs/scaling.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU if there is one."""
    lora_rank: int = 32
    """Rank r of the LoRA adapter on every linear layer but the head. RL needs little: 1 to 32."""
    lora_alpha: float = 32.0
    """The adapter is scaled by alpha / rank."""
    expert_adapters: bool = False
    """Of a mixture of experts: an adapter on every expert too, not only on attention and shared experts."""
    adapter: str = ""
    """A LoRA adapter in PEFT's format that the run begins from, with its rank and alpha: a folder, a run or one of its
    checkpoints, or a name on the hub. Empty: one that is nothing at first."""
    reference: Literal["base", "start"] = "base"
    """What the KL divergence, and a margin of dpo, is from: the base model alone, or with the adapter that the run
    began from (start), which is the default of dpo where there is one."""
    recompute: Literal["auto", "none", "layer", "offload"] = "auto"
    """Activations of the backward pass: keep all (none), recompute each layer (layer), its input in the host's memory
    meanwhile (offload). auto: on a GPU what fits, layer by layer; on a CPU none."""
    memory_gib: float = 0.0
    """GiB of the GPU that the run may take; 0: all that is free."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            (not self.model.strip(), f"model is {self.model!r}. Give a name, a folder, or embedded."),
            *self.between(1, 10**15, "lora_rank"),
            *self.between(0, 10, "dynamic_allowance"),
            (
                self.quantization == "dynamic" and self.base != "nf4",
                f"quantization dynamic is of a base in NF4, and base is {self.base}. Use base nf4, or quantization "
                "uniform.",
            ),
            (
                self.double_quant == "on" and self.base != "nf4",
                f"double_quant on is of a base in NF4, and base is {self.base}. Use base nf4, or double_quant auto.",
            ),
            (
                self.reference == "start" and not self.adapter,
                "reference start is the adapter that the run begins from, and adapter names none. Give one, or use "
                "reference base: without one they are the same.",
            ),
            # Its share of the rank is a number of float32, and neither 0 nor infinite there.
            *self.between(1e-6, 1e6, "lora_alpha"),
            *self.between(0, 10**6, "memory_gib"),
        ]


@dataclass(frozen=True)
class RolloutConfig(Part):
    """The rollout: who samples the completions, and how many."""

    engine: Literal["auto", "vllm", "torch", "server", "none"] = "auto"
    """Who samples the completions. vllm: vLLM in this process over the policy's own weights. torch: the policy's own
    model in PyTorch. server: one or more `vllm serve` (--servers). auto: vllm if it is installed, there is a GPU, and
    it takes the model. none: nobody, for sft and dpo, whose held-out score is then that of given answers."""
    servers: tuple[str, ...] = ()
    """server: addresses of `vllm serve`, such as http://127.0.0.1:8000. Their key is in GRPO_SERVER_KEY."""
    servers_folder: str = ""
    """server: a folder that the servers see too, through which they get the adapter; HERE=THERE where its path is
    another there. Empty: this machine's folder for temporary files."""
    servers_patience: float = 600.0
    """server: seconds without any server after which the run ends, saved."""
    staleness: int = 0
    """server: 1 samples the next step while the update runs, by the adapter before it; --correction corrects for it."""
    kv_cache_gib: float = 0.0
    """vllm: GiB for keys and values; 0 takes what a full rollout needs, at most half of the free GPU memory."""
    max_num_seqs: int = 0
    """vllm: sequences that are written side by side at most; 0 takes all of a step or of a held-out score, at most 512,
    and where the cache holds few of them fewer: what is drawn from takes memory for each."""
    release_kv_cache: bool = True
    """vllm: that memory may be given to the update while it runs, where that needs it or is the faster for it."""
    rollout_graphs: Literal["decode", "compiled", "none"] = "decode"
    """vllm on a GPU: decode steps are captured as CUDA graphs (decode); the model is compiled too, which takes 25 s of
    the start and makes a decode step about 1% faster (compiled); or neither: slow, and the least memory (none)."""
    prompts_per_step: int = 8
    """Prompts of one step."""
    group_size: int = 8
    """Completions sampled for each prompt; their rewards are compared with each other. Two or more; 1 will do for
    gae."""
    temperature: float = 1.0
    """Sampling temperature. Training log-probabilities are taken at the same temperature."""
    max_completion_tokens: int = 512
    """A completion is cut off after this many tokens."""
    max_context: int = 0
    """Longest prompt + completion in tokens; 0 takes what the model was built for."""
    chat_template_kwargs: dict = dataclasses.field(default_factory=dict)
    """What the model's chat template reads beside the messages, over the task's own: enable_thinking=False turns the
    thinking of Qwen3 off, reasoning_effort=low shortens that of gpt-oss. Values are JSON, else text."""
    dynamic_sampling: bool = False
    """DAPO: replace groups whose rewards are all equal by new prompts until the step is full."""
    max_refills: int = 4
    """Dynamic sampling gives up after this many further rollouts and trains on what it has."""

    def checks(self) -> list[Check]:
        read_addresses(self.servers)
        read_shared_folder(self.servers_folder)
        return [
            *super().checks(),
            *self.between(1, MOST_COMPLETIONS, "prompts_per_step", "group_size"),
            (
                self.prompts_per_step * self.group_size > MOST_COMPLETIONS,
                f"prompts_per_step x group_size is {self.prompts_per_step * self.group_size:,} completions a step. Use "
                f"at most {MOST_COMPLETIONS:,}.",
            ),
            *self.between(1, 10**9, "max_completion_tokens"),
            *self.between(0, 10**9, "max_context"),
            *self.between(0, 10_000, "max_refills"),
            *self.between(0, 10**6, "kv_cache_gib"),
            *self.between(0, MOST_COMPLETIONS, "max_num_seqs"),
            *self.between(1, 10**9, "servers_patience"),
            *self.between(0, 1, "staleness"),
            (
                self.staleness > 0 and self.engine != "server",
                f"staleness is {self.staleness}, and engine {self.engine} samples in this process, with the weights "
                "that the update changes. Use engine server, or staleness 0.",
            ),
            (
                self.engine == "server" and not self.servers,
                f"engine is server, and servers names none. Give their addresses, such as servers {EXAMPLE}.",
            ),
            (
                self.engine == "auto" and bool(self.servers),
                "servers has addresses, and engine is auto, which asks no servers. Use engine server.",
            ),
            (
                bool(fault := fault_of_template_kwargs(self.chat_template_kwargs)),
                f"chat_template_kwargs has {fault}.",
            ),
            (
                not _is_json(self.chat_template_kwargs),
                f"chat_template_kwargs is {_shown(self.chat_template_kwargs)}, which config.json cannot hold. Use "
                "texts, numbers, True, False, None, and lists and dictionaries of them.",
            ),
            # Logits are divided by it in float32: less makes them infinite, and there is nothing left to explore.
            *self.between(1e-4, 1e4, "temperature"),
        ]


@dataclass(frozen=True)
class LossConfig(Part):
    """The advantage and the loss."""

    advantage: Literal["grpo", "dr_grpo", "lite_ppo", "rloo", "gdpo", "gae"] = "grpo"
    """Reward minus group mean, over: group std (grpo), nothing (dr_grpo), batch std (lite_ppo); leave-one-out
    baseline (rloo); each reward normalised in its group, then summed (gdpo). gae: PPO, reward minus what a value head
    on the policy expects, token by token."""
    gamma: float = 1.0
    """gae: how much of its worth a reward keeps from a token to the one before."""
    gae_lambda: float = 1.0
    """gae: 1 compares with the reward itself, 0 with the value at the next token (Schulman et al. 2015)."""
    value_lr: float = 0.0
    """gae: learning rate of the value head, which follows the schedule too; 0: the adapter's."""
    value_clip: float = 0.2
    """gae: with several optimizer steps a rollout a value gains nothing by moving further than this. inf: no bound."""
    normalization: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """What the token losses of a step are divided by: all sampled tokens (dapo), each sequence's length
    (grpo), the tokens that carry gradient (bnpo), a constant length (dr_grpo)."""
    objective: Literal["grpo", "gspo", "cispo"] = "grpo"
    """Clipped token ratio (grpo), clipped sequence ratio (gspo), clipped importance weight (cispo)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low. With gspo think of 3e-4."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high ("clip-higher" leaves room for rare tokens). With gspo 4e-4."""
    dual_clip: float = math.inf
    """With a negative advantage the ratio counts at most this much; 3.0 is usual. inf: no such bound."""
    cispo_cap: float = 5.0
    """cispo: the largest importance weight."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy (--reference) in the loss."""
    kl_estimator: Literal["weighted", "k1", "k2", "k3"] = "weighted"
    """Of KL(policy || reference). weighted: k3 times the importance ratio, right in value and gradient
    (DeepSeek-V3.2). k2: half the squared log ratio, right in its gradient. k3: its gradient is that of KL(reference ||
    policy). k1: the log ratio, whose expected gradient is 0 (Schulman 2020; docs/algorithm.md)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    top_entropy: float = 1.0
    """Train only on this share of the tokens, those of highest entropy; 0.2 is the "80/20 rule"."""
    mask_truncated: bool = True
    """Completions cut off by the token limit are left out of the loss."""
    off_policy_mask: float = math.inf
    """Drop sequences of negative advantage whose mean log ratio sampler / policy is larger than this. inf: none."""
    correction: Literal["token_tis", "sequence_tis", "token_mask", "sequence_mask", "none"] = "token_tis"
    """Importance weight trainer / sampler for their different numerics: truncated (tis) or masked outside
    [correction_floor, correction_cap] (mask; a token mask is IcePop)."""
    correction_cap: float = 2.0
    """Largest importance weight of the correction."""
    correction_floor: float = 0.5
    """Smallest importance weight that a mask lets through."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *self.between(0, LARGEST, "kl_coef", "entropy_coef", "clip_low", "clip_high"),
            *self.between(0, math.inf, "off_policy_mask"),
            *self.between(0, 1, "gamma", "gae_lambda"),
            *self.between(0, 1000, "value_lr"),
            *self.between(TINY, math.inf, "value_clip"),
            *self.between(TINY, LARGEST, "correction_cap", "cispo_cap"),
            *self.between(TINY, math.inf, "dual_clip"),
            (not 0 < self.top_entropy <= 1, f"top_entropy is {self.top_entropy}. Use a share above 0 and at most 1."),
            (self.clip_low > 1, f"clip_low is {self.clip_low}. The ratio is never negative, so use at most 1."),
            (
                not 0 <= self.correction_floor <= self.correction_cap,
                f"correction_floor is {self.correction_floor} and correction_cap is {self.correction_cap}. "
                "Use 0 <= correction_floor <= correction_cap.",
            ),
        ]


@dataclass(frozen=True)
class TeachingConfig(Part):
    """What teaches: rewards, answers or pairs (docs/sft.md)."""

    method: Literal["grpo", "sft", "dpo"] = "grpo"
    """What the policy learns from: rewards of what it says (grpo), given answers (sft, `python -m grpo.sft`), or pairs
    of a better and a worse one (dpo, `python -m grpo.dpo`)."""
    train_on: Literal["answer", "assistant"] = "answer"
    """sft: of a conversation the last answer, or every message of the assistant."""
    dpo_loss: Literal["sigmoid", "sigmoid_norm", "ipo", "robust"] = "sigmoid"
    """dpo: log-sigmoid of the margin (sigmoid), of the margin of means a token (sigmoid_norm); the squared distance of
    that from 1 / (2 beta) (ipo); unbiased where label_smoothing of the pairs are the wrong way round (robust)."""
    dpo_beta: float = 0.1
    """dpo: how strongly the policy is held to the reference policy (--reference)."""
    label_smoothing: float = 0.0
    """dpo: the share of the pairs that are taken to be the wrong way round."""
    sft_coef: float = 0.0
    """dpo: weight of the chosen answers' negative log-likelihood in the loss."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *self.between(TINY, LARGEST, "dpo_beta"),
            *self.between(0, LARGEST, "sft_coef"),
            (
                not 0 <= self.label_smoothing < 0.5,
                f"label_smoothing is {self.label_smoothing}. Use 0 or more, and less than 0.5: with half of the pairs "
                "the wrong way round there is nothing to learn.",
            ),
            (
                self.label_smoothing > 0 and self.dpo_loss == "ipo",
                "label_smoothing is of a sigmoid, and dpo_loss is ipo. Use dpo_loss sigmoid or robust, or smoothing 0.",
            ),
        ]


@dataclass(frozen=True)
class UpdateConfig(Part):
    """The update of the adapter."""

    mini_batches: int = 1
    """Optimizer steps that the groups of one rollout are dealt out to."""
    epochs: int = 1
    """Times that the same rollout is trained on (mu in the paper). Of sft and dpo: that the data are gone through,
    where --steps does not say how long."""
    tokens_per_batch: int = 0
    """Tokens in one forward and backward pass; 0 takes what fits a GPU's memory, 16,384 on a CPU. Changes memory and
    speed, never the result."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: bitsandbytes' AdamW, whose moments take 2 bytes a parameter instead of 8; it needs bitsandbytes."""
    page_optimizer: Literal["auto", "on", "off"] = "auto"
    """Of adamw8bit on a CUDA GPU: its moments in pages of the host's memory, which come to the GPU for the optimizer's
    step. auto: where the GPU's memory does not hold the run otherwise. Changes memory and speed, never the result."""
    learning_rate: float = 2e-5
    """AdamW's learning rate. LoRA wants about ten times that of full training."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.99
    """Decay of AdamW's second moment."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of the adapter."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *self.between(1, MOST_COMPLETIONS, "mini_batches", "epochs"),
            *self.between(0, 10**9, "tokens_per_batch"),
            (
                self.page_optimizer == "on" and self.optimizer != "adamw8bit",
                f"page_optimizer on is of optimizer adamw8bit, and optimizer is {self.optimizer}. Use optimizer "
                "adamw8bit, or page_optimizer auto.",
            ),
            # AdamW moves each number by about the rate, whatever the gradient: beyond this nothing of a model is left.
            *self.between(TINY, 1000, "learning_rate"),
            *self.between(0, 10**9, "warmup_steps"),
            *self.between(0, LARGEST, "weight_decay"),
            *self.between(TINY, LARGEST, "max_grad_norm"),
            (
                not 0 <= self.adam_beta1 < 1 or not 0 <= self.adam_beta2 < 1,
                "adam_beta1 and adam_beta2 must be in [0, 1).",
            ),
        ]


@dataclass(frozen=True)
class EvalConfig(Part):
    """The held-out score."""

    eval_every: int = 20
    """Steps between two held-out scores, beside the first and the last; 0: only these two."""
    held_out: int | None = None
    """So many training prompts are kept out of training and asked in place of a test split, the same ones in every run,
    whatever its seed; 0: the score is of training prompts. Not given: the task's own, or the test split."""
    eval_prompts: int = 128
    """Held-out prompts; the same ones each time."""
    eval_samples: int = 4
    """Completions for each of them, at the training temperature."""
    eval_k: int = 4
    """k of pass@k and majority@k; at most eval_samples."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *self.between(0, 10**9, "eval_every", *(["held_out"] if self.held_out is not None else [])),
            *self.between(1, 10**9, "eval_prompts"),
            *self.between(1, MOST_COMPLETIONS, "eval_samples", "eval_k"),
            (
                self.eval_k > self.eval_samples,
                f"eval_k is {self.eval_k} but eval_samples is {self.eval_samples}: pass@k needs k samples of a prompt. "
                "Raise eval_samples or lower eval_k.",
            ),
        ]


@dataclass(frozen=True)
class RunConfig(Part):
    """The run: its data, its length, its folder."""

    data: str = ""
    """A file (CSV, JSON, JSON lines, Parquet, also compressed), a folder with train.jsonl and test.jsonl or of
    save_to_disk, a data set of the hub (NAME or NAME:CONFIGURATION), or "embedded"; empty means the task's own."""
    columns: tuple[str, ...] = ()
    """Columns of the data under the names that the task gives them: question=problem answer=solution. Points lead into
    a column: answer=reward_model.ground_truth."""
    splits: tuple[str, ...] = ()
    """Splits of the data where their names do not say it: train=train_sft test=dev."""
    skip_bad_rows: bool = False
    """Rows that cannot be read, asked or scored are left out, counted and named; without it the first of them is an
    error."""
    steps: int = 200
    """Steps of the run."""
    seed: int = 0
    """Every random choice follows from it."""
    save_every: int = 10
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints kept, beside the best by held-out score."""
    run_dir: str = ""
    """Where everything is written; must not exist. Empty: runs/<task>-<time>."""
    threads: int = 0
    """Threads of the CPU; 0 takes what is fastest here, OMP_NUM_THREADS or torch's own number where one is set. Equal
    runs need equal numbers; a resumed run keeps its own."""
    log: tuple[Literal["wandb", "trackio", "mlflow"], ...] = ()
    """Trackers that are told the run's numbers too: one or more of wandb, trackio, mlflow. They write into the run's
    folder, and to a server only where their own variables say so (WANDB_MODE=online, MLFLOW_TRACKING_URI)."""
    reward_timeout: float = 60.0
    """Seconds that one call of a reward may take before it counts as failed; 0: no limit."""
    reward_workers: int = -1
    """Processes in which rewards are called at the same time, where one that hangs is ended alone. 0: the run's own;
    -1: so many as suit the machine, for those rewards that were slow before the run."""
    max_reward_failures: float = 0.1
    """Share of its calls that a reward may fail in: what it failed on is left out of its group and of the loss, and
    counted. The run stops where failures are more than chance explains. 0: none may."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *self.between(0, 10**9, "steps"),
            *self.between(1, 10**9, "save_every", "keep"),
            (
                self.reward_timeout > LONGEST_TIMER,
                f"reward_timeout is {self.reward_timeout}. The system's timer takes at "
                f"most {LONGEST_TIMER:g} seconds; 0 sets no limit.",
            ),
            *self.between(0, LONGEST_TIMER, "reward_timeout"),
            *self.between(0, 1, "max_reward_failures"),
            *self.between(-1, 256, "reward_workers"),
            *self.between(0, 1024, "threads"),
            *self.between(0, 2**32 - 1, "seed"),
            *(
                (not _is_renaming(word), f"columns has {word!r}. It takes NAME=COLUMN; the task file stands before it.")
                for word in self.columns
            ),
            *(
                (
                    not _is_renaming(word) or word.partition("=")[0] not in ("train", "test"),
                    f"splits has {word!r}. It takes train=NAME and test=NAME; the task file stands before it.",
                )
                for word in self.splits
            ),
        ]


def _is_renaming(word: str) -> bool:
    new, _, old = word.partition("=")
    return bool(new.strip() and old.strip())


def named(words: tuple[str, ...]) -> dict[str, str]:
    """("question=problem",) -> {"question": "problem"}"""
    pairs = (word.partition("=") for word in words)
    return {new.strip(): old.strip() for new, _, old in pairs}


# In the order in which --help shows them. (Fields of a dataclass begin with those of its last base.)
PARTS = (ModelConfig, RolloutConfig, LossConfig, TeachingConfig, UpdateConfig, EvalConfig, RunConfig)


@dataclass(frozen=True)
class Config(RunConfig, EvalConfig, UpdateConfig, TeachingConfig, LossConfig, RolloutConfig, ModelConfig):
    """What a run is made of."""

    @property
    def has_values(self) -> bool:
        """Whether a value head is trained: PPO."""
        return self.method == "grpo" and self.advantage == "gae"

    @property
    def algorithm(self) -> str:
        """What people call it: grpo, ppo, sft or dpo."""
        return "ppo" if self.has_values else self.method

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            (
                self.staleness > 0 and (self.method != "grpo" or self.correction == "none"),
                f"staleness is {self.staleness}, method {self.method} and correction {self.correction}: completions of "
                "an older policy are for GRPO with a --correction, which weighs them. Use that, or staleness 0.",
            ),
            (
                self.engine == "none" and self.method == "grpo",
                "engine is none, and GRPO learns from what is sampled. Use engine auto, vllm or torch.",
            ),
            (
                self.group_size < 2 and self.method == "grpo" and not self.has_values,
                f"group_size is {self.group_size}, so every advantage would be 0. Use 2 or more.",
            ),
            (
                self.dynamic_sampling and self.has_values,
                "dynamic_sampling drops groups of equal rewards, and advantage gae learns from these too: it compares "
                "with a value. Leave dynamic_sampling out.",
            ),
            (
                self.temperature != 1 and self.method != "grpo",
                f"temperature is {self.temperature}, and {self.method} learns the model's own probabilities, those of "
                "temperature 1. Leave it out.",
            ),
            (
                self.mini_batches > self.prompts_per_step,
                f"mini_batches is {self.mini_batches} but a step has only {self.prompts_per_step} groups to deal out. "
                "Lower mini_batches or raise prompts_per_step.",
            ),
        ]


@cache
def _annotations(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _shown(value: object) -> str:
    """A value in a sentence; 10**400 would fill the screen, and Python refuses to write 10**5000."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {round(value.bit_length() / math.log2(10))} digits"
    return repr(value)


def check_type(name: str, value: object, annotation: Any) -> None:
    """A value is one of a Literal's choices, or of the type; an int will do for a float, and a bool is not an int.

    Raises:
        UserError: it is not.
    """
    if not _fits(value, annotation):
        if get_origin(annotation) is Literal:
            allowed = f"one of {', '.join(map(repr, get_args(annotation)))}"
        elif get_origin(annotation) is tuple and get_args(get_args(annotation)[0]):
            allowed = f"a tuple of {', '.join(map(repr, get_args(get_args(annotation)[0])))}"
        else:
            kinds = (annotation,) if get_origin(annotation) is tuple else get_args(annotation) or (annotation,)
            allowed = " or ".join(_WORDS.get(kind, str(kind)) for kind in kinds)
        raise UserError(f"{name} is {_shown(value)} ({type(value).__name__}). It must be {allowed}.")


def fault_of_template_kwargs(kwargs: dict[Any, Any]) -> str:
    """Why these cannot be given to a chat template as its variables, in words; empty if they can."""
    for name in kwargs:
        if not (isinstance(name, str) and name.isidentifier()):
            return f"{name!r}, which is no name of a variable of a chat template"
        if name == "tools":
            return "tools, which have a field of their own: Task(tools=...)"
        if name in OF_THE_RUN:
            return f"{name}, which the run decides itself: leave it out"
    return ""


def _is_json(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


_WORDS = {
    dict: "a dictionary",
    tuple[str, ...]: "a tuple of texts",
    int: "a whole number (int)",
    float: "a number",
    bool: "True or False",
    str: "text (str)",
    type(None): "None",
}


def _fits(value: object, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return isinstance(value, str) and value in get_args(annotation)
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(annotation)[0]) for each in value)
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, kind) for kind in get_args(annotation))
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def field_names() -> list[str]:
    """The names of all fields, in the order of the class."""
    return [field.name for field in dataclasses.fields(Config)]


def fields_of_part(part: type[Part]) -> list[str]:
    """The names of the fields of a part of it."""
    return [field.name for field in dataclasses.fields(part)]


def from_dict(values: dict) -> Config:
    """The Config saved in a run's config.json.

    Raises:
        UserError: a name that no field has, because the file was written by another version or by hand.
    """
    unknown = sorted(set(values) - set(field_names()))
    if unknown:
        raise UserError(f"The saved configuration has fields that this version does not know: {', '.join(unknown)}.")
    return Config(**values)
