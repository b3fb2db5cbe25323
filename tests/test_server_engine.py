"""Rollouts on servers, against small ones that speak vLLM's HTTP (fake_server.py) and go wrong in every way. What
servers must have sampled is what the torch engine samples from the trainer's policy. Real ones: tests/vllm."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_server import NAME, FakeServer, Sampler, Torn, borrow, error, give_back
from tiny_engines import Letters, batch_of, contexts, learn, prompts, rollout, tokens_of

from grpo.errors import UserError
from grpo.rollout.server import ServerEngine, check_reachable, open_exchange
from grpo.rollout.server_http import Fault
from grpo.rollout.server_pool import LOSSES, OTHER_FILES, TRIES, Task, Timing, at_once, units
from grpo.rollout.server_protocol import Sampling
from grpo.types import Request

QUICK = Timing(patience=30, first_wait=0.01, longest_wait=0.02, asked_after=60, to_answer=0.2, steady=60, tick=0.01)
LONGEST = 64


@pytest.fixture
def servers():
    """(config, count, settings) -> that many fake servers."""
    started = []

    def start(config, count=2, **settings):
        started.extend(FakeServer(config, **settings) for _ in range(count))
        return started[-count:]

    yield start
    for server in started:
        server.goes_on.set()
        server.die()
        with server.lock:
            give_back(server.policy)


@pytest.fixture
def small(tiny_config, tmp_path):
    """A Config that names no servers yet."""

    def build(**overrides):
        given = dict(engine="torch", max_completion_tokens=3, temperature=0.8, servers_folder=str(tmp_path / "shared"))
        return tiny_config("qwen3", **(given | overrides))

    return build


@pytest.fixture
def policy_of():
    """config -> a policy with a random adapter."""
    lent = []

    def build(config):
        lent.append(borrow(config))
        return lent[-1]

    yield build
    for policy in lent:
        give_back(policy)


@pytest.fixture
def open_engine(small, servers, policy_of):
    """A policy with a random adapter, fake servers, the engine on them, and what it tells."""
    opened = []

    def build(count=2, timing=QUICK, **overrides):
        config = small(**overrides)
        fakes, told = servers(config, count), []
        opened.append(engine_on(fakes, config, policy_of(config), told, timing))
        return opened[-1], fakes, told

    yield build
    for engine in opened:
        engine.close()


def engine_on(fakes, config, policy, told, timing=QUICK):
    config = replace(config, engine="server", servers=tuple(fake.url for fake in fakes))
    return ServerEngine(policy, Letters(), contexts(prompts(1)), config, LONGEST, told.append, timing)


def expected(engine, seed, asked=None, group_size=4, max_tokens=None):
    """What the torch engine samples from the same policy."""
    own = Sampler(engine.policy, engine.sampling.temperature)
    return tokens_of(rollout(own, asked or prompts(), group_size, seed, max_tokens))


def test_servers_sample_what_the_policy_samples_before_and_after_an_update(open_engine):
    engine, fakes, _ = open_engine(mask_truncated=False)
    for seed in (1, 2):
        groups = rollout(engine, prompts(), 4, seed, max_tokens=23)
        assert tokens_of(groups) == expected(engine, seed, max_tokens=23)
        batch = batch_of(groups, engine.policy.config)
        logprobs, _ = engine.policy.logprobs(batch)
        torch.testing.assert_close(batch.sampler_logprobs, logprobs, atol=1e-5, rtol=1e-5)
        assert {c.policy_version for group in groups for c in group.completions} == {engine.policy.version}
        assert {c.finish for group in groups for c in group.completions} == {"stop", "length"}
        learn(engine.policy, 5 + seed)
        metrics = engine.sync()
        assert metrics["sync/gap"] < 1e-5 < metrics["sync/moved"]
    assert all(fake.sampled for fake in fakes)


def test_an_adapter_has_a_new_name_each_version_and_the_old_one_goes(open_engine, tmp_path):
    engine, fakes, _ = open_engine()
    seen = set()
    for step in range(3):
        [names] = {tuple(fake.names()) for fake in fakes}
        [name] = names
        assert name not in seen
        seen.add(name)
        [folder] = (tmp_path / "shared").glob("grpo-servers-*")
        assert sorted(path.name for path in folder.iterdir()) == [name, "lock"]
        learn(engine.policy, step)
        engine.sync()
    engine.close()
    assert not any(fake.names() for fake in fakes)
    assert not list((tmp_path / "shared").iterdir())


def test_a_group_goes_whole_to_one_server_and_servers_get_equal_shares(open_engine):
    engine, fakes, _ = open_engine()
    asked = prompts()[:4]
    rollout(engine, asked, 6, seed=0)
    by_server = [{tuple(context) for context, _ in fake.sampled} for fake in fakes]
    assert not by_server[0] & by_server[1]
    assert [len(fake.sampled) for fake in fakes] == [12, 12]


def test_the_engine_scores_what_the_policy_scores(open_engine):
    engine, _, _ = open_engine(1)
    groups = rollout(engine, prompts(3), 1, seed=2)
    found = engine.logprobs([g.prompt.tokens for g in groups], tokens_of(groups))
    own = Sampler(engine.policy, engine.sampling.temperature)
    for row, other in zip(found, own.logprobs([g.prompt.tokens for g in groups], tokens_of(groups)), strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(other), atol=1e-5, rtol=1e-5)


# ---- faults in a rollout


def torn(*_):
    raise Torn


def sent(status, said):
    return lambda *_: (status, said)


def spoiled(**changes):
    """A completion as it should be, but for something."""

    def fault(server, body):
        choice = {"token_ids": [5] * body["max_tokens"], "prompt_token_ids": body["prompt"], "finish_reason": "length",
                  "logprobs": {"token_logprobs": [-1.0] * body["max_tokens"]}}  # fmt: skip
        return 200, {"model": body["model"], "choices": [choice | changes]}

    return fault


FAULTS = {
    "500": sent(500, error("EngineCore died")),
    "503": sent(503, error("overloaded")),
    "429": sent(429, error("slow down")),
    "reset in the middle of the body": torn,
    "a page of a proxy": sent(502, "<!DOCTYPE html><html>Bad gateway</html>"),
    "a page that means well": sent(200, "<html>Sign in</html>"),
    "another shape": sent(200, {"choices": []}),
    "a list": sent(200, [1, 2]),
    "an answer by another model": lambda _, body: (200, {"model": NAME, "choices": spoiled()(_, body)[1]["choices"]}),
    "an answer to another prompt": spoiled(prompt_token_ids=[9, 9]),
    "no ids": spoiled(token_ids=None),
    "ids that are none": spoiled(token_ids=[5, 5, 100000]),
    "a stop that is none": spoiled(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
    "cut off early": spoiled(token_ids=[5], logprobs={"token_logprobs": [-1.0]}),
    "on after the stop": spoiled(token_ids=[2, 5, 5]),
    "too long": spoiled(token_ids=[5] * 4, logprobs={"token_logprobs": [-1.0] * 4}),
    "no log-probabilities": spoiled(logprobs=None),
    "log-probabilities that are none": spoiled(logprobs={"token_logprobs": [-1.0, None, -1.0]}),
    "a probability above 1": spoiled(logprobs={"token_logprobs": [-1.0, 0.5, -1.0]}),
    "too few log-probabilities": spoiled(logprobs={"token_logprobs": [-1.0, -1.0]}),
    "another end": spoiled(finish_reason="abort"),
    "a redirection": sent(307, "elsewhere"),
}


@pytest.mark.slow
def test_what_a_server_answers_wrongly_is_asked_again(open_engine):
    engine, [one, _], told = open_engine()
    right = expected(engine, 1)
    for name, fault in FAULTS.items():
        told.clear()
        one.faults += [fault] * 2
        assert tokens_of(rollout(engine, prompts(), 4, seed=1)) == right, name
        assert any(one.url in line and "left out" in line for line in told), name
        one.faults.clear()
        engine.pool.wait_for(lambda: len(engine.pool.ready) == 2)


def test_a_completion_as_it_should_be_is_taken(open_engine):
    """What `spoiled` spoils is taken where nothing is."""
    engine, fakes, told = open_engine()
    for fake in fakes:
        fake.faults += [spoiled()] * 20
    assert tokens_of(rollout(engine, prompts(), 4, seed=1)) == [[5, 5, 5]] * 20
    assert not told


def test_an_answer_that_is_not_what_was_asked_for_is_none():
    sampling = Sampling(temperature=1.0, stop_tokens=(2,), vocabulary=101)
    request = Request([7, 8], seed=1, max_tokens=3)
    body = sampling.question("policy", request)
    answers = {name: fault(None, body) for name, fault in FAULTS.items() if fault not in (torn,)}
    wrong = {name: said for name, (status, said) in answers.items() if status == 200 and not isinstance(said, str)}
    assert len(wrong) > 12
    for name, said in wrong.items():
        with pytest.raises(Fault):
            print(name, sampling.read(said, "policy", request))
    right = spoiled()(None, body)[1]
    assert sampling.read(right, "policy", request) == ([5, 5, 5], [-1.0, -1.0, -1.0], False)
    stopped = spoiled(token_ids=[5, 2], logprobs={"token_logprobs": [-1.0, 1e-6]}, finish_reason="stop")(None, body)[1]
    assert sampling.read(stopped, "policy", request) == ([5, 2], [-1.0, 0.0], True)


def test_a_single_server_that_stumbles_is_waited_for(open_engine):
    engine, [fake], told = open_engine(1)
    fake.faults += [torn, FAULTS["500"]]
    assert tokens_of(rollout(engine, prompts(), 4, seed=1)) == expected(engine, 1)
    assert sum("taken in again" in line for line in told) >= 1


def test_a_completion_that_is_answered_wrongly_again_and_again_ends_the_run(open_engine):
    engine, [fake], _ = open_engine(1)
    fake.faults += [FAULTS["no ids"]] * 100
    with pytest.raises(UserError, match=rf"{fake.url} gives no token ids.*{TRIES} times over"):
        rollout(engine, prompts(1), 1, seed=1)


def test_a_server_dies_in_a_rollout_and_comes_back_without_its_adapter(open_engine):
    engine, [one, other], told = open_engine(max_completion_tokens=4)
    before = []

    def dies(server, _):
        server.die()
        raise Torn

    def comes_back(server):
        if one.http is None and len(server.sampled) >= 6 and not before:
            before.append(len(one.sampled))
            one.start()

    one.faults += [lambda *_: None, lambda *_: None, dies]
    other.after.append(comes_back)
    assert tokens_of(rollout(engine, prompts(), 16, seed=1)) == expected(engine, 1, group_size=16)
    assert before
    learn(engine.policy, 3)
    engine.sync()
    assert one.names() == other.names() != []
    assert tokens_of(rollout(engine, prompts(), 4, seed=2)) == expected(engine, 2)
    assert len(one.sampled) > before[0]
    assert any("left out" in line for line in told) and any("taken in again" in line for line in told)


def test_all_servers_away_for_longer_than_the_patience_end_the_run(open_engine):
    quick = Timing(patience=0.3, first_wait=0.01, longest_wait=0.02, tick=0.01)
    engine, fakes, _ = open_engine(timing=quick)
    for fake in fakes:
        fake.die()
    with pytest.raises(UserError, match=r"No rollout server has answered.*patience") as ended:
        rollout(engine, prompts(), 2, seed=1)
    assert all(fake.url in str(ended.value) for fake in fakes)


def test_a_server_that_hangs_loses_its_work_to_another(open_engine):
    timing = Timing(patience=30, first_wait=5, asked_after=0.05, to_answer=0.1, tick=0.01)
    engine, [one, other], told = open_engine(timing=timing)

    def hangs(server, _):
        server.goes_on.clear()
        server.goes_on.wait()

    one.faults.append(hangs)
    assert tokens_of(rollout(engine, prompts(), 4, seed=1)) == expected(engine, 1)
    assert any(one.url in line and "left out" in line for line in told)
    assert not other.faults
    one.goes_on.set()


def test_a_slow_server_that_is_well_is_waited_for(open_engine):
    timing = Timing(patience=0.2, first_wait=0.01, asked_after=0.02, to_answer=5, steady=0, tick=0.01)
    engine, [fake], told = open_engine(1, timing=timing)
    asked_after = threading.Event()
    answer = fake.answer

    def counted(method, path, *rest):
        if path == "/health" and fake.counts["/health"] >= 20:
            asked_after.set()
        return answer(method, path, *rest)

    fake.answer = counted
    fake.faults.append(lambda *_: asked_after.wait() and None)
    assert tokens_of(rollout(engine, prompts(1), 2, seed=1)) == expected(engine, 1, prompts(1), 2)
    assert not told


@pytest.mark.parametrize("cut_off", [torn, sent(504, "<html>Gateway timeout</html>")], ids=["reset", "504"])
def test_a_proxy_that_cuts_long_completions_off_ends_the_run(cut_off, open_engine):
    """In between the server is seen to be well again and again, so that it never counts as lost itself."""
    engine, [fake], _ = open_engine(1, timing=replace(QUICK, asked_after=0, steady=0))
    healthy, answer = threading.Semaphore(0), fake.answer

    def counted(method, path, *rest):
        if path == "/health":
            healthy.release()
        return answer(method, path, *rest)

    def after_a_while(server, body):
        while healthy.acquire(blocking=False):  # those of before
            pass
        healthy.acquire()
        healthy.acquire()  # asked for the second time when the first was taken for an answer
        return cut_off(server, body)

    fake.answer = counted
    fake.faults += [after_a_while] * 100
    with pytest.raises(UserError, match=rf"lost {LOSSES} times over .* at {fake.url}.* proxy that gives up"):
        rollout(engine, prompts(1), 1, seed=1)


def test_ctrl_c_in_a_rollout_breaks_off_what_is_asked_and_the_engine_can_go_on(open_engine):
    engine, [fake], told = open_engine(1)

    def interrupts(server, _):
        server.goes_on.clear()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        server.goes_on.wait()

    fake.faults.append(interrupts)
    with pytest.raises(KeyboardInterrupt):
        rollout(engine, prompts(), 4, seed=1)
    assert not engine.pool.stations[0].calls
    fake.goes_on.set()
    assert tokens_of(rollout(engine, prompts(), 4, seed=1)) == expected(engine, 1)
    assert not told


# ---- faults between rollouts


@pytest.mark.slow
def test_an_adapter_that_one_server_does_not_load_keeps_it_out_until_it_does(open_engine):
    engine, [one, other], told = open_engine()
    one.refuse_load = "No space left on device"
    learn(engine.policy, 3)
    engine.sync()
    assert any(one.url in line and "No space left" in line for line in told)
    before = len(one.sampled)
    assert tokens_of(rollout(engine, prompts(), 4, seed=1)) == expected(engine, 1)
    assert len(one.sampled) == before
    one.refuse_load = ""
    learn(engine.policy, 4)
    engine.pool.stations[0].next_try = 0
    engine.sync()
    assert tokens_of(rollout(engine, prompts(), 4, seed=2)) == expected(engine, 2)
    assert one.names() == other.names()
    assert len(one.sampled) > before


@pytest.mark.slow
def test_a_server_that_keeps_an_old_adapter_under_the_new_name_is_found_out(open_engine):
    engine, [one, _], _ = open_engine()
    kept = one.adapters[one.names()[0]]
    copy = Path(kept).parent.parent / "copy"
    shutil.copytree(kept, copy)
    load = one._load

    def stale(body):
        return load(body | {"lora_path": str(copy)})

    one._load = stale
    learn(engine.policy, 3, size=0.5)
    with pytest.raises(UserError, match=rf"server at {one.url}: The rollout engine (stood still|is not the policy)"):
        engine.sync()


@pytest.mark.slow
def test_a_server_that_is_back_as_another_model_is_not_taken_in(open_engine):
    engine, [one, _], _ = open_engine()
    one.die()
    tokens_of(rollout(engine, prompts(), 2, seed=1))
    one.engine.temperature = 1.3
    one.start()
    learn(engine.policy, 3)
    engine.pool.stations[0].next_try = 0
    engine.sync()
    assert not engine.pool.stations[0].is_ready
    assert "is not the policy" in engine.pool.stations[0].told
    assert tokens_of(rollout(engine, prompts(), 2, seed=2)) == expected(engine, 2, group_size=2)


# ---- by numbers


def test_many_completions_are_more_than_a_process_may_have_files_open():
    assert at_once(1, 1024) == 256 and at_once(1, None) == 256
    for servers, files in ((1, 1024), (4, 1024), (32, 4096), (3, 512)):
        assert 1 <= at_once(servers, files)
        assert servers * 2 * at_once(servers, files) + OTHER_FILES <= files
    assert at_once(64, 256) == 1


def test_groups_are_handed_out_whole_and_large_ones_in_parts():
    tasks = [Task(group, 1, lambda *_: None) for group in (0, 0, 0, 1, 2, 2, 2, 2, 2)]
    assert units(tasks, 9) == [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    assert units(tasks, 2) == [[0, 1], [2], [3], [4, 5], [6, 7], [8]]
    assert units([], 2) == []


# ---- the start


WRONG = {
    "no updating": (dict(updating=False), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    "no lora": (dict(lora=False), "--enable-lora"),
    "rank": (dict(max_lora_rank=1), r"lower rank than 3 \(--max-lora-rank\)"),
    "raw": (dict(processed=False), "--logprobs-mode processed_logprobs"),
    "old": (dict(scores=False), "logprob_token_ids"),
    "short": (dict(max_model_len=16), r"takes 16 tokens .*may have 64"),
    "key": (dict(key="secret-of-mine"), "GRPO_SERVER_KEY"),
    "another program": (dict(owned_by="llamacpp"), "something else than vLLM"),
}


@pytest.mark.slow
def test_a_server_that_was_started_otherwise_is_refused_and_nothing_stays_there(small, servers, policy_of, tmp_path):
    config = small()
    [good], policy = servers(config, 1), policy_of(config)
    for name, (settings, told) in WRONG.items():
        [bad] = servers(config, 1, **settings)
        with pytest.raises(UserError, match=told) as refused:
            engine_on([good, bad], config, policy, [])
        assert bad.url in str(refused.value) and good.url not in str(refused.value)
        assert "vllm serve" in str(refused.value) or name == "key"
        assert not good.names() and not bad.names()
        assert not list((tmp_path / "shared").iterdir())


def test_the_command_in_a_refusal_is_complete(small, servers, policy_of):
    config = small()
    [bad] = servers(config, 1, updating=False)
    with pytest.raises(UserError) as refused:
        engine_on([bad], config, policy_of(config), [])
    words = str(refused.value)
    assert f"--port {bad.port} --dtype float32 --max-model-len 64 --enable-lora --max-lora-rank 8 " in words
    assert f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {config.model} --host 127.0.0.1 " in words


def test_a_server_of_another_model_is_refused(small, servers, policy_of):
    config = small()
    [bad] = servers(config, 1)
    bad.engine.temperature = 1.3
    with pytest.raises(UserError, match=rf"{bad.url}, which serves org/tiny: The rollout engine is not the policy"):
        engine_on([bad], config, policy_of(config), [])
    assert not bad.names()


def test_the_same_server_by_two_names_is_refused(small, servers, policy_of):
    config = small()
    [fake] = servers(config, 1)
    policy = policy_of(config)
    twice = replace(config, engine="server", servers=(fake.url, fake.url.replace("127.0.0.1", "localhost")))
    with pytest.raises(UserError, match="the same as one of"):
        ServerEngine(policy, Letters(), contexts(prompts(1)), twice, LONGEST, [].append, QUICK)


def test_a_key_is_sent_and_is_in_no_message(small, servers, policy_of, monkeypatch):
    config = small()
    fakes = servers(config, 1, key="secret-of-mine")
    monkeypatch.setenv("VLLM_API_KEY", "not-this-one")
    monkeypatch.setenv("GRPO_SERVER_KEY", "secret-of-mine")
    told = []
    engine = engine_on(fakes, config, policy_of(config), told)
    fakes[0].faults.append(sent(500, error("Authorization: Bearer secret-of-mine")))
    assert tokens_of(rollout(engine, prompts(), 2, seed=1)) == expected(engine, 1, group_size=2)
    engine.close()
    assert told and "secret-of-mine" not in "".join(told)
    monkeypatch.setenv("GRPO_SERVER_KEY", "no\nheader")
    with pytest.raises(UserError, match="GRPO_SERVER_KEY has a key with characters") as refused:
        engine_on(fakes, config, engine.policy, told)
    assert "header\n" not in str(refused.value)


def test_before_a_model_is_loaded_servers_are_looked_for(small):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = small(engine="server", servers=(url,))
    with pytest.raises(UserError, match=rf"{url} cannot be reached.*vllm serve"):
        check_reachable(config, config.model)


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate with")
def test_a_certificate_of_ones_own_is_refused_until_its_authority_is_named(small, servers, tmp_path, monkeypatch):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    [fake] = servers(small(), 1, tls=(certificate, key))
    config = small(engine="server", servers=(fake.url,))
    with pytest.raises(UserError, match=r"certificate that is not trusted here .*SSL_CERT_FILE"):
        check_reachable(config, config.model)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    check_reachable(config, config.model)
    plain = small(engine="server", servers=(fake.url.replace("https", "http"),))
    with pytest.raises(UserError, match=rf"server at http://127.0.0.1:{fake.port} "):
        check_reachable(plain, config.model)


def test_an_address_may_be_a_number_of_ipv6(small, servers):
    try:
        [fake] = servers(small(), 1, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    config = small(engine="server", servers=(f"http://[::1]:{fake.port}/v1/",))
    check_reachable(config, config.model)


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*file.*--servers-folder"):
        open_exchange(f"{tmp_path}/file/folder")


def test_https_where_there_is_none_is_told(small, servers):
    config = small()
    [fake] = servers(config, 1)
    config = small(engine="server", servers=(fake.url.replace("http", "https"),))
    with pytest.raises(UserError, match="no TLS"):
        check_reachable(config, config.model)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_server_engine import engine_on
from fake_server import borrow
from grpo.config import Config
class At: url = sys.argv[2]
config = Config(model=sys.argv[3], base="float32", device="cpu", lora_rank=3, lora_alpha=6.0, engine="torch",
                max_completion_tokens=3, temperature=0.8, servers_folder=sys.argv[4])
engine = engine_on([At], config, borrow(config), [])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_killed_run_left_is_cleared_away_at_the_next_start(small, servers, policy_of, tmp_path):
    config = small()
    [fake] = servers(config, 1)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", KILLED, path, fake.url, config.model, config.servers_folder]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    [left] = fake.names()
    living = engine_on([fake], config, policy_of(config), [])
    [ours] = fake.names()
    assert left in fake.unloads and ours != left
    another = engine_on([fake], config, policy_of(config), [])
    assert ours in fake.names(), "the adapter of a run that lives stays"
    assert len(list((tmp_path / "shared").iterdir())) == 2
    another.close()
    living.close()
    assert not fake.names() and not list((tmp_path / "shared").iterdir())


@pytest.mark.slow
def test_a_resumed_run_takes_over_what_its_servers_canaries_know(open_engine, small):
    engine, fakes, told = open_engine()
    learn(engine.policy, 3)
    engine.sync()
    state = engine.canary.state()
    again = engine_on(fakes, engine.policy.config, engine.policy, told)
    assert again.canary.restore(state)
    assert again.canary.noise == engine.canary.noise
    again.close()
    alone = engine_on(fakes[:1], engine.policy.config, engine.policy, told)
    assert not alone.canary.restore(state) and not alone.canary.restore({})
    alone.close()
