"""Pictures from a trained generator: load the average, draw latents, grids, export for use without gradine."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from gradine.configs.schema import Run
from gradine.stages import checkpoint, commits
from gradine.stages.families import AnyGenerator, new_generator
from gradine.stages.growth import random_seed
from gradine.stages.latents import draw

COLUMNS = 8  # of a grid


def load_average(run: Run, files: dict[str, bytes]) -> AnyGenerator:
    """The averaged generator of a verified checkpoint, ready to sample at alpha = 1. Raises Damaged or UserError."""
    resolution = commits.state_of(files["state.json"])["resolution"]
    generator = new_generator(run.network, resolution, resolution > run.stages[0].resolution, run.data.channels)
    checkpoint.load_network(generator, "average", files)
    return generator.eval().requires_grad_(False)


def draw_latents(run: Run, purpose: str, count: int, seed: int | None = None, labels: Tensor | None = None) -> Tensor:
    """[count, input_size], a function of (seed, purpose); the seed is the run's unless another is given.

    labels: int64 [count] of a conditional generator; None: 0, 1, 2, ... in turn.
    """
    source = torch.Generator().manual_seed(random_seed(run.training.seed if seed is None else seed, purpose))
    return draw(run.network, count, source, labels)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded and clamped."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def generated(generator: AnyGenerator, latents: Tensor) -> Iterator[Tensor]:
    """Floats [n, C, R, R] around [-1, 1] on the generator's device, for the latents in order; n is 32 up to 128 px,
    fewer above for memory's sake, 4 at least: a minibatch-stddev group, two pairs.
    """
    device = next(generator.parameters()).device
    for part in latents.split(images_at_once(generator.resolution)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # paths take steps that TF32 would round away
            images = generator(part.to(device))
        yield images


def images_at_once(resolution: int) -> int:
    return max(4, min(32, 32 * 128**2 // resolution**2)) if resolution > 1 else 4096


def generate(generator: AnyGenerator, latents: Tensor) -> Iterator[Tensor]:
    """The same as uint8 on the CPU."""
    for images in generated(generator, latents):
        yield to_uint8(images).cpu()


def grid(images: Tensor, columns: int = COLUMNS) -> Image.Image:
    """uint8 [N, C, R, R] -> one picture, image i at row i // 8, column i % 8, no gaps; empty places are black."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    channels, size = images.shape[1:3]
    canvas = torch.zeros(rows * columns, channels, size, size, dtype=torch.uint8)
    canvas[:len(images)] = images
    tiles = canvas.view(rows, columns, channels, size, size)
    return picture(tiles.permute(2, 0, 3, 1, 4).reshape(channels, rows * size, columns * size))


def picture(pixels: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> RGB for three channels, gray (Pillow's mode L) for one."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path) -> Path:
    """Written beside, then renamed: a reader never meets half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(png(image))
    return partial.rename(path)


def export(run: Run, files: dict[str, bytes], out: Path) -> list[Path]:
    """Writes generator.safetensors, generator.pt2 (a torch.export program) and generator.json into `out`.

    The program maps latents [N, latent_size], any N, to images [N, C, R, R] in about [-1, 1], C = 3 for RGB and
    1 for gray, without gradine: `torch.export.load("generator.pt2").module()(latents)`.
    """
    generator = load_average(run, files)
    resolution, channels = generator.resolution, run.data.channels
    alone = new_generator(run.network, resolution, fades=False, image_channels=channels)  # no older to-RGB: alpha is 1
    alone.load_state_dict(generator.state_dict(), strict=False)
    alone.eval().requires_grad_(False)
    out.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(alone, (torch.zeros(2, run.network.input_size),),
                                  dynamic_shapes={"latents": {0: torch.export.Dim("batch", min=1)}, })
    paths = [out / name for name in ("generator.safetensors", "generator.pt2", "generator.json")]
    safetensors.torch.save_file(dict(alone.state_dict()), paths[0])
    torch.export.save(program, paths[1])
    paths[2].write_text(json.dumps({
        "kind": run.network.kind, "resolution": resolution, "latent_size": run.network.latent_size,
        "classes": run.network.classes, "codes": run.network.codes, "fmap_base": run.network.fmap_base,
        "fmap_max": run.network.fmap_max, "latents": run.network.latents,
        "channels": channels, "images": f"[N, {channels}, R, R] in [-1, 1]",
        "images_seen": json.loads(files["state.json"])["images_seen"]}, indent=1))
    return paths
