"""The GGUF of an adapter is the adapter, and llama.cpp computes with it what PEFT computes."""

import json
import re
import shlex
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_models import VOCABULARY

from grpo.export.__main__ import main

gguf = pytest.importorskip("gguf")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
OF_LLAMA_CPP = {"mistral": "llama"}
TOKENS = [5, 17, 40, 99, 3, 8, 60]


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(checkpoint, name, folder, **fields):
    """PEFT's model with a random adapter that it has written."""
    torch.manual_seed(3)
    settings = dict(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(opened(checkpoint(name)), peft.LoraConfig(**(settings | fields))).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def neighbours(rows, heads):
    """For each row of llama.cpp's that of Hugging Face's: the two that are rotated together, one after the other."""
    half = rows // heads // 2
    return [head * 2 * half + which * half + pair for head in range(heads) for pair in range(half) for which in (0, 1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_holds_the_adapter(name, checkpoint, tmp_path):
    theirs = adapted(checkpoint, name, tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), "--to", str(tmp_path / "out"), "--gguf"]) == 0
    read = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {key: read.get_field(key).contents() for key in ("general.type", "adapter.type", "general.architecture")}
    arch = OF_LLAMA_CPP.get(name, name)
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": arch}
    assert read.get_field("adapter.lora.alpha").contents() == 6.0
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    linears = [(n, m) for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert len(tensors) == 2 * len(linears)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if arch == "llama" else gguf.MODEL_ARCH[arch.upper()], 3)
    for linear, module in linears:
        theirs_a, theirs_b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        there = names.get_name(linear.removeprefix("base_model.model."))
        a, b = (tensors[f"{there}.weight.lora_{x}"] for x in "ab")
        if arch == "llama" and linear.endswith(("q_proj", "k_proj")):
            turned, order = b, neighbours(len(b), 4 if linear.endswith("q_proj") else 2)
            b = torch.empty_like(turned)
            b[order] = turned
        assert torch.equal(a, theirs_a) and torch.equal(b, theirs_b), linear


def test_every_linear_keeps_its_own_scale(checkpoint, tmp_path):
    scales = dict(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3.5})
    theirs = adapted(checkpoint, "qwen3", tmp_path / "adapter", **scales)
    assert main([str(tmp_path / "adapter"), "--to", str(tmp_path / "out"), "--gguf"]) == 0
    read = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    alpha = read.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    for linear, there in (("q_proj", "attn_q"), ("o_proj", "attn_output"), ("v_proj", "attn_v")):
        module = theirs.get_submodule(f"base_model.model.model.layers.1.self_attn.{linear}")
        a, b = (tensors[f"blk.1.{there}.weight.lora_{x}"] for x in "ab")
        torch.testing.assert_close(alpha / len(a) * b @ a, module.get_delta_weight("default"))


# ---- llama.cpp itself


def write_base(model, arch, path):
    """The base as a GGUF, as llama.cpp's documents say that one is laid out."""
    config, out = model.config, gguf.GGUFWriter(path, arch)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for add, value in {
        out.add_block_count: config.num_hidden_layers, out.add_context_length: 256, out.add_key_length: head,
        out.add_embedding_length: config.hidden_size, out.add_feed_forward_length: config.intermediate_size,
        out.add_head_count: heads["q_proj"], out.add_head_count_kv: heads["k_proj"], out.add_value_length: head,
        out.add_rope_dimension_count: head, out.add_rope_freq_base: config.rope_parameters["rope_theta"],
        out.add_layer_norm_rms_eps: config.rms_norm_eps, out.add_vocab_size: VOCABULARY,
    }.items():  # fmt: skip
        add(value)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"<{token}>" for token in range(VOCABULARY)])
    out.add_token_scores([0.0] * VOCABULARY)
    out.add_token_types([2, 3, 3, *[1] * (VOCABULARY - 3)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        linear = module.rpartition(".")[2]
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        if arch == "llama" and linear in heads:
            weight = weight[neighbours(len(weight), heads[linear])]
        if arch == "gemma" and "norm" in module:
            weight = weight + 1
        out.add_tensor(f"{names.get_name(module)}.{kind}", weight.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def next_token(base, *adapters):
    """log p of every next token after TOKENS, by llama.cpp."""
    llama = pytest.importorskip("xllamacpp")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = str(base), 256, 1, 1
    settings.warmup, settings.lora_adapters = False, [llama.CommonAdapterLoraInfo(str(each), 1.0) for each in adapters]
    asked = {"prompt": TOKENS, "max_tokens": 1, "temperature": 0, "logprobs": VOCABULARY}
    answer = llama.Server(settings).handle_completions(asked)
    [found] = answer["choices"][0]["logprobs"]["content"]
    by_token = {each["id"]: each["logprob"] for each in found["top_logprobs"]}
    return torch.tensor([by_token[token] for token in range(VOCABULARY)])


@pytest.mark.skipif(sys.platform != "linux", reason="xllamacpp is for Linux here")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_llama_cpp_computes_what_peft_computes(name, checkpoint, tmp_path):
    pytest.importorskip("xllamacpp")
    model = opened(checkpoint(name))
    write_base(model, OF_LLAMA_CPP.get(name, name), tmp_path / "base.gguf")
    theirs = adapted(checkpoint, name, tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), "--to", str(tmp_path / "out"), "--gguf"]) == 0
    with torch.no_grad():
        before, after = (each(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1) for each in (model, theirs))
    assert (before - after).abs().max() > 0.5
    # llama.cpp keeps keys and values in 16 bits.
    torch.testing.assert_close(next_token(tmp_path / "base.gguf"), before, atol=0.03, rtol=0.0)
    adapter = tmp_path / "out" / "adapter.gguf"
    torch.testing.assert_close(next_token(tmp_path / "base.gguf", adapter), after, atol=0.03, rtol=0.0)


# ---- the whole model, by llama.cpp's converter

CONVERTER = """
import json, pathlib, sys
folder, _, out, _, kind = sys.argv[1:]
assert json.loads((pathlib.Path(folder) / "config.json").read_text())["model_type"] == "qwen3"
assert (pathlib.Path(folder) / "model.safetensors").exists() and (pathlib.Path(folder) / "tokenizer.json").exists()
{}
"""


def checkout(folder, ends):
    """A folder with a converter that is called as llama.cpp's is."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(ends))
    return str(folder)


def test_the_whole_model_goes_through_the_converter_that_is_given(trained, tmp_path):
    path = checkout(tmp_path / "llama.cpp", "pathlib.Path(out).write_text(kind)")
    flags = ["--to", str(tmp_path / "out"), "--merged", "--gguf", "--llama-cpp", path]
    assert main([str(trained), *flags]) == 0
    assert (tmp_path / "out" / "model.gguf").read_text() == "bf16"
    assert "FROM ./model.gguf" in (tmp_path / "out" / "Modelfile").read_text().splitlines()


def test_the_commands_in_the_document_do_what_it_says(trained, tmp_path, monkeypatch):
    document = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    checkout(tmp_path / "llama.cpp", "pathlib.Path(out).write_text(kind)")
    commands = "".join(re.findall(r"```bash\n(.*?)```", document, re.S)).splitlines()
    commands = [command for command in commands if "--push" not in command]  # to a hub: test_push.py
    assert len(commands) == 6
    for command in commands:
        python, _, module, *flags = shlex.split(command)
        assert (python, module) == ("python", "grpo.export")
        assert main([str(trained) if flag == "RUN" else flag for flag in flags]) == 0
        out = tmp_path / flags[flags.index("--to") + 1]
        expected = {"--llama-cpp": "model.gguf", "--merged": "model.safetensors", "--gguf": "adapter.gguf"}
        written = next((file for flag, file in expected.items() if flag in flags), "adapter_model.safetensors")
        assert (out / written).is_file()
    base = json.loads((tmp_path / "my-adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    program = re.search(r"```python\n(.*?)```", document, re.S)[1]
    there = {}
    exec(program.replace('"RUN"', repr(str(trained))).replace('"MODEL"', repr(base)), there)
    assert isinstance(there["model"], peft.PeftModel) and there["tokenizer"].chat_template


@pytest.mark.parametrize(
    ("ends", "told"), [("sys.exit('No module named x\\033[31m')", "No module named x"), ("pass", "it said nothing")]
)
def test_a_converter_that_fails_is_told_and_nothing_is_left(ends, told, trained, tmp_path, capsys):
    path = checkout(tmp_path / "llama.cpp", ends)
    flags = ["--to", str(tmp_path / "out"), "--merged", "--gguf", "--llama-cpp", path]
    assert main([str(trained), *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and "\033" not in error
    assert not (tmp_path / "out").exists()


def test_what_cannot_become_a_gguf_is_told(trained, checkpoint, tmp_path, capsys):
    adapted(checkpoint, "starcoder2", tmp_path / "adapter", target_modules=["q_proj"])
    for flags, told in (
        ([tmp_path / "adapter", "--gguf"], "llama.cpp's own converter"),
        ([trained, "--gguf", "--merged"], "give --llama-cpp PATH"),
        ([trained, "--gguf", "--llama-cpp", tmp_path], "Give --merged and --gguf too"),
        ([trained, "--gguf", "--merged", "--llama-cpp", tmp_path], "there is no convert_hf_to_gguf.py"),
        ([trained, "--gguf", "--model", checkpoint("llama")], "has no weight for"),
    ):
        assert main([*map(str, flags), "--to", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
