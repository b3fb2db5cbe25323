"""`judge` against a server of its own, which busies itself, breaks, refuses and rambles."""

import asyncio
import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grpo.errors import UserError
from grpo.rewards import build_rewards, judge, score
from grpo.types import Completion, Group, Prompt


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `replies`, the last one again and again; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.headers = list(replies), [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.lock, self.together, self.at_once, self.most = threading.Lock(), None, 0, 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.headers.append(dict(self.headers))
            reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        if self.server.together:
            self.server.together.wait(20)
        with self.server.lock:
            self.server.at_once -= 1
        if reply is None:
            self.connection.close()
            return
        status, text, headers = reply if isinstance(reply, tuple) else (200, said(reply), {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def said(text):
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@pytest.fixture
def serve():
    servers = []

    def start(*replies):
        server = Server(*replies)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server, completion="Lima", **options):
    given = {"base_url": server.url, "backoff": 0.0, **options}
    reward = judge("a-model", **given)
    return reward, asyncio.run(reward(completion=completion, prompt="The capital of Peru?"))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Right and short.\nScore: 10", 1.0),
        ("**Score:** 5", 0.5),
        ("score = 2.5", 0.25),
        ('{"score": 7}', 0.7),
        ("[[3]]", 0.3),
        ("8", 0.8),
        (" 8/10 ", 0.8),
        ("Score: 8/10", 0.8),
        ('It says "Score: 10" itself. Score: 1', 0.1),
        ("Rating: 0", 0.0),
    ],
)
def test_the_score_is_read_from_what_it_says(serve, reply, expected):
    _, paid = ask(serve(reply))
    assert paid["score"] == pytest.approx(expected)


def test_it_asks_what_the_openai_interface_takes(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    server = serve("Score: 4")
    ask(server, "half a pair \ud800", system="Be strict.", key_variable="MY_KEY", scale=(0, 4), seed=7, temperature=0.5)
    (path, body), headers = server.asked[0], server.headers[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["seed"], body["temperature"], body["max_tokens"]) == ("a-model", 7, 0.5, 1024)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "The capital of Peru?" in body["messages"][1]["content"]
    assert "half a pair \ud800" in body["messages"][1]["content"]
    assert headers["Authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    "bad",
    [
        (503, "busy", {}),
        (429, "slow", {"Retry-After": "0"}),
        None,
        (200, "<html>", {}),
        (200, "[]", {}),
        (200, "{}", {}),
    ],
)
def test_what_may_be_better_a_moment_later_is_tried_again(serve, bad):
    server = serve(bad, bad, "Score: 10")
    reward, paid = ask(server, retries=2)
    assert paid["score"] == 1.0
    assert len(server.asked) == 3
    assert reward.usage.retries == 2


@pytest.mark.parametrize(
    ("bad", "times"),
    [
        ((503, "busy", {}), 3),
        (None, 3),
        ((401, "no key", {}), 1),
        ((400, "too long", {}), 1),
        ("I cannot say.", 2),
        ("Score: 11", 2),
    ],
)
def test_what_stays_bad_is_an_error_and_never_a_score(serve, bad, times):
    server = serve(bad)
    with pytest.raises(RuntimeError, match=r"a-model at http.* gave no score"):
        ask(server, retries=2)
    assert len(server.asked) == times


def test_a_server_that_is_not_there_is_an_error(serve):
    server = serve("Score: 1")
    server.server_close()
    with pytest.raises(RuntimeError, match="gave no score"):
        ask(server, retries=1)


def test_the_key_does_not_follow_to_another_host(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    other = serve("Score: 10")
    first = serve((307, "", {"Location": f"{other.url}/chat/completions"}), (302, "", {"Location": other.url}))
    with pytest.raises(RuntimeError, match="307"):
        ask(first)
    assert other.asked == []


def test_tokens_and_cost_are_counted(serve):
    server = serve("I cannot say.", "Score: 10")
    reward, paid = ask(server, price=(1.0, 10.0))
    assert paid == {"score": 1.0, "tokens": 240, "cost": pytest.approx(2 * (100 * 1.0 + 20 * 10.0) / 1e6)}
    assert (reward.usage.prompt_tokens, reward.usage.completion_tokens) == (200, 40)
    assert reward.usage.cost == pytest.approx(paid["cost"])


def test_a_run_asks_for_the_columns_of_the_question_and_for_many_completions_at_once(serve):
    server = serve("Score: 5")
    server.together = threading.Barrier(4)  # nobody is answered before four have asked
    question = "Is {completion} what {answer[0]} says? {lowest} to {highest}"
    reward = judge("a-model", question, base_url=server.url, concurrency=4, name="agrees")
    assert list(inspect.signature(reward).parameters) == ["completion", "answer"]
    rewards = build_rewards({reward: 1.0}, ["question", "answer"], chat=False)
    prompt = Prompt(0, "", [1], {"question": "?", "answer": ["Lima"]})
    group = Group(prompt, [Completion([1], [0.0], f"c{number}", "stop", 0) for number in range(8)])
    score([group], rewards)
    assert group.rewards.tolist() == [0.5] * 8
    assert group.parts["agrees/tokens"].tolist() == [120.0] * 8
    assert server.most == 4
    assert "Is c0 what Lima says? 0 to 10" in [body["messages"][0]["content"] for _, body in server.asked]


@pytest.mark.parametrize(
    "wrong",
    [{"question": "Good?"}, {"question": "{completion} {"}, {"scale": (1, 1)}, {"concurrency": 0}, {"retries": -1}],
)
def test_what_cannot_be_asked_is_told_when_it_is_made(wrong):
    with pytest.raises(UserError, match="judge"):
        judge("a-model", **wrong)


def test_openai_is_not_asked_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        asyncio.run(judge("a-model")(completion="", prompt=""))
