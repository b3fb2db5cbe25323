"""Benchmarks of cases: models are what transformers reads, results are merged, errors are sentences."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import canary
import cases
import memory
import our_run
import random_models
import step
import step_table
from shapes import SHAPES, is_written, model_folder
from test_memory import plan_for

from grpo.memory import GIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny shape, in bf16 and in NF4."""
    folder = tmp_path_factory.mktemp("models")
    for quantized in (False, True):
        random_models.write_model("tiny", folder, quantized)
    return folder


# ---- models


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_is_whole_and_of_the_shape(folder, quantized):
    """transformers misses nothing in it, finds nothing else, and computes with it; weights are as wide as they say."""
    target = model_folder("tiny", quantized, folder)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight
    assert embedding.shape == (SHAPES["tiny"]["vocab_size"], SHAPES["tiny"]["hidden_size"])
    assert abs(embedding.std().item() - random_models.DEVIATION) < 1e-3
    assert torch.equal(model.model.norm.weight, torch.ones(SHAPES["tiny"]["hidden_size"]))
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_model_in_4_bits_has_every_linear_of_a_layer_so_and_no_other(folder):
    target = model_folder("tiny", True, folder)
    stored = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    packed = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.uint8}
    packed = {name for name in packed if name.endswith("_proj")}
    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    layers = range(SHAPES["tiny"]["num_hidden_layers"])
    assert packed == {f"model.layers.{layer}.{name}" for layer in layers for name in linears}


def test_shards_are_cut_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(random_models, "SHARD_BYTES", 1000)
    tensors = {f"{n}": torch.randn(100) for n in range(7)}
    random_models.write_shards(tmp_path, iter(tensors.items()))
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) == 3
    for name, file in places.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_half_written_model_is_none(folder, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tokenizer.json").touch()
    assert is_written("tiny", False, folder) and not is_written("tiny", False, tmp_path)


@pytest.mark.parametrize("shape", ["tiny", "llama-3.1-8b"])
def test_questions_are_exactly_so_long(shape):
    """As the chat template makes them; and no two are the same."""
    tokenizer = random_models.make_tokenizer(SHAPES[shape])
    assert len(tokenizer) == SHAPES[shape]["vocab_size"]
    texts = random_models.questions(tokenizer, 5, 64, seed=1)
    for text in texts:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert len(tokenizer(rendered, add_special_tokens=False)["input_ids"]) == 64
    assert len(set(texts)) == 5


# ---- processes


def script(tmp_path, text):
    (tmp_path / "case.py").write_text(text)
    return str(tmp_path / "case.py")


def test_a_case_is_its_last_result_and_all_else_is_shown(tmp_path, capfd):
    text = "import json, sys; print('hello'); print('RESULT ' + json.dumps({'a': 1}))"
    record = cases.run_case(script(tmp_path, text), "tiny/trl", [], None)
    assert record["a"] == 1 and "failed" not in record
    assert capfd.readouterr().out == "hello\n"


def test_a_case_that_dies_has_failed(tmp_path):
    record = cases.run_case(script(tmp_path, "import os; os.abort()"), "tiny/trl", [], None)
    assert record == {"failed": "ended with code -6 and no result"}


def test_a_case_that_hangs_is_ended_with_what_it_started(tmp_path):
    """Its child holds a lock as long as it lives."""
    lock = tmp_path / "lock"
    text = (
        "import fcntl, signal, subprocess, sys\n"
        f"held = open({str(lock)!r}, 'w'); fcntl.flock(held, fcntl.LOCK_EX)\n"
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], pass_fds=[held.fileno()])\n"
        "signal.pause()\n"
    )
    record = cases.run_case(script(tmp_path, text), "tiny/trl", [], time.time() - cases.GRACE)
    assert record == {"failed": "was not done at the deadline"}
    with open(lock, "w") as free:
        fcntl.flock(free, fcntl.LOCK_EX)  # would wait for ever if one of them lived


def test_a_case_is_told_what_the_gpu_gave_out_meanwhile(tmp_path, monkeypatch):
    """By an nvidia-smi that sees 1,000 MiB before, 5,096 once the case runs, and 1,000 again."""
    seen = tmp_path / "seen"
    os.mkfifo(seen)
    program = tmp_path / "nvidia-smi"
    watching = f"printf '1000\\n5096\\nERR\\n'; echo > {seen}; exec tail -f /dev/null"
    program.write_text(f'#!/bin/sh\ncase "$*" in *-lms*) {watching};; *) echo 1000;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = f"open({str(seen)!r}).read(); print('RESULT {{}}')"
    record = cases.run_case(script(tmp_path, text), "tiny/trl", [], None)
    assert record.pop("device_peak_at_s") >= 0 and record == {"device_peak_gib": 4.0}


def test_a_case_leaves_when_nobody_waits_for_it(tmp_path):
    """Also where the process that waits is killed: the GPU would stay full."""
    lock, here = tmp_path / "lock", str(Path(cases.__file__).parent)
    text = (
        f"import fcntl, signal, sys; sys.path.append({here!r}); import cases\n"
        f"held = open({str(lock)!r}, 'w'); fcntl.flock(held, fcntl.LOCK_EX); print('begun', flush=True)\n"
        "cases.answer({}, signal.pause)\n"
    )
    name = script(tmp_path, text)
    waiting = f"import sys; sys.path.append({here!r}); import cases; cases.run_case({name!r}, '', [], None)"
    with subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.kill()
    with open(lock, "w") as free:
        fcntl.flock(free, fcntl.LOCK_EX)


def test_nothing_is_begun_behind_the_deadline(monkeypatch, capsys, tmp_path):
    given = ["--only", "tiny/trl", "--deadline", "-1", "--out", str(tmp_path), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step.py", *given])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 1 and "not begun: tiny/trl" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ours_is_measured_by_the_command(folder, tmp_path):
    """Two steps of the product on a CPU: completions are exactly as long as asked, and the stages make the step."""
    given = ["--only", "tiny/ours-nf4", "--device", "cpu", "--steps", "2", "--tokens", "8", "--prompt-tokens", "40"]
    command = [sys.executable, step.__file__, *given, "--set", "mini_batches=2", "--folder", str(folder)]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((name, record),) = kept(tmp_path / "step-cpu.json").items()
    assert name == "tiny/ours-nf4/tokens=8/prompt-tokens=40/mini_batches=2"
    assert record["completion_tokens"] == 8 and record["ran"]["base"] == "nf4" and len(record["all_steps_s"]) == 2
    stages = sum(record[f"{stage}_s"] for stage in ("rollout", "update", "sync", "other"))
    assert 0 < record["rollout_s"] < record["step_s"] == pytest.approx(stages, abs=1e-3)
    assert record["start_s"] > record["step_s"] and record["versions"]["torch"] == torch.__version__


def test_a_long_context_is_made_up_behind_what_was_sampled(folder):
    """Over a checkpoint in NF4; the update reads every token, and the canary and the audit still run."""
    model = model_folder("tiny", True, folder)
    config = our_run.our_config(
        model, "nf4", "cpu", steps=3, prompts_per_step=1, group_size=2, eval_prompts=2, max_completion_tokens=60
    )
    record = our_run.measure(config, 40, started=time.time(), until=time.time(), sampled=4)
    assert record["completion_tokens"] == 60 and record["gap"] > 1e-3
    assert len(record["all_steps_s"]) == 1, "no step is begun behind the deadline"


@pytest.mark.slow
def test_honest_steps_of_the_canary_and_a_stale_engine(folder, tmp_path):
    given = ["--only", "tiny/nf4", "--device", "cpu", "--steps", "2", "--rates", "1e-5", "1e-3", "--more", "20"]
    command = [sys.executable, canary.__file__, *given, "--tokens", "8", "--prompts", "2", "--folder", str(folder)]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [record] = kept(tmp_path / "canary-cpu.json").values()
    assert [(one["rate"], one["steps"], one["alarm"]) for one in record["honest"]] == [(1e-5, 2, ""), (1e-3, 2, "")]
    assert record["stale"]["steps"] and "engine" in record["stale"]["sentence"]
    assert "stale found after" in done.stdout


@pytest.mark.parametrize("name", memory.KNOWN)
def test_a_case_of_memory_is_as_long_as_its_name_says_and_fits_its_model(name):
    case, shape = memory.KNOWN[name], name.split("/")[0]
    longest = case.prompt_tokens + case.completion_tokens
    assert name.partition("@")[0] == f"{shape}/{case.prompts * case.group}x{longest}"
    assert longest <= SHAPES[shape].get("max_position_embeddings", random_models.CONTEXT)


def test_what_a_run_foretells_is_read_from_its_plan():
    plan = plan_for(40)
    record = our_run.foretold(["threads: 1", plan.table()])
    assert record["predicted_gib"] == pytest.approx(max(plan.peaks) / GIB, abs=0.05)
    assert record["plan"] == plan.table().splitlines()


# ---- tables


def measured(step_s, **more):
    stages = {"rollout_s": 0.5 * step_s, "update_s": 0.25 * step_s, "sync_s": 0.125, "old_logp_s": 0.0, "other_s": 0.01}
    told = {"start_s": 61.2, "device_peak_gib": 21.37, "compiled_before": False, "ran": {"base": "nf4"}}
    return {"step_s": step_s, **stages, **told, "versions": {"torch": "2.11.0", "trl": "1.15.0"}} | more


def rows_of(table):
    """The cells of each line of a table that says something."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_steps_are_told_whole_and_in_parts(tmp_path):
    path = cases.results_path(tmp_path, "step", "NVIDIA H100 80GB HBM3")
    about = {"device": "NVIDIA H100 80GB HBM3", "command": "python benchmarks/step.py", "prompts": 8, "group_size": 8,
             "prompt_tokens": 256, "completion_tokens": 512, "lora_rank": 32}  # fmt: skip
    results = cases.Results(path, about, step.add_ratios)
    results.keep("llama-3.1-8b/trl", measured(10.0, compiled_before=True), "")
    results.keep("llama-3.1-8b/ours-nf4", measured(5.0), "")
    results.keep("llama-3.1-8b/ours-nf4/recompute=none", measured(4.0), "")
    results.keep("llama-3.1-8b/unsloth", {"failed": "Broken: a | b\nc"}, "")
    short = rows_of(step_table.steps_in_short(tmp_path))
    whole = rows_of(step_table.whole_steps(tmp_path))
    assert len(whole) == 4 and whole == short[:4]  # the header and three contenders
    assert path.name == "step-nvidia-h100-80gb-hbm3.json"
    assert ["llama-3.1-8b", "**ours**, NF4 base", "5.00", "1.00", "21.4", "61", "1"] in short
    trl = "TRL 1.15.0, bf16, no pass for old log-probabilities"
    assert ["llama-3.1-8b", trl, "10.00", "2.00", "21.4", "61, compiled before", "1"] in short
    assert ["llama-3.1-8b", "Unsloth, 4 bits", "failed: Broken: a / b c", "", "", "", "1"] in short
    assert ["llama-3.1-8b", trl, "5.00", "2.50", "0.12", "0.00", "0.01"] in short
    assert not any("recompute" in cell for row in short for cell in row)
    everything = rows_of(step_table.steps(tmp_path))
    assert ["llama-3.1-8b", "**ours**, NF4 base, recompute=none", "4.00", "0.80", "21.4", "61", "1"] in everything
    assert "torch 2.11.0" in step_table.steps(tmp_path)


def test_peaks_are_told_beside_what_is_allowed_and_predicted(tmp_path):
    path = cases.results_path(tmp_path, "memory", "NVIDIA H100")
    about = {"device": "NVIDIA H100", "command": "python benchmarks/memory.py", "lora_rank": 32}
    results = cases.Results(path, about, memory.judge)
    results.keep("llama-3.1-8b/8x20256", measured(9.0, limit_gib=20, predicted_gib=24.0, reserved_peak_gib=15.0), "")
    results.keep(
        "qwen2.5-14b/64x768@24/recompute=none", {"limit_gib": 24, "failed": "torch.OutOfMemoryError: CUDA"}, ""
    )
    told = rows_of(step_table.memory(tmp_path))
    assert ["llama-3.1-8b", "8 x 20,256", "20", "21.4, more than allowed", "24.0", "2.25"] in told
    assert ["qwen2.5-14b", "64 x 768, recompute=none", "24", "failed: torch.OutOfMemoryError: CUDA", "", ""] in told
    assert kept(path)["llama-3.1-8b/8x20256"]["predicted_off"] == pytest.approx(24 / 21.37 - 1, abs=1e-3)


def test_what_was_tried_on_a_cpu_is_in_no_table(tmp_path):
    results_in(tmp_path / "step-cpu.json").keep("tiny/ours-nf4", measured(1.0), "")
    assert step_table.steps(tmp_path) == step_table.steps_in_short(tmp_path) == step_table.memory(tmp_path) == ""


# ---- results


def results_in(path):
    path.parent.mkdir(exist_ok=True)
    return cases.Results(path, {"device": "cpu"}, step.add_ratios)


def kept(path):
    return json.loads(path.read_text())["cases"]


def test_a_record_stays_until_its_case_is_measured_again(tmp_path):
    path = tmp_path / "step-cpu.json"
    first = results_in(path)
    first.keep("tiny/ours-nf4", {"step_s": 2.0}, "python benchmarks/step.py --only tiny/ours-nf4")
    first.keep("tiny/trl", {"step_s": 3.0}, "")
    second = results_in(path)
    second.keep("tiny/trl", {"step_s": 5.0}, "")
    assert [kept(path)[name]["run"] for name in ("tiny/ours-nf4", "tiny/trl")] == [1, 2]
    assert kept(path)["tiny/ours-nf4"]["command"] == "python benchmarks/step.py --only tiny/ours-nf4"
    assert kept(path)["tiny/trl"]["over_ours"] == 2.5


def test_ratios_follow_ours_when_it_is_measured_last(tmp_path):
    path = tmp_path / "step-cpu.json"
    results = results_in(path)
    results.keep("tiny/trl", {"step_s": 3.0}, "")
    assert "over_ours" not in kept(path)["tiny/trl"]
    results.keep("tiny/ours-nf4", {"step_s": 2.0}, "")
    results.keep("tiny/ours-nf4/recompute=none", {"step_s": 1.0}, "")
    results.keep("tiny/trl/tokens=8", {"step_s": 1.0}, "")
    assert kept(path)["tiny/trl"]["over_ours"] == 1.5
    assert kept(path)["tiny/ours-nf4/recompute=none"]["over_ours"] == 0.5
    assert "over_ours" not in kept(path)["tiny/trl/tokens=8"], "less work is no faster step"


def test_a_failure_takes_no_measurements_place(tmp_path, capsys):
    path = tmp_path / "step-cpu.json"
    results = results_in(path)
    results.keep("tiny/trl", {"failed": "out of memory"}, "")
    assert kept(path)["tiny/trl"]["failed"] == "out of memory"
    results.keep("tiny/trl", {"step_s": 3.0}, "")
    results.keep("tiny/trl", {"failed": "a GPU that fell off"}, "")
    assert kept(path)["tiny/trl"]["step_s"] == 3.0 and "is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, told",
    [
        (["--only", "qwen9/ours-nf4"], "there is no case qwen9/ours-nf4"),
        (["--only", "tiny/trl", "--set", "recompute"], "--set takes FIELD=VALUE"),
        (["--only", "tiny/trl", "--set", "colour=red"], "--set takes FIELD=VALUE"),
        (["--only", "tiny/trl", "--set", "recompute=sometimes"], "recompute is 'sometimes'"),
        (["--only", "tiny/trl", "--set", "kv_cache_gib=much"], "much"),
        (["--only", "tiny/ours-nf4", "--set", "dynamic_sampling=yes"], "True or False"),
        (["--only", "tiny/trl", "--set", "recompute=none"], "name cases of ours"),
        (["--steps", "0"], "must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_written(given, told, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["step.py", *given, "--out", str(tmp_path), "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_shape_alone_means_all_its_usual_cases():
    parser = step.build_parser()
    assert cases.chosen(parser, ["qwen3-1.7b", "qwen3-1.7b/trl"], step.USUAL, step.KNOWN) == [
        f"qwen3-1.7b/{contender}" for contender in step.CONTENDERS
    ]
    assert cases.chosen(parser, None, step.USUAL, step.KNOWN) == step.USUAL
