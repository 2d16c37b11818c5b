"""Every recipe of configs/lectures loads, says what it is, and trains with each of its presets."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gradine.configs.combinations import coupling
from gradine.configs.schema import RECIPES, Data, Run, load
from gradine.stages import loop

FILES = sorted((RECIPES / "lectures").glob("*.yaml"))
DOCS = Path(__file__).parents[1] / "docs" / "lectures.md"
COMMAND = re.compile(r"gradine run (lectures/\w+)((?: [\w.]+=[^\s`,]+)*)")
PRESETS = [(f"lectures/{file.stem}", preset) for file in FILES
           for preset in yaml.safe_load(file.read_text()).get("presets", {"": None})]


def loaded(recipe: str, preset: str, *overrides: str) -> Run:
    return load(recipe, [*[f"preset={preset}"] * bool(preset), *overrides])


def head(file: Path) -> list[str]:
    """The lines of the comment that a recipe opens with, without their signs."""
    lines = file.read_text().splitlines()
    return [line[2:] for line in lines[:next(n for n, line in enumerate(lines) if not line.startswith("# "))]]


def test_no_two_lectures_write_into_one_run_folder() -> None:
    names = [loaded(*each).name for each in PRESETS]
    assert len(names) > 15
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_head_comment_says_what_it_shows_by_which_command_how_long_and_what_was_seen(file: Path) -> None:
    lines = head(file)
    assert lines[0].endswith((".", ":"))
    (command,) = (line for line in lines if line.startswith(f"gradine run lectures/{file.stem}"))
    assert any("core" in line and re.search("minute|second", line) for line in lines)
    assert any("Seen" in line for line in lines)
    presets = yaml.safe_load(file.read_text()).get("presets", {})
    assert set(re.findall(r"preset=(\w+)", command)) <= set(presets)


@pytest.mark.parametrize("page", [*FILES, DOCS], ids=lambda page: page.stem)
def test_every_command_that_is_named_loads(page: Path) -> None:
    found = COMMAND.findall(page.read_text())
    assert found
    for recipe, settings in found:
        load(recipe, settings.replace("$seed", "1").split())


def test_the_page_of_lectures_names_every_recipe_with_every_preset() -> None:
    named = {(recipe, dict(text.split("=") for text in settings.split()).get("preset", ""))
             for recipe, settings in COMMAND.findall(DOCS.read_text())}
    for recipe, preset in PRESETS:
        default = load(recipe).preset
        assert (recipe, "" if preset == default else preset) in named


@pytest.mark.parametrize(("recipe", "preset"), PRESETS)
def test_what_couples_a_batch_runs_in_one_piece_and_sees_reals_as_they_are(recipe: str, preset: str) -> None:
    run = loaded(recipe, preset)
    if coupling(run):
        assert all((stage.workers, stage.micro_batch) == (1, 0) for stage in run.stages)
    assert run.training.mirror == run.data.source.startswith("bundled:")  # clothes have a left and a right


def test_the_compared_recipes_see_equal_numbers_of_images() -> None:
    compared = [load("lectures/dcgan"), load("lectures/vae"), load("lectures/progressive"),
                load("lectures/progressive", ["preset=r1"])]
    totals = {sum(stage.hold_images + (stage.fade_images if number else 0) for number, stage in enumerate(run.stages))
              for run in compared}
    assert len(totals) == 1
    assert len({run.final_resolution for run in compared}) == 1
    assert len({str(run.evaluation.features) + str(run.evaluation.count) for run in compared}) == 1


# ---- Each of them trains


@pytest.fixture(scope="module")
def clothes(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 80 gray gradients of 28 px in ten classes, from files laid out as those of the package."""
    from gradine.pipeline.shards import shard

    folder = tmp_path_factory.mktemp("clothes")
    rng = np.random.default_rng(0)
    ramps = np.linspace(0, 255, 28, dtype=np.float64) * rng.uniform(0.2, 1, (80, 28, 1))
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (80, 28, 28))
    (folder / "train-images-idx3-ubyte").write_bytes(header + ramps.astype(np.uint8).tobytes())
    labels = np.arange(80, dtype=np.uint8) % 10
    (folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + (80).to_bytes(4, "big") + labels.tobytes())
    shard(Data(source=str(folder / "train-images-idx3-ubyte"), shards=str(folder / "set"), channels=1, small="pad",
               background="black", shard_images=4_000), 32)
    return folder / "set"


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "preset"), PRESETS)
def test_every_lecture_takes_four_steps_in_each_of_its_stages(
        recipe: str, preset: str, clothes: Path, shards: Path, tmp_path: Path) -> None:
    images = 4 * 8 * loaded(recipe, preset).training.d_steps
    run = loaded(recipe, preset, "training.precision=float32", "training.channels_last=false",
                 f"data.shards={shards if recipe == 'lectures/augmented' else clothes}",
                 f"data.cache_dir={tmp_path}/cache", "network.fmap_base=64", "network.fmap_max=8", "tick_images=8",
                 "stages.*.batch_size=8", f"stages.*.fade_images={images}", f"stages.*.hold_images={images}",
                 "stages.*.threads=1")
    start = None
    for number in range(len(run.stages)):
        *others, end = loop.run_stage(run, number, start, tmp_path)
        assert end["event"] == "stage_end"
        saved = [event for event in others if event["event"] == "checkpoint"]
        assert saved[-1]["stage_end"]
        start = saved[-1]["path"]
        ticks = [event for event in others if event["event"] == "tick"]
        assert ticks
        assert all(math.isfinite(value) for tick in ticks for key, value in tick.items()
                   if key.endswith("loss") and value is not None)
