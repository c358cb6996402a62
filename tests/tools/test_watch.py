"""The live page: authentication, validation of messages, and display."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

import browser
from dreambooth_lab import lab
from dreambooth_lab.run import run

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from dreambooth_lab.tools.watch import app, board, payload  # noqa: E402

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def server():
    with serving() as url:
        yield url


@contextmanager
def serving():
    config = uvicorn.Config(app.build(TOKEN), port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(5)


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def image_message(kind="image", **changes):
    facts = {"type": kind, "run": "a run", "prompt": "a dog", "weights": "live", "training_step": 10, "sampler_step": 5,
             "total_steps": 20, "seed": 3, "image_index": 0, "image": png()}  # fmt: skip
    return facts | changes


def numbers(*lines, run="a run"):
    return {"type": "metrics", "run": run, "lines": list(lines)}


BEARER = {"Authorization": f"Bearer {TOKEN}"}


def post(url, message, headers=BEARER):
    return httpx.post(f"{url}/hook", json=message, headers=headers)


def read_events(url, n):
    """The first n events."""
    with httpx.stream("GET", f"{url}/events", auth=("me", TOKEN), timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        return [json.loads(next(lines).removeprefix("data: ")) for _ in range(n)]


def test_requests_without_the_token_are_refused(server):
    basic = {"Authorization": "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()}
    for path in ("/", "/page.js", "/events", "/picture/1", "/nowhere"):
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic !"}, {"Authorization": f"Token {TOKEN}"}):
            assert httpx.get(server + path, headers=wrong).status_code == 401, path
    assert httpx.get(server, headers=basic).status_code == httpx.get(server, headers=BEARER).status_code == 200
    assert post(server, image_message(), {}).status_code == 401
    assert post(server, image_message(), basic).status_code == 401, (
        "credentials that a browser sends by itself can't post messages"
    )
    assert post(server, image_message()).status_code == 204


def test_page_loads_only_its_own_resources(server):
    response = httpx.get(server, auth=("me", TOKEN))
    rules = response.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in rules and "script-src 'self'" in rules
    assert [rule for rule in rules if "unsafe" in rule] == ["style-src 'self' 'unsafe-inline'"], "only plotly's styles"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, json.dumps(image_message(run=3)), json.dumps(image_message(prompt="x" * 3000)),
     json.dumps(image_message(seed=True)), json.dumps(image_message(image_index=-1)), json.dumps(image_message(image="%%")),
     json.dumps(image_message(image=base64.b64encode(b"<script>").decode())), json.dumps(image_message(type="html")),
     json.dumps(numbers([1, "a"])), json.dumps(numbers([1, "a", "b"])), json.dumps(numbers(*[[1, "a", 0.5]] * 6000)),
     json.dumps(numbers(["1", "a", 0.5]))],
)  # fmt: skip
def test_invalid_messages_are_refused(server, body):
    assert httpx.post(f"{server}/hook", content=body, headers=BEARER).status_code == 422


def test_body_size_is_limited_with_or_without_content_length(server, monkeypatch):
    monkeypatch.setattr(app, "MOST_BODY", 1000)
    assert httpx.post(f"{server}/hook", content=b"x" * 2000, headers=BEARER).status_code == 413
    assert httpx.post(f"{server}/hook", content=iter([b"x" * 600] * 4), headers=BEARER).status_code == 413


def test_messages_reach_current_and_later_clients(server):
    post(server, numbers([1, "train/loss", 0.5], [2, "train/loss", float("1e400") and None]))
    post(server, image_message("preview"))
    post(server, image_message("preview", sampler_step=10))
    events = read_events(server, 2)
    assert events[0] == {"kind": "numbers", "run": "a run", "lines": [[1, "train/loss", 0.5], [2, "train/loss", None]]}
    assert events[1]["sampler_step"] == 10 and not events[1]["final"], "only the newest preview of an image is kept"
    post(server, image_message())
    (_, final) = read_events(server, 2)
    assert final["final"] and final["training_step"] == 10
    shown = httpx.get(f"{server}/picture/{final['number']}", auth=("me", TOKEN))
    assert shown.content == base64.b64decode(png()) and shown.headers["content-type"] == "image/png"
    replaced = httpx.get(f"{server}/picture/{events[1]['number']}", auth=("me", TOKEN))
    assert replaced.status_code == 200, "a browser may still request the replaced image"
    assert httpx.get(f"{server}/picture/999", auth=("me", TOKEN)).status_code == 404


def test_memory_is_bounded_and_slow_clients_must_reconnect(monkeypatch):
    monkeypatch.setattr(board, "MOST_BYTES", 400)
    monkeypatch.setattr(board, "MOST_RUNS", 3)
    monkeypatch.setattr(board, "MOST_WAITING", 5)
    state = board.Board()
    slow = state.join()
    for i in range(20):
        state.receive(payload.read(json.dumps(image_message(run=f"run {i % 5}", training_step=i)).encode()))
        state.receive(payload.Metrics(f"run {i % 5}", [(i, "a", 1.0)]))
    assert state.bytes <= 400 and len(state.runs) == 3 and len(state.pictures) == len(state.by_number) > 0
    assert state.bytes == sum(len(kept.picture.png) for kept in state.pictures.values())
    assert [slow.get_nowait() for _ in range(5)][-1] is None and not state.listeners
    for i in range(100):
        state.receive(payload.read(json.dumps(image_message("preview", sampler_step=i)).encode()))
    assert len(state.replaced) == board.MOST_REPLACED and len(state.pictures) == len(state.by_number)


def test_metrics_of_a_resumed_run_replace_older_ones():
    state = board.Board()
    state.receive(payload.Metrics("r", [(step, "a", float(step)) for step in range(6)]))
    state.receive(payload.Metrics("r", [(4, "a", 9.0), (5, "a", 8.0)]))
    assert list(state.runs["r"]["a"]) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 9.0), (5, 8.0)]


def test_server_requires_a_token_and_never_prints_it():
    command = [sys.executable, "-m", "dreambooth_lab.tools.watch", "--port", "0"]
    bare = {key: value for key, value in os.environ.items() if key != "DREAMBOOTH_WATCH_TOKEN"}
    for env in (bare, bare | {"DREAMBOOTH_WATCH_TOKEN": "short"}):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "has no token" in done.stderr and "short" not in done.stderr
    running = subprocess.Popen(command, env=bare | {"DREAMBOOTH_WATCH_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True)
    first = running.stdout.readline()
    running.terminate()
    assert first.startswith("http://127.0.0.1:") and TOKEN not in first + running.communicate(timeout=120)[0]


def test_run_appears_in_the_browser_during_training(small, tmp_path, monkeypatch):
    """Two real runs and one that tries to write HTML, at a desktop's and a phone's width."""
    monkeypatch.setenv("DREAMBOOTH_WATCH_TOKEN", TOKEN)
    with serving() as url, browser.chromium(tmp_path / "profile") as page:
        page.get(url.replace("http://", f"http://me:{TOKEN}@"))
        untrusted = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
        assert post(url, image_message(run=untrusted, prompt=untrusted)).status_code == 204
        assert post(url, numbers([1, untrusted, 2.0], run=untrusted)).status_code == 204
        words = ["webhook=watch", f"webhook.receivers.watch.url={url}/hook", "preview.enabled=true"]
        for name in ("first", "second"):
            run(lab.compose(*small, *words, "trainer.max_steps=3"), tmp_path / name)
        deadline = time.monotonic() + 20
        drawn = "return document.querySelectorAll('.plot .scatterlayer .trace').length"
        while page.execute_script(drawn) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert page.execute_script("return [...document.querySelectorAll('h2')].map(h => h.textContent)") == [
            untrusted,
            "first",
            "second",
        ]
        assert page.title == "dreambooth-lab" and page.find_element("id", "state").text == "live"
        options = page.execute_script(
            "return [...document.querySelectorAll('select')].map(s => [...s.options].map(o => o.value))"
        )
        assert options[1:] == [["newest", "3", "0"]] * 2
        assert any("train/loss: " in f.text for f in page.find_elements("tag name", "figcaption"))
        for size in (browser.DESKTOP, browser.PHONE):
            found = browser.look(page, size, tmp_path / f"live_{size[0]}.png")
            assert found["broken"] == 0 and found["pictures"] == 1 + 2 * 2 and found["wide"] <= size[0], found
        assert browser.complaints(page) == []
