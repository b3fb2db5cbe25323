"""Kernels compile for GPUs that are not there: the kind they are tuned on, and older and smaller ones."""

import os
import subprocess
import sys
from pathlib import Path

import grpo_kernels
import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
# Built on tensor descriptors, which Hopper introduced; elsewhere the head takes another way.
OF_HOPPER = {"logprob_tiles._multiply_kernel", "logprob_tiles._finish_kernel", "logprob_tiles._target_logits_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "elsewhere"),
    [("7.5", "float16", OF_HOPPER), ("8.9", "bfloat16", OF_HOPPER), ("9.0", "bfloat16", set())],
)
def test_every_kernel_compiles_and_fits(capability, dtype, elsewhere):
    # Without a GPU this process has kernels interpreted, and Triton hands that on.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_for.py"), capability, dtype],
        capture_output=True,
        text=True,
        check=False,
        env=inherited | {"PYTHONPATH": str(KERNELS)},
    )
    assert done.returncode == 0, done.stderr
    compiled = dict(line.split() for line in done.stdout.splitlines())
    assert {name for name, shared in compiled.items() if shared == "-"} == elsewhere


def test_laying_out_tokens_and_loading_a_task_need_no_kernels():
    """Nor Triton, which `dispatch` alone imports."""
    code = (
        "import sys; from grpo import Config, Task; import grpo.types, grpo.packing;"
        "from grpo_kernels import GroupLayout; assert 'grpo_kernels.dispatch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_has_the_name_of_a_function():
    """Importing the file would put it in the function's place."""
    files = {path.stem for path in Path(grpo_kernels.__file__).parent.glob("*.py")}
    assert not files & set(grpo_kernels.__all__)
    assert all(callable(getattr(grpo_kernels, name)) for name in grpo_kernels.__all__)
