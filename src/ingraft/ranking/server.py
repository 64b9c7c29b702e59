"""The page's server: the standard library's, on this machine only, for one person.

Whoever can open the page can write into the person's file, so it answers to nobody else: it listens on the loopback address unless told otherwise, its address
holds a secret drawn at the start (another site open in the same browser cannot know it), and a request that names another host is refused (a name that
was made to point here would otherwise be let in).
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from ingraft.errors import IngraftError
from ingraft.ranking.desk import Desk
from ingraft.ranking.page import PAGE

LONGEST = 10_000
"""Bytes of a request; an order is a few numbers."""


@contextmanager
def serving(desk: Desk, host: str, port: int) -> Iterator[str]:
    """Serve the desk's page while inside; gives its address.

    Args:
        port: 0 takes a free one.

    Raises:
        IngraftError: the port is taken, or the host is none of this machine's.
    """
    secret = secrets.token_urlsafe(16)
    try:
        server = ThreadingHTTPServer((host, port), _handler(desk, secret, host))
    except OSError as error:
        raise IngraftError(f"--host {host} --port {port}: {error.strerror}; `--port 0` takes a free one.") from None
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, name="ingraft rank", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}/{secret}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(desk: Desk, secret: str, host: str) -> type[BaseHTTPRequestHandler]:
    def rank(told: dict[str, Any]) -> None:
        desk.rank(told["number"], told["places"])

    deeds: dict[str, Callable[[dict[str, Any]], None]] = {
        "rank": rank,
        "skip": lambda told: desk.skip(told["number"]),
        "undo": lambda told: desk.undo(),
    }

    class Handler(BaseHTTPRequestHandler):
        """Requests of the page."""

        timeout = (
            5  # of a connection on which nothing comes: the end waits for open ones, so that the last answer arrives
        )
        server_version, sys_version = "ingraft", ""

        def do_GET(self) -> None:
            what = self._asked()
            if what == "":
                nonce = secrets.token_urlsafe(16)
                policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; form-action 'none'"
                self._send(
                    HTTPStatus.OK, PAGE.replace("{nonce}", nonce), "text/html", {"Content-Security-Policy": policy}
                )
            elif what == "state":
                self._tell(HTTPStatus.OK, desk.state())
            else:
                self._tell(HTTPStatus.NOT_FOUND, {"error": "There is no such page."})

        def do_POST(self) -> None:
            what, length = self._asked(), int(self.headers.get("Content-Length") or 0)
            if what not in deeds or length > LONGEST:
                self._tell(HTTPStatus.NOT_FOUND, {"error": "There is no such page."})
                return
            try:
                told = json.loads(self.rfile.read(length) or b"{}")
                if not isinstance(told, dict):
                    raise TypeError
                deeds[cast(str, what)](cast("dict[str, Any]", told))
            except IngraftError as error:
                self._tell(HTTPStatus.CONFLICT, {"error": str(error), **desk.state()})
            except (ValueError, KeyError, TypeError):
                self._tell(HTTPStatus.BAD_REQUEST, {"error": "This is no order of answers."})
            else:
                self._tell(HTTPStatus.OK, desk.state())

        def _asked(self) -> str | None:
            """What is wanted below the secret; None where the request is not the page's."""
            said = self.headers.get("Host", "")
            name, _, port = (said if ":" in said else f"{said}:80").rpartition(":")
            ours = {cast("tuple[str, int]", self.server.server_address)[0], "localhost", host}
            anywhere = "0.0.0.0" in ours
            if not (anywhere or name in ours) or port != str(cast(ThreadingHTTPServer, self.server).server_port):
                return None
            _, given, what = (*self.path.split("/", 2), "", "")[:3]
            return what if secrets.compare_digest(given.encode(), secret.encode()) else None

        def _tell(self, status: HTTPStatus, value: dict[str, Any]) -> None:
            self._send(status, json.dumps(value, ensure_ascii=False), "application/json", {})

        def _send(self, status: HTTPStatus, text: str, kind: str, headers: dict[str, str]) -> None:
            content = text.encode()
            self.send_response(status)
            usual = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
            for name, value in {
                **usual,
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: the terminal is the person's."""

    return Handler
