"""Webhook receivers that work, fail, hang or recover, on the loopback interface."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from dreambooth_lab import lab
from dreambooth_lab.callbacks import preview, webhook
from dreambooth_lab.callbacks.messages import Message
from dreambooth_lab.callbacks.webhook import Receiver, Sender
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.run import run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSES", (0.02, 0.05))
    monkeypatch.setattr(preview, "PATIENCE", 1.0)
    monkeypatch.setattr(webhook, "TIMEOUT", webhook.httpx.Timeout(0.5))


@contextmanager
def server(respond):
    """A server that stores request bodies; `respond(handler, n)` answers request n. Yields (url, bodies)."""
    bodies, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                bodies.append((dict(self.headers), body))
                n = len(bodies)
            respond(self, n)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/secret-path", bodies
    finally:
        running.shutdown()
        running.server_close()


def status(code, headers=()):
    def respond(handler, n):
        handler.send_response(code)
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()

    return respond


def message(final=False, **facts):
    known = {"run": "r", "prompt": "a dog", "sampler_step": 5, "total_steps": 20, "training_step": 10}
    known |= {"seed": 3, "image_index": 1}
    return Message(Image.new("RGB", (8, 6), "red"), known | facts, final)


def sender(url, kind=enums.ReceiverKind.raw, token=None):
    return Sender([Receiver("mine", kind, url, token)])


def test_raw_message_describes_the_image():
    with server(status(204)) as (url, bodies):
        sending = sender(url, token="abc")
        sending.send(message())
        sending.send(message(final=True))
        assert sending.close(5)["mine"] == dict.fromkeys(webhook.OUTCOMES, 0) | {"sent": 2}
    messages = sorted((json.loads(body) for _, body in bodies), key=lambda m: m["type"])
    assert [m["type"] for m in messages] == ["image", "preview"]
    assert {"prompt", "sampler_step", "total_steps", "training_step", "seed", "image_index", "run"} < messages[0].keys()
    assert Image.open(io.BytesIO(base64.b64decode(messages[0]["image"]))).size == (8, 6)
    assert all(headers["Authorization"] == "Bearer abc" for headers, _ in bodies)


def test_discord_form_mentions_no_users():
    with server(status(200)) as (url, bodies):
        sending = sender(url, enums.ReceiverKind.discord)
        sending.send(message(final=True, prompt="@everyone look"))
        assert sending.close(5)["mine"]["sent"] == 1
    headers, body = bodies[0]
    assert headers["Content-Type"].startswith("multipart/form-data")
    assert b'"allowed_mentions": {"parse": []}' in body and b"\x89PNG" in body


def truncated_response(handler, n):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
    handler.wfile.flush()
    handler.connection.close()


def ten_megabyte_response(handler, n):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10_000_000))
    handler.end_headers()
    handler.wfile.write(b"x" * 10_000_000)


@pytest.mark.parametrize("respond", [truncated_response, ten_megabyte_response], ids=lambda f: f.__name__)
def test_only_the_response_status_decides_success(respond):
    with server(respond) as (url, _):
        sending = sender(url)
        sending.send(message(final=True))
        assert sending.close(5)["mine"]["sent"] == 1


@pytest.mark.parametrize("receiver", ["hangs", "fails", "redirects", "unreachable", "limits"])
def test_failing_receiver_does_not_delay_training_and_is_counted(receiver):
    responses = {
        "hangs": lambda handler, n: time.sleep(5),
        "fails": status(500),
        "redirects": status(302, [("Location", "http://127.0.0.1:1/")]),
        "limits": status(429, [("Retry-After", "0.05")]),
    }
    with server(responses.get(receiver, status(200))) as (url, _):
        sending = sender("http://127.0.0.1:1/" if receiver == "unreachable" else url)
        start = time.monotonic()
        for _ in range(30):
            sending.send(message())
        sending.send(message(final=True))
        assert time.monotonic() - start < 2, "sending never waits for the five-second response"
        counts = sending.close(0.4)["mine"]
    assert counts["sent"] == 0 and counts["dropped"] == 31


def test_final_image_is_retried_until_the_receiver_is_back():
    def later(handler, n):
        status(503 if n <= 6 else 200)(handler, n)

    with server(later) as (url, bodies):
        sending = sender(url)
        sending.send(message(final=True))
        for i in range(20):
            sending.send(message(sampler_step=i))
        time.sleep(1.5)
        counts = sending.close(5)["mine"]
    delivered = [json.loads(body) for _, body in bodies[6:]]
    assert any(m["type"] == "image" for m in delivered)
    assert counts["sent"] + counts["dropped"] == 21 and counts["retried"] >= 5


def test_oldest_previews_are_dropped_first():
    release = threading.Event()

    def first_waits(handler, n):
        release.wait(2)
        status(200)(handler, n)

    with server(first_waits) as (url, bodies):
        sending = sender(url)
        for i in range(30):
            sending.send(message(sampler_step=i))
        release.set()
        counts = sending.close(5)["mine"]
    steps = [json.loads(body)["sampler_step"] for _, body in bodies]
    assert counts["sent"] == len(steps) and counts["sent"] + counts["dropped"] == 30
    assert steps[-webhook.PREVIEWS_WAITING :] == list(range(30 - webhook.PREVIEWS_WAITING, 30))


def test_retries_end_with_the_run(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSES", (0.2,))
    with server(status(500)) as (url, bodies):
        sending = sender(url)
        sending.send(message(final=True))
        time.sleep(0.05)
        counts = sending.close(1.0)["mine"]
    assert counts["dropped"] == 1 and 2 <= len(bodies) <= 8, "with pauses between attempts"


def test_metrics_are_batched_and_the_oldest_are_dropped_first(monkeypatch):
    monkeypatch.setattr(webhook, "METRICS_WAITING", 50)
    with server(status(200)) as (url, bodies):
        sending = sender(url)
        for step in range(200):
            sending.send_metrics("r", step, {"train/loss": 0.5, "train/odd": float("nan")})
        sending.send(message(final=True))
        counts = sending.close(5)["mine"]
    messages = [one for one in (json.loads(body) for _, body in bodies) if one["type"] == "metrics"]
    lines = [line for each in messages for line in each["lines"]]
    assert counts["numbers sent"] == len(lines) and counts["numbers sent"] + counts["numbers dropped"] == 400
    assert len(messages) <= 3 and lines[-2:] == [[199, "train/loss", 0.5], [199, "train/odd", None]]
    assert counts["sent"] == 1 and counts["dropped"] == 0, "images are counted separately"


def test_metrics_never_block_and_are_not_sent_to_discord():
    with server(status(500)) as (url, bodies):
        sending = Sender(
            [Receiver("raw", enums.ReceiverKind.raw, url, None), Receiver("discord", enums.ReceiverKind.discord, url, None)]
        )
        start = time.monotonic()
        for step in range(1000):
            sending.send_metrics("r", step, {"train/loss": 0.5})
        assert time.monotonic() - start < 2
        counts = sending.close(1)
    assert counts["raw"]["numbers dropped"] == 1000 and counts["raw"]["retried"] == 0, "they are tried once"
    assert sum(counts["discord"].values()) == 0 and all(b"metrics" in body for _, body in bodies)


def test_finished_image_is_read_when_sent(tmp_path):
    """Queued images are read from disk when sent; a missing file is counted, and the next is sent."""
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "blue").save(tmp_path / f"{name}.png")
    with server(status(200)) as (url, bodies):
        sending = sender(url)
        (tmp_path / "a.png").unlink()
        for name in ("a", "b"):
            sending.send(Message(tmp_path / f"{name}.png", message().facts, True))
        counts = sending.close(5)["mine"]
    assert (counts["sent"], counts["dropped"]) == (1, 1)
    assert base64.b64decode(json.loads(bodies[0][1])["image"]) == (tmp_path / "b.png").read_bytes()


def test_secrets_are_not_logged(caplog):
    caplog.set_level("INFO")
    with server(status(500)) as (url, _):
        sending = sender(url, token="hush")
        sending.send(message(final=True))
        sending.close(0.3)
    with server(status(200)) as (url, _):
        sending = sender(url, token="hush")
        sending.send(message(final=True))
        assert sending.close(3)["mine"]["sent"] == 1
    assert "does not accept messages" in caplog.text and "secret-path" not in caplog.text and "hush" not in caplog.text


def test_validation_sends_previews_every_5_of_20_steps_and_then_the_images(small, tmp_path):
    with server(status(200)) as (url, bodies):
        words = ["webhook=raw", f"webhook.receivers.raw.url={url}", "preview.enabled=true", "preview.every_n_steps=5"]
        words += ["validation.num_inference_steps=20", "validation.num_images=1", "trainer.max_steps=1"]
        run(lab.compose(*small, *words), tmp_path / "run")
    messages = [json.loads(body) for _, body in bodies]
    image_messages = [m for m in messages if m["type"] != "metrics"]
    for step in (0, 1):
        mine = [m for m in image_messages if m["training_step"] == step]
        assert [m["sampler_step"] for m in mine if m["type"] == "preview"] == [5, 10, 15, 20]
        (final,) = (m for m in mine if m["type"] == "image")
        image = Image.open(io.BytesIO(base64.b64decode(final["image"])))
        saved = Image.open(tmp_path / "run" / "images" / f"step_{step:07d}" / "00_00.png")
        assert image.tobytes() == saved.tobytes()
        last = next(m for m in mine if m["sampler_step"] == 20 and m["type"] == "preview")
        shown = Image.open(io.BytesIO(base64.b64decode(last["image"])))
        assert shown.tobytes() == image.tobytes(), "without a tiny decoder the VAE itself decodes previews"


@pytest.mark.slow
def test_previews_do_not_touch_training(small, tmp_path):
    quick = [*small, "trainer.max_steps=3"]
    run(lab.compose(*quick), tmp_path / "without")
    words = ["webhook=raw", "webhook.receivers.raw.url=http://127.0.0.1:1/", "preview.enabled=true"]
    run(lab.compose(*quick, *words), tmp_path / "with")
    assert lab.load(tmp_path / "with").series == lab.load(tmp_path / "without").series


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preview.enabled=true"], "there is no receiver"),
        (["preview.enabled=true", "validation.every_n_steps=0", "webhook=raw"], "so no images"),
        (["webhook=raw"], "webhook.receivers.raw has no http(s) address"),
        (["webhook=discord", "validation.every_n_steps=0"], "but no images are generated, and Discord gets no metrics"),
        (["webhook=raw", "webhook.receivers.raw.url=ftp://x"], "webhook.receivers.raw has no http(s) address"),
        (["webhook=[raw,discord]", "webhook.receivers.raw.url=http://x"], "'DISCORD_WEBHOOK_URL', an environment variable"),
    ],
)
def test_invalid_webhook_settings_are_refused(small, words, message, monkeypatch):
    monkeypatch.delenv("DISCORD_WEBHOOK_URL", raising=False)
    with pytest.raises(ConfigError, match="problem") as caught:
        check(lab.compose(*small, *words))
    assert message in str(caught.value)
