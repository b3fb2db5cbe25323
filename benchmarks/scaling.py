"""Weak scaling of a whole step: each GPU has the same work, so with N of them a step should take as long as with one.

    python benchmarks/scaling.py --ranks 1 1 2                   writes benchmarks/results/scaling-<gpu>.json
    python benchmarks/scaling.py --ranks 1 2 --shape tiny --device cpu --steps 4 --tokens 16 --prompt-tokens 48
                                                                 tries the script, with gloo

8 prompts a GPU of 256 tokens, 8 completions of 512 tokens each that nothing ends early, LoRA r=32 on an NF4 base of
random weights. The first steps are not timed; figures are medians. The first run of all compiles kernels, which later
ones find: one rank is measured twice, and the latter stays. Of each number of ranks:

    tokens_per_second     sampled tokens over the seconds of a step; weak_scaling is how many times those of one rank
    sum_s                 of a step: the gradients' sum as rank 0 sees it, waiting for the others included
    all_reduce_s          the sum alone, afterwards: `all_reduce_share` is its share of a step
    start_s               from the start of the launcher to the end of the first step; start_ratio over that of one rank
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
from shapes import SHAPES, is_written, model_folder
from work import COMPLETION_TOKENS, GROUP, PROMPT_TOKENS, PROMPTS

from grpo.launcher import launched, leave_variables, take_own_gpu

REPETITIONS = 10  # of the sum alone


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.record:
        work(arguments)
        return
    if not is_written(arguments.shape, True, arguments.folder):  # by a process that gives back the GPU's memory
        script = Path(__file__).with_name("random_models.py")
        subprocess.run([sys.executable, str(script), arguments.shape, str(arguments.folder), "nf4"], check=True)
    device = cases.device_name(arguments.device)
    records = {str(ranks): launch(ranks, arguments) for ranks in arguments.ranks}
    add_ratios(records)
    path = cases.results_path(arguments.out, "scaling", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": "python benchmarks/scaling.py " + " ".join(sys.argv[1:]), "device": device}
    path.write_text(json.dumps(about | {"shape": arguments.shape, "ranks": records}, indent=2) + "\n")
    print(json.dumps(records, indent=2))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes, one a GPU")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=6, help="the first two are not timed")
    parser.add_argument("--tokens", type=int, default=COMPLETION_TOKENS, help="of each completion")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="of each prompt")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-models"), help="where models are written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # in one of the processes: where it tells
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser


def launch(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What so many processes take, started as a user starts them: one by Python, several by torchrun."""
    print(f"{ranks} rank{'s' * (ranks > 1)}", flush=True)
    by_torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        given = [*sys.argv[1:], "--record", str(record), "--started", str(time.time())]
        command = [sys.executable, *(by_torchrun if ranks > 1 else []), __file__, *given]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(record.read_text())


def add_ratios(records: dict[str, dict[str, Any]]) -> None:
    """How many times the figures of one rank."""
    one = records.get("1")
    for record in records.values():
        record["all_reduce_share"] = round(record["all_reduce_s"] / record["step_s"], 5)
        if one:
            record["weak_scaling"] = round(record["tokens_per_second"] / one["tokens_per_second"], 3)
            record["start_ratio"] = round(record["start_s"] / one["start_s"], 3)


def work(arguments: argparse.Namespace) -> None:
    """One of the processes."""
    place = launched()
    if place is None:
        from grpo.world import ALONE

        arguments.record.write_text(json.dumps(measure(ALONE, arguments)))
        return
    take_own_gpu(place)
    leave_variables()
    from grpo.ranks import joined

    with joined(place, print) as world:
        record = measure(world, arguments)
        world.first(lambda: arguments.record.write_text(json.dumps(record)))


def measure(world: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a rank sees."""
    import our_run
    import torch

    from grpo.train import train

    config = our_run.our_config(
        model_folder(arguments.shape, True, arguments.folder), "nf4", arguments.device,
        prompts_per_step=PROMPTS * world.size, group_size=GROUP, steps=arguments.steps,
        max_completion_tokens=arguments.tokens, eval_prompts=8 * world.size, threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = our_run.build(config, arguments.prompt_tokens, Path(folder), lambda told: None, world)
        watch = our_run.Watch(run, None)
        sums = Timed(world.sum_gradients)
        world.sum_gradients = sums
        with run.recorder:
            train(run)
        masters = run.policy.store.parameters()
        for master in masters:
            master.grad = torch.zeros_like(master)
        alone = Timed(type(world).sum_gradients.__get__(world))
        for _ in range(REPETITIONS):
            world.gather(None)
            alone(masters)
        run.engine.close()
        steps = watch.record()
    tokens = PROMPTS * world.size * GROUP * steps["completion_tokens"]
    size = sum(master.numel() for master in masters)
    return steps | {
        "tokens_per_second": round(tokens / steps["step_s"], 1),
        "sum_s": round(statistics.median(sums.seconds[2:] or sums.seconds), 5),
        "all_reduce_s": round(statistics.median(alone.seconds), 5),
        "gradient_bytes": 4 * size,
        "start_s": round(watch.first - arguments.started, 1),
    }


class Timed:
    """A function, and the seconds of its calls, a GPU's work included."""

    def __init__(self, function: Any):
        self.function, self.seconds = function, []

    def __call__(self, masters: Sequence[Any]) -> None:
        """See World.sum_gradients."""
        self.wait(masters)
        start = time.perf_counter()
        self.function(masters)
        self.wait(masters)
        self.seconds.append(time.perf_counter() - start)

    def wait(self, masters: Sequence[Any]) -> None:
        """For what a GPU still has to do."""
        if masters[0].device.type == "cuda":
            import torch

            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
