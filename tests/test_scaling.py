"""Claims about predictions for a cluster, and about the numbers that infra/SCALING.md gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gradine.configs.schema import Run, UserError, assign, dump, from_dict, load
from gradine.pipeline import scaling
from gradine.pipeline.plan import ASSUMED_GMACS, memory_gb
from gradine.pipeline.scaling import Level, Measured, Nodes, Prediction, page, predict, predictions, ring_bytes
from gradine.stages import checkpoint
from gradine.stages.loop import initial_state
from gradine.stages.losses import penalty_divisor
from gradine.stages.networks import Discriminator, Generator
from gradine.stages.step import Rules, train_step
from gradine.stages.trial import first_moment, noise
from tests.test_commands import gradine, refused

ROOT = Path(__file__).parents[1]
FEW, MANY = Nodes(1, 1), Nodes(1000, 1)
CELEBA_HQ_IMAGES = 30_000


def run_of(changes: dict[str, Any] | None = None, sizes: tuple[int, ...] = (4, 8, 16)) -> Run:
    raw: dict[str, Any] = {
        "name": "t", "data": {"source": "in", "shards": "out"},
        "network": {"latent_size": 6, "fmap_base": 64, "fmap_max": 8},
        "stages": [{"resolution": size, "fade_images": 960, "hold_images": 960, "batch_size": 24, "threads": 2}
                   for size in sizes]}
    for path, value in (changes or {}).items():
        assign(raw, path, value)
    return from_dict(raw)


def one(run: Run, nodes: Nodes, index: int = 2, micro: int = 0, level: Level | None = None,
        measured: Measured | None = None, left: int = 1920) -> Prediction:
    level = level or scaling.level_of(run, run.stages[index].resolution)
    return predict(run, index, nodes, left, micro, level, measured or Measured())


def takes(seconds: float) -> Measured:
    """A run that has measured a worker's `seconds` for an image, whatever the stage."""
    return Measured({2**n: seconds for n in range(2, 11)})


# ---- What is sent and saved


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("index", "resolution"), [(0, 4), (1, 8), (3, 32)])
def test_gradients_are_the_float32_parameters_of_the_very_networks_a_stage_trains(
        index: int, resolution: int, channels: int) -> None:
    run = run_of({"data.channels": channels, "training.precision": "bfloat16"}, (4, 8, 16, 32))
    networks = [cls(run.network, resolution, index > 0, channels) for cls in (Discriminator, Generator)]
    counted = tuple(sum(4 * p.numel() for p in network.parameters()) for network in networks)
    assert scaling.gradient_bytes(run, index) == counted


def test_the_full_networks_have_the_published_numbers_of_parameters() -> None:
    network = load("celebahq1024", ["data.source=x"]).network
    assert scaling.generator_parameters(network, 1024, fades=False) == 23_071_507
    assert scaling.discriminator_parameters(network, 1024, fades=False) == 23_077_137
    assert scaling.generator_parameters(network, 1024, fades=True) == 23_071_507 + 3 * 33  # the 512 px to-RGB


def test_a_checkpoint_has_the_predicted_bytes_and_adams_step_of_each_parameter() -> None:
    run = run_of()
    state = initial_state(run, 1, None, torch.device("cpu"), None)
    train_step(state, noise(run, 1, 0, 1), first_moment(run, 1), Rules.of(run, 24, penalty_divisor(run, 8)))
    saved = sum(tensor.nbytes for part in checkpoint.tensors_of(state).values() for tensor in part.values())
    steps = 4 * sum(1 for network in (state.generator, state.discriminator) for _ in network.parameters())
    assert scaling.checkpoint_bytes(run, 1) == saved - steps


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_a_ring_sums_every_part_with_the_messages_and_bytes_of_the_model(workers: int) -> None:
    """Played through: each worker hands one part on per round, to be added first, then to be copied."""
    parts = [[10**worker for _ in range(workers)] for worker in range(workers)]  # [worker][part], each part one unit
    sent = 0
    for copying in (False, True):
        for turn in range(workers - 1):
            moving = [(worker, (worker - turn + copying) % workers) for worker in range(workers)]
            values = [parts[worker][part] for worker, part in moving]
            for (worker, part), value in zip(moving, values, strict=True):
                to = (worker + 1) % workers
                parts[to][part] = value if copying else parts[to][part] + value
            sent += 1  # by each worker
    assert all(part == sum(10**worker for worker in range(workers)) for own in parts for part in own)
    assert ring_bytes(float(workers), workers) == pytest.approx(sent)
    assert scaling.sum_s(0.0, workers, 1.0) == pytest.approx(sent * 50e-6)


# ---- Which workers


@pytest.mark.parametrize(("changes", "nodes", "micro", "expected", "because"), [
    ({}, Nodes(2, 2), 0, 3, "6 groups"),  # 24 images = 6 groups, which 4 workers do not divide
    ({}, Nodes(1, 6), 0, 6, "all there are"),
    ({}, Nodes(50, 8), 0, 6, "6 groups"),
    ({}, Nodes(50, 8), 8, 3, "micro_batch=8"),  # 24 images = 3 micro-batches
    ({}, Nodes(50, 8), 12, 2, "micro_batch=12"),
    ({"stages.2.batch_size": 2}, Nodes(8, 8), 0, 1, "1 group"),
    ({"stages.2.placement": "STRICT_PACK"}, Nodes(8, 3), 0, 3, "STRICT_PACK"),
    ({"stages.2.placement": "STRICT_SPREAD"}, Nodes(2, 8), 0, 2, "STRICT_SPREAD"),
    ({"stages.2.gpus": 0.5}, Nodes(8, 8), 0, 1, "gpus=0.5"),
])
def test_workers_divide_the_groups_and_their_shares_hold_whole_micro_batches(
        changes: dict[str, Any], nodes: Nodes, micro: int, expected: int, because: str) -> None:
    run = run_of(changes)
    found = one(run, nodes, micro=micro, measured=takes(10.0))  # compute is all that counts
    assert (found.workers, found.because) == (expected, because)
    wanted = {"stages.2.workers": found.workers, **({"stages.2.micro_batch": micro} if micro else {})}
    run_of({**changes, **wanted})  # the settings agree that it is possible


def test_a_stage_whose_batch_stays_in_one_piece_stays_on_one_worker() -> None:
    run = run_of({"network.kind": "dcgan", "training.loss": "hinge", "training.penalty": "none", "training.drift": 0},
                 (32,))
    assert (one(run, Nodes(2, 4), 0).workers, one(run, Nodes(2, 4), 0).because) == (1, "one batch")
    free = run_of({"network.kind": "mlp", "data.channels": 2, "data.points.kind": "ring", "training.mirror": False},
                  (1,))
    assert one(free, Nodes(2, 4), 0, measured=Measured({1: 10.0})).workers == 6


def test_a_stage_with_little_to_compute_stays_on_the_workers_it_is_fastest_with() -> None:
    found = one(run_of(), Nodes(8, 1), measured=takes(1e-9))
    assert (found.workers, found.because, found.sent, found.leaving) == (1, "more is slower", 0, 0)


@pytest.mark.parametrize("image_s", [1e-6, 1e-5, 1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("changes", [{}, {"stages.2.batch_size": 96, "stages.2.gpus": 1.0}])
def test_more_nodes_are_never_predicted_slower(image_s: float, changes: dict[str, Any]) -> None:
    run = run_of(changes)
    for each in (1, 2, 3, 8):
        times = [one(run, Nodes(count, each), measured=takes(image_s)).seconds for count in (1, 2, 3, 5, 8, 64, 1000)]
        assert all(later <= sooner for sooner, later in itertools.pairwise(times))
    widening = [one(run, Nodes(1, each), measured=takes(image_s)).seconds for each in (1, 2, 3, 4, 8, 24)]
    assert all(later <= sooner for sooner, later in itertools.pairwise(widening))


# ---- How long


def test_a_step_is_its_share_of_the_work_and_two_sums_at_the_pace_of_the_slowest_link() -> None:
    """16 px: 24 images of 0.5 s on 3 workers; a ring of 3 sends 4/3 of each vector in 4 messages."""
    run = run_of()
    of_d, of_g = scaling.gradient_bytes(run, 2)
    for nodes, on, links in ((Nodes(1, 3), 1, 0), (Nodes(3, 1), 3, 1), (Nodes(2, 2), 2, 1)):
        found = one(run, nodes, measured=takes(0.5))
        assert found.step_s == pytest.approx(24 / 3 * 0.5 + 2 * 4 * 50e-6 + 4 / 3 * (of_d + of_g) / 1.2e9)
        assert found.busy_s["network"] == pytest.approx(80 * (2 * 4 * 50e-6 + 4 / 3 * (of_d + of_g) / 1.2e9))
        assert (found.workers, found.nodes) == (3, on)
        assert found.seconds == pytest.approx(80 * found.step_s + found.start_s)
        assert found.sent == pytest.approx(4 / 3 * (of_d + of_g))
        assert found.leaving == pytest.approx(links * found.sent)
    gpus = replace(run, stages=[replace(stage, gpus=1.0) for stage in run.stages])
    assert one(gpus, Nodes(3, 1), measured=takes(0.5)).busy_s["network"] == pytest.approx(
        80 * (2 * 4 * 50e-6 + 4 / 3 * (of_d + of_g) / 1.25e9))


def test_spread_workers_of_a_node_share_its_way_out() -> None:
    run = run_of({"stages.2.placement": "SPREAD"})
    found = one(run, Nodes(2, 3), measured=takes(10.0))
    assert (found.workers, found.nodes) == (6, 2)
    of_d, of_g = scaling.gradient_bytes(run, 2)
    assert found.leaving == pytest.approx(3 * 5 / 3 * (of_d + of_g))
    assert found.busy_s["network"] == pytest.approx(80 * (2 * 10 * 50e-6 + 5 / 3 * (of_d + of_g) / (1.25e9 / 3)))


def test_an_assumed_speed_is_that_of_the_plan() -> None:
    """The 4 px network by hand: 6 latents, 8 channels; a step costs 18 passes an image, on 2 threads."""
    found = one(run_of(), FEW, index=0)
    macs = 6 * 8 * 16 + 8 * 8 * 9 * 16 + 8 * 3 * 16
    assert found.busy_s["compute"] == pytest.approx(1920 * 18 * macs / (2 * 1e9 * ASSUMED_GMACS["cpu"]))
    assert not found.measured


def test_the_ledger_gives_a_workers_time_for_an_image_whatever_the_number_of_workers() -> None:
    ticks = [{"event": "tick", "resolution": 8, "images_per_s": rate} for rate in (None, 10.0, 8.0, 2.0)]
    ledger = [{"event": "stage_start", "workers": 4}, *ticks, {"event": "stage_start", "workers": 1},
              {"event": "tick", "resolution": 16, "images_per_s": 0.5},
              {"event": "evaluation", "resolution": 8, "seconds": 3.0, "error": None},
              {"event": "evaluation", "resolution": 8, "seconds": 900.0, "error": "it died"}]
    measured = Measured.of(ledger)
    assert measured == Measured({8: 0.5, 16: 2.0}, {8: 3.0})
    found = one(run_of(), FEW, index=1, measured=measured)
    assert found.measured
    assert (found.step_s, found.evaluation_s) == (pytest.approx(24 * 0.5), 3.0)


# ---- Storage and measuring


@pytest.mark.parametrize(("shards", "images", "read_from", "of_a_batch"), [
    ("out", 13, "cache", 0), ("s3://b/out", 13, "cache", 0),  # 10 kB hold 13 images of 16 px
    ("out", 14, "disk", 24 / 3), ("s3://b/out", 14, "node", 0), ("s3://b/out", 20, "node", 0),
    ("s3://b/out", 21, "remote", 24),  # 30 kB hold 20 images of 1500 bytes
])
def test_where_a_level_is_read_follows_from_what_fits_a_node(
        shards: str, images: int, read_from: str, of_a_batch: float) -> None:
    run = run_of({"data.cache_gb": 1e-5, "data.download_gb": 3e-5, "data.shards": shards})
    level = scaling.level_of(run, 16, images, 1500 * images)
    assert level == Level(1500.0, images, read_from)
    found = one(run, Nodes(3, 1), level=level, measured=takes(0.5))
    assert found.workers == 3
    assert found.read_s * found.step_s == pytest.approx(of_a_batch * 1500)


def test_each_node_reads_a_level_whole_before_or_during_its_first_epoch() -> None:
    """48 images of 1 GB on 3 nodes: 144 s at 1 GB/s; two steps of at least 24 * 0.5 / 3 = 4 s go on meanwhile."""
    run = run_of()
    checkpoints = 3 * scaling.checkpoint_bytes(run, 2) / 1e9
    cached, remote = (one(run, Nodes(3, 1), level=Level(1e9, 48, kind), measured=takes(0.5))
                      for kind in ("cache", "node"))
    assert cached.start_s == pytest.approx(144 + checkpoints)
    assert remote.start_s == pytest.approx(144 - 2 * remote.step_s + checkpoints)
    assert cached.seconds == pytest.approx(80 * cached.step_s + cached.start_s)
    decoding = one(run, FEW, level=Level(1.0, 50_000_000, "cache"), measured=takes(0.5))
    assert decoding.start_s == pytest.approx(5e7 * 256 / (2 * 3600e6) + checkpoints / 3)  # raw, 2 threads


def test_a_storage_slower_than_the_steps_bounds_the_stage() -> None:
    run = run_of()
    found = one(run, Nodes(3, 1), level=Level(1e9), measured=takes(0.1))
    assert found.bound == "reading"
    assert found.workers == 1  # more would be no faster
    assert found.step_s == pytest.approx(24.0)  # 24 images of 1 GB at 1 GB/s
    again = one(run, Nodes(3, 1), level=Level(1e9, None, "remote"), measured=takes(3.0))
    assert (again.workers, again.step_s) == (2, 48.0)  # one computes for 72 s, three nodes read for 72 s


def test_without_shards_an_image_is_assumed_to_fill_whole_blocks_of_its_tar() -> None:
    run = run_of({"data.encoding": "raw:8,jpeg"})
    assert scaling.level_of(run, 4).image_bytes == 1024  # 48 bytes
    assert scaling.level_of(run, 16).image_bytes == 1024  # 768 bytes at 1 / 5
    assert scaling.level_of(run_of({"data.encoding": "raw"}), 16).image_bytes == 512 + 1024


def test_measuring_is_the_passes_of_all_networks_and_the_sorting_of_patches() -> None:
    """16 px, 100 reals: 50 images a side, of the trained and the untrained generator, both ends of 50 steps, 50 for the
    discriminator; six sets of 50 * 128 patches sorted; lite0 sees two sets of reals, both of fakes, and the steps."""
    run = run_of()
    macs = 6 * 8 * 16 + 8 * 8 * 9 * 16 + (8 + 8) * 8 * 9 * 64 + (8 + 8) * 8 * 9 * 256 + 8 * 3 * 256
    by_hand = 250 * macs / 60e9 + 6 * 512 * 50 * 128 / 22e6
    assert scaling.evaluation_s(run, 16, 100) == pytest.approx(by_hand)
    seen = run_of({"evaluation.features": ["pixels", "lite0"]})
    assert scaling.evaluation_s(seen, 16, 100) == pytest.approx(by_hand + 300 / 43)
    assert one(run, FEW, level=Level(1e3, 100)).evaluation_s == pytest.approx(by_hand)
    each = run_of({"evaluation.when": "checkpoint", "checkpoints.every_images": 480})  # 4 in 1920 images, 1 at the end
    assert one(each, FEW, level=Level(1e3, 100)).evaluation_s == pytest.approx(5 * by_hand)


def test_memory_is_that_of_a_workers_share_unless_a_smaller_micro_batch_is_in_force() -> None:
    for micro, expected in ((24, 8), (4, 4)):  # `plan` writes a whole share out; 4 was forced by memory
        run = run_of({"stages.2.micro_batch": micro})
        assert one(run, Nodes(3, 1), measured=takes(10.0)).memory_gb == memory_gb(
            run, replace(run.stages[2], micro_batch=expected))


# ---- What a person sees


def rows_of(text: str) -> list[list[str]]:
    """The cells of a printed page's table."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if "because" in line and " px" in line)
    return [line.split() for line in itertools.takewhile(str.strip, lines[first + 1:])]


@pytest.mark.parametrize("preset", ["gpus1", "gpus2", "gpus4", "gpus8"])
def test_the_full_recipe_never_has_more_workers_than_a_quarter_of_its_batch(preset: str) -> None:
    run = load("celebahq1024", ["data.source=x", f"preset={preset}"])
    levels = {stage.resolution: scaling.level_of(run, stage.resolution) for stage in run.stages}
    for nodes in (Nodes(8, 8), MANY):
        found = predictions(run, run, nodes, [1_200_000] * 9, levels, Measured())
        assert all(it.workers <= stage.batch_size // 4 for it, stage in zip(found, run.stages, strict=True))
        rows = rows_of(page(found, nodes))
        assert [int(row[0]) for row in rows] == [4 * 2**n for n in range(9)]
        assert [int(row[1]) for row in rows] == [it.workers for it in found]
        assert max(map(len, page(found, nodes).splitlines())) <= 120


def test_the_command_prints_the_page_below_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = gradine("plan", "celebahq1024", "data.source=x", "preset=gpus8", "--nodes", "8x8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan, _, predicted = result.stdout.partition("\non 8x8 ")
    assert "resume   from nothing" in plan
    assert [int(row[1]) for row in rows_of(predicted)][-1] == 8  # 32 images at 1024 px are 8 groups
    assert predicted.splitlines()[-1].startswith("~  ")
    assert "10 Gbit/s and 50 us" in predicted
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_shards_and_a_ledger_is_predicted_from_them(
        tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    run = tiny_run()
    (tmp_path / "config.yaml").write_text(dump(run))
    folder = Path(run.runs) / run.name
    folder.mkdir(parents=True)
    ticks = '{"event": "stage_start", "workers": 1}\n{"event": "tick", "resolution": 4, "images_per_s": 8.0}\n'
    (folder / "ledger.jsonl").write_text(ticks)
    rows = rows_of(gradine("plan", str(tmp_path / "config.yaml"), "--nodes", "1x1").stdout)
    assert rows[0][7:11] == ["1", "s", "10", "s"]  # 80 images in batches of 8, without a ~
    assert [any(cell.startswith("~") for cell in row) for row in rows] == [False, True]
    assert all("cache" in row for row in rows)


@pytest.mark.parametrize("text", ["8", "8by8", "0x4", "8x", "x8", "8x8:gpu", "8x-1", "8.5x2", "9999999x1"])
def test_nodes_of_another_form_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"--nodes .* e\.g\. 8x4") as caught:
        Nodes.of(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_nodes_end_the_command_with_one_line_and_exit_2(tmp_path: Path) -> None:
    said = refused("plan", "demo", "--nodes", "8by8", cwd=tmp_path)
    assert said.count("\n") == 1
    assert "'8by8'" in said


def test_a_stage_that_is_done_takes_no_time() -> None:
    run = run_of()
    found = [one(run, FEW, index, left=left) for index, left in enumerate((0, 960, 1920))]
    done, *others = rows_of(page(found, FEW))
    assert "done" in done
    assert all("done" not in row for row in others)


# ---- infra/SCALING.md


def tables() -> list[list[list[str]]]:
    """Every table of the document, without its head: rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in (ROOT / "infra" / "SCALING.md").read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def full_recipe(nodes: Nodes, times: int = 1) -> tuple[Run, list[Prediction]]:
    """celebahq1024 for eight GPUs on 30,000 images, with so many times its batches."""
    run = load("celebahq1024", ["data.source=x", "preset=gpus8"])
    run = replace(run, stages=[replace(stage, batch_size=times * stage.batch_size) for stage in run.stages])
    levels = {stage.resolution: scaling.level_of(run, stage.resolution, CELEBA_HQ_IMAGES) for stage in run.stages}
    left = [(stage.fade_images if index else 0) + stage.hold_images for index, stage in enumerate(run.stages)]
    return run, predictions(run, run, nodes, left, levels, Measured())


def traffic() -> list[list[str]]:
    run, _ = full_recipe(MANY)
    rows = []
    for index, stage in enumerate(run.stages):
        of_d, of_g = scaling.gradient_bytes(run, index)
        groups = stage.batch_size // 4
        sent = [f"{ring_bytes(of_d + of_g, min(n, groups)) / 1e6:.0f}" for n in (1, 2, 8, groups)]
        rows.append([f"{stage.resolution}", f"{of_g // 4:,}", f"{of_d // 4:,}", f"{(of_d + of_g) / 1e6:.0f}",
                     f"{stage.batch_size}", f"{groups}", *sent])
    return rows


def times() -> list[list[str]]:
    _, alone = full_recipe(FEW)
    _, inside = full_recipe(Nodes(1, 8))
    _, found = full_recipe(MANY)
    return [[f"{it.resolution}", f"{a.step_s * 1e3:.0f}", f"{i.workers}", f"{i.step_s * 1e3:.0f}", f"{it.workers}",
             f"{it.step_s * 1e3:.0f}", f"{it.busy_s['network'] / it.seconds:.0%}", f"{a.step_s / it.step_s:.1f}",
             f"{it.leaving / it.step_s / 1e6:.0f}"] for a, i, it in zip(alone, inside, found, strict=True)]


def storage() -> list[list[str]]:
    _, found = full_recipe(MANY)
    rows = []
    for it in found:
        decoded = CELEBA_HQ_IMAGES * 3 * it.resolution**2
        rows.append([f"{it.resolution}", f"{it.level.image_bytes:,.0f}",
                     f"{CELEBA_HQ_IMAGES * it.level.image_bytes / 1e9:.2f}", f"{decoded / 1e9:.2f}", it.level.read_from,
                     f"{it.read_s / 1e6:.1f}", f"{it.nodes * it.read_s / 1e6:.0f}", f"{it.checkpoint / 1e6:.0f}",
                     f"{it.workers * it.checkpoint / 1e9:.1f}"])
    return rows


def test_the_document_gives_the_traffic_that_the_model_gives() -> None:
    assert tables()[0] == traffic()


def test_the_document_gives_the_times_that_the_model_gives() -> None:
    assert tables()[1] == times()


def whole_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    rows: list[list[str]] = []
    for nodes, gbits, larger in ((FEW, 10, 1), (Nodes(1, 8), 10, 1), (Nodes(8, 1), 10, 1), (MANY, 10, 1),
                                 (MANY, 100, 1), (MANY, 100, 8), (Nodes(1000, 8), 100, 8)):
        monkeypatch.setattr(scaling, "NETWORK_BYTES_S", gbits / 8 * 1e9)
        _, found = full_recipe(nodes, larger)
        hours = sum(it.seconds for it in found) / 3600
        rows.append([f"{nodes.count}x{nodes.workers}", f"{gbits}", f"{larger}", f"{hours:.1f}",
                     " ".join(str(it.workers) for it in found)])
    return rows


def test_the_document_gives_the_storage_that_the_model_gives() -> None:
    assert tables()[3] == storage()


def test_the_document_gives_the_whole_runs_that_the_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables()[2] == whole_runs(monkeypatch)
