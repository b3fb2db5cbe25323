"""Checkpoints: a run's whole state in a folder of safetensors and JSON. Loading never runs code.

    checkpoints/step-000010/
        adapter_model.safetensors, adapter_config.json   PEFT's format, float32
        optimizer.safetensors                            the optimizer's moments; a value head, if one is trained
        rng.safetensors                                  random states of torch, CUDA, numpy and Python
        ahead.json                                       with --staleness 1: groups of the next step (grpo/ahead.py)
        README.md, tokenizer.json, chat_template.jinja   for other programs: how it is used, the model's tokenizer
        state.json                                       step, cursor, scores, where metrics.jsonl was; written last,
                                                         with the size and SHA-256 of those before README.md, and
                                                         of itself

A checkpoint is written under another name, synced to the disk and renamed: there is a whole one or none. Only folders
whose name is step- and digits count: left-step-000010 is one of a course that the run has left.

`best` in the run's folder is a text file of one line, the best checkpoint's path from there: a link would be lost on
some file systems, in archives and on the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from grpo.errors import UserError
from grpo.folder import BEST, CHECKPOINTS, STATE, is_checkpoint, list_checkpoints, resume_folder, run_of
from grpo.generators import Generators, from_tensors
from grpo.policy import Policy
from grpo.policy.adapter import adapter_files, load_adapter
from grpo.policy.companions import companions, contents
from grpo.policy.optimizer import optimizer_tensors, restore_optimizer
from grpo.system import open_folder
from grpo.usage import README, usage_of_adapter

OPTIMIZER, RNG, AHEAD = "optimizer.safetensors", "rng.safetensors", "ahead.json"
FORMAT = "grpo-checkpoint-2"
NO_DIGEST = "0" * 64  # stands for the SHA-256 of state.json where that is taken


@dataclass
class Progress:
    """How far a run is: everything of its state that is not a tensor."""

    run: str = ""  # the id of the run, as config.json has it
    start: str = ""  # fingerprint of the adapter that the run began from
    rows: dict[str, str] = field(default_factory=dict)  # fingerprints of those trained on and held out
    held_out: str = ""  # fingerprint of what the scores below are of: prompts, samples, measure
    step: int = 0  # steps done
    cursor: int = 0  # prompts handed out
    version: int = 0  # of the policy
    threads: int = 0  # of the CPU, that the run computes with; 0: not known
    tokens_per_batch: int = 0  # that sums of the update are taken over: another number rounds otherwise; 0: not known
    placed: dict[str, str] = field(default_factory=dict)  # {reward: where it is called}
    dense: list[str] = field(default_factory=list)  # projections that --quantization dynamic keeps in 16 bits
    double_quant: bool = False  # the scales of the base's blocks are in 8 bits, by our own choice or the user's
    batch_limit: list[int] = field(default_factory=list)  # how large batches may be: BatchLimit.state
    evaluated: int = -1  # steps done at the last held-out score
    best: float = -1.0  # best held-out score, the headline's, if there was any ...
    best_tie: float = 0.0  # ... what decides between scores that are equal to it: evaluate.standing ...
    best_step: int = -1  # ... and the checkpoint that has it
    first_scores: dict[str, float] = field(default_factory=dict)  # held-out, before training
    last_scores: dict[str, float] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)  # of metrics.jsonl and completions.jsonl, bytes
    canary: dict[str, Any] = field(default_factory=dict)  # what was last proved of the rollout engine: Canary.state
    audit: list[list[float]] = field(default_factory=list)  # the last steps' sums: Audit.state
    ahead: dict[str, Any] = field(default_factory=dict)  # groups of the next step: Ahead.state; in a file of its own


def save_checkpoint(folder: Path, policy: Policy, progress: Progress, generators: Generators, keep: int) -> Path:
    """Write checkpoints/step-N under the run's folder, then remove all but the last `keep` and the best.

    generators: as they were when `progress` was.

    Raises:
        OSError: it cannot be written, for want of space say; the earlier checkpoints are still there.
    """
    checkpoints = folder / CHECKPOINTS
    final = checkpoints / f"step-{progress.step:06d}"
    files = adapter_files(policy) | {
        OPTIMIZER: save(_on_cpu(optimizer_tensors(policy.optimizer) | policy.beside()) or {"none": torch.zeros(0)}),
        RNG: save(generators.tensors()),
        **({AHEAD: json.dumps(progress.ahead).encode()} if progress.ahead else {}),
    }
    title = f"{folder.name}, step {progress.step}"
    readme = usage_of_adapter(title, policy.source, str(final), policy.store.rank, in_a_run=True)
    # No part of the state: whoever changes them, to serve another chat template say, can still go on with the run.
    beside = dict(contents(companions(policy.source))) | {README: readme.encode()}
    draft = checkpoints / f".{final.name}.partial"
    before = checkpoints / f".{final.name}.before"  # of the same step, whose save was interrupted at its end
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name, content in files.items():
            write_synced(draft / name, content)
        for name, content in beside.items():
            _link_or_write(folder, draft / name, content)
        state = {
            "format": FORMAT,
            "progress": asdict(replace(progress, ahead={})),
            "files": {n: _fingerprint(c) for n, c in files.items()},
            "sha256": NO_DIGEST,
        }
        write_synced(draft / STATE, _signed(state))
        sync_folder(draft)
        shutil.rmtree(before, ignore_errors=True)
        with suppress(FileNotFoundError):
            final.rename(before)
        draft.rename(final)
        sync_folder(checkpoints)
        shutil.rmtree(before, ignore_errors=True)
        _point_to_best(folder, progress.best_step, final)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # where nothing has taken its place
            before.rename(final)
        raise
    _remove_old(folder, keep, progress.best_step)
    return final


def load_checkpoint(folder: Path, policy: Policy, note: Callable[[str], object] = print) -> Progress:
    """Put adapter, optimizer and random states back; return the progress.

    Raises:
        UserError: the folder is no checkpoint of ours, or a file of it is missing, truncated or altered.
    """
    progress = load_trained(folder, policy, note)
    try:
        tensors = load((folder / OPTIMIZER).read_bytes())
        tensors.pop("none", None)
        for name, tensor in policy.beside().items():
            tensor.copy_(tensors.pop(name))
        restore_optimizer(policy.optimizer, tensors)
        from_tensors(load((folder / RNG).read_bytes())).restore()
        progress.ahead = json.loads((folder / AHEAD).read_bytes()) if AHEAD in read_state(folder)[1] else {}
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"The checkpoint {folder} was not written by this version: {error}.") from error
    policy.version = progress.version
    return progress


def load_trained(folder: Path, policy: Policy, note: Callable[[str], object] = print) -> Progress:
    """Put the adapter of a checkpoint into the policy, after every file is what was written; return the progress.
    `note` is told where the adapter is only that of some linears.

    Raises:
        UserError: the folder is no checkpoint of ours, or a file of it is missing, truncated or altered.
    """
    progress = check_files(folder)
    if without := load_adapter(policy, folder):
        note(
            f"note: the adapter in {folder} has nothing for {len(without)} of the model's linear layers, such as "
            f"{without[0]}: they compute what the base computes."
        )
    return progress


def check_files(folder: Path) -> Progress:
    """Every file of a checkpoint is what was written; returns the progress.

    Raises:
        UserError: the folder is no checkpoint of ours, or a file of it is missing, truncated or altered.
    """
    progress, files = read_state(folder)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or _fingerprint(path.read_bytes()) != expected:
            raise UserError(
                f"{path} is missing or damaged: it is not what the checkpoint recorded ({expected['bytes']} bytes). "
                f"{_try_another(folder)}"
            )
    return progress


def read_state(folder: Path) -> tuple[Progress, dict[str, dict[str, Any]]]:
    """state.json of a checkpoint, checked: the progress, and the fingerprint of every other file.

    Raises:
        UserError: it is not one, of another version, or not as it was written.
    """
    path = folder / STATE
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{folder} is not a checkpoint: its {STATE} is no file. {_try_another(folder)}")
    try:
        content = path.read_bytes()
        state = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder} is not a checkpoint: its {STATE} cannot be read ({error}). {_try_another(folder)}"
        ) from error
    if not isinstance(state, dict) or not str(state.get("format")).startswith(FORMAT[:-1]):
        raise UserError(f"{folder} is not a checkpoint of this program: its {STATE} does not say {FORMAT!r}.")
    if state["format"] != FORMAT:
        raise UserError(
            f"{folder} was written by another version of this program ({reprlib.repr(state['format'])}, and this one "
            f"reads {FORMAT!r}). Go on with the version that wrote it, or start a new run; its adapter is PEFT's and "
            "opens in PeftModel as it is."
        )
    if _digest(content, state.get("sha256")) != state.get("sha256"):
        raise UserError(f"{path} is damaged: it is not what was written. {_try_another(folder)}")
    try:
        progress, files = Progress(**state["progress"]), dict(state["files"])
        unlike = [name for name, value in vars(Progress()).items() if type(getattr(progress, name)) is not type(value)]
        unlike += [name for name in (OPTIMIZER, RNG) if not {"bytes", "sha256"} <= dict(files[name]).keys()]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or of another version: {error}. {_try_another(folder)}") from error
    if unlike:
        raise UserError(f"{path} is damaged: {', '.join(unlike)} cannot be so. {_try_another(folder)}")
    return progress, files


def check_run(checkpoint: Path, run: str) -> None:
    """A checkpoint belongs to the run whose folder it lies in: steps and files of another do not go on from it.

    Raises:
        UserError: it is of another.
    """
    if read_state(checkpoint)[0].run != run:
        raise UserError(
            f"{checkpoint} is of another run than {run_of(checkpoint)}: their ids differ. Put it back where it was "
            "saved, or choose another."
        )


def _signed(state: dict[str, Any]) -> bytes:
    """state.json: JSON that says the SHA-256 of itself, taken with zeros instead of it."""
    unsigned = json.dumps(state, indent=2).encode()
    return unsigned.replace(NO_DIGEST.encode(), hashlib.sha256(unsigned).hexdigest().encode())


def _digest(content: bytes, said: object) -> str:
    """The SHA-256 of a state.json that says `said` of itself; nothing if that is none."""
    if not isinstance(said, str) or not re.fullmatch("[0-9a-f]{64}", said):
        return ""
    return hashlib.sha256(content.replace(said.encode(), NO_DIGEST.encode())).hexdigest()


def _try_another(folder: Path) -> str:
    return f"Give --resume or --eval another checkpoint of {folder.parent}."


def best_checkpoint(path: Path) -> Path:
    """The checkpoint with the best held-out score of a run, or the one at `path`.

    Raises:
        UserError: there is none.
    """
    if is_checkpoint(path):
        return path
    last = resume_folder(path)
    if last is None:
        raise UserError(f"{path} has no checkpoint to score yet. Go on with it: --resume {run_of(path)}.")
    best = last.with_name(f"step-{read_state(last)[0].best_step:06d}")
    return best if best.is_dir() else last


def _point_to_best(folder: Path, best_step: int, last: Path) -> None:
    """Let `best` name the checkpoint that --eval and an export take: the best by held-out score, else the last."""
    best = last.with_name(f"step-{best_step:06d}")
    draft = folder / f".{BEST}.partial"
    draft.unlink(missing_ok=True)  # of a run that was downloaded it may be a link to some other file
    write_synced(draft, f"{CHECKPOINTS}/{(best if best.is_dir() else last).name}\n".encode())
    draft.replace(folder / BEST)


def _link_or_write(folder: Path, path: Path, content: bytes) -> None:
    """A file that the last checkpoint has too, such as a tokenizer of 10 MB, is on the disk once."""
    for last in list_checkpoints(folder)[-1:]:
        there = last / path.name
        with suppress(OSError):  # a file system without links, another disk
            if not there.is_symlink() and there.is_file() and there.read_bytes() == content:
                os.link(there, path)
                return
    write_synced(path, content)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def write_synced(path: Path, content: bytes) -> None:
    """Write a file; when this returns it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """When this returns the names in the folder are on the disk."""
    descriptor = open_folder(folder)
    if descriptor is None:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _remove_old(folder: Path, keep: int, best_step: int) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        if old.name != f"step-{best_step:06d}":
            shutil.rmtree(old)
