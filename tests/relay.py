"""A relay in front of a real server, as a proxy is one: notes what goes through it, and goes wrong on request. No test
is here."""

import http.client
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from fake_server import reset

RESTART = "the server was started again"  # in the place of a path
LOAD, UNLOAD, COMPLETIONS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"


class Passed(NamedTuple):
    """A request and what became of it."""

    path: str
    body: dict  # empty of a GET
    status: int  # of the server; 0: it was not asked, or did not answer
    answer: bytes


class Written(NamedTuple):
    """A completion as it went over the wire."""

    model: str
    seed: int
    prompt: list  # [P]
    choice: dict

    @property
    def version(self):
        """Of the policy, by the adapter's name."""
        return int(re.search(r"-v(\d+)-", self.model)[1])


class Relay:
    """http://127.0.0.1:<port>, behind which is the server at `upstream`."""

    def __init__(self, upstream):
        """before: asked of each request, (method, path, body) -> None, or (status, kind of content, bytes) to answer
        instead, or "reset" to break the connection off."""
        self.upstream, self.lock = upstream, threading.Lock()
        self.passed: list[Passed] = []
        self.before = lambda method, path, body: None
        self.http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"relay": self}))
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def note(self, passed):
        with self.lock:
            self.passed.append(passed)

    def rollouts(self):
        """The completions that the server has written with an adapter, in the order of its answers."""
        return [
            Written(each.body["model"], each.body["seed"], each.body["prompt"], json.loads(each.answer)["choices"][0])
            for each in self.passed
            if each.path == COMPLETIONS and each.status == 200 and "stop_token_ids" in each.body
            if each.body["model"].startswith("grpo-")
        ]

    def adapters(self):
        """The adapters at the server after each one that it took or gave up."""
        there, found = [], []
        for path, body, status, _ in self.passed:
            if path == RESTART:
                there = []
            if path == LOAD and status == 200:
                there = [*there, body["lora_name"]]
            if path == UNLOAD and status == 200:
                there = [name for name in there if name != body["lora_name"]]
            if path in (LOAD, UNLOAD) and status == 200:
                found.append(there)
        return found


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    relay: Relay
    wbufsize = -1  # an answer in one piece

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._pass_on("GET", b"")

    def do_POST(self):
        self._pass_on("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def _pass_on(self, method, data):
        body = json.loads(data) if data else {}
        instead = self.relay.before(method, self.path, body)
        if instead == "reset":
            reset(self.connection)
            return
        status, kind, content = instead or self._asked(method, data)
        self.relay.note(Passed(self.path, body, 0 if instead else status, content))
        if not status:
            reset(self.connection)
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _asked(self, method, data):
        connection = http.client.HTTPConnection(self.relay.upstream.removeprefix("http://"))
        kept = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
        try:
            connection.request(method, self.path, data, kept)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", "text/plain"), answer.read()
        except (OSError, http.client.HTTPException):
            return 0, "", b""
        finally:
            connection.close()


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
