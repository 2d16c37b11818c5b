"""torch.compile for the two objectives of a step, where `training.compile` asks for it.

Nothing in them takes a derivative of a derivative (networks.py), which compilers refuse. Alpha enters as a tensor, so
that a fade is one program; a hold is a second, and a step without penalty one more. All are compiled before a stage's
first step, and none is after it.
"""

from __future__ import annotations

import time

import torch

from gradine.configs.schema import Run
from gradine.stages.data import noise
from gradine.stages.step import Objectives, Rules, Share, TrainState, critic_objective, generator_objective


def compiled(run: Run, stage: int, state: TrainState, rules: Rules) -> tuple[Objectives, str]:
    """Objectives for this stage's steps, and a line for the log: the seconds it took, or why there are none.

    Where the backend cannot (no C++ compiler, no kernels for the device), the plain ones.
    """
    import torch._dynamo.config  # the compiler is large, and most runs do without
    import torch._functorch.config
    import torch._inductor.config

    began = time.perf_counter()
    critic, generator = torch.compile(critic_objective), torch.compile(generator_objective)
    device = next(state.generator.parameters()).device

    def shown(alpha: float) -> float | torch.Tensor:  # a float would be compiled in, each a program of its own
        return torch.full((), alpha, device=device) if alpha < 1 else 1.0

    objectives = Objectives(
        lambda state, share, alpha, rules, penalised: critic(state, share, shown(alpha), rules, penalised),
        lambda state, share, alpha, rules, turn: generator(state, share, shown(alpha), rules, turn))
    share = noise(run, stage, 0, run.stages[stage].workers)[0].to(device)
    try:
        # The compiler's own caches on disk are pickles, which gradine reads from nowhere. All is compiled in here.
        with (torch._inductor.config.patch(fx_graph_cache=False), torch._dynamo.config.patch(
                automatic_dynamic_local_pgo=False), torch._functorch.config.patch(enable_autograd_cache=False)):
            programs_of(objectives, state, share, rules, fades=stage > 0)
    except Exception as error:
        if not of_the_compiler(error):
            raise
        torch.compiler.reset()
        return Objectives(), f"training.compile: not compiled, goes on without ({why(error)})"
    return objectives, f"compiled in {time.perf_counter() - began:.0f} s"


def programs_of(objectives: Objectives, state: TrainState, share: Share, rules: Rules, fades: bool) -> None:
    """Calls for every program that a stage needs, backwards too; changes nothing of `state`."""
    for alpha in (0.5, 1.0) if fades else (1.0,):
        for penalised in {True, rules.training.penalty_every == 1}:
            loss, _ = objectives.critic(state, share, alpha, rules, penalised)
            torch.autograd.grad(loss, list(state.discriminator.parameters()), allow_unused=True)
        for turn in range(rules.training.g_steps):
            loss, _ = objectives.generator(state, share, alpha, rules, turn)
            torch.autograd.grad(loss, list(state.generator.parameters()), allow_unused=True)


def of_the_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


def why(error: Exception) -> str:
    """Its first two lines that say something, as one, short: the first may only name the backend."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:160] or type(error).__name__
