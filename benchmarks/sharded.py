"""Updates over a base that no card holds: each rank keeps a part of it (--shard-base), a 70B's shape on two cards.

    torchrun --nproc-per-node 2 benchmarks/sharded.py            writes benchmarks/results/sharded-<gpu>.json
    torchrun --nproc-per-node 2 benchmarks/sharded.py --shape llama-3.1-8b
    python benchmarks/sharded.py --shape llama-3.1-8b            what it costs where one card would do
    torchrun --nproc-per-node 2 benchmarks/sharded.py --shape tiny --layers 6 --device cpu --tokens 64
                                                                 tries the script

Random NF4 weights are made on the device a layer at a time, and cut there: nothing ever holds them whole, and nothing
is read. Steps are those of SFT: answers of so many tokens, prompt included, LoRA r=32 on all linears, batches and
activations as the memory plan has them. The first step is not timed. Of each shape and number of ranks:

    tokens_per_second     of all ranks together: tokens of the answers and their prompts over the seconds of a step
    waiting               share of a step that rank 0's computation waited for the next layer to arrive
    allocated_gib         of rank 0's card once the model stands; peak_gib: the most that torch held; part_gib: of the
                          base, its part
    made_s, built_s       from the start of the measurement until the model stood, and until it was planned for too
    plan                  the memory plan, as it was told
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
from shapes import SHAPES
from work import PROMPT_TOKENS, RANK

from grpo.launcher import launched, leave_variables, take_own_gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-70b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, default=0, help="so many of them; 0: all")
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--answers", type=int, default=8, help="of a rank and step")
    parser.add_argument("--tokens", type=int, default=2048, help="of an answer, with its prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    name = cases.device_name(arguments.device)
    place = launched()
    if place is None:
        from grpo.world import ALONE

        tell(ALONE, arguments, name)
        return
    take_own_gpu(place)
    leave_variables()
    from grpo.ranks import joined

    with joined(place, print) as world:
        tell(world, arguments, name)


def tell(world: Any, arguments: argparse.Namespace, device: str) -> None:
    """Measure, and let rank 0 write it down beside what was measured before."""
    record = measure(world, arguments)

    def write() -> None:
        path = cases.results_path(arguments.out, "sharded", device)
        kept = json.loads(path.read_text()) if path.exists() else {"command": "benchmarks/sharded.py", "cases": {}}
        kept["device"] = device
        kept["cases"][f"{arguments.shape}/{world.size}"] = record
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=2) + "\n")
        print(json.dumps(record, indent=2))

    world.first(write)


def measure(world: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a rank sees."""
    import torch

    from grpo.config import Config
    from grpo.fitting import Fitting
    from grpo.memory_of_run import parkable, plan_memory, settle_memory
    from grpo.objectives import OBJECTIVES
    from grpo.packing import PACKERS, batch_limit
    from grpo.policy import Policy
    from grpo.rollout.idle import Idle

    began, on_gpu, told = time.perf_counter(), arguments.device == "cuda", []
    config = Config(
        model=arguments.shape, base="nf4", device=arguments.device, lora_rank=RANK, method="sft", engine="none",
        shard_base=True, double_quant="off", threads=1, prompts_per_step=arguments.answers, group_size=1,
        max_completion_tokens=arguments.tokens, max_grad_norm=1.0,
    )  # fmt: skip
    waits = Waits(world, on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(random_model(config, world, arguments, folder), config, world)
        made_s = time.perf_counter() - began
        allocated = torch.cuda.memory_allocated() if on_gpu else 0
        world.prepare(policy.masters())
        room = min(world.gather(parkable()))
        if plan := plan_memory(config, policy, arguments.tokens, 0, room, told.append):
            plan = settle_memory(plan, config, policy, Idle(), [], told.append)
            config = replace(config, tokens_per_batch=plan.tokens_per_batch)
    policy.fit = Fitting(batch_limit(config))
    if on_gpu:  # the plan's trial is no part of a step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pack, loss = PACKERS["sft"](config, policy.device, policy.fit.limit, world), OBJECTIVES["sft"](config)
    loaded_s, seconds, waited, losses = time.perf_counter() - began, [], [], []
    for step in range(arguments.steps):
        groups = answers(step, arguments.answers * world.size, arguments.tokens, policy.model.head.shape[0])
        world.gather(None)
        waits.spans.clear()
        start = time.perf_counter()
        losses.append(policy.update(pack(groups), loss, 1e-5)["policy/loss"])
        world.require_same(policy.digest, lambda others: f"ranks {others} have another adapter")
        seconds.append(time.perf_counter() - start)
        waited.append(waits.seconds() / seconds[-1])
    step_s = statistics.median(seconds[1:] or seconds)
    return {
        "layers": len(policy.model.layers),
        "step_s": round(step_s, 3),
        "steps_s": [round(each, 3) for each in seconds],
        "tokens_per_second": round(arguments.answers * world.size * arguments.tokens / step_s, 1),
        "waiting": round(statistics.median(waited[1:] or waited), 4),
        "losses": [round(each, 4) for each in losses],
        "allocated_gib": round(allocated / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else 0.0,
        "part_gib": round(sum(t.nbytes for t in waits.parts.values()) / 2**30, 3),
        "made_s": round(made_s, 1),
        "built_s": round(loaded_s, 1),
        "tokens_per_batch": policy.fit.limit.tokens,
        "plan": "\n".join(map(str, told)).splitlines(),
    }


def random_model(config: Any, world: Any, arguments: argparse.Namespace, folder: str) -> Any:
    """A model of a shape whose layers are made one after the other, each cut before the next one is made."""
    import torch
    import transformers

    from grpo.policy import fused
    from grpo.policy.allocator import grow_segments
    from grpo.policy.load import Loaded, choose_device
    from grpo.policy.recognition import recognise
    from grpo.policy.shards import Shards

    device = choose_device(config)
    if device.type == "cuda":
        grow_segments()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    settings = transformers.AutoConfig.for_model(**({"max_position_embeddings": 32768} | SHAPES[config.model]))
    settings.save_pretrained(folder)  # where the plan reads how large keys and values are
    layers = arguments.layers or settings.num_hidden_layers
    one = transformers.AutoConfig.for_model(**SHAPES[config.model] | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    with device:  # a CPU draws billions of numbers for a minute; it is on a CPU that models are recognised
        model = transformers.AutoModelForCausalLM.from_config(one, dtype=dtype)
    model = model.to("cpu").eval().requires_grad_(False)
    form = recognise(model, arguments.tokens)
    form = replace(form, layers=form.layers * layers)
    body = model.get_submodule(form.body)
    [layer] = body.layers
    body.layers = torch.nn.ModuleList([layer] * layers)  # for their norms
    shards = Shards(world) if world.size > 1 else None
    draw = torch.Generator(device).manual_seed(0)  # the same on all ranks
    store = fused.fuse(model, form, random_projections(draw, dtype, device), shards.take if shards else list)
    for parts in form.layers[0].linears.values():
        for part in parts:
            del layer.get_submodule(part).weight
    around = fused.as_they_are
    if shards:
        store.shared_by, around = world.size, shards.around
        shards.settle()
    ours = fused.FusedModel(model, form, store, recompute=True, around=around).to(device)
    store.initialise(config.lora_alpha, config.seed)
    return Loaded(ours, store, False, [2], folder)


def random_projections(draw: Any, dtype: Any, device: Any) -> Callable[..., Any]:
    """What builds a projection in NF4 of random codes and scales; of the linears it reads the sizes alone."""
    import torch
    from grpo_kernels.nf4 import BLOCK, NF4

    from grpo.policy.projections import Projection

    def build(_name: str, linears: list[Any], names: list[str]) -> Projection:
        sizes, columns = [each.out_features for each in linears], linears[0].in_features
        count = sum(sizes) * columns
        packed = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device=device, generator=draw)
        absmax = 0.04 * torch.rand(count // BLOCK, device=device, generator=draw)
        return Projection(NF4(packed, absmax, (sum(sizes), columns)), None, names, sizes, RANK, dtype)

    return build


def answers(step: int, count: int, tokens: int, vocabulary: int) -> list[Any]:
    """Answers of random tokens, the same on all ranks, a prompt before each."""
    import torch

    from grpo.types import Completion, Group, Prompt

    draw = torch.Generator().manual_seed(step)
    drawn = torch.randint(3, vocabulary, (count, tokens), generator=draw).tolist()
    before = min(PROMPT_TOKENS, tokens // 4)
    groups = [
        Group(Prompt(row, "", each[:before], {}), [Completion(each[before:], [0.0] * (tokens - before), "", "stop", 0)])
        for row, each in enumerate(drawn)
    ]
    for group in groups:
        group.advantages = torch.ones(1)
    return groups


class Waits:
    """How long a rank's computation waits for layers to arrive."""

    def __init__(self, world: Any, on_gpu: bool):
        self.collect, self.on_gpu = world.collect, on_gpu
        self.spans: list[tuple[Any, Any]] = []
        self.parts: dict[int, Any] = {}
        world.collect = self

    def __call__(self, part: Any, whole: Any) -> Callable[[], None]:
        arrived = self.collect(part, whole)
        self.parts[part.data_ptr()] = part

        def wait() -> None:
            begin = self.now()
            arrived()
            self.spans.append((begin, self.now()))

        return wait

    def now(self) -> Any:
        """This moment, on a GPU that of its stream."""
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """All of it together."""
        if not self.on_gpu:
            return sum(end - begin for begin, end in self.spans)
        import torch

        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.spans) / 1000


if __name__ == "__main__":
    main()
