"""Balance: the shares of the classes in a batch, exact, and without any state."""

from __future__ import annotations

import logging
import math
from collections import Counter
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import Balance, Plan, StateMismatch, TaskLoader, digest
from metabatch_cli.batching.balance import as_balance
from metabatch_cli.batching.sizes import Metabatch
from tests.batching.examples import KINDS, Waves, digests, first

LAW = Metabatch(1, 5, 9)
seeds = st.integers(-(2**65), 2**65)
alphas = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1)


def labels_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Classes of these sizes, their tasks anywhere in the set."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def plan(sizes: list[int], batch_size: int, *, alpha: float = 1.0, kind: Any = "fixed", **more):
    more.setdefault("classes", labels_of(sizes))
    arguments = {"n_tasks": len(more["classes"]), "law": LAW, "shuffle": True, **more}
    return Plan(batch_size=batch_size, balance=Balance(alpha, kind), **arguments)


def counts(of: Plan, step: int, classes: np.ndarray) -> np.ndarray:
    return np.bincount(classes[of.indices(step)], minlength=classes.max() + 1)


def share(sizes: list[int], alpha: float) -> list[Fraction]:
    """w_c, from its definition."""
    a, total = Fraction(repr(float(alpha))), sum(sizes)
    return [a / len(sizes) + (1 - a) * Fraction(size, total) for size in sizes]


def largest_remainders(
    sizes: list[int], alpha: float, batch_size: int
) -> tuple[list[int], list[int]]:
    """The fewest and the most tasks of each class, from the definition of the method."""
    quotas = [w * batch_size for w in share(sizes, alpha)]
    rests = [quota - math.floor(quota) for quota in quotas]
    left = batch_size - sum(map(math.floor, quotas))
    fewest, most = [], []
    for quota, rest in zip(quotas, rests, strict=True):
        before = sum(other > rest for other in rests)
        among = sum(other >= rest for other in rests)
        fewest.append(math.floor(quota) + (among <= left))
        most.append(math.floor(quota) + (before < left))
    return fewest, most


@st.composite
def balanced(draw, kinds=("fixed", "random")) -> dict[str, Any]:
    """Any legal plan with a balance, as the arguments of `plan`."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    alpha, kind = draw(alphas), draw(st.sampled_from(kinds))
    most = min(math.floor(size / w) for size, w in zip(sizes, share(sizes, alpha), strict=True))
    least = len(sizes) if alpha == 1 and kind == "fixed" else 1
    assume(most >= least)
    batch_size = draw(st.integers(least, min(most, least + 20)))
    assume(kind == "random" or all(largest_remainders(sizes, alpha, batch_size)[1]))
    return {
        "sizes": sizes,
        "batch_size": batch_size,
        "alpha": alpha,
        "kind": kind,
        "seed": draw(seeds),
        "classes": labels_of(sizes, draw(st.integers(0, 5))),
    }


# --- shares ------------------------------------------------------------------------------------


@given(balanced(["fixed"]), st.integers(0, 10**9))
def test_fixed_counts_are_rounded_by_largest_remainders(arguments, step):
    of, size = plan(**arguments), arguments["batch_size"]
    fewest, most = largest_remainders(arguments["sizes"], arguments["alpha"], size)
    for later in range(5):
        found = counts(of, step + later, arguments["classes"])
        assert found.sum() == size
        assert (np.array(fewest) <= found).all()
        assert (found <= np.array(most)).all()


@given(balanced(), st.integers(0, 10**9))
def test_no_task_is_twice_in_a_batch(arguments, step):
    of = plan(**arguments)
    for later in range(5):
        indices = of.indices(step + later)
        assert indices.dtype == np.int64
        assert len(indices) == len(set(indices.tolist())) == arguments["batch_size"]
        assert indices.min() >= 0
        assert indices.max() < of.n_tasks


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [[60, 30, 10], [50, 50, 50, 50, 50], [400, 40, 60]])
def test_over_many_steps_every_class_has_its_share_of_random_draws(alpha, sizes):
    steps, size = 2000, 7
    of, classes = plan(sizes, size, alpha=alpha, kind="random"), labels_of(sizes)
    total = sum(counts(of, step, classes) for step in range(steps))
    for count, w in zip(total, map(float, share(sizes, alpha)), strict=True):
        spread = math.sqrt(steps * size * w * (1 - w))
        assert abs(count - steps * size * w) < 5 * spread


@pytest.mark.parametrize("kind", ["fixed", "random"])
@pytest.mark.parametrize("alpha", [0.5, 0.7])
def test_all_tasks_of_a_class_come_equally_often(kind, alpha):
    sizes, steps, size = [6, 20, 30], 4000, 5
    of = plan(sizes, size, alpha=alpha, kind=kind)
    found = np.bincount(np.concatenate([of.indices(step) for step in range(steps)]), minlength=56)
    for c in range(3):
        mine = found[labels_of(sizes) == c]
        # draws without replacement vary less than these
        assert abs(mine - mine.mean()).max() < 5 * math.sqrt(mine.mean())


def test_equal_remainders_favour_no_class():
    sizes = [30] * 5
    of, classes = plan(sizes, 7), labels_of([30] * 5)
    more = Counter()
    for step in range(2000):
        found = counts(of, step, classes)
        assert sorted(found.tolist()) == [1, 1, 1, 2, 2]
        more.update(np.flatnonzero(found == 2).tolist())
    assert set(more) == set(range(5))
    assert all(abs(count - 800) < 5 * math.sqrt(800 * 0.6) for count in more.values())


def test_every_pair_of_classes_meets_in_a_batch():
    sizes = [30] * 6
    of, classes = plan(sizes, 2, alpha=0.0), labels_of(sizes)
    pairs = Counter(tuple(np.flatnonzero(counts(of, step, classes))) for step in range(3000))
    assert len(pairs) == 15
    assert min(pairs.values()) > 120  # of 200


def test_many_classes_are_as_exact_as_few():
    sizes = [3] * 500 + [1] * 500
    of, classes = plan(sizes, 20, alpha=0.0, kind="random"), labels_of(sizes)
    found = sum(counts(of, step, classes) for step in range(3000))
    expected = np.array([90.0] * 500 + [30.0] * 500)
    assert (abs(found - expected) < 6 * np.sqrt(expected)).all()
    assert abs(found[:500].sum() - 45_000) < 1000


@given(st.integers(1, 6), st.integers(1, 5), seeds)
def test_whole_shares_give_the_same_counts_in_every_batch(n_classes, each, seed):
    sizes = [each + extra for extra in range(n_classes)]
    of = plan(sizes, n_classes * each, seed=seed)
    for step in range(4):
        assert (counts(of, step, labels_of(sizes)) == each).all()


def test_alpha_is_the_number_that_was_typed():
    # 0.1 is no sum of powers of two: read as one, nothing would be left over to tie
    sizes = [75, 25]
    assert share(sizes, 0.1) == [Fraction(29, 40), Fraction(11, 40)]
    of, classes = plan(sizes, 20, alpha=0.1), labels_of(sizes)
    found = {tuple(counts(of, step, classes)) for step in range(200)}
    assert found == {(14, 6), (15, 5)}


def test_random_counts_vary_as_independent_draws_do():
    sizes, steps = [500, 500], 3000
    of, classes = plan(sizes, 8, kind="random"), labels_of(sizes)
    found = np.bincount([counts(of, step, classes)[0] for step in range(steps)], minlength=9)
    expected = np.array([math.comb(8, k) / 2**8 * steps for k in range(9)])
    assert (abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_a_random_class_without_tasks_left_gives_its_place_to_the_others():
    sizes = [1, 40, 80]
    of, classes = plan(sizes, 3, kind="random"), labels_of(sizes)
    found = np.array([counts(of, step, classes) for step in range(3000)])
    assert found[:, 0].max() == 1
    assert found.sum(1).tolist() == [3] * 3000
    # drawn at least once in three draws, and the rest is shared equally
    assert abs(found[:, 0].mean() - (1 - (2 / 3) ** 3)) < 0.05
    assert abs(found[:, 1].mean() - found[:, 2].mean()) < 0.1


def test_a_random_batch_can_be_the_whole_set():
    of = plan([2, 2], 4, kind="random")
    assert all(sorted(of.indices(step)) == [0, 1, 2, 3] for step in range(50))


def test_classes_are_mixed_over_the_places_of_a_batch():
    sizes = [40, 40]
    of, classes = plan(sizes, 4), labels_of(sizes)
    firsts = np.array([classes[of.indices(step)] for step in range(2000)])
    assert (abs(firsts.mean(0) - 0.5) < 0.06).all()
    assert len({tuple(row) for row in firsts}) == 6  # all orders of two and two


# --- one global batch --------------------------------------------------------------------------


@given(balanced(), st.lists(st.integers(0, 200), min_size=1, max_size=6))
@settings(max_examples=50)
def test_any_step_is_drawn_without_the_ones_before_it(arguments, steps):
    walking = plan(**arguments)
    expected = [walking.indices(step).tolist() for step in range(201)]
    jumping = plan(**arguments)
    for step in steps:
        assert plan(**arguments).indices(step).tolist() == expected[step]
        assert jumping.indices(step).tolist() == expected[step]


@given(balanced(), st.integers(0, 100))
@settings(max_examples=40)
def test_the_ranks_parts_joined_are_the_batch_for_every_legal_world_size(arguments, step):
    size = arguments["batch_size"]
    alone = plan(**arguments).indices(step).tolist()
    for shards in [k for k in range(1, size + 1) if size % k == 0]:
        for world_size in [k for k in range(1, shards + 1) if shards % k == 0]:
            parts = [
                plan(**arguments, shards=shards, world_size=world_size, rank=rank).spec(step)
                for rank in range(world_size)
            ]
            assert list(chain.from_iterable(part.indices.tolist() for part in parts)) == alone


def test_seeds_and_splits_have_draws_of_their_own():
    rows = [
        tuple(chain.from_iterable(plan([40] * 3, 6, **more).indices(s).tolist() for s in range(9)))
        for more in ({}, {"seed": 1}, {"seed": 2**32}, {"split": "val"})
    ]
    assert len(set(rows)) == 4


def test_the_balanced_batches_of_a_seed_never_change():
    # these pin the law: whoever changes them must raise STREAM_VERSION
    classes = np.arange(40) % 3
    drawn = {
        (alpha, kind): plan([], 5, alpha=alpha, kind=kind, seed=7, classes=classes)
        for alpha, kind in ((1.0, "fixed"), (0.3, "fixed"), (0.5, "random"))
    }
    assert {key: [of.indices(s).tolist() for s in (0, 10**9)] for key, of in drawn.items()} == {
        (1.0, "fixed"): [[13, 31, 32, 6, 3], [34, 36, 14, 31, 21]],
        (0.3, "fixed"): [[13, 31, 32, 6, 3], [36, 35, 17, 28, 21]],
        (0.5, "random"): [[12, 31, 32, 11, 3], [35, 36, 17, 30, 21]],
    }


@given(balanced(), st.integers(1, 9))
def test_an_epoch_is_n_batches_or_as_many_full_batches_as_a_pass_would_have(arguments, n_batches):
    assert plan(**arguments, n_batches=n_batches).epoch_length == n_batches
    full = sum(arguments["sizes"]) // arguments["batch_size"]
    for drop_last in (False, True):
        assert plan(**arguments, drop_last=drop_last).epoch_length == full >= 1


# --- what two public samplers do wrong ----------------------------------------------------------


def test_five_classes_in_batches_of_three_are_no_batches_of_four():
    with pytest.raises(ValueError, match=r"batch_size=3 .* classes, 5"):
        plan([30] * 5, 3)
    of, classes = plan([30] * 5, 3, kind="random"), labels_of([30] * 5)
    assert all(counts(of, step, classes).sum() == 3 for step in range(100))


def test_a_batch_smaller_than_the_classes_shows_them_all_in_time():
    of, classes = plan([30] * 5, 2, alpha=0.0), labels_of([30] * 5)
    assert (sum(counts(of, step, classes) for step in range(100)) > 20).all()


def test_small_classes_are_not_rounded_away():
    sizes = [90, 5, 5]
    of, classes = plan(sizes, 10, alpha=0.0), labels_of(sizes)
    found = {tuple(counts(of, step, classes)) for step in range(100)}
    assert found == {(9, 1, 0), (9, 0, 1)}


def test_a_class_that_would_be_rounded_away_for_ever_is_named():
    said = r"no place for 1 of 3 classes, the first of them class 2 with 0\.4 tasks a batch"
    with pytest.raises(ValueError, match=said):
        plan([90, 6, 4], 10, alpha=0.0)
    of, classes = plan([90, 6, 4], 10, alpha=0.0, kind="random"), labels_of([90, 6, 4])
    assert sum(counts(of, step, classes)[2] for step in range(200)) > 30


@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_an_empty_class_is_named_before_anything_is_drawn(kind):
    with pytest.raises(ValueError, match="class 1 has no tasks"):
        plan([], 2, kind=kind, classes=np.array([0, 0, 2, 2]))


@pytest.mark.parametrize("kind_of", [list, tuple, np.array, torch.tensor])
def test_classes_are_read_from_anything_and_left_as_they_are(kind_of):
    classes = kind_of([1, 0, 0, 1, 2, 2, 2])
    before = str(classes)
    of = plan([], 3, classes=classes)
    found = [of.indices(step).tolist() for step in range(20)]
    assert str(classes) == before
    expected = plan([], 3, classes=np.array([1, 0, 0, 1, 2, 2, 2]))
    assert found == [expected.indices(step).tolist() for step in range(20)]


def test_unsigned_and_short_integers_are_classes_too():
    for dtype in (np.uint8, np.int16, np.uint64):
        classes = np.array([0, 1, 0, 1], dtype=dtype)
        assert sorted(classes[plan([], 2, classes=classes).indices(0)].tolist()) == [0, 1]


def test_logging_is_left_alone():
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    plan([5, 5], 4).indices(0)
    assert (root.level, list(root.handlers)) == before


def test_n_batches_may_be_a_number_of_numpys():
    taskset = Labelled([10, 10])
    assert len(TaskLoader(taskset, 4, True, np.int64(3), balance={})) == 3


def test_a_class_is_never_asked_for_more_tasks_than_it_has():
    with pytest.raises(ValueError, match="class 1, which has 2"):
        plan([50, 2], 6)


def test_no_task_is_left_out_for_ever():
    sizes = [7, 5]
    of = plan(sizes, 4)
    seen = set(chain.from_iterable(of.indices(step).tolist() for step in range(60)))
    assert seen == set(range(12))


def test_no_two_epochs_have_the_same_order():
    of = plan([20, 20], 4)
    epochs = {
        tuple(chain.from_iterable(of.indices(s).tolist() for s in range(10 * e, 10 * e + 10)))
        for e in range(5)
    }
    assert len(epochs) == 5


def test_an_epoch_that_was_left_early_costs_the_next_one_nothing():
    loader = TaskLoader(Labelled([12, 9]), 5, shuffle=True, balance={"alpha": 1})
    assert len(loader) == 4
    list(islice(loader, 1))
    assert digests(loader) == first(loader, 8)[4:]


def test_two_readings_of_one_plan_do_not_disturb_each_other():
    of = plan([20, 20], 4)
    expected = [of.indices(step).tolist() for step in range(20)]
    one, other = iter(range(20)), iter(range(20))
    for step in one:
        assert of.indices(step).tolist() == expected[step]
        later = next(other)
        assert of.indices(later).tolist() == expected[later]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf"), "1", True, None])
def test_an_alpha_that_cannot_be_is_named_with_its_bounds(alpha):
    with pytest.raises(ValueError) as error:
        Balance(alpha=alpha)
    assert str(error.value).startswith(f"balance.alpha={alpha!r} must be")
    assert "0" in str(error.value)


def test_an_unknown_kind_or_field_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"balance\.kind='fixd': .*did you mean 'fixed'\?"):
        Balance(kind="fixd")
    with pytest.raises(ValueError, match=r"balance\.alpah: .*did you mean 'alpha'\?"):
        as_balance({"alpah": 1})
    with pytest.raises(TypeError, match="balance='fixed' must be a mapping"):
        as_balance("fixed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n_tasks": None, "classes": [0, 1]}, ["balance", "finite", "no end"]),
        ({"classes": None}, ["classes", "int64 [40]"]),
        ({"classes": [0, 1]}, ["classes of shape [2]", "[40]"]),
        ({"classes": np.zeros((40, 1), int)}, ["classes of shape [40, 1]", "[40]"]),
        ({"classes": np.full(40, 0.5)}, ["float64", "integers"]),
        ({"classes": ["a"] * 40}, ["integers"]),
        ({"classes": [-1] + [0] * 39}, ["-1 is negative"]),
        ({"classes": [0] * 39 + [7]}, ["class 1 has no tasks", "7"]),
        ({"shuffle": False}, ["shuffle=False", "shuffle=True"]),
        (
            {"batch_size": 3, "classes": np.arange(40) % 4},
            ["batch_size=3", "classes, 4", "batch_size=4", "balance.kind=random"],
        ),
        (
            {"batch_size": 8, "classes": [0] * 37 + [1] * 3},
            ["batch_size=8", "up to 4", "class 1, which has 3", "at most batch_size=6"],
        ),
        (
            {
                "batch_size": 8,
                "classes": [0] * 37 + [1] * 3,
                "balance": Balance(kind="random"),
            },
            ["batch_size=8", "4 on average", "class 1, which has 3", "at most batch_size=6"],
        ),
        ({"batch_size": 41, "n_batches": 2}, ["batch_size=41", "40 tasks"]),
    ],
)
def test_what_cannot_be_balanced_says_why(arguments, said):
    given = {"n_tasks": 40, "law": LAW, "batch_size": 4, "shuffle": True, "balance": Balance()}
    with pytest.raises(ValueError) as error:
        Plan(**given | {"classes": np.arange(40) % 4} | arguments)
    for words in said:
        assert words in str(error.value)


def test_the_largest_batch_that_is_offered_is_possible():
    classes = np.array([0] * 37 + [1] * 3)
    plan([], 6, classes=classes)
    with pytest.raises(ValueError, match="at most batch_size=6"):
        plan([], 7, classes=classes)


# --- the loader --------------------------------------------------------------------------------


class Labelled(Waves):
    """Waves with a class each."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(n_tasks=sum(sizes))
        self.classes = torch.from_numpy(labels_of(sizes))


def test_a_loader_reads_balanced_batches_with_any_number_of_workers():
    taskset = Labelled([12, 9, 30])
    arguments = {"batch_size": 6, "shuffle": True, "balance": Balance(1, "fixed")}
    expected = first(TaskLoader(taskset, **arguments), 10)
    with TaskLoader(taskset, **arguments, workers=2) as loader:
        read = [batch for batch, _ in zip(loader.stream(), range(10), strict=False)]
    assert digests(read) == expected
    for batch in read:
        assert taskset.classes[batch.aux["index"]].bincount().tolist() == [2, 2, 2]


def test_ranks_share_one_balanced_batch():
    taskset = Labelled([12, 9, 30])
    arguments = {"batch_size": 8, "shuffle": True, "balance": {"alpha": 0.5}, "shards": 4}
    alone = TaskLoader(taskset, **arguments)
    for world_size in (2, 4):
        ranks = [TaskLoader(taskset, **arguments, rank=r, world_size=world_size) for r in range(2)]
        joined = torch.cat([rank.batch_at(5).context_x for rank in ranks])
        assert torch.equal(joined, alone.batch_at(5).context_x[: len(joined)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_set_without_classes_says_what_is_missing(kind):
    with pytest.raises(ValueError, match="let the task set have `classes`"):
        TaskLoader(kind(), 4, shuffle=True, balance={})


def test_a_resumed_reading_has_the_same_balance():
    taskset = Labelled([12, 9])

    def loader(**balance: Any) -> TaskLoader:
        return TaskLoader(taskset, 4, shuffle=True, balance=balance or None)

    states = [
        loader(**balance).state_dict()
        for balance in (
            {},
            {"alpha": 1},
            {"alpha": 0.5},
            {"alpha": 1, "kind": "random"},
        )
    ]
    assert len({state["balance"] for state in states}) == 4
    assert loader(alpha=1.0, kind="fixed").state_dict() == states[1]
    with pytest.raises(StateMismatch, match="balance is"):
        loader(alpha=0.5).load_state_dict(states[1])
    resumed, straight = loader(alpha=1), loader(alpha=1)
    next(iter(straight))
    resumed.load_state_dict(straight.state_dict())
    assert digest(next(iter(resumed))) == digest(straight.batch_at(1))


def test_other_classes_are_another_balance():
    one, other = Labelled([12, 9]), Labelled([12, 9])
    other.classes = 1 - other.classes.clone()
    with pytest.raises(ValueError, match="class"):
        TaskLoader(Labelled([21, 1]), 4, shuffle=True, balance={})
    states = [TaskLoader(t, 4, shuffle=True, balance={}).state_dict() for t in (one, other)]
    assert states[0]["balance"] != states[1]["balance"]
