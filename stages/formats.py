"""In which precision and memory format a stage's steps run fastest: measured by its own workers, before its first step.

What `training.precision: auto` and `training.channels_last: null` leave open. Times are seconds of a step; on a CPU
processor seconds, for a choice that stays must not hang on who else was busy just then.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from gradine.configs.schema import Run
from gradine.stages.checkpoint import named_moments
from gradine.stages.data import noise
from gradine.stages.loop import initial_state, new_accelerator, use_threads
from gradine.stages.losses import penalty_divisor
from gradine.stages.memory import OutOfMemory, allocator_error, forget, out_of_memory_named
from gradine.stages.pulse import Pulse
from gradine.stages.step import Rules, TrainState
from gradine.stages.stopping import asked, listening
from gradine.stages.trial import first_moment, undisturbed_step

Event = dict[str, Any]
GAIN = 0.05  # by which another format must be faster than one that stands before it: below it lies noise
STEPS = 5  # of each format at most, after its first
ENOUGH_S = 5.0  # of steps: long ones are measured once after the first, and tell as much
BEHIND = 1.5  # times the fastest: not measured any further,
LONG_S = 3.0  # already after its first step, where steps are so long that what the first one also does is little
NO_MEMORY = float("inf")


class Format(NamedTuple):
    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.precision}{', channels last' * self.channels_last}"


# Those that take the least memory first, and of each precision the one whose convolutions need not reorder channels.
ORDER = [Format("bfloat16", True), Format("bfloat16", False), Format("float32", True), Format("float32", False)]


def candidates(run: Run, stage: int, has_bfloat16: bool) -> list[Format]:
    """What the settings leave open, those to prefer first; bfloat16 unasked only where the machine has it."""
    precision, last = run.format_of(run.stages[stage])
    precisions = ["bfloat16"] * has_bfloat16 + ["float32"] if precision == "auto" else [precision]
    return [each for each in ORDER if each.precision in precisions and last in (None, each.channels_last)]


def fastest(seconds: Mapping[Format, float]) -> Format:
    """The first that no other beats by GAIN: so that noise decides nothing. In the order of `seconds`."""
    return next(each for each in seconds if seconds[each] <= min(seconds.values()) / (1 - GAIN))


def chosen(event: Event) -> tuple[Format, dict[str, float | None], str]:
    """A `formats` event -> the choice, seconds of a step by format (None: no memory), and why, for a person."""
    formats = [Format(*each) for each in event["formats"]]
    if not event["seconds"]:
        return formats[0], {}, event["reason"]
    seconds = {each: NO_MEMORY if took is None else took for each, took in zip(formats, event["seconds"], strict=True)}
    choice = fastest(seconds)
    others = [f"{each} {'no memory' if took == NO_MEMORY else f'{took:.2g} s'}"
              for each, took in sorted(seconds.items(), key=lambda item: item[1]) if each != choice]
    return (choice, {str(each): took for each, took in zip(seconds, event["seconds"], strict=True)},
            "; ".join([f"{seconds[choice]:.2g} s a step", *others]))


def measure(run: Run, stage: int, pulses: bool = False) -> Iterator[Event]:
    """Steps on noise in each format that is open for run.stages[stage], by turns, as one of its workers.

    Rank 0 yields one event at last, `formats`: the formats, and `seconds` of a step of the slowest worker by format,
    None where memory ran out; no seconds, but a `reason`, where nothing has to be measured. None after a SIGTERM to any
    rank. pulses: as in `run_stage`. Raises OutOfMemory where no format fits.

    Nothing of it stays: no weights, no memory, no random numbers drawn. Networks are not compiled for it.
    """
    setting = run.stages[stage]
    with listening(), out_of_memory_named(setting):
        accelerator = new_accelerator(setting.gpus == 0, setting.workers)
        use_threads(setting)
        pulse = Pulse(pulses, setting.batch_size, 0)
        yield from pulse.beat("setup")
        lacks_bfloat16, = slowest(accelerator, float(not has_bfloat16(accelerator.device)))
        formats, seconds, reason = candidates(run, stage, not lacks_bfloat16), {}, ""
        if len(formats) == 1:
            reason = "all that this machine and the settings leave"
        elif run.training.deterministic:
            reason = "training.deterministic: not by time"
        else:
            try:
                seconds = yield from steps_by_turns(run, stage, formats, accelerator, pulse)
            finally:
                forget(accelerator.device)
            if not seconds:
                return
    if accelerator.is_main_process:
        yield {"event": "formats", "resolution": setting.resolution, "formats": formats, "reason": reason,
               "seconds": [None if took == NO_MEMORY else took for took in seconds.values()]}


def steps_by_turns(run: Run, stage: int, formats: list[Format], accelerator: Accelerator, pulse: Pulse
                   ) -> Generator[Event, None, dict[Format, float]]:
    """-> seconds of a step by format, equal on all workers; {} if one was asked to stop. Yields pulses.

    Each worker steps by itself, beside the others: what they send each other is the same in every format, and one that
    finds no memory leaves none waiting.
    """
    setting, device, workers = run.stages[stage], accelerator.device, accelerator.num_processes
    state = initial_state(run, stage, None, device, None)
    shares = [share.to(device) for share in noise(run, stage, accelerator.process_index, workers)]
    moment, divisor = first_moment(run, stage), penalty_divisor(run, setting.resolution)
    times: dict[Format, list[float]] = {each: [] for each in formats}
    left, spent = formats, 0.0
    for turn in range(1 + STEPS):
        for each in left:
            lay_out(state, each.channels_last)
            rules = Rules.of(run, setting.batch_size, divisor, each.precision)
            pulse.at("step")
            try:
                own = undisturbed_step(state, shares, moment, rules, torch.clone if workers > 1 else None)
            except Exception as error:
                if not allocator_error(error):
                    raise
                own = NO_MEMORY
            if own == NO_MEMORY and device.type == "cuda":  # or the next would find no memory in one piece
                torch.cuda.empty_cache()
            pulse.images_seen += setting.batch_size
            yield from pulse.beat("step")
            pulse.at("agree")
            took, stop = slowest(accelerator, own, float(asked()))
            if stop:
                return {}
            times[each].append(took)
            spent += took
        # the first step of each made kernels and room for tensors; the least of the others is the least disturbed
        seconds = {each: max(took) if NO_MEMORY in took else min(took[1:] or took) for each, took in times.items()}
        least = min(seconds.values())
        if least == NO_MEMORY:
            raise OutOfMemory(f"stage {setting.resolution}px: no memory for a step in any format",
                              setting.micro_batch or setting.batch_size // setting.workers)
        bound = BEHIND * least if turn or least > LONG_S else NO_MEMORY
        left = [each for each in left if seconds[each] <= bound and NO_MEMORY not in times[each]]
        if len(left) == 1 or (turn and spent > ENOUGH_S):
            break
    return seconds


def has_bfloat16(device: torch.device) -> bool:
    """Whether the machine itself computes in bfloat16: elsewhere torch emulates it, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def lay_out(state: TrainState, channels_last: bool) -> None:
    """Weights, average and moments into a memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for network in (state.generator, state.discriminator, state.average):
        network.to(memory_format=layout)  # type: ignore[call-overload]
    moments = [part for role in ("generator", "discriminator") for _, part in named_moments(state, role)]
    for tensor in (tensor for part in moments for tensor in part.values() if tensor.dim() == 4):
        tensor.data = tensor.data.contiguous(memory_format=layout)


def slowest(accelerator: Accelerator, *figures: float) -> list[float]:
    """The largest of each over the workers."""
    mine = torch.tensor([figures], device=accelerator.device)
    return accelerator.gather(mine).amax(0).tolist()
