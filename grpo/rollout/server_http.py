"""HTTP: one question to one server, and its answer as JSON. Knows nothing of vLLM, nor of what is asked.

Whatever may go wrong with a server is a `Fault`, a clause that can follow "the server at http://...". A question is
asked on a connection of its own: one that is kept may be closed just when it is used again, which looks like a server
that has died. Redirections are not followed, so that the key goes nowhere else, and proxies of the environment are not
used.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from contextlib import suppress
from typing import Any

from grpo.addresses import Address

MOST_BYTES = 4 << 20  # of an answer, where nothing else is said
SHOWN = 300  # characters of what a server says
TO_CONNECT = 10.0  # seconds
# A server may think for an hour without a byte. Its machine, where it is gone, is found out about by the system.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Fault(Exception):
    """What a server did wrong, a clause.

    status: of HTTP where it refused, else 0. is_answer: it answered, and the same question may get the same again.
    """

    def __init__(self, told: str, status: int = 0, is_answer: bool = False):
        super().__init__(told)
        self.status, self.is_answer = status, is_answer


class Call:
    """Questions on their way, which another thread may break off."""

    def __init__(self) -> None:
        self.connections: set[http.client.HTTPConnection] = set()
        self.is_aborted = False

    def abort(self) -> None:
        """Break them off: who waits for an answer gets a Fault, and so does who asks from now on."""
        self.is_aborted = True
        for connection in list(self.connections):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


class Line:
    """The way to a server."""

    def __init__(self, address: Address, key: str):
        """key: empty where none is needed."""
        self.address, self._key = address, key
        self._tls = ssl.create_default_context() if address.scheme == "https" else None

    @property
    def shows_the_key(self) -> bool:
        """Whether whoever listens in between can read it."""
        return bool(self._key) and self._tls is None and not self.address.is_of_this_machine

    def get(self, path: str, seconds: float, call: Call | None = None) -> Any:
        """What the server has under a path."""
        return self._ask("GET", path, None, seconds, MOST_BYTES, call or Call())

    def post(
        self, path: str, body: dict[str, Any], seconds: float | None, most_bytes: int = MOST_BYTES,
        call: Call | None = None,
    ) -> Any:  # fmt: skip
        """What the server answers to a body. seconds: without a byte from it; None: however long it takes.

        Raises:
            Fault: it does not answer, refuses, or answers with something that is no JSON. An empty answer is None, one
                in words a text.
        """
        return self._ask("POST", path, json.dumps(body).encode("ascii"), seconds, most_bytes, call or Call())

    def _ask(self, method: str, path: str, data: bytes | None, seconds: float | None, most: int, call: Call) -> Any:
        connection = self._connection()
        call.connections.add(connection)
        try:
            connection.connect()
            _keep_alive(connection.sock, seconds)
            if call.is_aborted:
                raise Fault("was not waited for any longer")
            connection.request(method, self.address.path + path, data, self._headers())
            answer = connection.getresponse()
            said = answer.read(most + 1)
            if answer.length and len(said) <= most:
                raise http.client.IncompleteRead(said, answer.length)
        except (OSError, http.client.HTTPException) as error:
            raise Fault(self._in_words(error, call)) from error
        finally:
            call.connections.discard(connection)
            connection.close()
        return self._read(answer, said, most)

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self.address.host, self.address.port, timeout=TO_CONNECT)
        return http.client.HTTPSConnection(self.address.host, self.address.port, timeout=TO_CONNECT, context=self._tls)

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", "Connection": "close"} | key

    def _read(self, answer: http.client.HTTPResponse, said: bytes, most: int) -> Any:
        """The JSON of an answer."""
        if answer.status in range(300, 400):
            where = self._shown(answer.headers.get("Location", "elsewhere"))
            raise Fault(f"sends on to {where}, where the key does not go: give that address", answer.status, True)
        if answer.status not in range(200, 300):
            told = self._shown(_message(said))
            raise Fault(f"refuses with {answer.status}{f': {told}' if told else ''}", answer.status, True)
        if len(said) > most:
            raise Fault(f"answers with more than {most:,} bytes", is_answer=True)
        try:
            return json.loads(said) if said.strip() else None
        except (ValueError, RecursionError) as error:
            if answer.headers.get_content_type() == "text/plain":  # or of no type at all
                return said.decode(errors="replace")
            told = self._shown(said.decode(errors="replace"))
            raise Fault(
                f"answers with what is no JSON ({told!r}): another program, or a proxy, is at this address",
                is_answer=True,
            ) from error

    def _in_words(self, error: Exception, call: Call) -> str:
        if call.is_aborted:
            return "was not waited for any longer"
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"shows a certificate that is not trusted here ({error.verify_message}): name the file of its "
                "authority in the variable SSL_CERT_FILE"
            )
        if isinstance(error, ssl.SSLError):
            return f"speaks no TLS that is understood here ({error.reason or error}): is it http:// there?"
        if isinstance(error, TimeoutError):
            return "did not answer in time"
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
            return "does not speak HTTP there: is it https://?"
        return f"cannot be reached or broke off ({self._shown(str(error)) or type(error).__name__})"

    def _shown(self, text: str) -> str:
        """What a server says, on one line, without the key."""
        text = " ".join((text.replace(self._key, "...") if self._key else text).split()).rstrip(".")
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _message(said: bytes) -> str:
    """The message of an error, where it is one of OpenAI's shape; else the answer."""
    text = said.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return text


def _keep_alive(sock: Any, seconds: float | None) -> None:
    sock.settimeout(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
