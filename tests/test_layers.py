"""No module imports upward: the table says which room a module is in, and what it may know.

Imports are read from the source, those inside functions and under TYPE_CHECKING too: a room that knows another one late
knows it all the same.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Bottom first. A module may import from its own room and from every layer below, not from a room beside its own.
# A name ending in ".*" is a package with all that is in it; every other module stands by itself.
LAYERS = (
    {"kernels": ("grpo_kernels.*",)},
    {
        "words": (
            *("grpo.errors", "grpo.addresses", "grpo.config", "grpo.types", "grpo.seeds", "grpo.generators"),
            "grpo.world",
        ),
        "system": ("grpo.system",),
        "terminal": ("grpo.terminal",),
        "threads": ("grpo.threads",),
        "watchdog": ("grpo.watchdog",),
        "metrics": ("grpo.metrics",),
        "recipes": ("grpo.recipes",),
        "usage": ("grpo.usage",),
        "embedded": ("grpo.embedded.*",),
    },
    {
        "mathematics": ("grpo.advantages", "grpo.packing", "grpo.fitting", "grpo.loss", "grpo.gae", "grpo.objectives"),
        "rewards": ("grpo.rewards.*",),
        "record": ("grpo.record.*",),
        "folder": ("grpo.folder", "grpo.guards"),
        "command line": ("grpo.command",),
        "clock": ("grpo.clock",),
        "ranks": ("grpo.launcher", "grpo.pulse", "grpo.meeting", "grpo.waiting", "grpo.ranks"),
        "exchange": ("grpo.exchange",),
        "files": ("grpo.files", "grpo.sources"),
    },
    {
        "policy": ("grpo.policy.*",),
        "task": (
            "grpo.task",
            "grpo.data",
            "grpo.prompts",
            "grpo.splits",
            "grpo.stream",
            "grpo.cautions",
            "grpo.chat_template",
            "grpo.conversations",
            "grpo.trees",
            "grpo.lessons",
            "grpo.pairs",
        ),
    },
    {
        "rollout": ("grpo.rollout.*",),
        "memory": ("grpo.memory", "grpo.memory_trial"),
        "checkpoint": ("grpo.checkpoint", "grpo.start"),
        "questions": ("grpo.questions",),
        "resolve": ("grpo.resolve",),
        "new": ("grpo.guess", "grpo.scaffold", "grpo.new"),
    },
    {"report": ("grpo.report.*",), "evaluate": ("grpo.evaluate",)},
    {"export": ("grpo.export.*",)},
    {"source of groups": ("grpo.ahead", "grpo.rollouts", "grpo.taught")},
    {"loop": ("grpo.train",), "methods": ("grpo.methods",), "chat": ("grpo.chat.*",)},
    {"build": ("grpo.build", "grpo.memory_of_run")},
    {"verbs": ("grpo.verbs.*",)},
    {"Python API": ("grpo.api",)},
    {
        "command": ("grpo.run", "grpo.sft", "grpo.dpo"),
        "doctor": ("grpo.doctor.*",),
        "launch": ("grpo.ray", "grpo.ray_worker"),
        "command of the rewards": ("grpo.rewards.__main__",),
    },
    {"what a task file imports": ("grpo",), "console script": ("grpo.__main__",)},
)


def modules() -> dict[str, Path]:
    """Name -> file of every module that is installed; a package is its __init__.py."""
    found = {}
    for root in (ROOT, ROOT / "kernels"):
        for package in ("grpo", "grpo_kernels"):
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(source: str, known: set[str]) -> set[str]:
    """The modules of `known` that a source imports; `from package import name` is a module where it names one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full, not relative"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known
            if len(submodules & known) < len(submodules):
                found.add(str(node.module))
    return found & known


def room_of(module: str) -> tuple[int, str] | None:
    """Layer and room of a module, by its name, else by its package's."""
    rooms = [(height, room, name) for height, layer in enumerate(LAYERS) for room in layer for name in layer[room]]
    own = [(height, room) for height, room, name in rooms if module == name]
    of_package = [(h, room) for h, room, name in rooms if name[-2:] == ".*" and f"{module}.".startswith(name[:-1])]
    return next(iter(own + of_package), None)


def test_every_module_has_a_room():
    missing = sorted(module for module in MODULES if room_of(module) is None)
    assert not missing, f"put these modules into a layer of {Path(__file__).name}: {missing}"


def test_the_table_names_nothing_that_is_gone():
    named = {name.removesuffix(".*") for layer in LAYERS for names in layer.values() for name in names}
    assert named <= set(MODULES), named - set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_room_and_from_below(module):
    height, room = room_of(module)
    for other in imported(MODULES[module].read_text(), set(MODULES)):
        other_height, other_room = room_of(other)
        assert other_height < height or (other_height, other_room) == (height, room), (
            f"{module} ({room}) imports {other} ({other_room}), which is above it or beside it"
        )


def test_nothing_imports_in_a_circle():
    edges = {module: imported(path.read_text(), set(MODULES)) for module, path in MODULES.items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_late_imports_are_read_too():
    source = "def f():\n    from grpo.a import b, name\n    import grpo.c\n\nif True:\n    from grpo import d\n"
    known = {"grpo", "grpo.a", "grpo.a.b", "grpo.c", "grpo.d", "grpo.e"}
    assert imported(source, known) == {"grpo.a", "grpo.a.b", "grpo.c", "grpo.d"}
