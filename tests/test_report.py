"""Claims about the report, on run folders made by hand: pictures of known pixels, ledgers of known numbers."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import UserError, dump, from_dict
from gradine.pipeline import figures
from gradine.pipeline.display import Board, Display
from gradine.pipeline.report import write_report
from gradine.pipeline.run_dir import RunDir

SPANS = {4: (0, 100), 8: (100, 300), 16: (300, 500), 32: (500, 700)}  # 100 images a phase; 4 px does not fade


class Page(HTMLParser):
    """A report, read back: its tags, its text, and the cells of its tables by the id they stand in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.id, self.cell = "", False
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("section", "table") and dict(attrs).get("id"):
            self.id = dict(attrs)["id"] or ""
        if tag == "tr":
            self.tables.setdefault(self.id, []).append([])
        if tag in ("td", "th"):
            self.tables[self.id][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self.cell:
            self.tables[self.id][-1][-1] = f"{self.tables[self.id][-1][-1]} {data}".strip()

    def pictures(self, alt: str) -> list[Image.Image]:
        found = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img" and alt in (attrs["alt"] or "")]
        return [Image.open(io.BytesIO(base64.b64decode(source.split("base64,")[1]))) for source in found]

    def row(self, table: str, start: str) -> list[str]:
        return next(cells for cells in self.tables[table] if cells[0].startswith(start))


def tiles(resolution: int, count: int = 16) -> np.ndarray:
    """uint8 [count, R, R, 3]: no two pixels alike but by chance."""
    return np.random.default_rng(resolution).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)


def save_grid(run: RunDir, name: str, images: np.ndarray) -> None:
    size, columns = images.shape[1], min(8, len(images))
    canvas = np.zeros((-(-len(images) // 8) * size, columns * size, 3), np.uint8)
    for i, image in enumerate(images):
        top, left = i // 8 * size, i % 8 * size
        canvas[top:top + size, left:left + size] = image
    run.samples.mkdir(exist_ok=True)
    Image.fromarray(canvas).save(run.samples / name)


def metric(name: str, resolution: int, **facts):
    seen = SPANS[resolution][1]
    return {"metric": name, "value": None, "reason": None, "interval": None, "parts": None, "floor": None,
            "untrained": None, "reals": None, "features": None, "features_digest": None, "resolution": resolution,
            "checkpoint": f"r{resolution:04d}-hold-{seen:09d}", "images_seen": seen, "count": 5000, "seed": 0,
            "data": "c" * 64, "seconds": 1.0, **facts}


def tick(resolution: int, images_seen: int, **facts):
    return {"event": "tick", "time": 1000.0 + images_seen, "resolution": resolution, "phase": "hold", "alpha": 1.0,
            "learning_rate": 0.001, "images_seen": images_seen, "images_per_s": 50.0, "skipped": [0.0, 0.0],
            "loss_d": -1.0 - images_seen / 100, "loss_g": 2.0, "score_real": 1.0, "score_fake": -1.0, "penalty": 0.1,
            "gradient_norm": 0.9, **facts}


def start(time: float):
    return {"time": time, "event": "start", "gradine": "0.1.0", "command": "gradine train flowers", "host": "atelier",
            "cores": 2, "versions": {"torch": "2.9", "ray": "2.60"}}


def new_run(folder: Path, resolutions=(4, 8, 16, 32), name: str = "flowers") -> RunDir:
    stages = [{"resolution": r, "fade_images": 100, "hold_images": 100, "batch_size": 4} for r in resolutions]
    run = RunDir(folder / "run")
    run.path.mkdir()
    (folder / "shards").mkdir()
    data = {"source": "flowers.zip", "shards": str(folder / "shards")}
    run.config.write_text(dump(from_dict({"name": name, "data": data, "stages": stages})))
    return run


def train(run: RunDir, resolutions=(4, 8, 16, 32)) -> None:
    """The ledger of a session that trains these stages to their ends."""
    run.append("ledger.jsonl", start(1000.0))
    for resolution in resolutions:
        begin, end = SPANS[resolution]
        for seen in range(begin + 20, end + 1, 20):
            run.append("ledger.jsonl", tick(resolution, seen))
        run.append("ledger.jsonl", {"time": 1000.0 + end, "event": "stage_end", "resolution": resolution,
                                    "images_seen": end, "wall_s": 200.0, "step_s": 150.0, "data_s": 30.0, "log_s": 1.0,
                                    "save_s": 7.0})
    run.append("ledger.jsonl", {"time": 8200.0, "event": "end", "seconds": 7200.0})


def evaluate(run: RunDir, resolutions=(4, 8, 16, 32)) -> None:
    for r in resolutions:
        run.append("metrics.jsonl", metric("swd", r, value=10.0 + r, floor=2.5, untrained=200.0 + r))
        save_grid(run, f"r{r:04d}-{SPANS[r][1]:09d}.png", tiles(r))
        save_grid(run, f"r{r:04d}-reals.png", 255 - tiles(r))


@pytest.fixture
def finished(tmp_path) -> RunDir:
    run = new_run(tmp_path)
    train(run)
    evaluate(run)
    return run


def report(run: RunDir) -> Page:
    path = write_report(run)
    assert path == run.path / "report.html"
    return Page(path)


# ---- The file


def test_page_asks_nothing_of_the_network(finished):
    page = report(finished)
    addresses = [value or "" for _, attrs in page.tags for key, value in attrs.items()
                 if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")]
    assert len(addresses) > 12
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|@import|url\((?!#)", page.source)


def test_report_needs_neither_torch_nor_matplotlib_until_it_plots():
    code = "import sys, gradine.pipeline.report; print({'torch', 'matplotlib', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_names_reasons_and_paths_appear_as_text(tmp_path):
    hostile = '<script>alert("1")</script>'
    run = new_run(tmp_path, name="a<b>&c")
    train(run, [4])
    run.append("ledger.jsonl", {"time": 1.0, "event": "retry", "reason": hostile, "failures": 1})
    run.append("metrics.jsonl", metric("swd", 4, reason=hostile))
    lines = [{"path": hostile, "reason": "torn"}, {"path": "caf\udce9.png", "reason": "<img src=x>"}]
    (tmp_path / "shards/rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run)
    assert page.text.count(hostile) == 3
    assert "a<b>&c" in page.text
    assert "<img src=x>" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]


# ---- Pictures


def test_growth_strip_holds_the_first_eight_tiles_of_each_stage(finished):
    strips = report(finished).pictures("first latents")
    assert len(strips) == 4
    for strip, resolution in zip(strips, SPANS, strict=True):
        np.testing.assert_array_equal(np.asarray(strip), np.concatenate(list(tiles(resolution)[:8]), axis=1))


def test_growth_strip_of_fewer_than_eight_tiles_keeps_their_size(tmp_path):
    run = new_run(tmp_path)
    train(run, [4])
    save_grid(run, "r0004-000000100.png", tiles(4, 3))
    page = report(run)
    (strip,) = page.pictures("first latents")
    np.testing.assert_array_equal(np.asarray(strip), np.concatenate(list(tiles(4, 3)), axis=1))
    assert "width: 37.5%" in page.source  # 3 of 8


def test_pictures_of_a_stage_are_its_samples_beside_its_reals(finished):
    page = report(finished)
    shown = page.pictures("Generated images, 16 px") + page.pictures("Real images, 16 px")
    for picture, images in zip(shown, (tiles(16), 255 - tiles(16)), strict=True):
        rows = [np.concatenate(list(row), axis=1) for row in (images[:8], images[8:])]
        np.testing.assert_array_equal(np.asarray(picture), np.concatenate(rows))
    assert len(page.pictures("Generated images, 32 px")) == 2  # large, and beside the reals


def test_the_nearest_training_images_are_shown_where_they_are(finished):
    assert not report(finished).pictures("nearest training images")
    save_grid(finished, "r0016-000000500-neighbors.png", tiles(16))
    save_grid(finished, "r0016-000000480-neighbors.png", 255 - tiles(16))
    save_grid(finished, "r0016-000000900-neighbors.png", 255 - tiles(16))  # of a branch that was given up
    page = report(finished)
    (picture,) = page.pictures("nearest training images, 16 px")
    rows = [np.concatenate(list(row), axis=1) for row in (tiles(16)[:8], tiles(16)[8:])]
    np.testing.assert_array_equal(np.asarray(picture), np.concatenate(rows))
    assert "(after 500 images)" in page.text
    assert len(page.pictures("Generated images, 16 px")) == 1  # they are not taken for samples


def test_gray_samples_are_shown_as_they_are(tmp_path):
    run = new_run(tmp_path)
    train(run, [16])
    rgb = tiles(16)
    save_grid(run, "r0016-000000500.png", rgb)
    grays = []
    for name, source in (("r0016-000000500.png", rgb), ("r0016-reals.png", 255 - rgb)):
        values = np.concatenate([np.concatenate(list(row[..., 0]), axis=1) for row in (source[:8], source[8:])])
        gray = Image.fromarray(values)
        assert gray.mode == "L"
        gray.save(run.samples / name)
        grays.append(np.repeat(values[..., None], 3, axis=2))
    page = report(run)
    for alt, expected in (("Generated images, 16 px", grays[0]), ("Real images, 16 px", grays[1]),
                          ("first latents", grays[0][:16])):
        assert page.pictures(alt)
        for picture in page.pictures(alt):
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), expected)


def test_wide_pictures_are_reduced(tmp_path):
    run = new_run(tmp_path, [256])
    run.append("ledger.jsonl", tick(256, 100))
    color = np.full((24, 256, 256, 3), (200, 40, 90), np.uint8)
    save_grid(run, "r0256-000000100.png", color)
    page = report(run)
    strip, large = page.pictures("first latents")[0], page.pictures("Generated")[0]
    assert (strip.size, strip.format) == ((1024, 128), "JPEG")
    assert (large.size, large.format) == ((1024, 384), "JPEG")
    np.testing.assert_allclose(np.asarray(strip).mean((0, 1)), (200, 40, 90), atol=3)


# ---- Numbers


def test_tables_show_the_last_row_of_each_metric_and_a_look_at_fewer_images_does_not_replace_it(finished):
    finished.append("metrics.jsonl", metric("swd", 32, value=7.25, floor=3.5, untrained=321.0, count=6543,
                                            interval=[7.0, 7.5], parts={"16": 6.5, "32": 8.0}))
    finished.append("metrics.jsonl", metric("swd", 32, value=9.0, count=200))
    finished.append("metrics.jsonl", metric("ms_ssim", 32, value=0.27, reals=0.31, count=900))
    page = report(finished)
    assert page.row("stage-32", "SWD") == ["SWD ↓ 16 px: 6.5, 32 px: 8", "7.25", "7 to 7.5", "3.5", "321", "6,543"]
    assert page.row("stage-32", "MS-SSIM") == ["MS-SSIM of pairs", "0.27", "–", "0.31", "–", "900"]
    assert page.row("stage-16", "SWD")[1:] == ["26", "–", "2.5", "216", "5,000"]


def test_a_table_of_many_metrics_is_read_from_distances_to_copies(finished):
    for name in ("discriminator", "copy_rate_lite0_224", "recall_lite0_224", "precision_lite0_224", "fd_pixels16",
                 "fd_lite0_224"):
        finished.append("metrics.jsonl", metric(name, 32, value=0.5, parts={"held_out": {"wrong": 0.25}}))
    page = report(finished)
    assert [cells[0].split(" held")[0] for cells in page.tables["stage-32"]] == [
        "Metric", "Distance to the reals", "SWD ↓", "Fréchet distance, lite0 at 224 px ↓",
        "Fidelity and diversity", "Precision, lite0 at 224 px ↑", "Recall, lite0 at 224 px ↑",
        "Copies of training images", "Copy rate, lite0 at 224 px ↓", "The discriminator",
        "Accuracy of the discriminator",
        "Metric", "Fréchet distance, pixels at 16 px ↓"]
    assert page.source.count("1 more, by features that say less</summary>") == 1
    assert "held out wrong: 0.25" in page.row("stage-32", "Accuracy")[0]


def test_rows_of_an_older_version_are_shown_under_their_present_names(tmp_path):
    run = new_run(tmp_path)
    train(run, [4])
    for old in (metric("frechet_pixels16", 4, value=9.0, spread=0.7), metric("swd", 4, value=5.0, levels={"4": 5.0})):
        for key in ("interval", "parts", "features", "features_digest", "data"):
            del old[key]
        run.append("metrics.jsonl", old)
    page = report(run)
    assert page.row("stage-4", "Fréchet distance, pixels at 16 px")[1:] == ["9", "–", "–", "–", "5,000"]
    assert page.row("stage-4", "SWD")[0] == "SWD ↓ 4 px: 5"


def test_a_table_never_mixes_two_checkpoints(finished):
    older = {"checkpoint": "r0032-fade-000000600", "images_seen": 600}
    finished.append("metrics.jsonl", metric("swd", 32, value=99.0, **older))
    finished.append("metrics.jsonl", metric("ms_ssim", 32, value=0.4, **older))
    page = report(finished)
    assert page.row("stage-32", "SWD")[1] == "42"
    assert not [cells for cells in page.tables["stage-32"] if cells[0].startswith("MS-SSIM")]


def test_an_evaluation_that_failed_hides_none_that_worked(finished):
    newest = {"checkpoint": "r0032-hold-000000699", "images_seen": 699}
    finished.append("metrics.jsonl", metric("swd", 16, reason="it hung", failed=True))
    for facts in ({**newest, "failed": True}, {"checkpoint": "r0032-fade-000000600", "images_seen": 600, "value": 9.0}):
        finished.append("metrics.jsonl", metric("swd", 32, **facts))
    lines = [line for line in finished.lines("metrics.jsonl") if line["images_seen"] != 700]
    (finished.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(finished)
    assert page.row("stage-16", "SWD")[1] == "26"
    assert page.row("stage-32", "SWD")[1] == "9"


def test_metrics_without_a_value_are_named_by_their_reason(finished):
    for name in ("fd_lite0_224", "kid_lite0_224"):
        finished.append("metrics.jsonl", metric(name, 8, reason="lite0 is not <installed>"))
    finished.append("metrics.jsonl", metric("ms_ssim", 8, reason="defined from 64 px up"))
    text = report(finished).text
    assert "No value : MS-SSIM of pairs: defined from 64 px up" in text
    assert "No value : Fréchet distance, lite0 at 224 px; KID, lite0 at 224 px: lite0 is not <installed>" in text


def test_status_says_how_far_how_long_and_how_good(finished):
    expected = "Finished: 700 images in 2 h; SWD 42 at 32 px, noise floor 2.5, untrained 232."
    assert expected in report(finished).text


def test_hours_are_those_of_every_session_and_not_of_the_nights_between(tmp_path):
    run = new_run(tmp_path)
    for line in (start(0.0), {**tick(4, 40), "time": 3600.0},  # killed
                 start(90_000.0), {"event": "end", "time": 93_600.0, "seconds": 3600.0},
                 {"event": "evaluation", "time": 99_999.0, "error": None, "checkpoint": "r"}):  # asked for later
        run.append("ledger.jsonl", line)
    assert "Stopped at 40 of 700 images in 2 h." in report(run).text


def test_table_of_stages_splits_the_wall_time(finished):
    page = report(finished)
    row = page.row("stages", "16 px")
    assert row == ["16 px", "4", "1", "100", "100", "200", "3.33 min", "50", "75.0%", "15.0%", "7 s"]
    assert page.row("stages", "4 px")[3:5] == ["0", "100"]  # nothing to fade from
    assert "last session only" not in page.text


def test_a_stage_resumed_inside_says_that_its_times_are_of_the_last_session(tmp_path):
    run = new_run(tmp_path)
    train(run, [4])
    run.append("ledger.jsonl", tick(8, 260))
    run.append("ledger.jsonl", {"time": 9000.0, "event": "resume", "images_seen": 200, "start": "r", "reason": "why"})
    run.append("ledger.jsonl", tick(8, 220))
    page = report(run)
    assert page.row("stages", "8 px*")[5:7] == ["120", "–"]
    assert page.row("stages", "4 px")[0] == "4 px"
    assert "last session only" in page.text
    assert "Stopped at 220 of 700 images" in page.text


def test_metrics_and_samples_ahead_of_a_branch_are_left_out(finished):
    finished.append("ledger.jsonl", {"time": 9e3, "event": "resume", "images_seen": 300, "start": "r", "reason": "b"})
    page = report(finished)
    assert {"stage-4", "stage-8"} < set(page.tables)
    assert not {"stage-16", "stage-32"} & set(page.tables)
    assert len(page.pictures("first latents")) == 2


def test_events_tell_what_went_wrong_in_the_order_it_did(tmp_path):
    run = new_run(tmp_path)
    train(run, [4])
    for line in (tick(4, 100, skipped=[1.0, 0.0]), {**tick(8, 120, skipped=[1.0, 2.0]), "time": 9004.0},
                 {"time": 9001.0, "event": "retry", "reason": "worker lost", "failures": 2},
                 {"time": 9003.0, "event": "evaluation", "checkpoint": "r0004", "error": "no memory"},
                 {"time": 9002.0, "event": "branch", "resolution": 8, "images_seen": 100, "superseded": "old"}):
        run.append("ledger.jsonl", line)
    rows = report(run).tables["events"][1:]
    assert [row[1] for row in rows] == ["masked updates", "retry", "branch", "evaluation failed", "masked updates"]
    assert "4 px: 1 of the discriminator, 0 of the generator" in rows[0][2]
    assert "8 px: 0 of the discriminator, 2 of the generator" in rows[4][2]


def test_masked_updates_are_counted_under_their_new_name_too(tmp_path):
    run = new_run(tmp_path)
    train(run, [4])
    newer = {**tick(8, 120, masked=[3.0, 2.0]), "time": 9004.0}
    del newer["skipped"]
    run.append("ledger.jsonl", newer)
    assert "8 px: 3 of the discriminator, 2 of the generator" in report(run).tables["events"][1][2]


def test_stops_roll_backs_failed_saves_and_halved_micro_batches_are_told(tmp_path):
    run = new_run(tmp_path)
    train(run, [4])
    for time, line in enumerate((
            {"event": "stopped", "resolution": 4, "images_seen": 50},  # the stage's own: the run's follows
            {"event": "stopped", "reason": "SIGTERM"},
            {"event": "roll_back", "first": 40, "last": 1080, "reason": "a weight is infinite"},
            {"event": "micro_batch", "resolution": 8, "was": 16, "now": 8, "reason": "no memory"},
            {"event": "save_failed", "images_seen": 5000, "failures": 2, "reason": "No space left on device"})):
        run.append("ledger.jsonl", {"time": 9000.0 + time, **line})
    rows = [(kind, text) for _, kind, text in report(run).tables["events"][1:]]
    assert rows == [("stopped", "SIGTERM"),
                    ("rolled back", "from 1,080 to 40 images, which update nothing since: a weight is infinite"),
                    ("out of memory", "8 px: micro_batch 16 -> 8: no memory"),
                    ("save failed", "checkpoint at 5,000 images, 2 in a row: No space left on device")]


def alarm(images_seen: int):
    return {"time": 2000.0 + images_seen, "event": "alarm", "alarm": "divergence", "figure": "penalty / weight",
            "value": 27.84, "bound": 1.25, "rule": "median +- 8 x MAD", "images_seen": images_seen, "resolution": 8,
            "message": f"8px after {images_seen} images: <training> diverges"}


def test_alarms_are_shown_before_the_pictures_with_figure_bound_and_rule(finished):
    assert "Alarms" not in report(finished).text
    finished.append("ledger.jsonl", alarm(120))
    page = report(finished)
    (row,) = page.tables["alarms"][1:]
    assert row[1] == "divergence"
    assert "8px after 120 images: <training> diverges" in row[2]
    assert "penalty / weight 27.84, bound 1.25. Rule: median +- 8 x MAD." in row[2]
    assert page.source.index('id="alarms"') < page.source.index("<img")


def test_of_many_alarms_the_last_twenty_are_shown(finished):
    for number in range(120, 151):
        finished.append("ledger.jsonl", alarm(number))
    page = report(finished)
    assert [row[2].split()[2] for row in page.tables["alarms"][1:]] == [str(number) for number in range(131, 151)]
    assert "the last 20 of 31" in page.text


def test_rejected_files_are_counted_and_the_first_twenty_named(tmp_path):
    run = new_run(tmp_path)
    lines = [{"path": f"{i:03d}.png", "reason": f"torn at {i}"} for i in range(31)]
    (tmp_path / "shards/rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run)
    assert "the first 20 of 31" in page.text
    assert page.tables["rejected"][1:] == [[f"{i:03d}.png", f"torn at {i}"] for i in range(20)]


# ---- Runs that are not whole


def nothing_yet(run: RunDir) -> None:
    pass


def killed_in_the_first_stage(run: RunDir) -> None:
    train(run, [])
    run.append("ledger.jsonl", tick(4, 20, images_per_s=None))
    with (run.path / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"time": 1, "event": "ti')


def no_metrics(run: RunDir) -> None:
    train(run, [4, 8])
    save_grid(run, "r0004-000000100.png", tiles(4))


def no_samples(run: RunDir) -> None:
    train(run, [4, 8])
    run.append("metrics.jsonl", metric("swd", 4, value=1.0))


def interrupted_evaluation(run: RunDir) -> None:
    train(run, [4])
    save_grid(run, "r0004-000000100.png", tiles(4))
    (run.samples / "r0004-reals.png").write_bytes((run.samples / "r0004-000000100.png").read_bytes()[:60])
    run.append("metrics.jsonl", metric("swd", 4, value=float("nan"), floor=0.0))


def torn_samples(run: RunDir) -> None:
    train(run, [4])
    save_grid(run, "r0004-000000100.png", tiles(64, 64))
    picture = run.samples / "r0004-000000100.png"
    head, first, rest = picture.read_bytes().split(b"IDAT", 2)
    picture.write_bytes(head + b"IDAT" + first + b"\0\0\0\0" + rest)


def figures_that_are_not_finite(run: RunDir) -> None:
    train(run, [4])
    for seen, value in ((120, float("nan")), (140, float("inf")), (160, None)):
        run.append("ledger.jsonl", tick(8, seen, loss_d=value, penalty=value, images_per_s=value))


@pytest.mark.parametrize("state", [nothing_yet, killed_in_the_first_stage, no_metrics, no_samples, torn_samples,
                                   interrupted_evaluation, figures_that_are_not_finite], ids=lambda f: f.__name__)
@pytest.mark.parametrize("resolutions", [(4, 8, 16, 32), (4,)], ids=["four-stages", "one-stage"])
@pytest.mark.filterwarnings("error")
def test_a_run_that_is_not_whole_leaves_a_clean_page(tmp_path, state, resolutions):
    run = new_run(tmp_path, resolutions)
    state(run)
    page = report(run)
    assert "flowers" in page.text
    assert "Settings" in page.text
    assert not re.search(r"\b(None|nan|inf|undefined)\b", page.text)
    assert all(0 < picture.width <= 1024 for picture in page.pictures(""))


def test_a_folder_that_is_no_run_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        write_report(RunDir(tmp_path))


# ---- Curves


def test_curves_follow_the_page_colors_and_name_the_stages(finished):
    page = report(finished)
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawings) == 5  # losses, scores, penalty, speed, SWD
    assert not re.search(r"(fill|stroke|color): *#", "".join(drawings))
    for label in ("4 px", "8 px", "16 px", "32 px"):
        assert label in drawings[0]


def test_a_stage_measured_several_times_gets_a_curve_of_its_distances(finished):
    assert "Distances over checkpoints" not in report(finished).source
    for seen, value in ((550, 300.0), (600, 200.0)):
        at = {"checkpoint": f"r0032-fade-{seen:09d}", "images_seen": seen}
        finished.append("metrics.jsonl", metric("swd", 32, value=value, **at))
        finished.append("metrics.jsonl", metric("fd_pixels16", 32, value=value / 9, **at))
        finished.append("metrics.jsonl", metric("fd_lite0_224", 32, value=value / 7, **at))
    page = report(finished)
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawings) == 6
    assert 'aria-label="Distances over checkpoints"' in drawings[5]
    assert "SWD Fréchet distance, lite0 at 224 px Of every measured checkpoint" in page.text


def test_ten_thousand_ticks_make_a_small_page(tmp_path):
    run = new_run(tmp_path, [4])
    with (run.path / "ledger.jsonl").open("w") as ledger:
        ledger.writelines(json.dumps(tick(4, 1 + i, loss_d=i * 7919 % 1000 / 9)) + "\n" for i in range(10_000))
    assert write_report(run).stat().st_size < 250_000


# ---- Other games


def other_run(folder: Path, stage: dict, **settings) -> RunDir:
    """A run of one stage of another kind of network."""
    run = RunDir(folder / "run")
    run.path.mkdir()
    data = {"source": "none", "shards": str(folder / "shards"), **settings.pop("data", {})}
    run.config.write_text(dump(from_dict({
        "name": "other", "data": data, "stages": [{"hold_images": 100, "batch_size": 4, **stage}], **settings})))
    run.append("ledger.jsonl", start(1000.0))
    return run


VAE = {"network": {"kind": "vae"}, "training": {"penalty": "none", "drift": 0.0}}
OTHER = {"event": "tick", "time": 1000.0, "phase": "hold", "alpha": 1.0, "learning_rate": 0.001, "images_per_s": 50.0,
         "masked": [0.0, 0.0]}


def panels(page: Page) -> dict[str, list[str]]:
    """Title of each panel of curves -> its series."""
    return {title: re.findall(r'class="key"[^>]*>([^<]*)<', caption) for title, caption in
            re.findall(r'<figure class="card plot">\s*<h3>(.*?)</h3>\s*<figcaption>(.*?)</figcaption>', page.source,
                       flags=re.DOTALL)}


def test_curves_are_of_what_the_run_has(tmp_path, finished):
    assert panels(report(finished)) == {
        "Losses": ["loss_d", "loss_g"], "Scores": ["score_real", "score_fake"],
        "Penalty and gradient norm": ["penalty", "gradient_norm"], "Speed": ["images_per_s"]}
    (tmp_path / "vae").mkdir()
    run = other_run(tmp_path / "vae", {"resolution": 8}, **VAE)
    for seen in (20, 40, 60):
        run.append("ledger.jsonl", {**OTHER, "resolution": 8, "images_seen": seen, "loss_g": 0.5, "gradient_g": 0.1,
                                    "reconstruction": 0.2, "divergence": 3.0})
    assert panels(report(run)) == {
        "Losses": ["loss_g"], "Reconstruction": ["reconstruction"], "Divergence": ["divergence"],
        "Gradient of the generator": ["gradient_g"], "Speed": ["images_per_s"]}


def test_a_curve_that_begins_later_is_drawn_beside_one_that_was_there_from_the_start(tmp_path):
    """G's first step comes after five of D: the first ticks have no loss_g."""
    run = other_run(tmp_path, {"resolution": 8})
    for seen in (20, 40, 60):
        run.append("ledger.jsonl", {**OTHER, "resolution": 8, "images_seen": seen, "loss_d": 0.5, "augmentation": 0.1,
                                    **({"loss_g": 0.3} if seen > 20 else {})})
    assert panels(report(run)) == {"Losses": ["loss_d", "loss_g"], "Augmentation": ["augmentation"],
                                   "Speed": ["images_per_s"]}


def test_a_game_of_points_shows_its_plot_whole(tmp_path):
    run = other_run(tmp_path, {"resolution": 1}, data={"channels": 2, "points": {"kind": "ring"}},
                    network={"kind": "mlp"}, training={"mirror": False})
    run.append("ledger.jsonl", {**OTHER, "resolution": 1, "images_seen": 100, "loss_d": 0.5, "loss_g": 0.3})
    run.append("metrics.jsonl", {**metric("modes", 4, value=8.0), "resolution": 1, "images_seen": 100})
    run.samples.mkdir()
    plot = np.random.default_rng(0).integers(0, 256, (450, 900, 3), dtype=np.uint8)
    Image.fromarray(plot).save(run.samples / "r0001-000000100.png")
    page = report(run)
    (picture,) = page.pictures("")
    np.testing.assert_array_equal(np.asarray(picture), plot)
    assert "Real and generated points after 100 reals" in page.text
    assert "growing" not in page.text
    assert page.row("stage-1", figures.label("modes"))[1] == "8"


def test_a_conditional_run_shows_each_class(tmp_path):
    network = {"kind": "dcgan", "conditioning": "projection", "classes": 10}
    run = other_run(tmp_path, {"resolution": 16}, network=network,
                    training={"loss": "hinge", "penalty": "none", "drift": 0.0})
    run.append("ledger.jsonl", {**OTHER, "resolution": 16, "images_seen": 100, "loss_d": 0.5, "loss_g": 0.3})
    save_grid(run, "r0016-000000100.png", tiles(16, 80))
    run.append("metrics.jsonl", {**metric("class_fd_pixels16", 16, value=9.0, parts={"0": 8.0, "1": 10.0, "2": None}),
                                 "images_seen": 100})
    page = report(run)
    assert {picture.size for picture in page.pictures("Generated images, 16 px")} == {(8 * 16, 10 * 16)}
    assert "A row for each class" in page.text
    assert "0: 8, 1: 10" in page.text


def test_the_line_of_a_tick_says_what_the_run_has(tmp_path):
    run = from_dict({"name": "other", "data": {"source": "none", "shards": "none"},
                     "stages": [{"resolution": 8, "hold_images": 100, "batch_size": 4}]})
    shown = Display(run)
    tick_of = {**OTHER, "resolution": 8, "images_seen": 20}
    assert "D    0.500  G    0.300" in shown.line({**tick_of, "loss_d": 0.5, "loss_g": 0.3})
    assert "D    0.500  " in shown.line({**tick_of, "loss_d": 0.5})
    line = shown.line({**tick_of, "loss_g": 0.3, "reconstruction": 0.25})
    assert "G    0.300  reconstruction    0.250" in line
    assert "  D " not in line
    told = []
    board = Board(tmp_path / "curves", told.append)
    board.tick({**tick_of, "loss_g": 0.3, "reconstruction": 0.25})
    assert [*(tmp_path / "curves").iterdir()]
    assert told == []
