"""Addresses: what --servers and --servers-folder may say, and what it means. Knows nothing of what answers there."""

from __future__ import annotations

import ipaddress
import urllib.parse
from typing import NamedTuple

from grpo.errors import UserError

EXAMPLE = "http://127.0.0.1:8000"
PORTS = {"http": 80, "https": 443}
OF_THE_API = "/v1"  # with which other clients want it


class Address(NamedTuple):
    """Where a server is."""

    scheme: str  # "http" or "https"
    host: str  # a name in ASCII, or a number without brackets
    port: int
    path: str  # "" or "/behind/a/proxy", without a slash at its end

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"

    @property
    def is_of_this_machine(self) -> bool:
        """Whether nobody else can listen to what is said there."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_address(word: str) -> Address:
    """An address as people write it: a slash or /v1 at its end does not matter.

    Raises:
        UserError: it is none.
    """
    if fault := _fault(word):
        raise UserError(f"servers has {_without_key(word)!r}, {fault}. An address looks like {EXAMPLE}.")
    parts = urllib.parse.urlsplit(word.strip())
    host = parts.hostname or ""
    if ":" not in host:
        host = host.encode("idna").decode("ascii").lower()
    path = urllib.parse.quote(parts.path, safe="/%").rstrip("/").removesuffix(OF_THE_API).rstrip("/")
    return Address(parts.scheme, host, parts.port or PORTS[parts.scheme], path)


def read_addresses(words: tuple[str, ...]) -> list[Address]:
    """Several, each another.

    Raises:
        UserError: one is none, or is there twice.
    """
    found: dict[Address, str] = {}
    for word in words:
        address = read_address(word)
        if address in found:
            raise UserError(f"servers has {found[address]} and {word}, which are the same. Name each server once.")
        found[address] = word
    return list(found)


def read_shared_folder(word: str) -> tuple[str, str]:
    """ "HERE" or "HERE=THERE" -> the folder's path on this machine and at the servers; ("", "") for none.

    Raises:
        UserError: it is neither.
    """
    here, mapped, there = word.partition("=")
    if word and (not here.strip() or (mapped and not there.startswith("/"))):
        raise UserError(
            f"servers_folder is {word!r}. It takes a folder that the servers see too, or HERE=THERE where its path at "
            "the servers is another, such as /mnt/shared=/data/shared."
        )
    return here, there.rstrip("/") if mapped else here


def _fault(word: str) -> str:
    """Why this is no address, a clause; empty if it is one."""
    try:
        parts = urllib.parse.urlsplit(word.strip())
        port, host = parts.port, parts.hostname
        (host or "").encode("idna")
    except ValueError as error:  # UnicodeError is one
        return f"which is no address ({error})"
    if parts.scheme not in PORTS:
        return "which does not begin with http:// or https://"
    if not host or any(c.isspace() or not c.isprintable() for c in word.strip()):
        return "which names no host"
    if port == 0:
        return "whose port is 0"
    if parts.username is not None or parts.password is not None:
        return "which has a name or a password in it, and would be saved; a key goes into the variable GRPO_SERVER_KEY"
    if parts.query or parts.fragment:
        return "which has more than a host, a port and a path"
    return ""


def _without_key(word: str) -> str:
    """The address without what may be a password in it."""
    head, at, tail = word.rpartition("@")
    return f"{head.partition('://')[0]}://...@{tail}" if at else word
