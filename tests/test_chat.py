"""python -m grpo.chat: answers are those of the model that was trained, by independent code; what is written is shown
as it comes, and never obeyed; whatever is typed, or closed, ends in a sentence."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.chat.__main__ import main
from grpo.chat.dialogue import BASE, TRAINED, Answer, Dialogue
from grpo.chat.screen import Below, told_of
from grpo.chat.trained import Asked, open_trained
from grpo.embedded import MODEL_DIR
from grpo.errors import UserError
from grpo.folder import list_checkpoints

ROOT = Path(__file__).parents[1]
QUESTION = "Sara has 3 apples and buys 5 more. How many apples are there?"
SYSTEM = "Think, then answer."


def quiet(*_):
    pass


def silent(_who):
    return quiet


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def strong(trained, tmp_path_factory):
    """The run with an adapter that says something else than its base does, the same in every checkpoint's files."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("strong") / "adapter"
    shutil.copytree(list_checkpoints(trained)[-1], folder)
    for name in ("state.json", "optimizer.safetensors", "rng.safetensors"):
        (folder / name).unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {n: w + 0.3 * torch.randn(w.shape, generator=generator) * ("lora_B" in n) for n, w in weights.items()}
    save_file(noisy, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def talk(strong):
    return open_trained(Asked(str(strong)), quiet)


def dialogue(talk, **fields):
    return Dialogue(talk, **(dict(temperature=0.0, max_tokens=24) | fields))


def expected(model, messages, most=24):
    """transformers' own greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    made = model.generate(**tokens, max_new_tokens=most, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_greedy_answers_are_those_of_transformers_and_peft(model, strong, talk):
    """Of both, turn by turn, each with its own history; with a system prompt."""
    conversation = dialogue(talk, system=SYSTEM)
    said = {BASE: [{"role": "system", "content": SYSTEM}], TRAINED: [{"role": "system", "content": SYSTEM}]}
    for prompt in (QUESTION, "And if she gives 2 away?"):
        for answer in conversation.ask(prompt, silent, quiet):
            theirs = model
            if answer.who == TRAINED:
                fresh = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
                theirs = PeftModel.from_pretrained(fresh, strong).eval()
            said[answer.who].append(user(prompt))
            assert answer.text == expected(theirs, said[answer.who]), answer.who
            said[answer.who].append(assistant(answer.text))
    assert said[BASE] != said[TRAINED], "or the test would show nothing of the adapter"


def test_what_comes_is_the_beginning_of_what_is_answered(talk):
    heard = {}
    answers = dialogue(talk).ask(QUESTION, lambda who: heard.setdefault(who, []).append, quiet)
    for answer in answers:
        texts = heard[answer.who]
        assert texts[-1] == answer.text and len(texts) > 5
        assert all(answer.text.startswith(text) for text in texts)
        assert texts == sorted(texts, key=len)


def test_the_same_seed_is_the_same_answer_at_any_temperature(talk):
    texts = [[a.text for a in dialogue(talk, temperature=t, seed=s).ask(QUESTION, silent, quiet)]
             for t, s in ((1.5, 1), (1.5, 1), (1.5, 2), (0, 1), (0, 2))]  # fmt: skip
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4]


def test_reset_system_and_temperature(talk):
    conversation = dialogue(talk)
    first = conversation.ask(QUESTION, silent, quiet)
    assert conversation.history[BASE][0] == user(QUESTION)
    assert conversation.ask(QUESTION, silent, quiet) != first, "there is a history"
    conversation.command("/reset")
    assert conversation.ask(QUESTION, silent, quiet) == first
    conversation.command(f"/system {SYSTEM}")
    assert conversation.system == SYSTEM and not conversation.history[BASE]
    assert conversation.command("/temperature 0.5") == "temperature 0.5" == conversation.command("/temperature")
    for wrong in ("/temperature hot", "/temperature nan", "/temperature -1", "/temperature 1e-9", "/nothing"):
        with pytest.raises(UserError):
            conversation.command(wrong)
    assert conversation.temperature == 0.5


def test_an_interrupted_answer_stays_as_far_as_it_came(talk):
    conversation = dialogue(talk)
    interrupts = []

    def listening(who):
        def heard(text):
            if who == BASE and len(text) > 8:
                raise KeyboardInterrupt

        return heard

    base, trained = conversation.ask(QUESTION, listening, lambda: interrupts.append(1))
    assert base.finish == "interrupted" and 8 < len(base.text) and trained.finish != "interrupted"
    assert conversation.history[BASE][-1] == assistant(base.text) and interrupts == [1]
    assert conversation.trained.policy.store.scale.item() != 0, "the adapter is on again"


def test_a_conversation_that_is_too_long_is_told(talk):
    conversation = dialogue(talk)
    with pytest.raises(UserError, match="/reset"):
        conversation.ask("apples " * talk.context, silent, quiet)
    with pytest.raises(UserError, match="empty"):
        conversation.ask(" ", silent, quiet)
    assert conversation.ask(QUESTION, silent, quiet), "and goes on"


# ---- what can be opened


def said_by(capsys, *words):
    code = main([*words, "--json"])
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_a_run_a_checkpoint_an_adapter_and_a_model(trained, strong, capsys):
    words = ["--prompt", QUESTION, "--temperature", "0", "--max-completion-tokens", "8"]
    last = list_checkpoints(trained)[-1]
    whole, of_last, of_adapter, of_model = (
        said_by(capsys, str(name), *words, *more)[1][0]["answers"]
        for name, more in ((trained, ["--checkpoint", "last"]), (last, []), (strong, []), ("embedded", []))
    )
    assert whole == of_last and set(whole) == {BASE, TRAINED}
    assert of_adapter[BASE] == whole[BASE] == of_model["model"] != of_adapter[TRAINED]
    alone = said_by(capsys, str(trained), *words, "--no-base")[1][0]["answers"]
    assert set(alone) == {TRAINED}


def test_the_task_s_system_prompt_is_the_default(toy_run, capsys):
    lines = (toy_run / "prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["messages"] = [{"role": "system", "content": SYSTEM}, *record["messages"]]
    (toy_run / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [str(toy_run), "--prompt", "1 + 1?", "--max-completion-tokens", "2"]
    assert said_by(capsys, *words)[1][0]["system"] == SYSTEM
    assert said_by(capsys, *words, "--system", "")[1][0]["system"] == ""
    (toy_run / "prompts.jsonl").write_text("not JSON")
    assert said_by(capsys, *words)[1][0]["system"] == ""


@pytest.mark.parametrize(
    "words, told",
    [
        (["gone/for/ever"], "no folder gone/for/ever"),
        (["{run}", "--checkpoint", "77"], "--checkpoint is 77"),
        (["{run}", "--temperature", "x"], "The temperature is x"),
        (["{run}", "--max-completion-tokens", "0"], "Use 1 or more"),
        (["{run}", "--prompt", "  "], "The prompt is empty"),
        (["embedded", "--checkpoint", "last"], "is a model"),
        (["{run}/checkpoints/../../"], "neither a run's folder nor an adapter's"),
    ],
)
def test_bad_input(trained, capsys, words, told):
    code, _, err = said_by(capsys, *(word.format(run=trained) for word in words))
    assert code == 2 and told in err


# ---- a terminal


def test_what_a_model_writes_is_shown_and_not_obeyed():
    written = []
    screen = Below(written.append)
    with screen.turn([TRAINED]) as listening:
        heard = listening(TRAINED)
        for text in ("a", "a\x1b[2J", "a\x1b[2J\u202eb", "something else", "a\x1b[2J\u202ebc"):
            heard(text)
    screen.done([Answer(TRAINED, "", 3, "stop")])
    assert "".join(written) == "\ntrained:\na\\x1b[2J\\u202ebc\n\n[trained: 3 tokens, stopped by itself]\n"
    assert told_of([Answer(BASE, "", 2, "length")]) == "base: 2 tokens, cut off"


def test_lines_from_a_pipe_until_it_is_closed(strong, capsys, monkeypatch):
    lines = f"{QUESTION}\n\n/temperature 0\n/wrong\n//slash\n/reset\n{QUESTION}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, answers, err = said_by(capsys, str(strong), "--max-completion-tokens", "6")
    assert code == 0 and [each["prompt"] for each in answers] == [QUESTION, "/slash", QUESTION]
    assert answers[1]["temperature"] == 0 and "There is no /wrong" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nnever asked\n"))
    assert said_by(capsys, str(strong))[:2] == (0, [])


def test_the_document_shows_what_is_printed(trained, capsys):
    """Line by line, but for what another run has learned to say."""
    page = (ROOT / "docs" / "chat.md").read_text()
    shown = page.split("<!-- output begin -->")[1].split("<!-- output end -->")[0].replace("```", "").split("\n")
    assert main([str(trained), "--prompt", QUESTION, "--max-completion-tokens", "4", "--system", "Be brief."]) == 0
    printed = capsys.readouterr().out.split("\n")

    def form(lines):
        """What is fixed: the first lines' words, who speaks, how it ended."""
        kept = [line for line in lines if re.match(r"layers: |.*Temperature|system prompt|base:|trained:|\[base", line)]
        return [re.sub(r"^.* over .*/|^system.*|\d+|stopped by itself|cut off", "", line) for line in kept]

    assert form(shown) == form(printed) and len(form(shown)) == 6
