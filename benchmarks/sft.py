"""Steps of SFT and DPO, ours beside TRL and Unsloth: forward, backward and optimizer over the same tokens.

    python benchmarks/sft.py            all cases; writes benchmarks/results/sft-<gpu>.json
    python benchmarks/sft.py --only llama-3.1-8b/sft-ours-nf4 llama-3.1-8b/sft-unsloth --deadline 540
    python benchmarks/sft.py --only tiny/sft-ours-nf4 tiny/dpo-ours-nf4 --device cpu --tokens 96      tries the script

Models have true shapes and random weights, written to --folder once. Each case is a process of its own. SFT: 8 answers
a step; DPO: 4 pairs. A sequence, prompt and answer, has 2,048 tokens in SFT and 1,024 in DPO, 256 of them the prompt's;
LoRA r=32 on all linears. The first steps are not timed; figures are medians. Results in the file stay until the same
case is measured again.

    ours-nf4, ours-bf16    the product's own loop, without an engine and without a held-out score
    trl                    TRL, bf16, as many sequences at once as its trainer takes at 8B; padding-free where it can be
    unsloth                Unsloth, 4 bits, its own checkpointing
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
from our_settings import add_settings, fields_of, settings_of
from shapes import SHAPES, model_folder
from work import PROMPT_TOKENS, RANK, timed, torch_peaks

STEPS = 6
ROWS = {"sft": 8, "dpo": 4}  # of a step
TOKENS = {"sft": 2048, "dpo": 1024}  # of a sequence
ANSWERS = {"sft": ("completion",), "dpo": ("chosen", "rejected")}
METHODS = tuple(ROWS)
CONTENDERS = ("ours-nf4", "ours-bf16", "trl", "unsloth")
USUAL = [f"llama-3.1-8b/{method}-{who}" for method in METHODS for who in ("ours-nf4", "trl", "unsloth")]
KNOWN = [f"{shape}/{method}-{who}" for shape in SHAPES for method in METHODS for who in CONTENDERS]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AT_ONCE = {"trl": 2, "unsloth": 4}  # rows in one pass; the rest is accumulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, example="llama-3.1-8b/sft-ours-nf4")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a case; the first two are not timed")
    parser.add_argument("--tokens", type=int, default=0, help="of each sequence, where not the usual ones")
    parser.add_argument("--unsloth-site", type=Path, help="a folder with Unsloth's packages, for its process alone")
    add_settings(parser)
    arguments = parser.parse_args()
    if arguments.case:
        cases.answer(work(arguments), lambda: measure(arguments))
    names = cases.chosen(parser, arguments.only, USUAL, KNOWN)
    shown = [*(["--tokens", str(arguments.tokens)] if arguments.tokens else []), *settings_of(parser, arguments)]
    device = cases.device_name(arguments.device)
    about = {"command": "python benchmarks/sft.py", "device": device, "prompt_tokens": PROMPT_TOKENS, "lora_rank": RANK}
    results = cases.Results(cases.results_path(arguments.out, "sft", device), about, add_ratios)
    variant = "".join(
        f"/{each}" for each in [*([f"tokens={arguments.tokens}"] if arguments.tokens else []), *arguments.set]
    )
    hidden = ["--steps", str(arguments.steps)]
    hidden += ["--unsloth-site", str(arguments.unsloth_site)] if arguments.unsloth_site else []
    sys.exit(cases.Benchmark(arguments, results, needs, in_a_line, shown, hidden, variant).run(names))


def parts(case: str) -> tuple[str, str, str]:
    """ "llama-3.1-8b/sft-ours-nf4" -> shape, method, contender."""
    shape, _, rest = case.partition("/")
    method, _, contender = rest.partition("-")
    return shape, method, contender


def needs(case: str) -> tuple[str, bool]:
    """The checkpoint of a case: Unsloth reads one in NF4, the others quantise what they load."""
    shape, _, contender = parts(case)
    return shape, contender == "unsloth"


def sequence_tokens(arguments: argparse.Namespace) -> int:
    """Of prompt and answer."""
    return arguments.tokens or TOKENS[parts(arguments.case)[1]]


def work(arguments: argparse.Namespace) -> cases.Record:
    """What a case is. tokens: that all sequences of a step have together; a pair's prompt counts twice."""
    _, method, _ = parts(arguments.case)
    sequences = ROWS[method] * len(ANSWERS[method])
    return {"sequence_tokens": sequence_tokens(arguments), "sequences": sequences, "steps": arguments.steps,
            "tokens": sequences * sequence_tokens(arguments)}  # fmt: skip


def measure(arguments: argparse.Namespace) -> cases.Record:
    """One case, in its own process. What it imports is its own too: Unsloth wants to be the first."""
    _, method, contender = parts(arguments.case)
    model = model_folder(*needs(arguments.case), arguments.folder)
    measured = of_ours if contender.startswith("ours") else of_a_peer
    steps, ran = measured(arguments, method, contender, model)
    step_s = statistics.median(timed(steps))
    return {
        "step_s": round(step_s, 4),
        "tokens_per_second": round(work(arguments)["tokens"] / step_s),
        "all_steps_s": [round(seconds, 3) for seconds in steps],
        "timed_steps": len(timed(steps)),
        "ran": ran,
        **torch_peaks(arguments.device != "cpu"),
    }


def rows(tokenizer: Any, method: str, tokens: int, count: int) -> Iterator[dict[str, str]]:
    """A question, and answers with which it is a sequence of so many tokens; the same for all."""
    from random_models import questions

    prompt = min(PROMPT_TOKENS, tokens // 2)
    [probe] = questions(tokenizer, 1, prompt, seed=1)
    around = prompt - len(tokenizer(probe, add_special_tokens=False)["input_ids"])  # of the chat template
    asked = questions(tokenizer, count, prompt, seed=0)
    said = iter(questions(tokenizer, count * len(ANSWERS[method]), tokens - prompt + around - 1, seed=2))
    for question in asked:
        yield {"question": question} | {name: next(said) for name in ANSWERS[method]}


def of_ours(
    arguments: argparse.Namespace, method: str, contender: str, model: Path
) -> tuple[list[float], dict[str, Any]]:
    """The product's own loop, over a task whose rows are these."""
    import our_run

    from grpo.build import build_run
    from grpo.policy import load_tokenizer
    from grpo.questions import build_questions
    from grpo.task import Task
    from grpo.train import train

    config = our_run.our_config(
        model, contender.removeprefix("ours-"), arguments.device, method=method, steps=arguments.steps,
        prompts_per_step=ROWS[method], engine="none", **fields_of(arguments.set),
    )  # fmt: skip
    count = ROWS[method] * arguments.steps
    made = list(rows(load_tokenizer(config.model), method, sequence_tokens(arguments), count + config.eval_prompts))
    task = Task(
        name="benchmark",
        rows=lambda split, data: made[:count] if split == "train" else made[count:],
        prompt=lambda row: [{"role": "user", "content": row["question"]}],
        rewards={}, gold=None, solved=None, data="made up", config=config,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(task, config, Path(folder), build_questions(task, config), None)
        run.progress.evaluated = config.steps  # no held-out score is made, for peers make none
        seconds: list[float] = []
        record_step = run.recorder.step

        def watch(step: int, metrics: Any) -> None:
            record_step(step, metrics)
            seconds.append(metrics["time/step"])
            run.stop_requested |= arguments.until is not None and time.time() > arguments.until

        run.recorder.step = watch
        with run.recorder:
            train(run)
        ran = {"base": config.base, "model": type(run.policy.model).__name__, "recompute": run.config.recompute,
               "tokens_per_batch": run.config.tokens_per_batch}  # fmt: skip
    return seconds, ran


def of_a_peer(
    arguments: argparse.Namespace, method: str, contender: str, model: Path
) -> tuple[list[float], dict[str, Any]]:
    """TRL's trainer, over a model that PEFT puts LoRA on, or over Unsloth's."""
    on_cpu = arguments.device == "cpu"
    kind, tokens = method.upper(), sequence_tokens(arguments)
    if contender == "unsloth":
        if arguments.unsloth_site:
            sys.path.append(str(arguments.unsloth_site))
        import unsloth
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    batch = min(AT_ONCE[contender], ROWS[method])
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(arguments.folder / "trainer"), per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS[method] // batch, max_steps=arguments.steps, max_length=tokens + 8,
        learning_rate=1e-5, lr_scheduler_type="constant", logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=3407, bf16=not on_cpu, use_cpu=on_cpu,
        **({"optim": "adamw_8bit"} if contender == "unsloth" else {"gradient_checkpointing": not on_cpu}),
    )  # fmt: skip
    if contender == "unsloth":
        network, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            model_name=str(model), max_seq_length=tokens + 8, load_in_4bit=True
        )
        network = unsloth.FastLanguageModel.get_peft_model(
            network, r=RANK, lora_alpha=RANK, target_modules=LINEARS, use_gradient_checkpointing="unsloth",
            random_state=3407,
        )  # fmt: skip
        more = {}
    else:
        dtype = "float32" if on_cpu else "bfloat16"
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
        more = {"peft_config": lora}
    made = rows(tokenizer, method, tokens, ROWS[method] * (arguments.steps + 1))
    chats = [
        {"prompt": [{"role": "user", "content": row.pop("question")}]}
        | {name: [{"role": "assistant", "content": text}] for name, text in row.items()}
        for row in made
    ]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=network, args=settings, train_dataset=Dataset.from_list(chats), processing_class=tokenizer, **more
    )
    seconds: list[float] = []
    trainer.add_callback(watcher(seconds, arguments.until, on_cpu))
    trainer.train()
    return seconds, {"trainer": type(trainer).__name__, "rows_at_once": batch, "optimizer": str(settings.optim)}


def watcher(seconds: list[float], until: float | None, on_cpu: bool) -> Any:
    """A callback that notes the seconds of each step."""
    import torch
    from transformers import TrainerCallback

    def clock() -> float:
        if not on_cpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Watch(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            self.last = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
            now = clock()
            seconds.append(now - self.last)
            self.last = now
            control.should_training_stop |= until is not None and time.time() > until
            return control

    return Watch()


def add_ratios(records: dict[str, cases.Record]) -> None:
    """How many of our steps in NF4 a step takes, beside the same shape, method and work."""
    for name, record in records.items():
        shape, rest, *variant = name.split("/")
        ours = records.get("/".join([shape, f"{rest.partition('-')[0]}-ours-nf4", *variant]), {})
        record.pop("over_ours", None)
        if "step_s" in record and "step_s" in ours:
            record["over_ours"] = round(record["step_s"] / ours["step_s"], 3)


def in_a_line(record: cases.Record) -> str:
    """What was found, for the terminal."""
    peak = f"; peak {record['device_peak_gib']:.1f} GiB" if "device_peak_gib" in record else ""
    return f"step {record['step_s']:.2f} s, {record['tokens_per_second']:,} tokens/s{peak}"


if __name__ == "__main__":
    main()
