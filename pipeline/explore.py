"""What `gradine explore` makes of a checkpoint: pictures, a video, latents and figures, in RUN/explore/<what>.

An image is named SEED:INDEX, image INDEX of `gradine sample --seed SEED --count 64`; a plain INDEX is of seed 0.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from gradine.configs.schema import Run, UserError, require
from gradine.pipeline.commands import chosen
from gradine.pipeline.run_dir import RunDir
from gradine.stages import checkpoint, commits, explore
from gradine.stages.data import Images
from gradine.stages.families import AnyGenerator, new_discriminator
from gradine.stages.features import Unavailable, first_line, open_network
from gradine.stages.generate import draw_latents, generate, grid, load_average, save_png, to_uint8
from gradine.stages.latents import Parts
from gradine.stages.pixels import Rejected, levels, open_image, squares
from gradine.stages.subjects import read

DRAWN_AT_ONCE = 64  # latents: what lies behind one in the stream of random numbers depends on how many are drawn
FRAMES, FPS = 48, 24  # of the video, from one seed to the next
SHOWN = 256  # px a side at least, of a video's frame
FOLLOWED, JUDGED, SHIFTS = 256, 100, 7  # samples that show a direction, others that it is tried on, and places on it
NEIGHBOURS = 4


@dataclass(frozen=True)
class Opened:
    """A checkpoint's averaged generator, on the CPU, and where what is made of it goes."""

    folder: RunDir
    run: Run
    of: commits.Checkpoint
    files: dict[str, bytes]
    generator: AnyGenerator
    out: Path

    @staticmethod
    def at(path: Path, name: str, out: Path | None, what: str) -> Opened:
        folder, run, of, files = chosen(path, name)
        require(run.data.points.kind == "none", f"{path} makes points, which have no pictures to {what}. Use "
                                                f"gradine explore {path} game.")
        return Opened(folder, run, of, files, load_average(run, files), out or folder.path / "explore" / what)

    def latents(self, names: str) -> Tensor:
        """`0:5,7` -> [2, input_size]. UserError for what is no name of an image."""
        return torch.stack([self._latent(name.strip()) for name in names.split(",")])

    def _latent(self, name: str) -> Tensor:
        found = re.fullmatch(r"(?:(-?\d+):)?(\d+)", name)
        if not found:
            raise UserError(f"{name!r} names no image. Use SEED:INDEX, e.g. 0:5 for image 5 of `gradine sample --seed "
                            "0`, or INDEX alone, several with commas between them.")
        index = int(found[2])
        return self.drawn(index + 1, int(found[1] or 0))[index]

    def drawn(self, count: int, seed: int) -> Tensor:
        """[count, input_size]: the first ones of `gradine sample`."""
        return draw_latents(self.run, "sample", -(-count // DRAWN_AT_ONCE) * DRAWN_AT_ONCE, seed)[:count]

    def images(self, latents: Tensor) -> Tensor:
        """uint8 [N, C, R, R]"""
        return torch.cat(list(generate(self.generator, latents)))

    def save(self, name: str, rows: Sequence[Tensor]) -> None:
        """Rows of uint8 images [n, C, R, R], n may differ, as a PNG."""
        say(save_png(sheet(rows), self.out / name))

    def write(self, name: str, content: dict[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_text(json.dumps(content, indent=1))
        say(self.out / name)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, self.out / name)
        say(self.out / name)


def say(written: Path) -> None:
    print(f"written: {written}")


def sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Shorter rows end in black."""
    widest = max(map(len, rows))
    return grid(torch.cat([torch.cat([row, row.new_zeros(widest - len(row), *row.shape[1:])]) for row in rows]), widest)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- Walks and sums


def interpolate(path: Path, seeds: str, steps: int, video: bool, out: Path | None, name: str) -> None:
    """A strip for each pair of neighbouring seeds, and a video through all of them."""
    it = Opened.at(path, name, out, "interpolate")
    network, ends = it.run.network, it.latents(seeds)
    require(len(ends) > 1, f"--seeds={seeds} is one image: a way has two ends. Name two or more, e.g. --seeds 1,2.")
    ends = explore.with_noise(ends[:1].expand(len(ends), -1), ends[:, Parts.of(network).noise], network)
    it.save("interpolation.png", [it.images(explore.walk(a, b, steps, network)) for a, b in pairwise(ends)])
    if video:
        from gradine.stages.video import write_video

        ways = (explore.walk(a, b, FRAMES + 1, network)[:-1] for a, b in pairwise(ends))
        say(write_video(frames(it.generator, (*ways, ends[-1:])), it.out / "interpolation.mp4", FPS))


def frames(generator: AnyGenerator, latents: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3], each pixel as a square of several where images are small."""
    for part in latents:
        for images in generate(generator, part):
            times = -(-SHOWN // images.shape[-1])
            large = images.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
            yield from large.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def arithmetic(path: Path, groups: Sequence[str], out: Path | None, name: str) -> None:
    """Rows A, B and C, each with the image of its mean last, then that of A - B + C alone."""
    it = Opened.at(path, name, out, "arithmetic")
    latents = [it.latents(group) for group in groups if group]
    means, result = explore.arithmetic(latents, it.run.network)
    it.save("arithmetic.png", [*(it.images(torch.cat([group, mean[None]])) for group, mean in
                                 zip(latents, means, strict=True)), it.images(result)])
    it.save_tensors("arithmetic.safetensors", {"means": means, "result": result})


# ---- Directions


def direction(path: Path, classifier: str, labels: Path | None, classes: str, steps: int, reach: float, count: int,
              seed: int, out: Path | None, name: str) -> None:
    """A direction for each class, what moving along it does to all of them, and a strip of each."""
    require(bool(classifier or labels), "gradine explore direction wants --classifier module:function, --labels FILE "
                                        "or both: something must tell the classes.")
    wanted, it = class_numbers(classes), Opened.at(path, name, out, "direction")
    network, place = it.run.network, device()
    generator = it.generator.to(place)
    classify = classifier_of(it, classifier, place) if classifier else None
    if classify:
        with torch.no_grad():
            known = classify(generator(it.drawn(4, seed).to(place))).shape[1]
        require(max(wanted) < known, f"--class={classes}: {classifier} knows classes 0 to {known - 1}. Use those.")
    if labels:
        named = labels_of(labels)
        latents, of_class = it.latents(",".join(named)), torch.tensor([*named.values()])
        directions = torch.stack([explore.between_means(latents, of_class, k, network) for k in wanted]).to(place)
    else:
        latents, found = it.drawn(FOLLOWED, seed).to(place), []
        for k in wanted:
            followed = explore.follow(generator, cast("explore.Classify", classify), latents, k, steps, network)
            print(f"class {k}: {followed.arrived} of {followed.walked} samples became it, after {followed.steps:.0f} "
                  "steps in the mean")
            found.append(followed.direction)
        directions = torch.stack(found)
    it.save_tensors("direction.safetensors", {"directions": directions, "classes": torch.tensor(wanted)})

    amounts = torch.linspace(-reach, reach, SHIFTS).tolist()
    shown = draw_latents(it.run, "direction", max(count, JUDGED), seed).to(place)  # others than showed the direction
    for k, along in zip(wanted, directions, strict=True):
        columns = [torch.cat(list(generate(generator, explore.moved(shown[:count], along, amount, network))))
                   for amount in amounts]
        it.save(f"direction-{k}.png", [*torch.stack(columns, dim=1)])
    told = {"classes": wanted, "reach": reach, "cosines": (directions @ directions.T).tolist()}
    if classify:
        odds = [explore.odds_along(generator, classify, shown, along, amounts, network) for along in directions]
        told |= {"samples": len(shown),
                 "monotone": [rising(each[:, :, k]) for k, each in zip(wanted, odds, strict=True)],
                 "changes": [(each[-1] - each[0]).mean(dim=0).tolist() for each in odds]}
    it.write("direction.json", told)
    print(entanglement(told))


def rising(odds: Tensor) -> float:
    """[places, N] -> the share of samples whose odds rise at every step."""
    return float((odds.diff(dim=0) > 0).all(dim=0).float().mean())


def entanglement(told: dict[str, Any]) -> str:
    """The table for a person: how alike the directions are, and what each does to every class."""
    wanted = told["classes"]
    lines = ["cosine   " + "".join(f"{k:>8}" for k in wanted)]
    lines += [f"class {k:<3}" + "".join(f"{cosine:8.2f}" for cosine in row)
              for k, row in zip(wanted, told["cosines"], strict=True)]
    if "changes" in told:
        lines += [f"change of log odds from -{told['reach']:g} to {told['reach']:g} along each direction, by class; "
                  f"and the share of {told['samples']} samples whose own rises at every step",
                  "along    " + "".join(f"{k:>8}" for k in range(len(told["changes"][0]))) + "   rising"]
        lines += [f"class {k:<3}" + "".join(f"{change:8.2f}" for change in row) + f"{share:9.0%}"
                  for k, row, share in zip(wanted, told["changes"], told["monotone"], strict=True)]
    return "\n".join(lines)


def class_numbers(text: str) -> list[int]:
    require(re.fullmatch(r"\d+(,\d+)*", text) is not None, f"--class={text!r} is no number of a class, or several with "
                                                           "commas between them, e.g. --class 0,3.")
    return [int(number) for number in text.split(",")]


def labels_of(path: Path) -> dict[str, int]:
    """Image names and their classes: {"0:5": 3, ...} as JSON, or lines `0:5,3` as CSV, with a headline or without."""
    try:
        if path.suffix == ".json":
            return {str(name): int(label) for name, label in json.loads(path.read_text()).items()}
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        return {name.strip(): int(label) for name, label in rows[rows[:1] == [["seed", "label"]]:]}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--labels={path} cannot be read: {first_line(error)}. Use lines SEED:INDEX,LABEL below a "
                        'headline seed,label, or JSON {"SEED:INDEX": LABEL}.') from None


def classifier_of(it: Opened, name: str, place: torch.device) -> explore.Classify:
    """`discriminator`: the run's own auxiliary head; `module:function`: function() gives the classifier."""
    if name == "discriminator":
        return auxiliary_head(it, place)
    module, _, function = name.partition(":")
    try:
        classify = getattr(importlib.import_module(module), function)()
        if isinstance(classify, nn.Module):
            classify = classify.to(place).eval()  # dropout or batch norm in training would mix the samples
    except Exception as error:  # anyone's code
        raise UserError(f"--classifier={name} cannot be used: {first_line(error)}. It must be module:function, the "
                        "module on PYTHONPATH, and function() give a callable: images [N, C, R, R] in [-1, 1] -> "
                        "logits [N, K].") from error

    def checked(images: Tensor) -> Tensor:
        logits = classify(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = [*logits.shape] if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"--classifier={name} gave {got} for {len(images)} images. It must give logits [N, K].")
        return logits

    return checked


def auxiliary_head(it: Opened, place: torch.device) -> explore.Classify:
    network, resolution = it.run.network, it.of.resolution
    require(network.conditioning == "auxiliary", f"--classifier=discriminator: with network.conditioning="
            f"{network.conditioning} it tells no classes. Use module:function, or a run with conditioning=auxiliary.")
    judge: Any = new_discriminator(network, resolution, resolution > it.run.stages[0].resolution, it.run.data.channels)
    checkpoint.load_network(judge, "discriminator", it.files)
    judge.to(place).eval().requires_grad_(False)

    def classify(images: Tensor) -> Tensor:
        whole = torch.cat([images, images[-1:].expand(-len(images) % 4, -1, -1, -1)])  # minibatch-stddev groups
        return judge.linearised(whole)[0].heads[:len(images), :network.classes]

    return classify


# ---- Nearest training images


def neighbours(path: Path, count: int, features: str, seed: int, out: Path | None, name: str) -> None:
    """A row for each sample: itself, then the training images that are nearest to it, the nearest first."""
    it = Opened.at(path, name, out, "neighbours")
    try:
        network = open_network(features, it.run.evaluation, it.run.data.cache_dir, device())
    except Unavailable as error:
        raise UserError(f"--features={features}: {error}") from None
    samples = it.images(it.drawn(count, seed))
    with closing(Images(it.run.data, it.of.resolution)) as images:
        looked_at = (network(batch).features for batch in read(images, np.arange(len(images))))
        distances, places = explore.nearest(network(samples).features, looked_at, NEIGHBOURS)
        rows = [torch.cat([sample[None], torch.from_numpy(images.pixels(ids.numpy()))])
                for sample, ids in zip(samples, places, strict=True)]
    it.save("neighbours.png", rows)
    it.write("neighbours.json", {"features": network.definition, "training_images": len(images), "neighbours": {
        f"{seed}:{number}": [{"image": image, "distance": distance} for image, distance in zip(*found, strict=True)]
        for number, found in enumerate(zip(places.tolist(), distances.tolist(), strict=True))}})
    closest = distances[:, 0]
    print(f"distance to the nearest of {len(images):,} training images: {closest.min():.4g} to {closest.max():.4g}, "
          f"median {closest.median():.4g}, in {network.name}")


# ---- From images to latents


def invert(path: Path, files: Sequence[Path], steps: int, restarts: int, rate: float, seed: int, out: Path | None,
           name: str) -> None:
    """A row for each image: as the run's level shows it, and as the generator does."""
    it = Opened.at(path, name, out, "invert")
    network, place = it.run.network, device()
    pixels = torch.stack([level_of(file, it) for file in files])
    images, generator = pixels.to(place) / 127.5 - 1, it.generator.to(place)
    if network.autoencodes:
        found = encoded(it, images)
    else:
        starts = max(restarts, network.classes, network.codes)  # labels come in turn: one start at least for each
        latents = draw_latents(it.run, "invert", starts, seed).to(place)
        found = torch.stack([explore.inverted(generator, image, latents, steps, rate, network)[0] for image in images])
    with torch.no_grad():
        shown = torch.cat([generator(part) for part in found.split(explore.at_once(generator))])
    errors = explore.squared_error(shown, images).tolist()
    it.save("inversion.png", [torch.stack(pair) for pair in zip(pixels, to_uint8(shown).cpu(), strict=True)])
    it.save_tensors("inversion.safetensors", {"latents": found})
    by_file = dict(zip(map(str, files), errors, strict=True))
    it.write("inversion.json", {"mean_squared_errors": by_file})
    for file, error in by_file.items():
        print(f"{file}: mean squared error {error:.5f} of pixels in -1..1")


@torch.no_grad()
def encoded(it: Opened, images: Tensor) -> Tensor:
    """[N, latent_size] by the run's encoder; of the VAE's, the mean."""
    encoder: Any = new_discriminator(it.run.network, it.of.resolution, False, it.run.data.channels)
    checkpoint.load_network(encoder, "discriminator", it.files)
    encoder.to(images.device).eval()
    parts = images.split(explore.at_once(it.generator))
    return torch.cat([encoder(part)[:, :it.run.network.latent_size] for part in parts])


def level_of(file: Path, it: Opened) -> Tensor:
    """uint8 [C, R, R]: the image as sharding would make it, but for its centre alone, and small ones are enlarged."""
    data = replace(it.run.data, crop="centre", small="upscale")
    try:
        square = next(squares(open_image(file.read_bytes(), data), str(file), data, it.of.resolution))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or first_line(error)}. Give an image file.") from None
    except (Rejected, ValueError, SyntaxError) as error:
        raise UserError(f"{file} is no image that can be used: {first_line(error)}.") from None
    return torch.from_numpy(next(levels(square))[1].transpose(2, 0, 1).copy())


# ---- Conditions


def traverse(path: Path, rows: int, columns: int, seed: int, out: Path | None, name: str) -> None:
    """A sheet for the label and each code: each row has its own noise, each column a value."""
    it = Opened.at(path, name, out, "traverse")
    sheets = explore.traversals(it.drawn(rows, seed), columns, it.run.network)
    require(bool(sheets), f"{path} has neither labels nor codes to go through. Use a run with network.conditioning, "
                          "codes or continuous_codes; or find directions: gradine explore RUN direction.")
    for part, latents in sheets.items():
        it.save(f"traverse-{part}.png", [it.images(row) for row in latents])


# ---- The game of points


def game(path: Path, out: Path | None) -> None:
    """Every checkpoint that is there, oldest first, as a frame, and all of them as a video."""
    from gradine.stages import plane

    folder, run, _, _ = chosen(path)
    require(run.data.points.kind != "none", f"{path} makes images: its game cannot be drawn in a plane. Use a run with "
                                            "data.points, e.g. gradine run ring8.")
    found, _ = commits.find(commits.location_of(run, folder.path))
    whole = []
    for each in found:
        try:
            commits.read(each.path)
            whole.append(each.path)
        except commits.Damaged as damage:
            print(f"{each.name} is left out: {damage}")
    for written in plane.game(run, whole, out or folder.path / "explore" / "game"):
        say(written)
