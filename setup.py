"""The task files of tasks/ go into the wheel as grpo/tasks/; everything else of the package is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTasks(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # which finds them in the repository
            target = Path(self.build_lib) / "grpo" / "tasks"
            target.mkdir(parents=True, exist_ok=True)
            for file in (Path(__file__).parent / "tasks").glob("*.py"):
                shutil.copy(file, target)


setup(cmdclass={"build_py": BuildWithTasks})
