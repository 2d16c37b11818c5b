# ruff: noqa: F811 (fixtures of another module)
"""Runs that train by night: asked to end in time, waiting for their turn, telling in the morning what happened.

No test waits for a time of day: `Morning` says when it has come, and rings as the timer does.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import CrashLoop, Diverged, EnvironmentFault, Run, SaveFault, UserError, from_dict
from gradine.pipeline import driver, signals, summary, webhook
from gradine.pipeline.display import Board
from gradine.pipeline.figures import current
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.session import SECONDS_TO_LEAVE, Session
from gradine.pipeline.signals import Deadline, Signals, Stopped
from gradine.pipeline.summary import Best, Teller, night_of, outcome_of
from tests.injected import PATIENCE_S, Injected, meanwhile, wait_until
from tests.test_faults_runs import (  # noqa: F401 (fixtures among them)
    EVALUATION_STUCK,
    ONE_WORKER,
    SHARDING_STUCK,
    WITHOUT_EVALUATIONS,
    Here,
    bits,
    copied,
    events,
    gradine,
    injected,
    settings_of,
    started,
    unbroken,
    unmeasured,
)

# Until HH:MM ---------------------------------------------------------------------------------------------------------


def utc(*when: int) -> float:
    return datetime(*when, tzinfo=UTC).timestamp()  # type: ignore[arg-type,misc]


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One hour before UTC in winter, two in summer; 2026 changes on 29 March, 01:00 UTC, and on 25 October, 01:00."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(("now", "text", "then"), [
    (utc(2026, 11, 21, 21, 0), "06:00", utc(2026, 11, 22, 5, 0)),
    (utc(2026, 11, 22, 4, 59, 59), "6:00", utc(2026, 11, 22, 5, 0)),
    (utc(2026, 11, 22, 5, 0), "06:00", utc(2026, 11, 23, 5, 0)),
    (utc(2026, 11, 21, 22, 30), "23:59", utc(2026, 11, 21, 22, 59)),
    (utc(2026, 12, 31, 22, 0), "00:00", utc(2026, 12, 31, 23, 0)),
    (utc(2026, 3, 28, 21, 0), "06:00", utc(2026, 3, 29, 4, 0)),  # the night that is an hour shorter
    (utc(2026, 10, 24, 20, 0), "06:00", utc(2026, 10, 25, 5, 0)),  # and the one that is longer
    (utc(2026, 3, 28, 21, 0), "02:30", utc(2026, 3, 29, 1, 30)),  # clocks go from 01:59 to 03:00
    (utc(2026, 10, 24, 20, 0), "02:30", utc(2026, 10, 25, 0, 30)),  # the first of two
    (utc(2026, 10, 25, 0, 45), "02:30", utc(2026, 10, 25, 1, 30)),  # the second
])
def test_until_is_the_next_time_that_local_clocks_show_it(now: float, text: str, then: float, berlin: None) -> None:
    assert Deadline.next(text, now).unix_s == then


@pytest.mark.parametrize("text", ["6", "24:00", "06:60", "6am", "-1:00", "06:00:00", "0600", " 06:00", "006:00"])
def test_what_is_no_time_of_day_is_refused_in_one_line_before_anything_is_read(text: str, gradine: Here) -> None:
    assert gradine("run", "no-such-recipe", f"--until={text}") == 2
    assert gradine.err.count("\n") == 1
    for part in (repr(text), "HH:MM", "--until 06:00"):
        assert part in gradine.err


def test_the_timer_rings_a_grace_before_the_deadline_wherever_the_driver_waits() -> None:
    began = time.time()
    with pytest.raises(Stopped) as stopped, Signals(Deadline("06:00", began + 3600.2), grace_s=3600.0).heard():
        threading.Event().wait(PATIENCE_S)
    assert time.time() >= began + 0.2
    assert stopped.value.exit_code == 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_clock_that_is_set_is_met_at_the_next_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LOOK_AGAIN_S", 0.01)
    true_time, ahead = time.time, [0.0]
    monkeypatch.setattr("gradine.pipeline.signals.time.time", lambda: true_time() + ahead[0])
    looks: list[float] = []
    true_left = Deadline.seconds_left
    monkeypatch.setattr(Deadline, "seconds_left", lambda self: looks.append(left := true_left(self)) or left)

    def wait() -> None:
        wait_until(lambda: len(looks) > 3, "the clock is looked at")
        ahead[0] = 7201.0
        threading.Event().wait(PATIENCE_S)

    with pytest.raises(Stopped), Signals(Deadline("06:00", true_time() + 7200)).heard():
        wait()
    assert min(looks[:-1]) > 7000


def test_a_signal_after_the_alarm_is_the_first_request_and_one_more_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    quits: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: quits.append(number))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    clock = iter([100.0, 100.1, 102.0, 103.0])
    monkeypatch.setattr("gradine.pipeline.signals.time.monotonic", lambda: next(clock))
    heard = Signals(Deadline("06:00", 0.0))
    heard.gentle = True
    heard._look_at_the_clock()
    assert (heard.asked, heard.reason) == (signal.SIGALRM, "until 06:00")
    heard._hear(signal.SIGTERM, None)
    assert (heard.asked, heard.reason, quits) == (signal.SIGTERM, "SIGTERM", [])
    heard._look_at_the_clock()
    assert heard.asked == signal.SIGTERM
    heard._hear(signal.SIGTERM, None)  # of the same request
    assert quits == []
    heard._hear(signal.SIGTERM, None)
    assert quits == [signal.SIGTERM]


def test_a_session_that_has_ended_is_not_interrupted_by_its_deadline() -> None:
    with Signals(Deadline("06:00", time.time() + 3600)).heard() as heard:
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        heard.forget_deadline()
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        os.kill(os.getpid(), signal.SIGALRM)  # one that was under way


# The summary, of ledgers made by hand --------------------------------------------------------------------------------

NIGHT = utc(2026, 11, 21, 21, 0)


def line(minute: float, event: str, **facts: Any) -> dict[str, Any]:
    return {"time": NIGHT + 60 * minute, "event": event, **facts}


def tick(minute: float, size: int, seen: int, rate: float, masked: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return line(minute, "tick", resolution=size, images_seen=seen, images_per_s=rate, masked=list(masked))


def saved(minute: float, size: int, seen: int) -> dict[str, Any]:
    return line(minute, "checkpoint", resolution=size, images_seen=seen, path=f"/c/r{size:04d}-hold-{seen:09d}")


def measured(minute: float, size: int, seen: int, error: str | None = None) -> dict[str, Any]:
    return line(minute, "evaluation", resolution=size, images_seen=seen, error=error,
                checkpoint=f"r{size:04d}-hold-{seen:09d}")


def row(size: int, seen: int, metric: str, value: float | None) -> dict[str, Any]:
    return current({"metric": metric, "value": value, "resolution": size, "images_seen": seen, "floor": 2.5,
                    "untrained": 300.0, "checkpoint": f"r{size:04d}-hold-{seen:09d}", "count": 271})


LAST_NIGHT = [
    line(-1440, "start", command="gradine run flowers.yaml --until 06:00"), line(-1440, "resume", images_seen=0),
    line(-1439, "stage_start", resolution=4, images_seen=0, workers=1), tick(-1400, 4, 600, 100.0, (1, 0)),
    saved(-1400, 4, 600), tick(-1399, 4, 640, 100.0, (3, 1)), line(-1398, "stopped", reason="until 06:00")]
TONIGHT = [
    line(0, "start", command="/opt/bin/gradine run flowers.yaml --until 06:00"),
    line(0, "resume", images_seen=600, reason="newest"),
    line(1, "group", workers=1, nodes=["10.0.0.1"]),
    line(1, "stage_start", resolution=4, images_seen=600, workers=1),
    tick(11, 4, 800, 90.0, (2, 0)), tick(21, 4, 1000, 110.0, (2, 0)), saved(21, 4, 1000),
    line(21, "stage_end", resolution=4, images_seen=1000),
    line(25, "group", workers=2, nodes=["10.0.0.1", "10.0.0.2"]),
    line(26, "stage_start", resolution=8, images_seen=1000, workers=2),
    measured(27, 4, 1000),
    tick(36, 8, 1400, 20.0, (2, 0)), saved(36, 8, 1400), tick(46, 8, 1900, 30.0, (7, 0)),
    line(47, "alarm", resolution=8, images_seen=1900, alarm="gradient norm",
         message="the norm <left> its band", figure="norm", value=9.0, bound=2.0),
    line(48, "retry", reason="ActorDiedError: the worker died", failures=1),
    line(49, "resume", images_seen=1400, reason="ActorDiedError: the worker died"),
    line(50, "group", workers=1, nodes=["10.0.0.1"]),
    line(51, "stage_start", resolution=8, images_seen=1400, workers=1),
    tick(61, 8, 1600, 10.0, (3, 2)), saved(62, 8, 1600), measured(63, 8, 1400, error="it died"),
    measured(64, 8, 1600), tick(65, 8, 1700, 12.0, (3, 2)),
    line(66, "stopped", reason="until 06:00")]
ROWS = [row(4, 600, "swd", 40.0), row(4, 1000, "swd", 32.0),
        {**row(4, 1000, "fd_pixels16", 9.0), "metric": "frechet_pixels16"},  # as older versions call it
        row(8, 1600, "swd", 55.0), row(8, 1600, "ms_ssim", None)]


def flowers() -> Run:
    return from_dict({"name": "flowers", "data": {"source": "a", "shards": "b"}, "stages": [
        {"resolution": 4, "hold_images": 1000, "batch_size": 8},
        {"resolution": 8, "fade_images": 1000, "hold_images": 2000, "batch_size": 8}]})


def told(rows: list[dict[str, Any]] = ROWS, error: BaseException | None = None) -> summary.Night:
    outcome = outcome_of(error or Stopped(signal.SIGALRM), "until 06:00")
    return night_of(flowers(), LAST_NIGHT + TONIGHT, len(LAST_NIGHT), rows, outcome, NIGHT, NIGHT + 66 * 60)


def test_the_facts_of_a_night_are_those_of_its_lines_alone() -> None:
    night = told()
    assert (night.first, night.last, night.kept, night.end) == (600, 1700, 1600, 4000)
    four, eight = night.stages
    assert (four.resolution, four.first, four.last, four.rate) == (4, 600, 1000, 100.0)
    assert (four.workers, four.nodes) == ("1", "1")
    assert four.seconds == 20 * 60
    assert (eight.resolution, eight.first, eight.last, eight.rate) == (8, 1000, 1700, 16.0)  # of 10, 12, 20 and 30
    assert (eight.workers, eight.nodes) == ("2, then 1", "2, then 1")
    assert eight.seconds == (21 + 14) * 60  # what came between is no training
    assert [one["reason"] for one in night.retries] == ["ActorDiedError: the worker died"]
    assert [(kind, text) for _, kind, text in night.trouble] == [
        ("retry", "failure 1: ActorDiedError: the worker died"),
        ("evaluation failed", "r0008-hold-000001400: it died")]
    assert night.masked == (2, 2)  # at 600 images it was 1 and 0; what came after 1,400 the first time is undone
    assert night.checkpoints == ["r0004-hold-000001000", "r0008-hold-000001400", "r0008-hold-000001600"]
    assert night.best == [Best("swd", 4, 40.0, 32.0, "r0004-hold-000001000"),
                          Best("swd", 8, None, 55.0, "r0008-hold-000001600"),
                          Best("fd_pixels16", 4, None, 9.0, "r0004-hold-000001000")]
    assert [name for name, _ in night.measured] == ["r0004-hold-000001000", "r0008-hold-000001600"]


def test_what_was_not_better_is_no_new_best() -> None:
    assert summary.new_best([*ROWS, row(4, 200, "swd", 31.0)], [ROWS[1]]) == []
    assert summary.new_best([row(4, 200, "swd", None), (lost := row(4, 400, "swd", float("nan")))], [lost]) == []


def test_a_best_is_held_against_rows_of_its_count_and_features_alone() -> None:
    others = [{**row(4, 600, "swd", 31.0), key: "of another kind"} for key in ("count", "features_digest", "data")]
    assert summary.new_best([*ROWS, *others], [ROWS[1]]) == [Best("swd", 4, 40.0, 32.0, "r0004-hold-000001000")]


def test_of_several_features_the_strongest_tell_of_a_new_best() -> None:
    own = [row(8, 1600, name, 1.0) for name in ("fd_pixels16", "fd_lite0_224", "kid_lite0_224", "swd")]
    before = [row(8, 1400, name, 2.0) for name in ("fd_pixels16", "fd_lite0_224", "kid_lite0_224", "swd")]
    assert [(best.metric, best.was) for best in summary.new_best([*before, *own], own)] == [
        ("swd", 2.0), ("fd_lite0_224", 2.0)]


def test_the_table_of_figures_has_the_columns_that_the_night_measured() -> None:
    extra = [row(8, 1600, name, 0.5) for name in ("coverage_lite0_224", "copy_rate_lite0_224", "fd_lite0_224",
                                                  "fd_pixels16", "kid_lite0_224")]
    night = told([*ROWS, *extra])
    assert summary.columns(told()) == ["swd", "fd_pixels16"]  # of ms_ssim there is no value
    assert summary.columns(night) == ["swd", "fd_lite0_224", "coverage_lite0_224", "copy_rate_lite0_224"]
    table = summary.page(night, []).partition('<table id="figures">')[2].partition("</table>")[0]
    assert [re.findall(r"<td>(.*?)</td>", line) for line in table.split("<tr>")[2:]] == [
        ["r0004-hold-000001000", "32", "2.5", "300", "–", "–", "–"],
        ["r0008-hold-000001600", "55", "2.5", "300", "0.5", "0.5", "0.5"]]


@pytest.mark.parametrize(("error", "result", "code"), [
    (None, "done", 0), (Stopped(signal.SIGALRM), "stopped", 0), (Stopped(signal.SIGTERM), "stopped", 143),
    (KeyboardInterrupt(), "stopped", 130), (UserError("a"), "refused", 2), (EnvironmentFault("a"), "failed", 3),
    (SaveFault("a"), "failed", 4), (CrashLoop("a"), "failed", 5), (Diverged("a"), "failed", 6),
    (OSError(errno.ENOSPC, "No space"), "failed", 3), (RuntimeError("ours"), "failed", 1)])
def test_a_night_is_told_with_the_exit_code_it_ends_with(error: BaseException | None, result: str, code: int) -> None:
    outcome = outcome_of(error, "until 06:00")
    assert (outcome.result, outcome.exit_code) == (result, code)


@pytest.mark.parametrize(("worked", "result"), [
    ([], "refused"), (["start", "stopped"], "refused"), (["start", "shards", "stopped"], "failed"),
    (["start", "stage_start", "tick", "stopped"], "failed")])
def test_wrong_input_that_comes_to_light_after_hours_of_work_is_no_refusal(
        worked: list[str], result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunDir(tmp_path / "flowers")
    folder.path.mkdir()
    posts: list[dict[str, Any]] = []
    monkeypatch.setattr(webhook, "post", lambda message, *_, **__: posts.append(message))
    for each in LAST_NIGHT:
        folder.append("ledger.jsonl", each)
    teller = Teller(flowers(), folder)
    teller.hold()
    for each in (*TONIGHT, line(1, "shards", images=9, seconds=1.0)):
        if each["event"] in worked:
            folder.append("ledger.jsonl", each)
    with pytest.raises(UserError), teller.whatever_happens():
        raise UserError("shard 3 is torn")
    assert [(post["result"], post["exit_code"]) for post in posts] == [(result, 2)]
    assert f"flowers: {result} with exit code 2. shard 3 is torn." in posts[0]["text"]


def test_the_paragraph_reads_as_one(berlin: None) -> None:
    assert summary.paragraph(told()) == (
        "flowers: stopped as asked, until 06:00. 1,700 of 4,000 images (42 %), 1,100 of them in 1 h 06 min. 1 retry, "
        "the last after: ActorDiedError: the worker died. 1 alarm, the last: the norm <left> its band. New best SWD at "
        "4 px: 32, was 40.")
    failed = summary.paragraph(told(error=CrashLoop("training failed 3 times")))
    assert failed.startswith("flowers: failed with exit code 5. training failed 3 times. 1,700 of")


def noise(folder: RunDir, size: int, seen: int) -> None:
    folder.samples.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seen).integers(0, 256, (8 * size, 8 * size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder.samples / f"r{size:04d}-{seen:09d}.png")


@pytest.mark.parametrize("size", [32, 64, 1024])
def test_the_page_is_self_contained_small_and_escapes_what_came_from_outside(
        tmp_path: Path, berlin: None, size: int) -> None:
    folder = RunDir(tmp_path / "flowers")
    for seen in (1000, 1600):  # noise is the most that a picture can take
        noise(folder, size, seen)
    lines = [measured(1, size, seen) for seen in (1000, 1600)]
    night = replace(told(), trouble=[(NIGHT, "retry", f"a reason of <b>{'many words ' * 90}")] * 40,
                    alarms=told().alarms * 20)
    text = summary.page(night, summary.sights(folder, lines, first=600))
    assert len(text.encode()) < 300_000
    assert text.count("data:image/") == 2
    assert not re.search(r"https?://|src=\"(?!data:)|<script|url\(", text)
    assert "<left>" not in text
    assert "a reason of &lt;b&gt;many" in text
    for part in ("Stopped as asked, until 06:00", "Saturday, 21 November 2026, 22:00 to 23:06 (CET)", "600 → 1,700",
                 "New best SWD at 4 px: 40 → 32", "2, then 1", "gradine run flowers.yaml --until 06:00",
                 "at 1,600 images: what came after is trained again", "The last 5 of 40", "35 min 00 s"):
        assert part in " ".join(text.split()), part


def test_the_pictures_are_the_first_and_last_of_the_night_or_the_one_before_it(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "flowers")
    for size, seen in ((4, 600), (4, 800), (8, 1000), (8, 1200), (8, 9000)):
        noise(folder, size, seen)
    (folder.samples / "r0008-000000850-neighbors.png").touch()  # no samples
    night = [measured(1, 8, seen) for seen in (1000, 1100, 1200)]

    def seen(lines: list[dict[str, Any]]) -> list[int]:
        return [sight.images_seen for sight in summary.sights(folder, lines, first=900)]

    assert seen(night) == [1000, 1200]
    assert seen(night[2:]) == [800, 1200]
    assert seen(night[1:2]) == [800]  # its own has gone
    assert seen([]) == []


def test_a_page_that_cannot_be_written_is_one_line_and_changes_no_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = RunDir(tmp_path / "flowers"), []
    folder.path.mkdir()
    folder.tell = said.append
    monkeypatch.setattr(summary, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    for failing in ("write_atomic", "night_of"):
        monkeypatch.setattr(summary, failing, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        teller = Teller(flowers(), folder)
        teller.hold()
        folder.append("ledger.jsonl", line(0, "start", command="gradine run flowers"))
        with pytest.raises(CrashLoop, match="three times"), teller.whatever_happens():
            raise CrashLoop("three times")
        assert len(said) == 1
        assert "No space" in said.pop()


def test_a_night_is_told_once_and_one_that_did_nothing_leaves_no_page(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "flowers")
    folder.path.mkdir()
    teller = Teller(flowers(), folder)
    with teller.whatever_happens():
        teller.hold()
    assert not (folder.path / "nights").exists()
    for _ in range(2):  # both begin in the same second
        teller = Teller(flowers(), folder)
        teller.hold()
        teller.began = NIGHT
        with teller.whatever_happens():
            folder.append("ledger.jsonl", line(0, "start", command="gradine run flowers"))
            teller.tell(None)
    assert len(list((folder.path / "nights").iterdir())) == 2


# The webhook ---------------------------------------------------------------------------------------------------------

SECRET = "canary-B00000-0123456789"


class Hook:
    """A server that keeps what is posted to it, and answers with `code`, or never."""

    def __init__(self, code: int) -> None:
        self.posts: list[dict[str, Any]] = []
        self.over = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if not code:
                    hook.over.wait(PATIENCE_S)
                    return
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", f"{hook.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                hook.posts.append({"text": "a GET"})

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{SECRET}"


@contextmanager
def hook_of(monkeypatch: pytest.MonkeyPatch, code: int = 200) -> Iterator[Hook]:
    hook = Hook(code)
    thread = threading.Thread(target=hook.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("GRADINE_WEBHOOK", hook.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield hook
    finally:
        hook.over.set()
        hook.server.shutdown()
        hook.server.server_close()
        thread.join()


@pytest.mark.parametrize(("code", "tries", "says"), [
    (200, 1, ""), (204, 1, ""), (500, 3, "HTTP 500"), (404, 3, "HTTP 404"), (302, 3, "HTTP 302"), (0, 3, "timed out"),
    (0, 1, "no answer within")])
def test_what_is_posted_arrives_or_is_given_up_in_one_line_that_holds_no_secret(
        code: int, tries: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)
    monkeypatch.setattr(webhook, "ANSWER_S", 0.3 if says == "timed out" else 5.0)
    monkeypatch.setattr(webhook, "WITHIN_S", 0.3 if "within" in says else PATIENCE_S)
    said: list[str] = []
    with hook_of(monkeypatch, code) as hook:
        webhook.post({"text": f"see {hook.url}"}, said.append)
        assert hook.posts == [{"text": "see ***"}] * tries
    assert len(said) == bool(says)
    assert says in "".join(said)
    assert SECRET not in "".join(said)


def test_a_session_that_was_asked_to_stop_does_not_wait_long_for_its_webhook(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert webhook.IN_HASTE_S + 2 < SECONDS_TO_LEAVE  # what is left is for Ray's end and a lease's
    monkeypatch.setattr(webhook, "IN_HASTE_S", 0.2)
    monkeypatch.setattr(webhook, "ANSWER_S", PATIENCE_S)
    monkeypatch.setattr(webhook, "WITHIN_S", PATIENCE_S)
    folder, said = RunDir(tmp_path / "flowers"), []
    folder.path.mkdir()
    folder.tell = said.append
    with hook_of(monkeypatch, 0) as hook:
        with pytest.raises(Stopped), Teller(flowers(), folder).whatever_happens():
            raise Stopped(signal.SIGTERM)
        assert len(hook.posts) == 1
        assert not hook.over.is_set()
    assert len(said) == 1
    assert "no answer within 0 s" in said[0]


@pytest.mark.parametrize(("url", "says"), [
    ("http://127.0.0.1:1/" + SECRET, "Connection refused"), ("file:///tmp/" + SECRET, "no http:// or https:// URL"),
    ("ftp://127.0.0.1/" + SECRET, "no http:// or https:// URL"), (SECRET, "no http:// or https:// URL"),
    ("http://[bad/" + SECRET, "ValueError"), ("http://127.0.0.1:x/" + SECRET, "InvalidURL"),
    ("http://127.0.0.1/a b" + SECRET, "InvalidURL"), ("http:///" + SECRET, "")])
def test_a_webhook_that_cannot_be_is_one_line_without_it(
        url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)
    monkeypatch.setenv("GRADINE_WEBHOOK", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said: list[str] = []
    webhook.post({"text": "the end"}, said.append)
    (only,) = said
    assert says in only
    assert SECRET not in only
    assert "\n" not in only


# F40: whole nights ---------------------------------------------------------------------------------------------------


class Morning:
    """In this process: the deadline is an hour away until it rings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_come = False
        monkeypatch.setattr(Deadline, "seconds_left", lambda _: -1.0 if self.has_come else 3600.0)

    def rings(self) -> None:
        self.has_come = True
        os.kill(os.getpid(), signal.SIGALRM)


@pytest.fixture
def morning(monkeypatch: pytest.MonkeyPatch) -> Morning:
    return Morning(monkeypatch)


STAYING = WITHOUT_EVALUATIONS + '''
@before_steps
def stay(state, shares, seen):
    if seen in (120, 200) and rank() == 0 and first(f"asked-{seen}"):
        until_asked(str(seen))
'''
FILE_RINGS = '''
def change(module):
    module.LOOK_AGAIN_S = 0.05
    module.Deadline.seconds_left = lambda self: -1.0 if (HERE / "morning").exists() else 3600.0
CHANGES["gradine.pipeline.signals"] = change
'''


def pages(folder: RunDir) -> list[str]:
    return [path.read_text() for path in sorted((folder.path / "nights").iterdir())]


@pytest.mark.fault
def test_f40_nights_that_end_in_time_in_a_fade_and_in_a_hold_equal_the_unbroken_run_to_the_bit(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None, morning: Morning, monkeypatch: pytest.MonkeyPatch) -> None:
    """--until comes in a fade and in a hold; the night between the two is missed"""
    injected.add(STAYING)
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    with hook_of(monkeypatch) as hook:
        for where, phase in ((120, "fade"), (200, "hold")):
            def night(where: int = where) -> None:
                injected.reached(str(where))
                morning.rings()

            with meanwhile(night):
                assert gradine("train", config, "--until", "06:00") == 0, gradine.err
            assert "until 06:00: writing a checkpoint, then ending" in gradine.out
            assert not gradine.err
            last = events(folder, "checkpoint")[-1]
            assert (last["images_seen"], last["phase"]) == (where + 8, phase)
            assert events(folder, "stopped")[-1]["reason"] == "until 06:00"
            morning.has_come = False
        assert gradine("train", config, "--until", "06:00") == 0
    assert [one["start"] for one in events(folder, "resume")] == [
        None, "r0008-fade-000000128", "r0008-hold-000000208"]
    assert not events(folder, "retry")
    assert bits(folder) == bits(unbroken)
    assert [(post["result"], post["exit_code"], post["images_seen"], post["retries"]) for post in hook.posts] == [
        ("stopped", 0, 128, []), ("stopped", 0, 208, []), ("done", 0, 240, [])]
    assert len(pages(folder)) == 3
    assert [Path(post["summary"]).read_text() for post in hook.posts] == pages(folder)
    for page, part in zip(pages(folder), ("0 → 128", "128 → 208", "208 → 240"), strict=True):
        assert part in page
        assert SECRET not in page


@pytest.mark.fault
@pytest.mark.parametrize("where", ["sharding", "between stages", "evaluation"])
def test_f40_until_ends_a_night_outside_of_a_stage_too_and_the_next_one_goes_on(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        morning: Morning, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """--until comes while a sharding task is stuck, after a stage's end, while only an evaluation runs"""
    injected.add({"sharding": SHARDING_STUCK, "evaluation": EVALUATION_STUCK}.get(where, WITHOUT_EVALUATIONS))
    config, folder = settings_of(tiny_run({**ONE_WORKER, "data.shards": str(tmp_path / "own-shards")}), tmp_path)
    true_join = Session.join_group

    def join(self: Session, index: int) -> Any:
        if index == 1 and first:
            first.clear()
            morning.rings()
        return true_join(self, index)

    first = [True]
    if where == "between stages":
        monkeypatch.setattr(Session, "join_group", join)
    stuck = {"sharding": "slice", "evaluation": "evaluation"}.get(where)

    def night() -> None:
        if stuck:
            injected.reached(stuck)
            if stuck == "evaluation":
                wait_until(lambda: len(events(folder, "stage_end")) == 2, "training ends")
            morning.rings()

    if where == "sharding":  # Ray's tasks must be gone before the next night makes the rest
        injected.add(SHARDING_STUCK + FILE_RINGS)
        with started("run", config, "--until", "06:00") as process:
            injected.reached("slice")
            (injected.folder / "morning").touch()
            assert process.ended() == 0, process.err
        assert not process.err
        injected.end()
    else:
        with meanwhile(night):
            assert gradine("run", config, "--until", "06:00") == 0, gradine.err
        assert not gradine.err
    assert [one["reason"] for one in events(folder, "stopped")] == ["until 06:00"]
    assert len(pages(folder)) == 1
    morning.has_come = False
    if stuck == "evaluation":
        injected.let_go(stuck)
    assert gradine("run", config, "--until", "06:00") == 0
    assert bits(folder) == bits(unbroken)
    assert not events(folder, "retry")


@pytest.mark.fault
def test_f40_a_night_killed_before_it_could_end_in_time_is_gone_on_with(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None) -> None:
    """SIGKILL to driver and Ray after --until has come, in a step that does not end"""
    injected.add(FILE_RINGS + WITHOUT_EVALUATIONS + '''
@before_steps
def stay(state, shares, seen):
    if seen == 120 and first("stuck-once"):
        hold("stuck")
''')
    config, folder = settings_of(tiny_run({**ONE_WORKER, "ray.grace_s": 600.0}), tmp_path)
    with started("train", config, "--until", "06:00") as process:
        injected.reached("stuck")
        (injected.folder / "morning").touch()
        assert process.popen.stdout
        for said in process.popen.stdout:
            if "until 06:00: writing a checkpoint" in said:
                break
        family = process.family()
        for one in family:
            one.kill()
        process.popen.communicate()
    assert not (folder.path / "nights").exists()
    (injected.folder / "morning").unlink()
    assert gradine("train", config, "--until", "06:00") == 0
    assert len(pages(folder)) == 1
    assert bits(folder) == bits(unbroken)


@pytest.mark.fault
def test_f40_a_sigterm_while_the_last_checkpoint_of_a_night_is_written_loses_nothing(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here, unmeasured: None,
        morning: Morning) -> None:
    """SIGTERM to the driver after --until has come, before the worker has ended its step"""
    injected.add(STAYING + '''
def slowly(module):
    true_save = module.Saver.save
    def save(self, state, info):
        if state.images_seen == 128:
            hold("saving")
        return true_save(self, state, info)
    module.Saver.save = save
CHANGES["gradine.stages.checkpoint"] = slowly
''')
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)

    def night() -> None:
        injected.reached("120")
        morning.rings()
        injected.reached("saving")
        os.kill(os.getpid(), signal.SIGTERM)
        injected.let_go("saving")

    with meanwhile(night):
        assert gradine("train", config, "--until", "06:00") == 143
    assert events(folder, "checkpoint")[-1]["images_seen"] == 128
    assert events(folder, "stopped")[-1]["reason"] == "SIGTERM"


@pytest.mark.fault
def test_f40_a_night_that_finds_the_last_one_running_refuses_or_takes_its_turn_after_it(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None, morning: Morning, monkeypatch: pytest.MonkeyPatch) -> None:
    """the nightly command on a run that trains: alone, with --queue for too long, with --queue till its turn"""
    monkeypatch.setattr(driver, "QUEUE_LOOK_S", 0.05)
    injected.add(FILE_RINGS + STAYING.replace("(120, 200)", "(120,)"))
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    with started("train", config, "--until", "06:00") as process, hook_of(monkeypatch) as hook:
        injected.reached("120")
        ledger = (folder.path / "ledger.jsonl").read_bytes()
        holder = f"pid {process.popen.pid} on {socket.gethostname()}"
        assert gradine("train", config, "--until", "06:00") == 2
        assert gradine.err.count("\n") == 1
        assert holder in gradine.err
        morning.has_come = True
        assert gradine("train", config, "--until", "06:00", "--queue") == 0
        assert gradine.out.count("\n") == 1
        assert holder in gradine.out
        assert "nothing was trained here" in gradine.out
        morning.has_come = False
        for post, result, code in zip(hook.posts, ("refused", "stopped"), (2, 0), strict=True):
            assert (post["result"], post["exit_code"], post["summary"]) == (result, code, None)
            assert holder in post["text"]
        assert (folder.path / "ledger.jsonl").read_bytes() == ledger
        assert not (folder.path / "nights").exists()

        tries: list[int] = []
        true_wait = driver.Turn.wait

        def wait(self: driver.Turn, busy: Any) -> None:
            tries.append(1)
            if len(tries) == 3:
                (injected.folder / "morning").touch()  # for the first, in its own process
            true_wait(self, busy)

        monkeypatch.setattr(driver.Turn, "wait", wait)
        assert gradine("train", config, "--until", "06:00", "--queue") == 0, gradine.err
        assert process.ended() == 0, process.err
    assert gradine.out.count("waiting for its end") == 1
    assert len(tries) >= 3
    assert [one["images_seen"] for one in events(folder, "resume")] == [0, 128]
    assert [post["result"] for post in hook.posts[2:]] == ["done"]
    assert len(pages(folder)) == 2
    assert bits(folder) == bits(unbroken)


@pytest.mark.fault
def test_f40_a_night_after_the_end_of_the_run_says_so_and_changes_nothing(
        unbroken: RunDir, tmp_path: Path, gradine: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """the nightly command three times on a run that has trained"""
    config, folder = copied(unbroken, tmp_path)
    assert gradine("train", config, "--until", "06:00") == 0  # measures what was not measured yet
    assert len({row["checkpoint"] for row in folder.lines("metrics.jsonl")}) == 2

    def no_ray(*_: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver, "connected", no_ray)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.path.rglob("*")
              if path.is_file() and path.name != "lock"}
    with hook_of(monkeypatch) as hook:
        for _ in range(2):
            assert gradine("train", config, "--until", "06:00") == 0
            assert "all 240 images are trained and measured: nothing is left to do" in gradine.out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.path.rglob("*")
            if path.is_file() and path.name != "lock"} == before
    assert [(post["result"], post["images_seen"], post["summary"]) for post in hook.posts] == [("done", 240, None)] * 2


@pytest.mark.fault
@pytest.mark.parametrize("code", [0, 500], ids=["blackholed", "500"])
def test_f40_a_webhook_that_hangs_or_fails_delays_no_step_and_changes_no_end(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here,
        unmeasured: None, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """a webhook that takes a post and never answers, or answers 500, after a run that fails and one that does not"""
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)
    monkeypatch.setattr(webhook, "ANSWER_S", 0.2)
    injected.add('''
@before_steps
def fail(state, shares, seen):
    if seen == 136 and (HERE / "cause").exists():
        raise RuntimeError("the tape is torn")
''')
    (injected.folder / "cause").touch()
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    with hook_of(monkeypatch, code) as hook:
        assert gradine("train", config) == 5
        assert len(hook.posts) == 3
        assert hook.posts[0]["result"] == "failed"
        assert len(hook.posts[0]["retries"]) == 3
        assert "the tape is torn" in hook.posts[0]["text"]
        (injected.folder / "cause").unlink()
        hook.posts.clear()
        assert gradine("train", config) == 0
        assert len(hook.posts) == 3
    assert (gradine.out + gradine.err).count("could not be posted to GRADINE_WEBHOOK") == 1
    assert SECRET not in gradine.out + gradine.err
    assert "Failed with exit code 5" in pages(folder)[0]
    assert not [path for path in folder.path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert bits(folder) == bits(unbroken)


@pytest.mark.fault
def test_f40_a_tracker_that_hangs_delays_no_step(
        tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here, unmeasured: None,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's disk does not answer from the middle of a stage until its last step has begun"""
    injected.add('''
@before_steps
def tell(state, shares, seen):
    if seen == 232:
        reached("last")
''')
    true_draw, hung = Board.draw, []

    def draw(self: Board, points: dict[str, float], images_seen: int) -> None:
        if images_seen == 96:
            injected.reached("last")
            hung.append(images_seen)
        true_draw(self, points, images_seen)

    monkeypatch.setattr(Board, "draw", draw)
    config, folder = settings_of(tiny_run(ONE_WORKER), tmp_path)
    assert gradine("train", config) == 0
    assert hung == [96]
    assert [one["images_seen"] for one in events(folder, "tick")] == [*range(8, 241, 8)]
