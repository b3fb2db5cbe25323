"""A run that begins from an adapter: found, taken up with its rank and alpha, kept, and the reference where asked."""

import json
import shutil
from functools import partial

import peft
import pytest
import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from tiny_models import build_policy, one_batch, randomise, reference_logprobs
from toy_task import SMALL, TASK

from grpo.config import Config
from grpo.embedded import MODEL_DIR
from grpo.errors import UserError
from grpo.folder import START, list_checkpoints
from grpo.policy.adapter import SETTINGS, WEIGHTS, adapter_files, describe
from grpo.policy.projections import Projection, ProjectionStore
from grpo.resolve import resolve
from grpo.run import main
from grpo.start import begin, fields_of, find_adapter, keep
from grpo.verbs.announce import over_its_adapter

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def written(model, folder, **fields):
    """PEFT's model over a checkpoint with a random adapter, which it has written."""
    torch.manual_seed(3)
    defaults = dict(r=4, lora_alpha=12, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**(defaults | fields))).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    theirs.save_pretrained(folder)
    return theirs


def begun(model, adapter, **fields):
    """A policy that began from an adapter, and what was told."""
    config = Config(**(dict(model=model, base="float32", device="cpu", adapter=str(adapter)) | fields))
    config = Config(**(vars(config) | fields_of(config, ())))
    policy, notes = build_policy(config), []
    begin(config, policy, None, None, notes.append)
    return policy, notes


def logprobs_of(policy, groups, read=None):
    batch = one_batch(groups, policy.config)
    return (read or policy.read)(batch), batch.mask


@pytest.mark.parametrize("fields", [
    dict(r=8, lora_alpha=5),
    dict(r=3, use_rslora=True),
    dict(r=2, rank_pattern={"q_proj": 5}, alpha_pattern={"o_proj": 3.5}, target_modules=["q_proj", "o_proj"]),
], ids=str)  # fmt: skip
def test_the_run_computes_what_peft_computes_at_its_first_step(fields, checkpoint, groups, tmp_path):
    theirs = written(checkpoint("qwen3"), tmp_path / "adapter", **fields)
    policy, notes = begun(checkpoint("qwen3"), tmp_path / "adapter")
    assert policy.store.rank == policy.config.lora_rank == max(fields["r"], 5 * ("rank_pattern" in fields))
    assert policy.store.alpha == policy.config.lora_alpha
    assert float(policy.store.scale) == pytest.approx(policy.config.lora_alpha / policy.config.lora_rank)
    (logprobs, _), mask = logprobs_of(policy, groups)
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    torch.testing.assert_close(logprobs[mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert any("has nothing for 10 of" in note for note in notes) == ("target_modules" in fields)


def test_another_model_under_the_adapter_is_told(checkpoint, tmp_path):
    written(checkpoint("qwen3"), tmp_path)
    assert begun(checkpoint("qwen3"), tmp_path)[1] == []
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"base_model_name_or_path": "org/Another-7B"}))
    [note] = begun(checkpoint("qwen3"), tmp_path)[1]
    assert "says that it was trained over org/Another-7B" in note


@pytest.mark.parametrize("base, is_told", [("nf4", True), ("bf16", False)])
def test_other_base_weights_under_a_run_s_adapter_are_told(base, is_told, trained):
    notes = begun("embedded", trained, base=base)[1]
    assert [f"in float32, and these are in {base}: " in note for note in notes] == [True] * is_told


def test_a_pickled_adapter_is_read_and_no_code_in_it_runs(checkpoint, groups, tmp_path):
    written(checkpoint("qwen3"), tmp_path)
    (safe, _), mask = logprobs_of(begun(checkpoint("qwen3"), tmp_path)[0], groups)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    (pickled, _), mask = logprobs_of(begun(checkpoint("qwen3"), tmp_path)[0], groups)
    assert torch.equal(safe[mask], pickled[mask])

    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for content in ({"a": Runs()}, ["no", "names"], {"a": 3}):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(UserError, match="cannot be read"):
            describe(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- the reference policy


@pytest.mark.parametrize("reference", ["base", "start"])
def test_the_reference_is_the_base_or_what_the_run_began_from(reference, checkpoint, groups, tmp_path):
    theirs = written(checkpoint("qwen3"), tmp_path)
    policy, _ = begun(checkpoint("qwen3"), tmp_path, kl_coef=0.1, reference=reference)
    randomise(policy)
    (before, _), mask = logprobs_of(policy, groups)
    masters = [master.clone() for master in policy.store.parameters()]
    found, _ = logprobs_of(policy, groups, policy.reference_logprobs)
    with theirs.disable_adapter() if reference == "base" else torch.no_grad():
        expected, _ = reference_logprobs(theirs, groups, 1.0)
    torch.testing.assert_close(found[mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(now, then) for now, then in zip(policy.store.parameters(), masters, strict=True))
    assert torch.equal(logprobs_of(policy, groups)[0][0], before) and not torch.equal(found, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kept_adapter_stands_where_the_trained_one_stands(dtype):
    """Also where what is multiplied by is a copy in 16 bits; and what was trained is there again after an error."""
    torch.manual_seed(0)
    store = ProjectionStore()
    store.add("one", Projection(torch.randn(6, 8).to(dtype), None, ["a", "b"], [4, 2], 3, dtype))
    store.initialise(6.0, seed=1)

    def randomised():
        with torch.no_grad():
            for master in store.parameters():
                master.normal_()
        store.refresh()
        return [mirror.clone() for mirror in store["one"].mirrors]

    x = torch.randn(2, 8).to(dtype)
    start = randomised()
    store.keep_start()
    at_start = store["one"](x)
    trained, addresses = randomised(), [mirror.data_ptr() for mirror in store["one"].mirrors]
    masters = [master.detach().clone() for master in store.parameters()]
    with pytest.raises(KeyError), store.started():
        assert all(map(torch.equal, store["one"].mirrors, start))
        assert torch.equal(store["one"](x), at_start)
        raise KeyError
    assert all(map(torch.equal, store["one"].mirrors, trained))
    assert all(map(torch.equal, (master.detach() for master in store.parameters()), masters))
    assert [mirror.data_ptr() for mirror in store["one"].mirrors] == addresses


def test_a_reference_without_an_adapter_is_refused():
    with pytest.raises(UserError, match="reference start is the adapter that the run begins from, and adapter names"):
        Config(reference="start")


# ---- finding it


def test_where_an_adapter_is_looked_for(trained, tmp_path):
    last = list_checkpoints(trained)[-1]
    best = json.loads((last / "state.json").read_text())["progress"]["best_step"]
    assert find_adapter(str(trained)).name == f"step-{best or 4:06d}"
    assert find_adapter(str(last)) == last
    copy = shutil.copytree(last, tmp_path / "copy")
    assert find_adapter(str(copy)) == copy
    (copy / "state.json").unlink()  # files in PEFT's format, wherever they come from
    assert find_adapter(str(copy)) == copy
    with pytest.raises(UserError, match=r"holds no adapter_config\.json\. Its folders copy do: name one of them"):
        find_adapter(str(tmp_path))
    with pytest.raises(UserError, match=r"holds no adapter_config\.json\. An adapter in PEFT's format is"):
        find_adapter(str(MODEL_DIR))
    for nothing in ("org/adapter", "./nothing", "a/b/c/d", "/no/where"):
        with pytest.raises(UserError, match="is neither a folder here nor to be had from the hub"):
            find_adapter(nothing)


def test_a_damaged_checkpoint_is_no_beginning(toy_run):
    last = list_checkpoints(toy_run)[-1]
    with (last / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="is missing or damaged"):
        find_adapter(str(last))


def test_an_adapter_in_the_cache_of_the_hub(monkeypatch, checkpoint, tmp_path):
    kept = tmp_path / "models--org--adapter"
    written(checkpoint("qwen3"), kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    monkeypatch.setattr("grpo.start.snapshot_download", partial(snapshot_download, cache_dir=tmp_path))
    assert describe(find_adapter("org/adapter")).rank == 4


def test_rank_and_alpha_are_the_adapter_s_and_a_flag_may_not_say_otherwise(checkpoint, tmp_path):
    path, adapter = tmp_path / "toy.py", tmp_path / "adapter"
    path.write_text(TASK.format(rewards="{letters: 1.0}", extra=""))
    written(MODEL_DIR, adapter, r=3, lora_alpha=5)

    def over(*flags):
        return over_its_adapter(resolve([str(path), "--adapter", str(adapter), *flags])[1])

    resolved = over()
    assert (resolved.config.lora_rank, resolved.config.lora_alpha) == (3, 5.0)
    assert {name: resolved.origins[name] for name in ("adapter", "lora_rank", "lora_alpha")} == {
        "adapter": "flag", "lora_rank": "adapter", "lora_alpha": "adapter"
    }  # fmt: skip
    assert over("--lora-rank", "3").origins["lora_rank"] == "flag"
    with pytest.raises(UserError, match=r"--lora-rank is 8, and the adapter .* has 3, which .* keeps\. Leave"):
        over("--lora-rank", "8")
    with pytest.raises(UserError, match=r"--lora-alpha is 4\.0, and the adapter .* has 5"):
        over("--lora-alpha", "4")


@pytest.mark.parametrize("name", ["base_model.model.lm_head.weight", "base_model.model.lm_head.lora_A.weight",
                                  "base_model.model.model.embed_tokens.lora_embedding_A"])  # fmt: skip
def test_a_head_or_an_embedding_that_was_trained_too_is_refused(name, checkpoint, tmp_path):
    written(checkpoint("qwen3"), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | {name: torch.ones(4, 4)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"has the head or the embedding too .*target_modules.*merge_and_unload"):
        begun(checkpoint("qwen3"), tmp_path)


# ---- whole runs


def train(folder, name, steps):
    """A run of the toy task that begins from the adapter in the folder."""
    small = " ".join(SMALL).replace("--lora-rank 4", "").split()
    more = f"--kl-coef 0.1 --reference start --save-every 2 --eval-every 2 --steps {steps} --run-dir {folder / name}"
    return main([str(folder / "toy.py"), *small, "--adapter", str(folder / "adapter"), *more.split()])


def prepared(folder):
    (folder / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return written(MODEL_DIR, folder / "adapter", r=3, use_rslora=True, target_modules=["q_proj", "v_proj"])


def opened(adapter):
    """The embedded model with an adapter, by PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def test_a_run_begins_from_the_adapter_and_what_it_saves_opens_in_peft(groups, tmp_path, capsys):
    theirs = prepared(tmp_path)
    assert train(tmp_path, "run", 1) == 0
    told = capsys.readouterr().out
    assert "LoRA of rank 3, " in told and f"trainable parameters, begun from {tmp_path / 'adapter'}" in told
    assert "has nothing for" in told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [step] = [line for line in lines if "mismatch/kl" in line]
    assert step["mismatch/kl"] < 1e-10 and step["sync/gap"] < 1e-4 and step["sync/moved"] > 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["lora_rank"] == 3 and saved["origins"]["lora_rank"] == "adapter"
    kept = opened(tmp_path / "run" / START)
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    torch.testing.assert_close(reference_logprobs(kept, groups, 1.0)[0], expected, atol=1e-5, rtol=1e-5)
    trained = list_checkpoints(tmp_path / "run")[-1]
    after = opened(trained)
    policy, _ = begun("embedded", trained)
    (logprobs, _), mask = logprobs_of(policy, groups)
    expected, _ = reference_logprobs(after, groups, 1.0)
    torch.testing.assert_close(logprobs[mask].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_resumed_without_what_it_began_from_it_is_the_uninterrupted_run(tmp_path, capsys):
    prepared(tmp_path)
    assert train(tmp_path, "whole", 4) == train(tmp_path, "half", 2) == 0
    shutil.rmtree(tmp_path / "adapter")
    half = tmp_path / "half"
    for flags, told in (["--adapter", "other"], "--adapter is other, but the run in"), (["--lora-rank", "4"], "keeps"):
        assert main(["--resume", str(half), *flags]) == 2 and told in capsys.readouterr().err
    kept = half / START / WEIGHTS
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + b"\x01")
    assert main(["--resume", str(half), "--steps", "4"]) == 2 and "it was changed" in capsys.readouterr().err
    kept.write_bytes(content)
    assert main(["--resume", str(half), "--steps", "4"]) == 0
    for name in (WEIGHTS, "optimizer.safetensors"):
        ours, theirs = (tmp_path / run / "checkpoints" / "step-000004" / name for run in ("half", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    # With the kept one gone the other reference will do; a run without a checkpoint starts over from what was kept.
    shutil.rmtree(half / START)
    assert main(["--resume", str(half), "--steps", "5"]) == 2 and "--reference base" in capsys.readouterr().err
    assert main(["--resume", str(half), "--steps", "5", "--reference", "base"]) == 0
    whole = tmp_path / "whole"
    shutil.rmtree(whole / "checkpoints")
    assert main(["--resume", str(whole), "--steps", "2"]) == 0
    assert "the run starts over" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_begins_from_another_run_and_a_model_is_scored_with_an_adapter(toy_run, tmp_path, capsys):
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    small = " ".join(SMALL).replace("--lora-rank 4", "").split()
    assert main([str(path), "--eval", "embedded", "--adapter", str(toy_run), *small]) == 0
    with_adapter = capsys.readouterr().out.splitlines()[-3:]
    assert main(["--eval", str(toy_run)]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == with_adapter
    assert main([str(path), *small, "--adapter", str(toy_run), "--steps", "1", "--run-dir", str(tmp_path / "on")]) == 0
    assert "begun from" in capsys.readouterr().out
    best = find_adapter(str(toy_run))
    assert load_file(tmp_path / "on" / START / WEIGHTS).keys() == load_file(best / WEIGHTS).keys()
    for name, tensor in load_file(tmp_path / "on" / START / WEIGHTS).items():
        assert torch.equal(tensor, load_file(best / WEIGHTS)[name])


def test_a_start_is_kept_once(checkpoint, tmp_path):
    written(checkpoint("qwen3"), tmp_path / "adapter")
    policy, _ = begun(checkpoint("qwen3"), tmp_path / "adapter")
    run = tmp_path / "run"
    run.mkdir()
    first = keep(run, policy)
    before = (run / START / WEIGHTS).read_bytes()
    assert before == adapter_files(policy)[WEIGHTS]
    randomise(policy)
    assert keep(run, policy) == first and (run / START / WEIGHTS).read_bytes() == before


def test_a_model_that_is_an_adapter_s_folder_is_begun_from_over_its_base(tmp_path, trained):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    checkpoint = list_checkpoints(trained)[-1]
    for given, base in ((trained, "embedded"), (checkpoint, "embedded")):
        _, resolved = resolve([str(tmp_path / "toy.py"), "--model", str(given)])
        assert (resolved.config.model, resolved.config.adapter) == (base, str(given))
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in (SETTINGS, WEIGHTS):
        shutil.copyfile(checkpoint / name, alone / name)
    _, resolved = resolve([str(tmp_path / "toy.py"), "--eval", str(alone)])
    assert (resolved.config.model, resolved.config.adapter) == (str(MODEL_DIR), str(alone))
    settings = json.loads((alone / SETTINGS).read_text()) | {"base_model_name_or_path": None}
    (alone / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not say which model"):
        resolve([str(tmp_path / "toy.py"), "--model", str(alone)])
    with pytest.raises(UserError, match="Leave one of them out"):
        resolve([str(tmp_path / "toy.py"), "--model", str(alone), "--adapter", str(trained)])
