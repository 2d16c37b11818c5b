"""Claims about comparing recipes over seeds, and about the picture of a comparison, on run folders made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import UserError, assign, dump, from_dict
from gradine.pipeline.compare import compare_runs
from gradine.pipeline.run_dir import RunDir


def run_of(folder: Path, name: str, values: dict[str, float], seed: int = 0, changes: dict[str, Any] | None = None,
           **facts: Any) -> Path:
    """A run of one stage of 8 px with a row a metric, measured at its end."""
    raw: dict[str, Any] = {"name": name, "data": {"source": "a", "shards": "b"},
                           "training": {"seed": seed, "precision": "auto"},
                           "stages": [{"resolution": 8, "hold_images": 300, "batch_size": 4}]}
    for key, value in (changes or {}).items():
        assign(raw, key, value)
    seen = raw["stages"][0]["hold_images"]
    run = RunDir(folder / name)
    run.path.mkdir(parents=True)
    run.config.write_text(dump(from_dict(raw)))
    for metric, value in values.items():
        run.append("metrics.jsonl", {
            "metric": metric, "value": value, "interval": [value - 0.5, value + 0.5], "features": None, "count": 5000,
            "resolution": 8, "checkpoint": f"r0008-hold-{seen:09d}", "images_seen": seen, "seed": seed,
            "data": "c" * 64, **facts})
    return run.path


def seeds_of(folder: Path, name: str, values: list[float], **changes: Any) -> list[Path]:
    return [run_of(folder, f"{name}-seed{seed}", {"swd": value}, seed, changes.get("changes"))
            for seed, value in enumerate(values)]


WIDER = {"network.fmap_base": 1024}


def test_runs_that_differ_by_their_seed_are_a_column_with_mean_and_deviation(tmp_path: Path) -> None:
    runs = [*seeds_of(tmp_path, "narrow", [50.0, 52.0, 54.0]), *seeds_of(tmp_path, "wide", [41.0, 40.0, 45.0],
                                                                         changes=WIDER)]
    assert compare_runs(runs).splitlines() == [
        "8 px",
        "                images  narrow                wide",
        "checkpoint              r0008-hold-000000300  r0008-hold-000000300",
        "images seen             300                   300",
        "seeds                   0, 1, 2               0, 1, 2",
        "SWD          ↓   5,000  52 ± 2                42 ± 2.646 *",
        "",
        "↓ lower is better, ↑ higher. Mean of 3 seeds ± their standard deviation; * its worst seed is better than "
        "every other recipe's best."]


def test_programs_get_every_run_and_the_mean_and_deviation_of_each_recipe(tmp_path: Path) -> None:
    runs = [*seeds_of(tmp_path, "narrow", [50.0, 52.0]), *seeds_of(tmp_path, "wide", [53.0, 49.0], changes=WIDER)]
    told = json.loads(compare_runs(runs[::-1], as_json=True))
    (line,) = told["metrics"]
    assert [figure["value"] for figure in line["figures"]] == [49.0, 53.0, 52.0, 50.0]
    assert told["recipes"] == [
        {"recipe": "wide", "runs": [str(runs[2]), str(runs[3])], "seeds": [0, 1]},
        {"recipe": "narrow", "runs": [str(runs[0]), str(runs[1])], "seeds": [0, 1]}]
    assert line["over_seeds"] == [{"mean": 51.0, "deviation": pytest.approx(math.sqrt(8))},
                                  {"mean": 51.0, "deviation": pytest.approx(math.sqrt(2))}]
    assert line["best"] is None  # their seeds interleave


def test_seeds_of_one_recipe_alone_are_a_table_without_a_best(tmp_path: Path) -> None:
    table = compare_runs(seeds_of(tmp_path, "only", [1.0, 3.0]))
    assert "SWD          ↓   5,000  2 ± 1.414\n" in table


@pytest.mark.parametrize("fact", [
    {"stages.0.precision": "bfloat16"}, {"stages.0.threads": 2}, {"evaluation.samples": 8}, {"data.shards": "moved"},
    {"checkpoints.every_images": 50}])
def test_what_does_not_change_the_training_makes_no_other_recipe(fact: dict[str, Any], tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", {"swd": 1.0})
    two = run_of(tmp_path, "two", {"swd": 2.0}, 1, fact)
    assert "1.5 ± 0.7071" in compare_runs([one, two])


@pytest.mark.parametrize("fact", [WIDER, {"training.penalty_weight": 5.0}, {"stages.0.learning_rate": 0.01},
                                  {"stages.0.batch_size": 12}, {"training.precision": "float32"}])
def test_what_changes_the_training_makes_another_recipe(fact: dict[str, Any], tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", {"swd": 1.0})
    two = run_of(tmp_path, "two", {"swd": 3.0}, 1, fact)
    assert "1 [0.5 to 1.5] *" in compare_runs([one, two])  # single runs of two recipes: any seeds, as ever


def test_a_format_that_was_asked_for_is_part_of_the_recipe(tmp_path: Path) -> None:
    fixed = {"training.precision": "float32"}
    one = run_of(tmp_path, "one", {"swd": 1.0}, 0, fixed)
    two = run_of(tmp_path, "two", {"swd": 3.0}, 1, {**fixed, "stages.0.precision": "bfloat16"})
    assert "1 [0.5 to 1.5] *" in compare_runs([one, two])


def refusal(runs: list[Path], **how: Any) -> str:
    with pytest.raises(UserError) as refused:
        compare_runs(runs, **how)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_recipes_of_other_seeds_are_refused(tmp_path: Path) -> None:
    narrow = seeds_of(tmp_path, "narrow", [50.0, 52.0])
    wide = seeds_of(tmp_path, "wide", [41.0, 40.0, 39.0], changes=WIDER)
    assert refusal([*narrow, *wide]).startswith("narrow has seeds 0, 1 and wide 0, 1, 2: recipes of several seeds ")
    assert refusal([*narrow, wide[0]]).startswith("narrow has seeds 0, 1 and wide-seed0 0: ")
    assert "narrow" in compare_runs([*narrow, *wide[:2]])


def test_recipes_that_saw_other_numbers_of_images_are_refused(tmp_path: Path) -> None:
    narrow = seeds_of(tmp_path, "narrow", [50.0, 52.0])
    longer = seeds_of(tmp_path, "longer", [41.0, 40.0], changes={"stages.0.hold_images": 1200})
    assert "narrow-seed0 saw 300 images and " in refusal([*narrow, *longer])
    assert "longer-seed0 1,200: recipes of several seeds compare after as many." in refusal([*narrow, *longer])
    assert "1,200" in compare_runs([narrow[0], longer[0]])  # of single runs each tells how long


def test_a_seed_given_twice_is_refused(tmp_path: Path) -> None:
    runs = [*seeds_of(tmp_path, "narrow", [50.0, 52.0]), run_of(tmp_path, "again", {"swd": 51.0}, 1)]
    assert "are one recipe, both with training.seed=1" in refusal(runs)


@pytest.mark.parametrize(("names", "column"), [
    (("dcgan-s1", "dcgan-s2"), "dcgan"), (("a_10", "a_11"), "a"), (("r1", "r1-2"), "r1"), (("x", "y"), "x")])
def test_a_recipe_is_called_by_what_its_runs_names_share(names: tuple[str, str], column: str, tmp_path: Path) -> None:
    runs = [run_of(tmp_path, name, {"swd": 1.0 + seed}, seed) for seed, name in enumerate(names)]
    assert json.loads(compare_runs(runs, as_json=True))["recipes"][0]["recipe"] == column


# ---- The picture


def grid_of(run: Path, pixels: np.ndarray, name: str = "r0008-000000300.png") -> None:
    (run / "samples").mkdir()
    Image.fromarray(pixels).save(run / "samples" / name)


def test_the_picture_shows_the_first_rows_of_each_recipes_first_seed(tmp_path: Path) -> None:
    narrow = seeds_of(tmp_path, "narrow", [50.0, 52.0])
    wide = seeds_of(tmp_path, "wide", [53.0, 49.0], changes=WIDER)
    green, blue, red = ((0, 160, 0), (0, 0, 255), (255, 0, 0))
    for run, color in ((narrow[0], green), (wide[0], blue), (narrow[1], red), (wide[1], red)):
        pixels = np.full((64, 64, 3), color, np.uint8)
        pixels[24:] = red  # below the three rows of 8 px that are shown
        grid_of(run, pixels)
    compare_runs([*narrow[::-1], *wide[::-1]], picture=tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as image:
        pixels = np.asarray(image.convert("RGB"), int)

    def near(color: tuple[int, int, int]) -> np.ndarray:
        return np.argwhere(np.abs(pixels - color).sum(2) < 30)

    assert len(near(green)) > 5_000
    assert len(near(blue)) > 5_000
    assert near(green)[:, 1].max() < near(blue)[:, 1].min()  # side by side, in the order given
    assert len(near(red)) == 0


@pytest.mark.parametrize("names", [("one", "two"), tuple("abcdef")], ids=["two", "six"])
def test_the_picture_is_less_than_200_kb_even_of_noise_and_twenty_metrics(names: tuple[str, ...],
                                                                         tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f"fd_{n}": float(n) for n in range(20)}
    changes = {"stages.0.resolution": 64}
    runs = [run_of(tmp_path, name, values, changes={**changes, "network.fmap_base": 1024 + n}, resolution=64)
            for n, name in enumerate(names)]
    for run in runs:
        grid_of(run, rng.integers(0, 256, (512, 512, 3), np.uint8), "r0064-000000300.png")
    compare_runs(runs, picture=tmp_path / "all.png")
    content = (tmp_path / "all.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 200_000


def test_a_picture_lacks_only_the_samples_that_are_not_there(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, "one", {"swd": 1.0}), run_of(tmp_path, "two", {"swd": 3.0}, changes=WIDER)]
    without = compare_runs(runs)
    assert compare_runs(runs, picture=tmp_path / "all.PNG") == without
    assert (tmp_path / "all.PNG").is_file()


def test_a_picture_of_another_kind_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    assert "is written as PNG" in refusal([tmp_path / "a", tmp_path / "b"], picture=tmp_path / "all.svg")
