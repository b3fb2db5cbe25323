"""What every kernel test shares: where and in which types it runs, and memory that shows an unwritten element.
Knows nothing of any operation.
"""

from collections.abc import Iterator

import pytest
import torch

# The interpreter's tl.dot is wrong in bfloat16, so without a GPU the kernels are tested in the other two.
KERNEL_DTYPES = (
    [torch.float32, torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32, torch.float16]
)

MAY_BE_HELD = 2**30  # bytes of a GPU's memory

# Which functions `with torch.device(...)` means is looked up once a process. If that were while torch.empty is another
# (below), models "on meta" would take real memory in every test after it: one of 8B took 20 GB.
torch.utils._device._device_constructors()


def pytest_configure(config: pytest.Config) -> None:
    # Triton's interpreter computes in numpy, which warns where a GPU's exp overflows to infinity in silence.
    config.addinivalue_line("filterwarnings", "ignore:.*encountered in:RuntimeWarning:triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs on the torch twin and on the Triton kernel."""
    return request.param


def _stage(dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """In the interpreter the second type is the second stage: it takes as long again, and what it shows is rounding."""
    return [] if dtype == torch.float32 or torch.cuda.is_available() else [pytest.mark.slow]


@pytest.fixture(
    params=[pytest.param(each, id=str(each).removeprefix("torch."), marks=_stage(each)) for each in KERNEL_DTYPES]
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def gpu_memory_given_back() -> Iterator[None]:
    """Several processes share a GPU (`pytest -n 8`): what a large test has taken is given back after it."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > MAY_BE_HELD:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and its kin holds NaN (or the largest integer), so an element nobody wrote shows."""

    @torch.no_grad()  # leaves too: torch.utils.checkpoint makes one, in some versions
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        if tensor.dtype != torch.bool and not tensor.dtype.is_complex:
            return tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor if tensor.is_meta or torch.compiler.is_compiling() else poison(tensor)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def relative_error():
    """‖got - truth‖ / ‖truth‖ in float64; NaN in `got` gives NaN, which no bound accepts."""

    def measure(got: torch.Tensor, truth: torch.Tensor) -> float:
        got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
        assert got.shape == truth.shape
        scale = truth.norm().item()
        difference = (got - truth).norm().item()
        return difference / scale if scale > 0 else difference

    return measure
