"""The Python API: what the command line does, said in a notebook; and what a notebook does to it."""

import importlib
import math
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from small_task import task_with
from toy_task import TASK

import grpo
from grpo.metrics import TIMING_PREFIXES
from grpo.record.jsonl import read_metrics
from grpo.run import main

FIELDS = dict(
    prompts_per_step=2,
    group_size=4,
    max_completion_tokens=7,
    eval_prompts=4,
    eval_samples=2,
    eval_k=2,
    eval_every=4,
    save_every=2,
    learning_rate=1e-3,
    lora_rank=4,
    mask_truncated=False,
    threads=1,
)


class Heard(grpo.Sink):
    """Keeps what it hears."""

    def __init__(self, at=None, act=None):
        self.events, self.at, self.act = [], at, act

    def step(self, step, metrics):
        self.events.append(("step", step))
        if step == self.at:
            self.act()

    def evaluation(self, step, scores, groups=()):
        self.events.append(("evaluation", step))

    def close(self):
        self.events.append(("close", None))


def numbers(folder):
    """What metrics.jsonl has that does not depend on the clock or on what else is in memory."""
    return [
        (step, {k: v for k, v in record.items() if not k.startswith(TIMING_PREFIXES)})
        for step, record in read_metrics(folder / "metrics.jsonl", None)
    ]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return path


@pytest.fixture(scope="module")
def made(toy):
    """(the run, what its sink heard): four steps."""
    heard = Heard()
    return grpo.train(toy, steps=4, run_dir=str(toy.parent / "run"), sinks=heard, **FIELDS), heard


def test_it_trains_what_the_command_line_trains(made, trained):
    run, heard = made
    assert numbers(run.folder) == numbers(trained)
    assert run.is_done and run.step == 4 and run.config.steps == 4 and run.report.exists()
    assert [event for event, _ in heard.events] == ["evaluation", *["step"] * 4, "evaluation", "close"]
    assert [record["step"] for record in run.metrics] == [0, 0, 1, 2, 3, 4]


def test_what_is_given_is_what_the_flags_are(toy, made):
    run = made[0]
    origins = grpo.load(run.folder).config
    assert origins == run.config and run.config.group_size == 4 and run.config.model == "embedded"


def test_scores_are_those_of_the_command_line(made, capsys):
    run = made[0]
    again = grpo.load(run.folder)
    scores = run.evaluate()
    told = capsys.readouterr().out
    assert main(["--eval", str(run.folder)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "pass@1" in line)
    assert line in told
    repeated = again.evaluate()
    assert {name: value for name, value in scores.items() if "reward" not in name} == {
        name: value
        for name, value in repeated.items()
        if "reward" not in name  # one reward draws at random
    }


def test_samples_are_the_model_s(made):
    """Greedy tokens and log-probabilities, beside transformers with PEFT's adapter merged in."""
    import peft

    from grpo.embedded import MODEL_DIR

    run = made[0]
    asked = ["Sara has 3 apples.", [{"role": "user", "content": "Sara has 5 apples and buys 7."}]]
    got = run.sample(asked, temperature=0, max_tokens=9)
    assert grpo.load(run.folder).sample(asked, temperature=0, max_tokens=9) == got
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.checkpoint)
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run.checkpoint).eval()
    for prompt, one in zip(asked, got, strict=True):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        context = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([context + one.tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert logits.argmax(-1).tolist() == one.tokens
        expected = logits.gather(1, ids[0, len(context) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=1e-4)
        assert one.finish in ("stop", "length") and one.prompt == prompt


def test_samples_follow_from_the_seed_and_the_place(made):
    run = made[0]
    first = run.sample(["a"] * 4, seed=1, temperature=3.0)
    assert len({tuple(each.tokens) for each in first}) > 1
    assert run.sample(["a"] * 4, seed=1, temperature=3.0) == first != run.sample(["a"] * 4, seed=2, temperature=3.0)
    assert run.sample("a", seed=1, temperature=3.0)[0].tokens == first[0].tokens
    assert run.sample([]) == []


@pytest.mark.parametrize("prompts, told", [
    (3, "prompts is 3"),
    (["a", " "], "Prompt 1 is an empty text"),
    ([["a"]], "whose messages must be"),
    ([None], "Prompt 0 is None"),
    (b"a", "prompts is b'a'"),
    ("word " * 5000, "the model's context has"),
])  # fmt: skip
def test_prompts_that_are_none(prompts, told, made):
    with pytest.raises(grpo.UserError, match=told):
        made[0].sample(prompts)


@pytest.mark.parametrize("asked, told", [
    (dict(temperature=-1), "The temperature is -1"),
    (dict(max_tokens=0), "max_tokens is 0"),
    (dict(max_tokens="9"), "max_tokens is '9'"),
])  # fmt: skip
def test_sampling_that_cannot_be(asked, told, made):
    with pytest.raises(grpo.UserError, match=told):
        made[0].sample("a", **asked)


def test_it_goes_on_as_the_command_line_does(toy, made, tmp_path):
    """Two steps, asked to stop by a sink, then to the fourth: the numbers of a run that was never stopped."""

    def stop():
        raise grpo.Stop("enough for now")

    run = grpo.train(toy, steps=4, run_dir=str(tmp_path / "run"), sinks=[Heard(1, stop)], **FIELDS)
    assert run.step == 2 and not run.is_done
    heard = Heard()
    gone_on = run.resume(sinks=heard)
    assert gone_on.is_done and numbers(gone_on.folder) == numbers(made[0].folder)
    assert [event for event in heard.events if event[0] == "step"] == [("step", 2), ("step", 3)]


def test_an_interrupt_ends_a_step_and_the_run_goes_on(toy, tmp_path, capsys):
    run = grpo.train(
        toy,
        steps=3,
        run_dir=str(tmp_path / "run"),
        sinks=Heard(0, lambda: signal.raise_signal(signal.SIGINT)),
        **FIELDS,
    )
    assert run.step == 1 and "run.resume()" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run.resume(steps=2).step == 2


def test_a_sink_that_fails_is_left_out(toy, tmp_path, capsys):
    wrong = Heard(0, lambda: 1 / 0)
    run = grpo.train(toy, steps=2, run_dir=str(tmp_path / "run"), sinks=[wrong], **FIELDS)
    told = capsys.readouterr().out
    assert run.is_done and "the sink Heard is left out from now on: step raised ZeroDivisionError" in told
    assert [event for event, _ in wrong.events].count("step") == 1


def test_a_task_without_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = task_with(rows=lambda split, data: [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(9)])
    task = replace(task, config=grpo.Config(model="embedded", base="float32", **FIELDS), held_out=3)
    run = grpo.train(task, {"steps": 1, "eval_every": 0})
    assert run.folder.parent == tmp_path / "runs" and run.step == 1
    assert run.resume(steps=2).step == 2
    assert main(["--resume", str(run.folder), "--steps", "3"]) == 2
    assert "with a Task that no file holds" in capsys.readouterr().err
    with pytest.raises(grpo.UserError, match=r"give the Task to grpo\.load"):
        grpo.load(run.folder).evaluate()
    assert not math.isnan(grpo.load(run.folder, task=task).evaluate()["eval/pass@1"])
    assert len(grpo.load(run.folder).sample("a")) == 1


@pytest.mark.parametrize("task, config, fields, told", [
    (None, None, {}, "task is None"),
    (7, None, {}, "task is 7"),
    ("nothing_like_it", None, {}, "There is no task file nothing_like_it"),
    ("gsm8k", 5, {}, "config is 5"),
    ("gsm8k", None, {"num_generations": 4}, "There is no field 'num_generations'. Here it is `group_size`"),
    ("gsm8k", None, {"lerning_rate": 4}, "Did you mean `learning_rate`"),
    ("gsm8k", None, {"learning_rate": "fast"}, "learning_rate is 'fast'"),
    ("gsm8k", {"group_size": 1}, {}, "group_size is 1"),
    ("gsm8k", None, {"recipe": "ppo"}, "recipe is 'ppo'. It is one of grpo, dapo"),
    ("gsm8k", None, {"sinks": Heard}, r"sinks is <class|Make one of it: Heard\(\)"),
    ("gsm8k", None, {"sinks": [Heard]}, r"Make one of it: Heard\(\)"),
    ("gsm8k", None, {"sinks": [print]}, "which is none"),
])  # fmt: skip
def test_what_cannot_be_is_told(task, config, fields, told):
    with pytest.raises(grpo.UserError, match=told):
        grpo.train(task, config, **fields)


def test_a_config_gives_what_is_not_its_default(toy):
    from grpo.api import _given

    assert _given(grpo.Config(steps=3), {"seed": 2}) == {"steps": 3, "seed": 2}


def test_runs_that_are_none(tmp_path, made):
    with pytest.raises(grpo.UserError, match="There is no run in"):
        grpo.load(tmp_path)
    with pytest.raises(grpo.UserError, match="has those of steps 2, 4"):
        grpo.load(made[0].folder, checkpoint=3)
    assert grpo.load(made[0].folder, checkpoint=2).checkpoint.name == "step-000002"
    assert grpo.load(str(made[0].folder / "checkpoints" / "step-000002")).checkpoint.name == "step-000002"


def test_one_policy_is_in_memory_and_a_closed_run_answers_again(made):
    run, other = made[0], grpo.load(made[0].folder)
    before = run.sample("a", temperature=0)
    assert other.sample("a", temperature=0) == before
    assert run._in_memory is None and other._in_memory is not None
    other.close()
    assert other._in_memory is None
    assert other.sample("a", temperature=0) == before


def test_two_threads_are_not_at_work_at_once(toy, tmp_path):
    told = []

    def second():
        try:
            grpo.train(toy, run_dir=str(tmp_path / "second"), **FIELDS)
        except grpo.UserError as error:
            told.append(str(error))

    def meanwhile():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    grpo.train(toy, steps=1, run_dir=str(tmp_path / "first"), sinks=Heard(0, meanwhile), **FIELDS)
    assert told and told[0].startswith("Another run is at work")


def test_the_function_and_the_module_of_the_loop_have_one_name():
    from grpo.train import Run

    importlib.import_module("grpo.train")
    assert grpo.train is sys.modules["grpo.api"].train and Run is sys.modules["grpo.train"].Run
    assert set(dir(grpo)) >= {"train", "load", "Run", "Sink", "Stop", "Config", "Task", "UserError"}


def test_import_is_light():
    program = "import sys, grpo; grpo.Config, grpo.Task, grpo.UserError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_notebook_shows_the_sentence_alone():
    assert grpo.UserError("No.\x1b[31m\nDo.")._render_traceback_() == ["error: No.\\x1b[31m\nDo."]
