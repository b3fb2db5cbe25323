"""Start: the adapter that a run begins from, found, taken up, and kept in the run's folder. Knows nothing of the loop.

    name of a folder, a run or the hub -> find_adapter -> fields_of: rank and alpha that a run over it has
                                                       -> begin: the policy computes with it
                                                       -> keep: start_adapter/ of the run, which a resumed run reads

A run is whole without what it began from: that may be another run's checkpoint, which is gone tomorrow.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from grpo.checkpoint import best_checkpoint, check_files, read_state, sync_folder, write_synced
from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import START, is_checkpoint, is_run, saved_run
from grpo.policy import Policy
from grpo.policy.adapter import PICKLED, SETTINGS, WEIGHTS, adapter_files, describe, load_adapter

NEEDED = f"An adapter in PEFT's format is {SETTINGS} and {WEIGHTS}"


def find_adapter(name: str) -> Path:
    """The folder with an adapter's files: of a run of ours its best checkpoint, which is as it was written.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if not path.is_dir():
        return _from_hub(name)
    if is_run(path) or is_checkpoint(path):
        path = best_checkpoint(path)
        check_files(path)
    if not (path / SETTINGS).is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{SETTINGS}"))
        hint = f" Its folders {', '.join(inside[:4])} do: name one of them." if inside else ""
        raise UserError(f"--adapter is {name}, which holds no {SETTINGS}.{hint or f' {NEEDED}.'}")
    return path


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS, PICKLED]))
    except Exception as error:  # the hub's client raises classes of its own, of half a dozen families
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".:")
        raise UserError(
            f"The adapter {name} is neither a folder here nor to be had from the hub: {reason}. Check the name and the "
            "network."
        ) from error


def fields_of(config: Config, given: Collection[str]) -> dict[str, Any]:
    """What a run over the configuration's adapter has of that: its rank and alpha, and the folder it was found in.

    given: the fields that the command line names.

    Raises:
        UserError: there is no such adapter, it cannot be computed here, or a flag asks for another rank or alpha.
    """
    folder = find_adapter(config.adapter)
    described = describe(folder)
    fields: dict[str, Any] = {"lora_rank": described.rank, "lora_alpha": float(described.alpha)}
    for name in fields.keys() & set(given):
        if getattr(config, name) != fields[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {getattr(config, name)}, and the adapter {config.adapter} has {fields[name]:g}, which a "
                f"run that begins from it keeps. Leave {flag} out."
            )
    return fields | ({"adapter": str(folder.resolve())} if Path(config.adapter).is_dir() else {})


def begin(config: Config, policy: Policy, folder: Path | None, checkpoint: Path | None, note: Callable) -> None:
    """Let the policy compute with the configuration's adapter, and let it be the reference where that is asked for.

    folder: of the run, which may have kept the adapter; None where nothing is trained. checkpoint: that the run goes on
    from, whose own adapter is loaded after this. `note` is told.

    Raises:
        UserError: the adapter does not go with the model, or what the run kept of it is gone or was changed.
    """
    refers = config.reference == "start" and (config.kl_coef > 0 or config.method == "dpo")
    if not config.adapter or (checkpoint and not refers):
        return
    kept = folder / START if folder else None
    if checkpoint:
        assert kept
        _check_kept(kept, checkpoint)
    source = kept if kept and kept.is_dir() else find_adapter(config.adapter)
    without = load_adapter(policy, source)
    if refers:
        policy.refer_to_start()
    if not checkpoint:
        for told in _told(config, policy, source, without):
            note(f"note: {told}")


def _told(config: Config, policy: Policy, source: Path, without: list[str]) -> list[str]:
    """What a user may want to know of an adapter that is taken up."""
    over = describe(source).base
    told = []
    if without:
        told.append(
            f"the adapter {config.adapter} has nothing for {len(without)} of the model's linear layers, such as "
            f"{without[0]}: there it begins as nothing, and is trained too."
        )
    if over and Path(over).name.lower() != Path(policy.source).name.lower():
        told.append(f"the adapter {config.adapter} says that it was trained over {over}, and this is {policy.source}.")
    with suppress(UserError):  # of a run whose config.json is damaged nothing is known
        of_run = saved_run(config.adapter)
        if of_run and (of_run.config.base == "nf4") != (config.base == "nf4"):
            told.append(
                f"the adapter {config.adapter} was trained over base weights in {of_run.config.base}, and these are in "
                f"{config.base}: over others than it has learnt beside it says something else. --base "
                f"{of_run.config.base} has those."
            )
    return told


def keep(folder: Path, policy: Policy) -> str:
    """Write the policy's adapter into the run's folder, unless one is kept there; returns its fingerprint."""
    kept = folder / START
    if not kept.is_dir():
        draft = folder / f".{START}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            for name, content in adapter_files(policy).items():
                write_synced(draft / name, content)
            sync_folder(draft)
        except OSError:  # the disk is full, say
            shutil.rmtree(draft, ignore_errors=True)
            raise
        draft.rename(kept)
        sync_folder(folder)
    return _fingerprint(kept)


def _check_kept(kept: Path, checkpoint: Path) -> None:
    """What the run kept is there, and as it was when the checkpoint was written."""
    expected = read_state(checkpoint)[0].start
    try:
        found = _fingerprint(kept)
    except OSError as error:
        raise UserError(
            f"{kept} cannot be read ({error}), the adapter that the run began from and that --reference start needs. "
            "Put it back, or go on with --reference base."
        ) from error
    if found != expected:
        raise UserError(
            f"{kept} is not the adapter that the run began from: it was changed. Put it back as it was, or go on with "
            "--reference base."
        )


def _fingerprint(folder: Path) -> str:
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in (SETTINGS, WEIGHTS))).hexdigest()
