"""What a checkpoint's files say is believed only if it is what was written, by --resume and by --eval."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from tiny_models import CPU, build_policy

from grpo.checkpoint import STATE, Progress, check_run, read_state, save_checkpoint
from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import list_checkpoints, saved_run
from grpo.generators import reader
from grpo.resolve import resolve
from grpo.run import main
from grpo.verbs.train import fingerprint_of_held_out


def flipped(content, bit):
    """The same bytes with one bit the other way."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_flipped_bit_of_the_state_is_believed(toy_run):
    last = list_checkpoints(toy_run)[-1]
    whole = (last / STATE).read_bytes()
    bits = random.Random(0).sample(range(8 * len(whole)), 1500)
    for bit in bits:
        (last / STATE).write_bytes(flipped(whole, bit))
        with pytest.raises(UserError):
            read_state(last)
    (last / STATE).write_bytes(whole)
    assert read_state(last)[0].step == 4


@pytest.mark.parametrize("verb", ["--resume", "--eval"])
@pytest.mark.parametrize("name", [STATE, "adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_is_told_before_anything_is_cut(verb, name, toy_run, capsys):
    earlier, last = list_checkpoints(toy_run)
    metrics = toy_run / "metrics.jsonl"
    written = metrics.read_text()
    for checkpoint in (earlier, last):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(flipped(content, 8 * len(content) // 2 + 3))
    assert main([verb, str(last), *(["--steps", "5"] if verb == "--resume" else [])]) == 2
    told = capsys.readouterr().err
    assert any(f"{name} {what}" in told for what in ("is missing or damaged", "is damaged", "cannot be read"))
    assert metrics.read_text() == written


def test_a_save_of_a_step_that_is_saved_already_takes_its_place_or_leaves_it(tiny_config, tmp_path, monkeypatch):
    policy = build_policy(tiny_config())
    place = save_checkpoint(tmp_path, policy, Progress(step=3, version=1), reader(CPU)(), keep=2)
    assert save_checkpoint(tmp_path, policy, Progress(step=3, version=2), reader(CPU)(), keep=2) == place
    assert read_state(place)[0].version == 2
    rename = Path.rename

    def fails(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, policy, Progress(step=3, version=3), reader(CPU)(), keep=2)
    assert read_state(place)[0].version == 2
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_checkpoint_of_another_run_is_refused(toy_run, tmp_path, capsys):
    other = shutil.copytree(toy_run, tmp_path / "other")
    saved = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(saved | {"id": "another"}))
    for verb in ("--resume", "--eval"):
        assert main([verb, str(other)]) == 2
        assert "is of another run" in capsys.readouterr().err
    run = saved_run(str(toy_run))
    check_run(list_checkpoints(toy_run)[-1], run.id)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(hello=1), "is damaged: It says `hello`, which this version does not know."),
        (dict(task_sha256=None), "is damaged: it lacks 'task_sha256'."),
        (dict(config=3), "is damaged: config is 3 (int)."),
    ],
)
def test_what_a_run_s_configuration_must_say(changes, told, toy_run):
    saved = json.loads((toy_run / "config.json").read_text()) | changes
    (toy_run / "config.json").write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        saved_run(str(toy_run))
    assert told in str(caught.value)


def test_a_field_that_a_run_says_nothing_of_is_told(toy_run):
    saved = json.loads((toy_run / "config.json").read_text())
    del saved["config"]["kl_estimator"], saved["config"]["steps"]
    (toy_run / "config.json").write_text(json.dumps(saved))
    _, resolved = resolve(["--resume", str(toy_run), "--steps", "9"])
    assert resolved.unsaid == ["kl_estimator"]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(toy_run):
    last = list_checkpoints(toy_run)[-1]
    for path, read in [(last / STATE, lambda: read_state(last)), (toy_run / "config.json", lambda: saved_run(toy_run))]:
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match="is no file"):
            read()


def test_a_run_of_an_earlier_format_is_told_so(toy_run):
    last = list_checkpoints(toy_run)[-1]
    state = json.loads((last / STATE).read_text())
    (last / STATE).write_text(json.dumps(state | {"format": "grpo-checkpoint-1"}))
    with pytest.raises(UserError, match=r"another version of this program.*opens in PeftModel"):
        read_state(last)


@pytest.mark.slow
def test_scores_of_another_held_out_set_are_not_compared(toy_run, capsys):
    """pass@1 of four prompts is no measure for that of six."""
    before = read_state(list_checkpoints(toy_run)[-1])[0]
    assert main(["--resume", str(toy_run), "--steps", "5", "--eval-prompts", "6"]) == 0
    printed = capsys.readouterr().out
    assert "scored anew" in printed
    lines = [json.loads(line) for line in (toy_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 4, 4, 5]
    after = read_state(list_checkpoints(toy_run)[-1])[0]
    assert after.held_out != before.held_out
    assert after.first_scores == {name: lines[-3][name] for name in after.first_scores}
    assert main(["--resume", str(toy_run), "--steps", "6"]) == 0
    assert "scored anew" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["--resume", "--eval"])
@pytest.mark.parametrize(("flag", "kept"), [("--lora-rank", "4"), ("--lora-alpha", "32.0")])
def test_an_adapter_keeps_its_rank_and_scale(verb, flag, kept, trained):
    with pytest.raises(
        UserError, match=rf"{flag} is 7(\.0)?, but the adapter of .* was trained with {kept}, and keeps"
    ):
        resolve([verb, str(trained), flag, "7"])
    _, resolved = resolve([verb, str(trained), flag, kept.removesuffix(".0")])
    assert str(getattr(resolved.config, flag[2:].replace("-", "_"))) == kept


def test_a_held_out_set_is_known_by_all_that_its_score_depends_on():
    def fingerprint(prompts=((1, 2), (3,)), solved=("says", 1.0), **changes):
        return fingerprint_of_held_out(list(map(list, prompts)), solved, Config(**changes))

    assert fingerprint() == fingerprint(steps=7, learning_rate=1.0)
    others = [dict(prompts=((1,), (2, 3))), dict(solved=None), dict(solved=("says", 0.5)), dict(eval_samples=5),
              dict(eval_k=1), dict(temperature=0.9), dict(max_completion_tokens=8), dict(seed=1),
              dict(base="bf16"), dict(quantization="dynamic")]  # fmt: skip
    assert len({fingerprint(), *(fingerprint(**other) for other in others)}) == 1 + len(others)
