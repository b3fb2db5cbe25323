"""What --servers and --servers-folder may say."""

import pytest

from grpo.addresses import read_address, read_addresses, read_shared_folder
from grpo.config import Config
from grpo.errors import UserError

MEANT = {
    "http://a:8000": "http://a:8000",
    "http://a:8000/": "http://a:8000",
    "http://a:8000/v1": "http://a:8000",
    "http://a:8000/v1//": "http://a:8000",
    " https://A.Example.org ": "https://a.example.org",
    "https://a:443": "https://a",
    "http://a:80/behind/proxy/v1/": "http://a/behind/proxy",
    "http://[::1]:8000": "http://[::1]:8000",
    "http://[FE80::1]": "http://[fe80::1]",
    "http://büro:8000": "http://xn--bro-hoa:8000",
    "http://127.0.0.1": "http://127.0.0.1",
    "http://my_host-1:8000": "http://my_host-1:8000",
    "http://a/für/v1": "http://a/f%C3%BCr",
    "http://a/%20x": "http://a/%20x",
}


@pytest.mark.parametrize("word", MEANT)
def test_an_address_as_people_write_it(word):
    assert str(read_address(word)) == MEANT[word]
    assert str(read_address(MEANT[word])) == MEANT[word]


REFUSED = {
    "a:8000": "does not begin with http",
    "ftp://a": "does not begin with http",
    "": "does not begin with http",
    "http://": "names no host",
    "http://:8000": "names no host",
    "http://a b": "names no host",
    "http://a\nb:1": "names no host",
    "http://a:99999": "no address",
    "http://a:x": "no address",
    "http://a:0": "port is 0",
    "http://[::1": "no address",
    "http://a?key=1": "more than a host",
    "http://a#1": "more than a host",
    "http://me:secret@a": "GRPO_SERVER_KEY",
    f"http://{'a' * 64}": "no address",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_no_address_is_refused_in_words(word):
    with pytest.raises(UserError, match=REFUSED[word]) as refused:
        Config(engine="server", servers=("http://b", word))
    assert "secret" not in str(refused.value)


def test_a_server_is_named_once():
    with pytest.raises(UserError, match=r"http://a:80/ and http://A/v1, which are the same"):
        read_addresses(("http://a:80/", "http://b", "http://A/v1"))


def test_only_this_machine_is_this_machine():
    of_this = ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:1", "http://127.3.2.1"]
    others = ["http://10.0.0.1", "http://gpu-1:8000", "http://0.0.0.0", "http://localhost.example.org"]
    assert [read_address(word).is_of_this_machine for word in of_this + others] == [True] * 4 + [False] * 4


def test_a_shared_folder_may_have_another_path_at_the_servers():
    assert read_shared_folder("") == ("", "")
    assert read_shared_folder("shared") == ("shared", "shared")
    assert read_shared_folder("/mnt/x=/data/y/") == ("/mnt/x", "/data/y")
    for word in ("=/data", "/mnt=", "/mnt=data", " =/x"):
        with pytest.raises(UserError, match="HERE=THERE"):
            Config(servers_folder=word)


def test_engine_and_servers_go_together():
    with pytest.raises(UserError, match="servers names none"):
        Config(engine="server")
    with pytest.raises(UserError, match="Use engine server"):
        Config(servers=("http://a",))
    assert Config(engine="torch", servers=("http://a",)).engine == "torch", "a resumed run may leave its servers"
    with pytest.raises(UserError, match="servers_patience"):
        Config(servers_patience=0)
