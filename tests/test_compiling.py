"""Claims about compiled objectives: the same function as the plain ones, no program more after the first step."""

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from gradine.configs.schema import Run, from_dict
from gradine.stages.compiling import compiled
from gradine.stages.data import noise
from gradine.stages.loop import initial_state
from gradine.stages.step import Objectives, Rules, Share, TrainState

SETTINGS: dict[str, Any] = {"penalty_every": 2, "precision": "float32", "channels_last": False}
plain_compile = torch.compile
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch by torch, whose compiler is the matter


@pytest.fixture(autouse=True)
def no_program_of_another_test() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run_of(pool_first: bool = False) -> Run:
    return from_dict({
        "name": "x", "data": {"source": "a", "shards": "b"}, "training": SETTINGS,
        "network": {"latent_size": 6, "fmap_base": 64, "fmap_max": 4, "pool_before_activation": pool_first},
        "stages": [{"resolution": size, "batch_size": 8, "micro_batch": 4, "threads": 1} for size in (8, 16)]})


def compiled_of(run: Run) -> tuple[TrainState, Rules, Share, Objectives, str]:
    state, rules = initial_state(run, 1, None, torch.device("cpu"), None), Rules.of(run, 8, 1)
    return state, rules, noise(run, 1, 0, 1)[0], *compiled(run, 1, state, rules)


def assert_same_function(run: Run) -> None:
    state, rules, share, objectives, note = compiled_of(run)
    assert "compiled in" in note
    plain = Objectives()
    with torch.compiler.set_stance("fail_on_recompile"):  # an alpha, a hold, a step without penalty: all are there
        for alpha, penalised in ((0.1, True), (0.7, True), (0.7, False), (1.0, True), (1.0, False)):
            for net, fast, slow in (
                    (state.discriminator, partial(objectives.critic, state, share, alpha, rules, penalised),
                     partial(plain.critic, state, share, alpha, rules, penalised)),
                    (state.generator, partial(objectives.generator, state, share, alpha, rules, 0),
                     partial(plain.generator, state, share, alpha, rules, 0))):
                (loss, figures), (expected_loss, expected) = fast(), slow()
                assert figures.keys() == expected.keys()
                torch.testing.assert_close(figures, expected, rtol=1e-4, atol=1e-5)
                got, wanted = (torch.autograd.grad(each, list(net.parameters()), materialize_grads=True)
                               for each in (loss, expected_loss))
                for a, b in zip(got, wanted, strict=True):
                    assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("pool_first", [False, True])
def test_what_a_compiler_makes_of_the_objectives_is_the_same_function(pool_first: bool,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Its front ends alone, which take the derivatives; kernels are torch's own, so that this takes seconds."""
    monkeypatch.setattr(torch, "compile", partial(plain_compile, backend="aot_eager"))
    assert_same_function(run_of(pool_first))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler wants g++")
def test_compiled_kernels_are_the_same_function() -> None:
    assert_same_function(run_of())


def test_a_backend_that_cannot_leaves_the_plain_objectives_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", partial(plain_compile, backend=broken))
    *_, objectives, note = compiled_of(run_of())
    assert objectives == Objectives()
    assert note.startswith("training.compile: not compiled, goes on without (")
    assert "no compiler here" in note
    assert "\n" not in note
    assert len(note) < 250


def test_an_error_that_is_not_the_compilers_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda objective: objective)
    run = run_of()
    state = initial_state(run, 0, None, torch.device("cpu"), None)  # an 8 px network, for a stage of 16 px
    with pytest.raises(RuntimeError, match="size"):
        compiled(run, 1, state, Rules.of(run, 8, 1))
