"""What is installed is what pyproject.toml asks for: a suite that passes on other versions says nothing of these."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS["test"]]]
# Those that a suite runs without; where one is here, it is one that is allowed.
OPTIONAL = [Requirement(line) for extra, lines in EXTRAS.items() if extra != "test" for line in lines]


def wanted(requirements):
    """Those of this system, but for our own extras."""
    return [
        each for each in requirements if each.name != PROJECT["name"] and (not each.marker or each.marker.evaluate())
    ]


@pytest.mark.parametrize("requirement", wanted(REQUIRED), ids=str)
def test_what_is_needed_is_here_in_a_version_that_is_allowed(requirement):
    assert requirement.specifier.contains(version(requirement.name), prereleases=True), version(requirement.name)


@pytest.mark.parametrize("requirement", wanted(OPTIONAL), ids=str)
def test_what_may_be_here_is_in_a_version_that_is_allowed(requirement):
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    assert requirement.specifier.contains(found, prereleases=True), found
