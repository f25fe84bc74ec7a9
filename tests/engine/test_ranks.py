"""Several processes: what one alone would compute, and whose fault it is where they fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine import ranks, shared_sums
from metabatch_cli.engine.average import Averaging
from metabatch_cli.engine.ranks import RankLost, Ranks
from metabatch_cli.engine.run import train
from metabatch_cli.engine.shared_sums import SharedSums
from metabatch_cli.engine.stop import Stopped
from tests.engine.examples import TINY, Watcher, asked, learner, new_directory, rows, state

ROOT = Path(__file__).parents[2]
EXACT = ("trainer.precision=64", "trainer.log_every=1", "loader.shards=4", "loader.workers=0")
FEW = ("trainer.max_steps=6", "trainer.eval_every=3", "trainer.eval_tasks=20")
SINE = (*TINY, *EXACT, *FEW, "scheduler=none")
EPISODES = (
    *("+experiment=protonet_omniglot", "+debug=short", *EXACT, *FEW, "loader.batch_size=4"),
    *("taskset.ways=3", "taskset.queries=2", "model.width=16", "trainer.eval_tasks=8"),
    *("loader.device=cpu", "trainer.threads=1", "evaluation.figures=false", "evaluation.tasks=8"),
)
MAML = (
    *("+experiment=maml_sine", "+debug=short", *EXACT, *FEW, "loader.batch_size=4"),
    *("loader.device=cpu", "trainer.threads=1", "evaluation.figures=false", "evaluation.tasks=20"),
)
GROUPS = ("tasks of Groups", *SINE)
REPTILE = (
    *("tasks of Groups", *(word.replace("maml_sine", "reptile_sine") for word in MAML)),
    *("learner.inner_batch=null", "learner.inner_optimizer=adam"),
)
NOISY = (*SINE, *learner("Noisy"))


# --- averages, with two ranks as two threads ---------------------------------------------------


class OneOfTwo(Ranks):
    """A rank whose other one is a thread."""

    size = 2
    barrier = Barrier(2)
    lent: tuple[list[Tensor], ...] = ([], [])

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def sum(self, numbers: Tensor) -> None:
        self.lent[self.rank][:] = [numbers.clone()]
        self.barrier.wait()
        numbers.copy_(self.lent[0][0] + self.lent[1][0])
        self.barrier.wait()


class Weighted(nn.Module):
    """A weight, one that only some tasks use, one that none does; a statistic, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64).t())
        self.rare = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("constant", torch.tensor(0.1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tasks: Tensor) -> Tensor:
        self.steps += 1
        self.running = 0.9 * self.running + 0.1 * tasks.mean(dim=0).float()
        loss = (self.weight @ tasks[:, :2].t()).square().mean() * 3
        if (tasks[:, 2] > 1).any():
            loss = loss + self.rare * (tasks[:, 2] > 1).double().mean()
        return loss


def averaged(
    tasks: Sequence[Sequence[Tensor]], make: Callable[[], nn.Module] = Weighted
) -> list[tuple[nn.Module, Tensor]]:
    """Each rank's module and loss after a step on its own tasks."""
    found: list = [None, None]

    def step(rank: int) -> None:
        torch.manual_seed(0)
        module = make()
        average = Averaging(module, OneOfTwo(rank))
        average.begin()
        loss = module(tasks[rank])
        loss.backward()
        found[rank] = module, average(loss.detach(), torch.tensor(len(tasks[rank])))

    threads = [Thread(target=step, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_ranks_of_unequal_parts_have_the_mean_over_all_tasks(cut):
    tasks = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tasks[0, 2] = 2.0  # of the first rank's tasks one uses what the second one's do not
    alone = Weighted()
    loss = alone(tasks)
    loss.backward()
    for module, of_all in averaged([tasks[:cut], tasks[cut:]]):
        torch.testing.assert_close(of_all, loss.detach())
        torch.testing.assert_close(module.weight.grad, alone.weight.grad)
        torch.testing.assert_close(module.rare.grad, alone.rare.grad)
        assert module.weight.grad.stride() == module.weight.stride()
        assert module.unused.grad is None
        torch.testing.assert_close(module.running, alone.running)
        assert torch.equal(module.constant, alone.constant)
        assert module.steps == 1


@pytest.mark.parametrize("counts", [(0, 3), (0, 0), (2, 3)])
def test_ranks_agree_on_which_weights_have_gradients_also_if_they_count_nothing(counts):
    found: list = [None, None]

    def step(rank: int) -> None:
        module = Weighted()
        average = Averaging(module, OneOfTwo(rank))
        average.begin()
        used = module.weight.sum() + (module.rare if rank == 0 else 0)
        used.backward()
        average(used.detach(), torch.tensor(counts[rank]))
        found[rank] = module

    threads = [Thread(target=step, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for module in found:
        assert module.rare.grad == counts[0] / max(sum(counts), 1)
        assert module.unused.grad is None


class Normalising(nn.Module):
    """Batch normalisation of tasks that have points, and of those that have more than three."""

    def __init__(self) -> None:
        super().__init__()
        self.some = nn.BatchNorm1d(2, dtype=torch.float64)
        self.more = nn.BatchNorm1d(2, momentum=0.3, dtype=torch.float64)
        for layer in (self.some, self.more):
            layer.running_mean.fill_(2.0)
            layer.num_batches_tracked.fill_(2**24 + 1)  # more than 32 bits of a float can count

    def forward(self, tasks: Sequence[Tensor]) -> Tensor:
        loss = self.some.weight.sum() + self.more.weight.sum()
        for task in tasks:
            if len(task):
                loss = loss + self.some(task).square().mean()
            if len(task) > 3:
                loss = loss + self.more(3 * task).square().mean()
        return loss


@pytest.mark.parametrize(
    "points",
    [((5, 4), (6, 4)), ((5, 3), (4, 0)), ((0, 4), (5, 3)), ((3, 2), (4, 7)), ((5, 6, 4), (0,))],
    ids=str,
)
def test_running_averages_follow_the_tasks_that_each_rank_has_seen(points):
    draws = torch.Generator().manual_seed(3)
    tasks = [
        [torch.rand(count, 2, dtype=torch.float64, generator=draws) for count in of_rank]
        for of_rank in points
    ]
    alone = Normalising()
    alone(tasks[0] + tasks[1])
    first, second = (dict(module.named_buffers()) for module, _ in averaged(tasks, Normalising))
    for name, expected in alone.named_buffers():
        torch.testing.assert_close(first[name], expected, rtol=1e-12, atol=0)
        assert torch.equal(first[name], second[name]), name


# --- whole trainings, with a second process ----------------------------------------------------


@contextmanager
def as_rank_zero(*trainings: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """This process is rank zero of two; another one makes the same trainings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    second = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.second_rank", json.dumps(trainings)],
        cwd=ROOT,
        env={**os.environ, **place, "RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**place, "RANK": "0"}.items():
            patch.setenv(name, value)
        try:
            yield second
        finally:
            second.kill()


def together(*trainings: tuple[str, ...]) -> list[Path]:
    """The directories of trainings over two processes."""
    directories = [new_directory() for _ in trainings]
    with as_rank_zero(*trainings) as second:
        for overrides, directory in zip(trainings, directories, strict=True):
            train(asked(*overrides), directory, reporter=Watcher())
        said, _ = second.communicate(timeout=60)
        assert said == ""
    assert not (ROOT / "nobody writes here").exists()
    return directories


def assert_the_same(ours: Path, others: Path, rtol: float = 1e-9) -> None:
    """Rows, results and weights of two runs, to rounding."""
    assert len(rows(ours)) == len(rows(others))
    for own, other in zip(rows(ours), rows(others), strict=True):
        assert own.keys() == other.keys()
        for name in own.keys() - {"seconds"}:
            expected = other[name] if other[name] is None else pytest.approx(other[name], rel=rtol)
            assert own[name] == expected, (name, own["step"])
    results = [json.loads((run / "result.json").read_text()) for run in (ours, others)]
    assert results[0]["digests"] == results[1]["digests"]
    for name, entry in results[0]["metrics"].items():
        assert entry["mean"] == pytest.approx(results[1]["metrics"][name]["mean"], rel=rtol)
    torch.testing.assert_close(
        state(ours)["learner"], state(others)["learner"], rtol=rtol, atol=1e-9
    )


def alone(*overrides: str) -> Path:
    directory = new_directory()
    train(asked(*overrides), directory, reporter=Watcher())
    return directory


ACCUMULATED = (*SINE, "trainer.accumulate=2", "trainer.clip_norm=0.1")


@pytest.mark.parametrize(
    "trainings",
    [[MAML, GROUPS, ACCUMULATED], pytest.param([SINE, REPTILE], marks=pytest.mark.slow)],
    ids=["maml, groups, accumulated", "sine, reptile"],
)
def test_two_processes_learn_what_one_does(trainings):
    for directory, overrides in zip(together(*trainings), trainings, strict=True):
        assert_the_same(directory, alone(*overrides))


@pytest.mark.parametrize("can", ["all", "one", "none"])
def test_ranks_of_one_machine_share_memory_where_they_can(monkeypatch, can):
    shares = can == "all" and shared_sums._stores_are_seen_in_order()
    if can == "none":
        monkeypatch.setattr(shared_sums, "_stores_are_seen_in_order", lambda: False)
    elif can == "one":
        monkeypatch.setattr(shared_sums, "_machine", lambda: "where nobody else is")
    used = []
    for name in ("sum", "mean", "largest"):
        plain = getattr(SharedSums, name)
        monkeypatch.setattr(
            SharedSums, name, lambda *given, n=name, f=plain: (used.append(n), f(*given))[1]
        )
    (directory,) = together(SINE)
    assert set(used) == ({"mean", "largest"} if shares else set())
    assert_the_same(directory, alone(*SINE))


def test_all_begin_with_the_weights_of_rank_zero(monkeypatch):
    begun = (*SINE, f"trainer.init_from={alone(*SINE, 'seed=5')}")
    directory = new_directory()
    monkeypatch.setenv("METABATCH_TEST_BLIND", "1")  # the other rank sees no checkpoint at all
    with as_rank_zero(begun) as second:
        train(asked(*begun), directory, reporter=Watcher())
        assert second.communicate(timeout=60)[0] == ""
    assert_the_same(directory, alone(*begun))


@pytest.mark.parametrize("other", [False, True])
def test_ranks_of_which_some_would_round_otherwise_are_told_of(monkeypatch, other):
    if other:
        monkeypatch.setenv("METABATCH_TEST_OTHER_MKL", "1")
    (directory,) = together(SINE)
    said = (directory / "train.log").read_text()
    assert ("MKL uses AVX-512 in some of the processes only" in said) == other


def test_a_group_of_ones_own_is_left_alone(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="process group of its own"):
            alone(*SINE, "trainer.processes=2")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("metabatch_data")
@pytest.mark.parametrize("overrides", [SINE, EPISODES, MAML], ids=["cnp", "protonet", "maml"])
def test_two_processes_learn_what_one_does_over_200_steps(overrides):
    long = (*overrides, "trainer.max_steps=200", "trainer.eval_every=100")
    (directory,) = together(long)
    assert_the_same(directory, alone(*long), rtol=1e-6)


def test_a_training_goes_on_with_another_number_of_processes():
    half, whole = (*SINE, "trainer.max_steps=3"), SINE
    directories = [new_directory() for _ in range(2)]
    train(asked(*half), directories[0], reporter=Watcher())
    with as_rank_zero(half, whole) as second:
        train(asked(*half), directories[1], reporter=Watcher())
        train(asked(*whole), directories[0], reporter=Watcher())
        assert second.communicate(timeout=60)[0] == ""
    train(asked(*whole), directories[1], reporter=Watcher())
    undisturbed = alone(*whole)
    for directory in directories:
        assert_the_same(directory, undisturbed)


@pytest.mark.slow
def test_what_ranks_draw_is_their_own_and_goes_on_after_a_resume():
    half = (*NOISY, "trainer.max_steps=3")
    directories = [new_directory() for _ in range(2)]
    with as_rank_zero(NOISY, half, NOISY) as second:
        train(asked(*NOISY), directories[0], reporter=Watcher())
        train(asked(*half), directories[1], reporter=Watcher())
        train(asked(*NOISY), directories[1], reporter=Watcher())
        assert second.communicate(timeout=60)[0] == ""
    found = [state(directory) for directory in directories]
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in directories]
    assert losses[0] == losses[1]
    for name, weight in found[0]["learner"].items():
        assert torch.equal(weight, found[1]["learner"][name]), name
    (other,) = found[0]["random_of_others"]
    assert not torch.equal(found[0]["random"]["torch"], other["torch"])


# --- mistakes and failures ---------------------------------------------------------------------


def test_what_cannot_be_is_said_by_rank_zero_alone():
    with as_rank_zero(SINE) as second:
        with pytest.raises(UserError, match=r"model\.width"):
            train(asked(*SINE, "model.width=0"), new_directory(), reporter=Watcher())
        assert second.communicate(timeout=60)[0] == "SystemExit 1\n"


def test_ranks_that_were_asked_for_different_things_say_so():
    with as_rank_zero((*SINE, "seed=1")) as second:
        with pytest.raises(RankLost, match=r"rank 1 of 2 .*\n  seed: 1 here, 0 of rank 0"):
            train(asked(*SINE), new_directory(), reporter=Watcher())
        assert "started with another configuration" in second.communicate(timeout=60)[0]


def test_a_rank_that_fails_has_its_own_words_in_the_result():
    failing = (*SINE, *learner("FailingSecond", fail_at=2))
    directory = new_directory()
    with as_rank_zero(failing) as second:
        with pytest.raises(RankLost, match=r"rank 1 of 2 \(process \d+ on .*no step 2"):
            train(asked(*failing), directory, reporter=Watcher())
        second.communicate(timeout=60)
    found = json.loads((directory / "result.json").read_text())
    assert found["status"] == "failed"
    assert "no step 2" in found["error"]
    assert 'raise ArithmeticError(f"no step' in (directory / "train.log").read_text()


class StopAtFirstRow:
    def log(self, row: dict) -> None:
        raise Stopped("enough")

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def test_whoever_stops_rank_zero_stops_all():
    directory = new_directory()
    with as_rank_zero(SINE) as second:
        with pytest.raises(Stopped, match="enough"):
            train(asked(*SINE), directory, reporter=Watcher(), loggers=[StopAtFirstRow()])
        assert second.communicate(timeout=60)[0] == "SystemExit 1\n"
    assert json.loads((directory / "result.json").read_text())["status"] == "interrupted"


@pytest.mark.slow  # as is told of in tests/cli/test_together.py, where a rank is a child
def test_a_rank_that_is_killed_ends_the_training_and_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "_SILENCE", 1.5)
    with as_rank_zero((*SINE, "trainer.max_steps=100000")) as second:

        def kill(step: int) -> None:
            if step == 5:
                second.kill()

        with pytest.raises(RankLost, match=rf"rank 1 of 2 \(process {second.pid} on .* is gone"):
            train(
                asked(*SINE, "trainer.max_steps=100000"),
                new_directory(),
                reporter=Watcher(kill),
            )


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_cannot_share_a_batch_are_refused(processes):
    with pytest.raises(UserError, match=f"processes={processes}.*loader.shards=1 parts"):
        alone(*TINY, f"trainer.processes={processes}")
