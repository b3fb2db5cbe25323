"""An export is pushed: to a hub of a few lines on this machine, which keeps what it was sent."""

import base64
import html
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from made_up_run import make_run

from grpo.embedded import MODEL_DIR
from grpo.export.__main__ import main
from grpo.export.card import card
from grpo.export.source import Source
from grpo.folder import saved_run

TOKEN = "hf_averysecrettoken"


class Hub(ThreadingHTTPServer):
    """repos: name -> is it private. commits: what was written, in order. answers: path -> a status to give there."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.commits, self.answers, self.asked = {}, [], {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def _reply(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _answer(self):
        hub = self.server
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if status := next((code for path, code in hub.answers.items() if self.path.startswith(path)), None):
            return self._reply({"error": f"no, {self.headers.get('Authorization')}"}, status)
        if self.path == "/api/whoami-v2":
            return self._reply({"name": "me", "type": "user"})
        if self.path == "/api/repos/create":
            made = json.loads(sent)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            if name in hub.repos:
                return self._reply({"error": "there", "url": f"{hub.address}/{name}"}, 409)
            hub.repos[name] = bool(made.get("private")) or made.get("visibility") == "private"
            return self._reply({"url": f"{hub.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(sent)["files"]
            ]
            return self._reply({"files": files})
        if "/commit/" in self.path:
            hub.commits.append([json.loads(line) for line in sent.splitlines() if line.strip()])
            return self._reply({"commitUrl": f"{hub.address}/me/x/commit/1", "commitOid": "1" * 40, "success": True})
        if found := re.match(r"/api/models/([^/]+/[^/]+)", self.path):
            if found[1] not in hub.repos:
                return self._reply({"error": "no"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="no")
            return self._reply({"id": found[1], "private": hub.repos[found[1]], "sha": "1" * 40, "siblings": []})
        return self._reply({}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _answer


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def files_of(commit):
    sent = [line["value"] for line in commit if line["key"] == "file"]
    return {each["path"]: base64.b64decode(each["content"]) for each in sent}


def test_the_adapter_and_a_card_with_the_run_s_numbers(hub, trained, tmp_path, capsys):
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 0
    told = capsys.readouterr()
    assert hub.repos == {"me/toy": True} and f"{hub.address}/me/toy (private)" in told.out
    sent = files_of(hub.commits[0])
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= sent.keys()
    page = sent["README.md"].decode()
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first = next(line["eval/pass@1"] for line in metrics if "eval/pass@1" in line)
    assert f"| before training | 0 | {first:.1%} |" in page
    assert page.startswith('---\nlibrary_name: "peft"\n') and "PeftModel.from_pretrained" in page and '"me/toy"' in page
    assert "* learning\\_rate: 0.001" in page and "* steps: " in page


def test_nothing_of_this_machine_is_told(hub, trained, tmp_path):
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 0
    everything = b"".join(files_of(hub.commits[0]).values())
    for path in (tmp_path, trained.parent, MODEL_DIR, Path.home()):
        assert str(path).encode() not in everything
    assert json.loads(files_of(hub.commits[0])["adapter_config.json"])["base_model_name_or_path"] == "model"


@pytest.mark.parametrize("flags, private", [((), True), (("--public",), False)])
def test_it_is_private_unless_everybody_may_have_it(flags, private, hub, trained, tmp_path):
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/new", *flags]) == 0
    assert hub.repos == {"me/new": private}


def test_a_public_one_gets_nothing_unasked(hub, trained, tmp_path, capsys):
    hub.repos["me/toy"] = False
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 2
    assert "is there already, and public. Give --public" in capsys.readouterr().err
    assert not hub.commits and not (tmp_path / "out").exists()
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy", "--public"]) == 0
    assert len(hub.commits) == 1


@pytest.mark.parametrize("path, status, told, is_left", [
    ("/api/whoami-v2", 401, "the token is not valid", False),
    ("/api/repos/create", 403, "the token may not write there", True),
    ("/api/models/me/toy/preupload", 422, "was refused by", True),  # 500 would be tried again and again
])  # fmt: skip
def test_what_the_hub_refuses_is_told_without_the_token(path, status, told, is_left, hub, trained, tmp_path, capsys):
    hub.answers[path] = status
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 2
    heard = capsys.readouterr()
    assert told in heard.err and TOKEN not in heard.err + heard.out
    assert (tmp_path / "out" / "README.md").exists() == is_left


def test_offline_and_without_a_login(hub, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 2
    assert "needs the network, and HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert main([str(trained), "--to", str(tmp_path / "out"), "--push", "me/toy"]) == 2
    assert "could not reach http://127.0.0.1:1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, told", [
    (["--push", "toy"], "It takes OWNER/NAME"),
    (["--push", "me/../x"], "It takes OWNER/NAME"),
    (["--push", ""], "It takes OWNER/NAME"),
    (["--public"], "--public is of --push"),
])  # fmt: skip
def test_names_that_are_none(words, told, trained, tmp_path, capsys):
    assert main([str(trained), "--to", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_names_in_a_card_are_text(tmp_path):
    evil = "x\n---\n# y <script>alert(1)</script> [a](javascript:b) `c` | d"
    make_run(tmp_path / "run", reward="correctness", name="toy")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    config = saved_run(str(tmp_path / "run")).config
    page = card("# usage\n", Source(checkpoint, f"{evil}, step 10", "org/base", 4, config), "peft")
    head, body = page.split("---\n", 2)[1:]
    assert 'base_model: "org/base"' in head and "<script>" not in body and "](javascript" not in body
    assert "| this checkpoint | 10 |" in body and "paired permutation test" in body


@pytest.mark.parametrize("changed, algorithm, tags", [
    ({}, "GRPO (grpo advantages, grpo objective)", ["grpo", "reinforcement-learning"]),
    ({"advantage": "gae"}, "PPO (advantages by GAE from a value head, grpo objective)",
     ["ppo", "reinforcement-learning"]),
    ({"method": "sft"}, "SFT on given answers", ["sft"]),
    ({"method": "dpo", "dpo_loss": "ipo"}, "DPO on pairs of answers (ipo loss)", ["dpo"]),
    (None, None, []),
])  # fmt: skip
def test_a_card_says_by_what_it_was_taught(changed, algorithm, tags, tmp_path):
    make_run(tmp_path / "run", reward="correctness", name="toy")
    config = None if changed is None else replace(saved_run(str(tmp_path / "run")).config, **changed)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    head, body = card("# usage\n", Source(checkpoint, "toy", "org/base", 4, config), "peft").split("---\n", 2)[1:]
    told = re.search(r"\* algorithm: (.*)", body)
    assert (told and html.unescape(told[1].replace("\\", ""))) == algorithm
    assert json.loads(re.search("tags: (.*)", head)[1]) == [*tags, "lora"]
