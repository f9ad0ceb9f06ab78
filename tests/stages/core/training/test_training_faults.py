"""Steps that go wrong: bad losses and gradients by the stated policy, and memory that runs out."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from torch import nn
from training_forks import FORKS
from training_problem import FakeRun, InterruptedFitError, Problem

from stages.core.artifacts import read_json
from stages.core.errors import UserError
from stages.core.params import FaultParams
from stages.core.training.faults import Step, find_fault, remember_good_step, stop_where_it_persists
from stages.core.training.memory import is_out_of_memory
from stages.core.training.recipe import Faults, Position, Tensors

POLICY = FaultParams(spike=4.0, window=3, skips=2, rollbacks=2, rate_factor=0.5)
CPU_FULL = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def _after(*losses: float) -> Faults:
    faults = Faults()
    for loss in losses:
        remember_good_step(faults, loss, POLICY.window)
    return faults


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "fault"),
    [
        (1.0, 1.0, False, None),
        (float("nan"), 1.0, False, "the loss is nan"),
        (float("inf"), 1.0, True, "the loss is inf"),
        (1.0, float("inf"), False, "the gradient norm is inf"),
        (1.0, float("nan"), True, None),  # the loss scaler skips that step and lowers its scale
        (8.1, 1.0, False, "the loss of 8.1 is a spike over the usual 2"),
        (7.9, 1.0, False, None),
    ],
)
def test_what_is_a_fault(loss: float, norm: float, scaled: bool, fault: str | None) -> None:
    assert find_fault(Step(loss, norm), _after(3.0, 2.0, 1.0), POLICY, scaled) == fault


def test_spikes_count_from_a_full_window_on_and_not_below_where_the_training_began() -> None:
    assert find_fault(Step(99.0, 1.0), _after(1.0, 1.0), POLICY, scaled=False) is None
    learnt = _after(3.0, 2.0, 1.0, 0.1, 0.1, 0.1)
    assert find_fault(Step(2.9, 1.0), learnt, POLICY, scaled=False) is None
    assert find_fault(Step(3.1, 1.0), learnt, POLICY, scaled=False) is not None
    off = POLICY.model_copy(update={"spike": None})
    assert find_fault(Step(99.0, 1.0), learnt, off, scaled=False) is None


def _spoiled(problem: Problem, steps: dict[int, Any]) -> None:
    """Make the targets of chosen calls of the loss what `steps` says."""

    def before(call: int, tensors: Tensors) -> None:
        if call in steps:
            tensors["targets"].fill_(steps[call])

    problem.before = before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0e4])
def test_one_bad_step_is_skipped_and_leaves_no_trace(bad: float, tmp_path: Path) -> None:
    """As if the batch had not been there, but for the schedule, which goes on."""
    spoiled = Problem(noise=False)
    _spoiled(spoiled, {15: bad})
    run = FakeRun(tmp_path / "spoiled", faults={"spike": 10.0})
    weights = spoiled.fit(run)
    assert len(run.said) == 1
    assert run.said[0].startswith("fit step 14: the loss")
    assert run.said[0].endswith("skipped, 1 in a row of at most 2")

    left_out = Problem(noise=False)
    kept = left_out.batches

    def hold(call: int, tensors: Tensors) -> None:
        if call == 14:
            left_out.trainer.position.step += 1  # the rate of the batches after it

    left_out.before = hold
    left_out.batches = lambda index: [b for i, b in enumerate(kept(index)) if (index, i) != (1, 4)]  # type: ignore[method-assign]
    run = FakeRun(tmp_path / "left out")
    assert torch.equal(_fit_with_steps(left_out, run, 30), weights)


def _fit_with_steps(problem: Problem, run: FakeRun, steps: int) -> torch.Tensor:
    """Train with the schedule of so many steps."""
    from stages.core.training import loop

    real = loop.rate_share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "rate_share", lambda schedule, step, _: real(schedule, step, steps))
        return problem.fit(run)


def test_too_many_bad_steps_lead_back_to_a_slower_run_without_their_batches(tmp_path: Path) -> None:
    problem, run = Problem(), FakeRun(tmp_path, {"steps": 4, "keep": 5})
    _spoiled(problem, {15: float("nan"), 16: float("nan")})
    seen: list[tuple[int, int, float]] = []

    def remember(call: int, tensors: Tensors, before: Callable[[int, Tensors], None] = problem.before) -> None:
        position = problem.trainer.position
        seen.append((position.round, position.batch, problem.trainer.optimizer.param_groups[0]["lr"]))
        before(call, tensors)

    problem.before = remember
    problem.fit(run)
    assert run.said[-1] == (
        "fit back to step 12, with 0.5 of the learning rate and without the bad batches; 1 of at most 2"
    )
    places = [(round_, batch) for round_, batch, _ in seen]
    # Saved after 12 steps, bad at the 15th and 16th, back to the 13th, and over the two bad ones.
    expected = [(1, batch) for batch in (0, 1, 2, 3, 4, 5, 2, 3, 6, 7, 8, 9)]
    assert places == [(0, batch) for batch in range(10)] + expected + [(2, batch) for batch in range(10)]
    assert seen[16][2] == pytest.approx(0.5 * seen[12][2])
    position: Position = problem.trainer.position
    assert position.faults.bad_batches == [[1, 4], [1, 5]]
    assert (position.faults.rollbacks, position.faults.rate, position.faults.in_a_row) == (1, 0.5, 0)


@pytest.mark.parametrize("dies_at", [16, 17, 18, 25])
def test_a_run_killed_around_its_way_back_ends_with_the_same_bits(dies_at: int, tmp_path: Path) -> None:
    """The bad batches are bad by their rows, so that they are bad again."""

    def spoilt(dies_at: int | None) -> Problem:
        problem = Problem()
        rows = [row for batch in problem.batches(1)[4:6] for row in batch]
        inputs = problem.inputs[rows]

        def before(call: int, tensors: Tensors) -> None:
            if call == dies_at:
                raise InterruptedFitError
            if problem.trainer.position.round == 1 and torch.isin(tensors["inputs"], inputs).all():
                tensors["targets"].fill_(float("nan"))

        problem.before = before
        return problem

    whole = spoilt(None)
    weights = whole.fit(FakeRun(tmp_path / "whole", {"steps": 4}))
    with pytest.raises(InterruptedFitError):
        spoilt(dies_at).fit(FakeRun(tmp_path / "broken", {"steps": 4}))
    resumed = spoilt(None)
    assert whole.trainer.position.faults.rollbacks == 1
    assert torch.equal(resumed.fit(FakeRun(tmp_path / "broken", {"steps": 4})), weights)
    assert resumed.trainer.position.faults == whole.trainer.position.faults


def test_bad_to_the_end_goes_further_back_each_time_and_stops_with_the_batch(tmp_path: Path) -> None:
    problem, run = Problem(), FakeRun(tmp_path, {"steps": 4, "keep": 9})

    def before(call: int, tensors: Tensors) -> None:
        if call > 14:
            tensors["targets"].fill_(float("nan"))

    problem.before = before
    with pytest.raises(UserError) as stopped:
        problem.fit(run)
    backs = [line.partition(",")[0] for line in run.said if " back to " in line]
    assert backs == ["fit back to step 12", "fit back to step 8"]
    path = tmp_path / "fit-fault" / "bad-batch.safetensors"
    assert str(stopped.value) == (
        "step 9: the loss is nan, after 2 ways back to a saved state and at 0.25 of the learning rate; "
        f"look at the batch in {path}, or lower the learning rate"
    )
    described = read_json(path.with_suffix(".json"))
    rows = problem.batches(0)[9]
    assert (described["round"], described["batch"], described["rows"], described["loss"]) == (0, 9, rows, "nan")
    assert torch.equal(safetensors.torch.load_file(path)["inputs"], problem.inputs[rows])
    # Run again, it goes on from its last way back, and none is left.
    again = Problem()
    again.before = lambda call, tensors: tensors["targets"].fill_(float("nan"))  # type: ignore[assignment,return-value]
    with pytest.raises(UserError, match="after 2 ways back"):
        again.fit(FakeRun(tmp_path, {"steps": 4, "keep": 9}))


def test_the_batch_is_written_by_the_first_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    tensors, faults = {"inputs": torch.ones(2)}, Faults(in_a_row=2, rollbacks=2)
    step = Step(float("nan"), 1.0)
    with pytest.raises(UserError, match="look at the batch in"):
        stop_where_it_persists("bad", step, [0], tensors, Position(faults=faults), POLICY, tmp_path / "fault")
    assert not (tmp_path / "fault").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    problem, run = Problem(), FakeRun(tmp_path)
    problem.model[0].weight.register_hook(lambda gradient: gradient * float("inf") if problem.calls == 3 else gradient)
    assert torch.isfinite(problem.fit(run)).all()
    assert run.said == ["fit step 2: the gradient norm is inf; skipped, 1 in a row of at most 2"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError(CPU_FULL), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) is full


def _needs_memory_for(problem: Problem, examples: int, error: Exception) -> list[int]:
    """Make every micro-batch of more examples run out of memory; return the sizes of all that were tried."""
    sizes: list[int] = []

    def before(call: int, tensors: Tensors) -> None:
        sizes.append(len(tensors["targets"]))
        if sizes[-1] > examples:
            torch.rand(3)  # what was drawn before the memory ran out is drawn again
            raise error

    problem.before = before
    return sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_FULL)])
def test_halved_micro_batches_come_to_the_same(error: Exception, tmp_path: Path) -> None:
    whole = Problem(noise=False).fit(FakeRun(tmp_path / "whole"))
    problem, run = Problem(noise=False), FakeRun(tmp_path / "halved")
    sizes = _needs_memory_for(problem, 2, error)
    halved = problem.fit(run)
    torch.testing.assert_close(halved, whole, rtol=0, atol=1e-5)
    assert sizes == [4] + [2] * 2 * 30
    assert run.said == ["fit step 0: out of memory; from here on in 2 parts of the same batch"]
    assert problem.trainer.position.parts == 2


def test_a_step_done_again_draws_what_it_drew_before(tmp_path: Path) -> None:
    """A run that starts in two parts, and one that finds out: the same bits, dropout and all."""
    found_out = Problem()
    _needs_memory_for(found_out, 2, RuntimeError(CPU_FULL))
    weights = found_out.fit(FakeRun(tmp_path / "found out"))
    real = Position.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Position, "__init__", lambda self, **values: real(self, **{"parts": 2, **values}))
        assert torch.equal(Problem().fit(FakeRun(tmp_path / "told")), weights)


def test_unequal_parts_weigh_by_what_the_mean_is_over(tmp_path: Path) -> None:
    """The weight of an example is its place in the mean; parts of 1 and 3 tokens must not count alike."""

    def weight(tensors: Tensors) -> float:
        return float((tensors["targets"] > 0).sum())

    def fit(problem: Problem, run: FakeRun) -> torch.Tensor:
        def loss(tensors: Tensors) -> torch.Tensor:
            problem.before(0, tensors)
            counted = tensors["targets"] > 0
            return (problem.model(tensors["inputs"]).squeeze(-1) - tensors["targets"])[counted].square().mean()

        problem.loss = loss  # type: ignore[method-assign]
        return problem.fit(run, weight=weight)

    whole, halved = Problem(noise=False), Problem(noise=False)
    for problem in (whole, halved):
        problem.targets.abs_()[::3] *= -1
    _needs_memory_for(halved, 2, MemoryError())
    torch.testing.assert_close(
        fit(halved, FakeRun(tmp_path / "b")), fit(whole, FakeRun(tmp_path / "a")), rtol=0, atol=1e-5
    )


def test_one_example_too_many_is_a_clear_line(tmp_path: Path) -> None:
    problem, run = Problem(), FakeRun(tmp_path)
    _needs_memory_for(problem, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError) as stopped:
        problem.fit(run)
    assert str(stopped.value) == (
        "step 0: one example at a time is still too large for the memory of this machine "
        "(batch: inputs [4, 3], targets [4]); take a smaller model or shorter texts"
    )
    assert run.said[-1] == "fit step 0: out of memory; from here on in 4 parts of the same batch"


def test_any_other_error_goes_up(tmp_path: Path) -> None:
    problem = Problem()
    _needs_memory_for(problem, 0, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="^shapes$"):
        problem.fit(FakeRun(tmp_path))


class Wide(nn.Module):
    """A weight whose loss needs 16 MiB an example, several times over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.weight * torch.ones(len(inputs), 2**22)).square().mean()


def _train_in_little_memory(state: Path, answers: Any) -> None:
    """Run out of real memory: the process may take 800 MiB more than it has, a batch of 16 needs over 1 GiB."""
    problem, run = Problem(noise=False), FakeRun(state)
    problem.model = Wide()  # type: ignore[assignment]
    problem.loss = lambda tensors: problem.model(tensors["inputs"])  # type: ignore[method-assign]
    problem.batches = lambda index: [list(range(16))]  # type: ignore[method-assign]
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + 800 * 2**20, -1))
    problem.fit(run, rounds=1)
    answers.put((run.said, problem.trainer.position.parts))


def test_real_memory_that_runs_out_halves_the_micro_batch(tmp_path: Path) -> None:
    answers = FORKS.Queue()
    process = FORKS.Process(target=_train_in_little_memory, args=(tmp_path, answers))
    process.start()
    said, parts = answers.get(timeout=60)
    process.join()
    assert parts in (2, 4, 8)
    assert said[0] == "fit step 0: out of memory; from here on in 2 parts of the same batch"
