"""What watching costs a training step, in units of a step that nobody watches, measured in one run:

    python -m dreambooth_lab.tools.bench.callback_cost trainer.max_steps=30 validation.every_n_steps=10 …

The words are those of a training run. Every kind trains the same steps, several rounds in turn, so that a busy machine slows
them alike; steps on which pictures are drawn are left out. Kinds: webhooks to receivers of every temper, with previews, and the
average of the weights. A receiver runs in its own process and counts what it received.

    CPU     seconds of the whole process, sending included, a step; the median over rounds of the ratio to the plain run
    wall    the same by the clock
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from ...callbacks import preview
from ...callbacks.builders import build_callbacks, interval
from ...callbacks.periodic import Interval
from ...data.module import DreamBoothData
from ...factory import build_family
from ...profiling.phases import Phases
from ...run import build_module, build_trainer, fit
from ...runfolder import RunFolder
from ..common.training_config import command, compose_checked

ROUNDS = 3
BACK_AFTER = 3.0  # seconds after its first message in which the receiver that comes back takes none
PATIENCE = 4.0  # seconds that a run waits for its receivers in the end; the lab's own patience only costs time here


class Stopwatch(Callback):
    """From one step's start to the next one's, except for steps that generate images. Comes first of the callbacks."""

    def __init__(self, drawn: Interval):
        self.drawn = drawn
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.since: tuple[float, float] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter(), time.process_time()
        if self.since and not self.drawn.due(trainer.global_step):
            self.wall.append(now[0] - self.since[0])
            self.cpu.append(now[1] - self.since[1])
        self.since = now


Answer = Callable[[BaseHTTPRequestHandler, float], None]


def status(code: int) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, age: float) -> None:
        handler.send_response(code)
        handler.end_headers()

    return answer


def hangs(handler: BaseHTTPRequestHandler, age: float) -> None:
    time.sleep(30)


def closes(handler: BaseHTTPRequestHandler, age: float) -> None:
    """Close the connection in the middle of the response's body."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
    handler.connection.close()


def floods(handler: BaseHTTPRequestHandler, age: float) -> None:
    """Respond with ten megabytes."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(10_000_000))
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(b"x" * 10_000_000)


def comes_back(handler: BaseHTTPRequestHandler, age: float) -> None:
    status(200 if age > BACK_AFTER else 500)(handler, age)


TEMPERS: dict[str, Answer | None] = {
    "takes all": status(200), "is down": None, "hangs 30 s": hangs, "answers 500": status(500), "closes mid-body": closes,
    "answers 10 MB": floods, "comes back after 3 s": comes_back,
}  # fmt: skip
TAKES = {"takes all", "closes mid-body", "answers 10 MB"}  # whose status is 200 from the beginning


def receive(temper: str, pipe: Any) -> None:
    """A receiver's process: tells its port, then, when asked, how many finished images it answered with 200."""
    answer: Answer = TEMPERS[temper] or hangs
    taken: Counter[bool] = Counter()
    first: list[float] = []  # when the first message came

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            first.append(time.monotonic())
            age = first[-1] - first[0]
            taken[b'"type":"image"' in body and (temper in TAKES or (answer is comes_back and age > BACK_AFTER))] += 1
            answer(self, age)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    pipe.send(server.server_port)
    server.timeout = 0.05
    while not pipe.poll():
        server.handle_request()
    pipe.send(taken[True])


@contextlib.contextmanager
def receiver(temper: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """Its address, and a function that returns how many finished images it received."""
    if TEMPERS[temper] is None:
        yield "http://127.0.0.1:1/", lambda: 0
        return
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(temper, theirs), daemon=True)
    process.start()

    def taken() -> int:
        ours.send(None)
        return ours.recv()

    yield f"http://127.0.0.1:{ours.recv()}/", taken
    process.kill()


class Measured(NamedTuple):
    cpu: float  # seconds a step
    wall: float
    counts: Counter[str]  # of the webhook


def train(words: list[str]) -> Measured:
    """One run of these words, in a folder that is thrown away."""
    cfg = compose_checked(words)
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        folder, family = RunFolder(Path(root) / "run"), build_family(cfg)
        data = DreamBoothData(cfg, family)
        data.prepare()
        module = build_module(cfg, family, data, folder)
        watchers = build_callbacks(cfg, folder, data, family, 0, leads=True)
        watch = Stopwatch(interval(cfg, cfg.validation, data))
        watchers.callbacks.insert(0, watch)
        fit(build_trainer(cfg, folder, watchers, Phases()), module, data, None)
        senders = [callback.sender for callback in watchers.callbacks if isinstance(callback, preview.CloseWebhooks)]
    counts = senders[0].receivers[0].counts if senders else Counter()
    return Measured(median(watch.cpu), median(watch.wall), counts)


def main(words: list[str]) -> None:
    preview.PATIENCE = PATIENCE
    words = [*words, "ema.enabled=false", "trainer.progress=false", "checkpoint.every_n_steps=1000000", "logger=none"]
    made: dict[str, list[Measured]] = {}
    delivered: dict[str, list[int]] = {}
    for _ in range(ROUNDS):
        made.setdefault("nobody watches", []).append(train(words))
        made.setdefault("average of the weights", []).append(train([*words, "ema.enabled=true", "ema.validation=none"]))
        for temper in TEMPERS:
            with receiver(temper) as (url, taken):
                lines = ["webhook=raw", f"webhook.receivers.raw.url={url}", "preview.enabled=true", "preview.every_n_steps=5"]
                made.setdefault(f"receiver {temper}", []).append(train([*words, *lines]))
                delivered.setdefault(f"receiver {temper}", []).append(taken())
    Console(width=130).print(table(made, delivered))


def table(made: dict[str, list[Measured]], delivered: dict[str, list[int]]) -> Table:
    shown = Table(title=f"medians of {ROUNDS} rounds; counts of the last", title_justify="left")
    columns = ("kind", "CPU", "wall", "CPU s a step", "sent", "retried", "dropped", "numbers", "finished images received")
    for column in columns:
        shown.add_column(column)
    plain = made["nobody watches"]
    for kind, rounds in made.items():
        pairs, counts = list(zip(rounds, plain, strict=True)), rounds[-1].counts
        ratios = (median(a.cpu / b.cpu for a, b in pairs), median(a.wall / b.wall for a, b in pairs))
        cells = [f"{ratio:.3f}" for ratio in ratios] + [f"{median(r.cpu for r in rounds):.4f}"]
        cells += [str(counts[name]) for name in ("sent", "retried", "dropped")] if kind in delivered else ["", "", ""]
        cells += [f"{counts['numbers sent']}, {counts['numbers dropped']} dropped" if kind in delivered else ""]
        shown.add_row(kind, *cells, str(delivered[kind][-1]) if kind in delivered else "")
    return shown


if __name__ == "__main__":
    command(main, __doc__)
