"""A small server that speaks vLLM's HTTP over a policy of its own, and goes wrong on request. No test is here.

It reads adapters from the folders that it is given, as vLLM does, and samples by the torch engine, whose draws follow
from the seed: what servers sample is what that engine samples from the trainer's policy, token by token.
"""

import json
import socket
import ssl
import struct
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from tiny_engines import Letters
from tiny_models import build_policy, randomise

from grpo.config import Config
from grpo.policy.adapter import load_adapter
from grpo.rollout.torch_engine import TorchEngine
from grpo.types import Request

NAME = "tiny"
_free = {}  # configuration -> policies that nobody uses: they are built once for many tests


def borrow(config):
    """A policy with a random adapter."""
    key = str(config)
    policy = _free[key].pop() if _free.get(key) else build_policy(config)
    policy.key, policy.version = key, 0
    policy.store.set_alpha(config.lora_alpha)
    randomise(policy)
    return policy


def give_back(policy):
    """For another test."""
    _free.setdefault(policy.key, []).append(policy)


class Sampler(TorchEngine):
    """The torch engine without a canary, which takes a while to make."""

    def __init__(self, policy, temperature):
        self.policy, self.tokenizer, self.temperature = policy, Letters(), temperature
        self.stop_tokens = set(policy.stop_tokens)


class Torn(Exception):
    """The connection is to be reset."""


class FakeServer:
    """http://127.0.0.1:<port>. `faults` are called one after the other by the requests for completions of a rollout,
    before they are answered; a fault that returns something has that sent instead."""

    def __init__(self, config, key="", tls=None, host="127.0.0.1", **started):
        """started: settings of the command line that a user may have wrong; tls: a certificate and its key."""
        self.tls, self.host = tls, host
        self.started = {"updating": True, "lora": True, "processed": True, "scores": True, "max_model_len": 256,
                        "max_lora_rank": 32, "owned_by": "vllm"} | started  # fmt: skip
        self.policy, self.key = borrow(config), key
        self.temperature = config.temperature
        self.engine = Sampler(self.policy, config.temperature)
        self.lock = threading.RLock()
        self.faults, self.counts, self.after, self.goes_on = [], Counter(), [], threading.Event()
        self.goes_on.set()  # while it is not, nothing is answered, as by kill -STOP
        self.sampled, self.loads, self.unloads = [], [], []
        self.refuse_load = ""
        self.http, self.port = None, 0
        self.start()

    @property
    def url(self):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"

    def start(self):
        """With nothing loaded, at the port that it had."""
        self.adapters, self.present = {}, ""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256
            open_connections: ClassVar[set] = set()
            address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET

            def handle_error(server, request, address):
                pass

        handler = type("Handler", (_Handler,), {"fake": self})
        self.http = Server((self.host, self.port), handler)
        self.http.open_connections = set()
        self.port = self.http.server_address[1]
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        """As by kill -9: nobody listens, and every connection is reset."""
        http, self.http = self.http, None
        if http:
            threading.Thread(target=http.shutdown, daemon=True).start()
            http.socket.close()
            for connection in list(http.open_connections):
                reset(connection)

    def names(self):
        """Of the adapters that it has."""
        return sorted(self.adapters)

    # ---- answers: (status, body)

    def answer(self, method, path, headers, body):
        self.counts[path] += 1
        if path.startswith("/v1") and self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/health":
            return 200, None
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if (method, path) == ("GET", "/v1/models"):
            return 200, {"object": "list", "data": self._cards()}
        if path == "/v1/completions":
            return self._completion(body)
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.started["updating"]:
            return self._load(body) if path == "/v1/load_lora_adapter" else self._unload(body)
        return 404, {"detail": "Not Found"}

    def _cards(self):
        base = {"id": NAME, "root": "org/tiny", "parent": None, "owned_by": self.started["owned_by"],
                "max_model_len": self.started["max_model_len"]}  # fmt: skip
        rest = [{"id": name, "root": path, "parent": NAME, "owned_by": "vllm"} for name, path in self.adapters.items()]
        return [base, *rest]

    def _load(self, body):
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return 400, error(f"The lora adapter '{name}' has already been loaded. If you want to ...")
        if self.refuse_load:
            return 500, error(self.refuse_load)
        if not self.started["lora"]:
            return 500, error("Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if not (Path(path) / "adapter_config.json").is_file():
            return 404, error(f"Loading lora {name} failed: No adapter found for <path>")
        if json.loads((Path(path) / "adapter_config.json").read_text())["r"] > self.started["max_lora_rank"]:
            return 500, error("LoRA rank 3 is greater than max_lora_rank 1.")
        self.adapters[name] = path
        self.loads.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body):
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, error(f"The lora adapter '{body['lora_name']}' cannot be found.")
        self.unloads.append(body["lora_name"])
        return 200, "Success"

    def _completion(self, body):
        name, context, limit = body["model"], body["prompt"], body["max_tokens"]
        if name != NAME and name not in self.adapters:
            return 404, error(f"The model `{name}` does not exist.")
        assert {"temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"} <= body.keys()
        is_rollout = "stop_token_ids" in body and name != NAME
        if is_rollout:
            with self.lock:
                fault = self.faults.pop(0) if self.faults else None
            if fault and (sent := fault(self, body)) is not None:
                return sent
        with self.lock:
            self._take(name)
            if allowed := body.get("allowed_token_ids"):
                logprob = 0.0 if self.started["processed"] else self.engine.logprobs([context], [allowed])[0][0]
                return 200, completion(name, context, allowed, [logprob], "length")
            if (asked := body.get("logprob_token_ids")) and self.started["scores"]:
                scores = {f"token_id:{asked[0]}": self.engine.logprobs([context], [asked])[0][0]}
                return 200, completion(name, context, [5], [-1.0], "length", scores)
            [found] = self.engine.sample([Request(context, body["seed"], limit)])
            if is_rollout:
                self.sampled.append((context, body["seed"]))
        for hook in list(self.after) if is_rollout else ():
            hook(self)
        return 200, completion(name, context, found.tokens, found.sampler_logprobs, found.finish)

    def _take(self, name):
        """Compute with an adapter, or without."""
        if name == NAME:
            self.policy.store.scale.zero_()
            self.present = NAME
        elif name != self.present:
            load_adapter(self.policy, Path(self.adapters[name]))
            self.present = name


def completion(model, context, tokens, logprobs, finish, top=None):
    """An answer as vLLM gives it."""
    names = [f"token_id:{token}" for token in tokens]
    told = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": [top or {}]}
    choice = {"index": 0, "text": "", "token_ids": tokens, "prompt_token_ids": context, "logprobs": told,
              "finish_reason": finish, "stop_reason": None}  # fmt: skip
    return {"id": "cmpl-1", "model": model, "choices": [choice]}


def error(message, code=400):
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


def reset(connection):
    """Close it so that the other side is told of a reset."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    wbufsize = -1  # an answer in one piece

    def setup(self):
        super().setup()
        self.server.open_connections.add(self.connection)

    def finish(self):
        self.server.open_connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._reply("GET", None)

    def do_POST(self):
        self._reply("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, method, body):
        self.fake.goes_on.wait()
        try:
            status, said = self.fake.answer(method, self.path, self.headers, body)
        except Torn:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"id": "cmpl')
            self.wfile.flush()
            reset(self.connection)
            return
        kind, data = _as_sent(said)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _as_sent(said):
    if said is None:
        return "text/plain", b""
    if isinstance(said, str):
        return ("text/html" if said.startswith("<") else "text/plain"), said.encode()
    return "application/json", json.dumps(said).encode()


@contextmanager
def embedded_server(base):
    """One of the embedded model, over this base, for as long as it is wanted."""
    config = Config(model="embedded", base=base, device="cpu", lora_rank=4, max_completion_tokens=7)
    fake = FakeServer(config, max_model_len=2048)
    yield fake
    fake.die()
