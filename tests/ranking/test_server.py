"""The page answers the person who was given its address, and nobody else."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ingraft.errors import IngraftError
from ingraft.ranking.desk import Desk, Question
from ingraft.ranking.server import serving

EVIL = "</script><script>alert(1)</script>"


def _desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path / "ranked.jsonl", [EVIL])
    desk.put(Question(prompt=EVIL, responses=[EVIL + "1", "two"]))
    desk.full()
    return desk


def _ask(address: str, told: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    content = None if told is None else told if isinstance(told, bytes) else json.dumps(told).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, content, headers)) as answer:
            code, body, found = answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            code, body, found = error.code, error.read().decode(), dict(error.headers)
    return code, json.loads(body) if "json" in found["Content-Type"] else body, found


def test_a_person_ranks_and_the_last_answer_arrives(tmp_path: Path) -> None:
    desk = _desk(tmp_path)
    with serving(desk, "127.0.0.1", 0) as address:
        code, page, headers = _ask(address)
        assert code == 200 and EVIL not in page, "what a model says is no part of the page"
        nonce = page.split('script nonce="')[1].split('"')[0]
        assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
        assert _ask(address)[1] != page, "a nonce is used once"
        code, state, _ = _ask(address + "state")
        assert state["question"]["prompt"] == [{"role": "user", "content": EVIL}]
        assert _ask(address + "rank", {"number": 0, "places": [1, 1]})[0] == 409
        code, state, _ = _ask(address + "rank", {"number": 0, "places": [2, 1]})
        assert code == 200 and state["ranked"] == 1 and state["question"] is None and not state["more"]
        assert desk.complete.is_set()
        code, state, _ = _ask(address + "rank", {"number": 0, "places": [2, 1]})
        assert code == 409 and "not open" in state["error"]
    assert len((tmp_path / "ranked.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "told", [b"", b"{", b"[]", b'{"number": 0}', b'{"number": [], "places": 3}', b"\xff", b"x" * 20_000]
)
def test_nonsense_changes_nothing(tmp_path: Path, told: bytes) -> None:
    desk = _desk(tmp_path)
    with serving(desk, "127.0.0.1", 0) as address:
        assert _ask(address + "rank", told)[0] in (400, 404)
        assert desk.state()["waiting"] == 1 and not (tmp_path / "ranked.jsonl").exists()


def test_strangers_are_refused(tmp_path: Path) -> None:
    desk = _desk(tmp_path)
    with serving(desk, "127.0.0.1", 0) as address:
        root, secret = address.rstrip("/").rsplit("/", 1)
        for path in ("/", f"/{secret[:-1]}/", f"/x{secret}/", "/state", "/rank", "//"):
            assert _ask(root + path)[0] == 404
            assert _ask(root + path + "rank", {"number": 0, "places": [2, 1]})[0] == 404
        assert _ask(address, Host=f"elsewhere.example:{root.rsplit(':', 1)[1]}")[0] == 404
        assert _ask(address, Host="127.0.0.1:1")[0] == 404
        assert _ask(address + "../state")[0] == 404
    assert not (tmp_path / "ranked.jsonl").exists()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(IngraftError, match=f"--port {port}: .*`--port 0` takes a free one"),
            serving(_desk(tmp_path), "127.0.0.1", port),
        ):
            pass
