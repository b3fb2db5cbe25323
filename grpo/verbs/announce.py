"""What every verb shows first: whether this is the embedded default, and the configuration."""

from __future__ import annotations

from dataclasses import replace

from rich.panel import Panel
from rich.table import Table

from grpo.config import field_names
from grpo.folder import CONFIG_FILE, Origin
from grpo.recipes import module_of
from grpo.resolve import Resolved
from grpo.start import fields_of
from grpo.terminal import console, plain, say


def over_its_adapter(resolved: Resolved) -> Resolved:
    """The same with the rank and the alpha of the adapter that a run is to begin from, if it is.

    Raises:
        UserError: there is no such adapter, it cannot be computed here, or a flag asks for another rank or alpha.
    """
    if not resolved.config.adapter:
        return resolved
    flags = [name for name, origin in resolved.origins.items() if origin == "flag"]
    fields = fields_of(resolved.config, flags)
    origin: Origin = "adapter"
    origins = dict.fromkeys(("lora_rank", "lora_alpha"), origin) | {name: resolved.origins[name] for name in flags}
    return replace(resolved, config=replace(resolved.config, **fields), origins=resolved.origins | origins)


def announce(resolved: Resolved) -> None:
    """Print both, and what the run that goes on or is scored says nothing of."""
    if resolved.missing:
        console.print(banner(resolved))
    console.print(describe(resolved))
    if resolved.unsaid:
        say(
            f"note: {CONFIG_FILE} says nothing of {', '.join(resolved.unsaid)}: it is of an earlier version, or was "
            "edited. Their defaults are taken."
        )


def banner(resolved: Resolved) -> Panel:
    """One visible notice that this is not the real thing, and how to get it."""
    task, missing = resolved.task, "\n".join(f"  - {what}" for what in resolved.missing)
    return Panel(
        plain(
            f"Missing here:\n{missing}\n"
            "So this run uses what ships with the package: a tiny model and "
            f"{'its generated problems' if resolved.config.data == 'embedded' else resolved.config.data}.\n"
            f"The real thing, on a machine with a GPU and the hub (or with local copies):\n"
            f"  python -m {module_of(resolved.config.method)} {resolved.task_path} --model {task.config.model} "
            f"--base {task.config.base} --data {task.data}"
        ),
        title="EMBEDDED DEFAULT",
        border_style="yellow",
    )


def describe(resolved: Resolved) -> Table:
    """The values that are not defaults, with where each came from."""
    table = Table(title="configuration", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for column in ("field", "value", "from"):
        table.add_column(column)
    for name in field_names():
        origin = resolved.origins.get(name, "default")
        if origin != "default":
            value = getattr(resolved.config, name)
            table.add_row(name, plain(" ".join(value) if isinstance(value, tuple) else str(value)), plain(origin))
    defaults = sum(resolved.origins.get(name, "default") == "default" for name in field_names())
    table.caption = f"and {defaults} defaults; all are in {CONFIG_FILE}, --help explains them"
    table.caption_justify = "left"
    return table
