"""Single training steps on noise, on demand: of the gradine in the working directory, or of pro-gan-pth 3.4.

    python tests/bench/step_process.py [FOLDER OF PRO-GAN-PTH]

Each line on stdin is JSON and is answered by a line of JSON:
    {"make": NAME, "resolution": 32, "batch": 8, "network": {...}, "training": {...}}   keep such a step: its file
    {"step": NAME}                                                                      train once: its seconds
`python -m tests.bench.step --base REF` runs the same text of this file in two checkouts. It asks of gradine only what
all its versions have, and imports nothing else of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

CPU = torch.device("cpu")


def gradine_step(resolution: int, batch: int, network: dict[str, Any], training: dict[str, Any]) -> Callable[[], Any]:
    """One `train_step` in the middle of a fade, all rows in one share."""
    from gradine.configs.schema import from_dict
    from gradine.stages import growth
    from gradine.stages.loop import initial_state
    from gradine.stages.step import Rules, Share, train_step

    sizes = [4] if resolution == 4 else [resolution // 2, resolution]
    stages = [{"resolution": size, "batch_size": batch, "micro_batch": batch} for size in sizes]
    run = from_dict({"name": "bench", "data": {"source": "none", "shards": "none"}, "network": network,
                     "training": training, "stages": stages})
    state = initial_state(run, len(sizes) - 1, None, CPU, None)
    moment = growth.at(growth.schedule(run), state.images_seen)
    moment = replace(moment, alpha=0.5) if moment.phase.kind == "fade" else moment
    rules, latent = Rules.of(run, batch, 1), run.network.latent_size
    share = Share(torch.randint(0, 256, (batch, 3, resolution, resolution), dtype=torch.uint8), torch.rand(batch) < 0.5,
                  torch.randn(batch, latent), torch.randn(batch, latent), torch.rand(batch))
    return lambda: train_step(state, [share], moment, rules)


def peer_step(resolution: int, batch: int) -> Callable[[], None]:
    """What pro-gan-pth's own trainer does with a batch: both updates, gradients checked, losses read, average.

    It has no settings for widths: those of a base of 16384. Its parts for data and logs are not measured, hence mocked.
    """
    mocked = ("torchvision", "torchvision.transforms", "torchvision.utils", "torch.utils.tensorboard")
    sys.modules.update((name, MagicMock()) for name in mocked)
    from pro_gan_pytorch import custom_layers, gan, networks
    from pro_gan_pytorch.losses import WganGP

    # It passes the builtin `input` to a method that today's torch has changed; it always wants the default.
    custom_layers.EqualizedConvTranspose2d._output_padding = lambda self, *_: self.output_padding
    depth = resolution.bit_length() - 1
    with contextlib.redirect_stdout(None):  # it prints its networks
        trainer = gan.ProGAN(networks.Generator(depth), networks.Discriminator(depth))
    # betas=(0, 0.99) in its trainer: today's torch wants a float
    adams = [torch.optim.Adam(net.parameters(), 0.003, (0.0, 0.99), 1e-8) for net in (trainer.gen, trainer.dis)]
    reals, latents, loss = torch.randn(batch, 3, resolution, resolution), torch.randn(batch, 512), WganGP()

    def step() -> None:
        trainer.optimize_discriminator(loss, adams[1], latents, reals, depth, 0.5)
        gan.update_average(trainer.gen_shadow, trainer.gen, beta=trainer.ema_beta)
        trainer.optimize_generator(loss, adams[0], latents, reals, depth, 0.5)

    return step


def seconds(step: Callable[[], Any]) -> float:
    """Of the processor where one thread does it all, so that what else runs on the machine counts little."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    step()
    return clock() - began


def serve(peer: str | None) -> None:
    sys.path[0] = peer or str(Path.cwd())  # instead of this file's folder
    steps: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if name := asked.pop("make", None):
            steps[name] = peer_step(asked["resolution"], asked["batch"]) if peer else gradine_step(**asked)
            answer: Any = sys.modules["pro_gan_pytorch.gan" if peer else "gradine.stages.step"].__file__
        else:
            answer = seconds(steps[asked["step"]])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1] if len(sys.argv) > 1 else None)
