"""Mixtures: every batch, or every task of a batch, from a component as often as its weight says."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabatch_cli.batching import Task, TaskLoader, TaskSet, TaskSpec, digest
from metabatch_cli.batching.plan import Plan
from metabatch_cli.config.build import build_learner, build_loader, build_taskset
from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.errors import UserError
from tasksets.functions import Functions, Sawtooth, Sine
from tasksets.images import ImageCompletion, LabelledImages
from tasksets.mixture import Mixture
from tests.composed import composed

SIZES = {"min_pts": 1, "max_ctx_pts": 5, "max_tgt_pts": 9}


def sine(n_tasks: int | None = None, **more: Any) -> Functions:
    return Functions(Sine(), **{**SIZES, **more}, n_tasks=n_tasks)


def sawtooth(n_tasks: int | None = None, **more: Any) -> Functions:
    return Functions(Sawtooth(), **{**SIZES, **more}, n_tasks=n_tasks)


def mixture(mixed: str = "tasks", n_tasks: tuple = (None, None), **more: Any) -> Mixture:
    return Mixture({"sine": sine(n_tasks[0]), "saw": sawtooth(n_tasks[1])}, mixed=mixed, **more)


def loader(taskset: TaskSet, batch_size: int = 8, **more: Any) -> TaskLoader:
    return TaskLoader(taskset, batch_size, **{"shuffle": True, **more})


def components(taskset: TaskSet, steps: int, **more: Any) -> list[list[int]]:
    reading = loader(taskset, **more)
    return [reading.batch_at(step).aux["component"].tolist() for step in range(steps)]


class Numbers(TaskSet):
    """Whole batches whose points are the task's index, and a field of their own kind."""

    def __init__(self, n_tasks: int | None, base: int = 0, **more: Any) -> None:
        super().__init__(**{**SIZES, **more})
        self.n_tasks, self.base = n_tasks, base

    def __len__(self) -> int:
        if self.n_tasks is None:
            raise TypeError("endless")
        return self.n_tasks

    def __gettasks__(self, indices, n_context, n_target, generator):
        values = (self.base + indices).float()[:, None, None]
        context, target = (values.expand(-1, n, 1).clone() for n in (n_context, n_target))
        return Task(context, context, target, target, {"index": indices.clone()})


class Single(Numbers):
    """The same, one task at a time, with draws from the global generators."""

    __gettasks__ = TaskSet.__gettasks__

    def __gettask__(self, index, n_context, n_target):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        value = torch.full((n_context + n_target, 1), float(self.base + index))
        aux = {"index": index, "noise": noise}
        return Task(value[:n_context], value[:n_context], value[n_context:], value[n_context:], aux)


both = pytest.mark.parametrize("mixed", ["batch", "tasks"])
counts = pytest.mark.parametrize("n_tasks", [(None, None), (30, 20), (None, 20)])


# --- how often ---------------------------------------------------------------------------------


@counts
@pytest.mark.parametrize(
    ("weights", "share"),
    [(None, 0.5), ([3, 1], 0.25), ({"saw": 0.1, "sine": 0.9}, 0.1), ([1, 0], 0.0)],
)
@both
def test_every_component_comes_as_often_as_its_weight_says(mixed, n_tasks, weights, share):
    taskset = mixture(mixed, n_tasks, weights=weights)
    more = {"n_batches": 400} if n_tasks[0] else {}
    found = np.mean(components(taskset, 400, **more))
    spread = 0.5 / (400 * (1 if mixed == "batch" else 8)) ** 0.5
    assert abs(found - share) < 5 * spread


@counts
def test_a_batch_of_one_component_is_of_one_component(n_tasks):
    batches = components(mixture("batch", n_tasks), 60)
    assert all(len(set(batch)) == 1 for batch in batches)
    assert {batch[0] for batch in batches} == {0, 1}


@counts
def test_a_batch_of_mixed_tasks_is_mixed(n_tasks):
    batches = components(mixture("tasks", n_tasks), 20, batch_size=20)
    assert all(set(batch) == {0, 1} for batch in batches)


def test_without_shuffling_tasks_are_mixed_too():
    batches = components(mixture("tasks", (60, 60)), 15, shuffle=False)
    assert all(sum(batch) == 4 for batch in batches)


def test_the_component_of_a_step_and_its_sizes_are_drawn_apart():
    plan = loader(mixture("batch")).plan
    drawn = Counter((plan.sizes(s)["component"], plan.sizes(s)["n_context"]) for s in range(2000))
    assert len(drawn) == 10
    assert min(drawn.values()) > 140


def test_every_component_keeps_its_own_sizes_unless_the_mixture_has_some():
    sets = {
        "small": sine(max_ctx_pts=2, max_tgt_pts=3),
        "large": sawtooth(min_pts=20, max_ctx_pts=22, max_tgt_pts=30),
    }
    reading = loader(Mixture(sets))
    for step in range(40):
        batch = reading.batch_at(step)
        large = bool(batch.aux["component"][0])
        assert (batch.context_x.shape[1] >= 20) == large
    for mixed in ("batch", "tasks"):
        reading = loader(Mixture(sets, mixed=mixed, sizes="fixed", max_ctx_pts=4, max_tgt_pts=7))
        assert {reading.batch_at(step).context_x.shape for step in range(10)} == {(8, 4, 1)}


def test_a_full_target_is_no_law_without_its_numbers():
    sets = {"one": sine(), "other": sawtooth()}
    with pytest.raises(ValueError, match="min_pts is missing"):
        Mixture(sets, predict_full_target=True)


# --- which task --------------------------------------------------------------------------------


@st.composite
def finite(draw) -> tuple[list[int], list[int]]:
    n = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 12), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(any))
    return sizes, weights


def numbers(sizes: list, kind: type = Numbers, **more: Any) -> Mixture:
    sets = {f"n{c}": kind(size, 1000 * c) for c, size in enumerate(sizes)}
    return Mixture(sets, **more)


@given(finite())
def test_a_finite_mixture_of_tasks_shows_every_task_in_the_shares_asked_for(drawn):
    sizes, weights = drawn
    taskset = numbers(sizes, weights=weights, mixed="tasks")
    total = len(taskset)
    made = taskset.__gettasks__(torch.arange(total), 1, 1, torch.Generator())
    for c, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mine = made.aux["component"] == c
        share = Fraction(weight, sum(weights)) * total
        assert abs(int(mine.sum()) - share) < 1
        inner = made.aux["index"][mine].bincount(minlength=size)
        if weight:
            assert inner.min() >= 1
            assert inner.max() - inner.min() <= 1
        assert (made.target_y[mine, 0, 0] == 1000 * c + made.aux["index"][mine]).all()


@given(finite(), st.lists(st.integers(0, 10**6), min_size=1, max_size=9), st.booleans())
def test_an_index_is_always_the_same_task_whatever_is_beside_it(drawn, indices, endless):
    sizes, weights = drawn
    taskset = numbers([None if endless else sizes[0], *sizes[1:]], weights=weights, mixed="tasks")
    if not (endless and weights[0]):
        indices = [index % len(taskset) for index in indices]
    together = taskset.__gettasks__(torch.tensor(indices), 2, 3, torch.Generator())
    for row, index in enumerate(indices):
        alone = taskset.__gettasks__(torch.tensor([index]), 2, 3, torch.Generator())
        assert torch.equal(alone.target_y[0], together.target_y[row])
        for name in together.aux:
            assert torch.equal(alone.aux[name][0], together.aux[name][row])


def test_mixed_with_an_infinite_set_a_finite_one_shows_all_its_tasks_equally():
    made = numbers([None, 10], mixed="tasks").__gettasks__(
        torch.arange(4000), 1, 1, torch.Generator()
    )
    mine = made.aux["component"] == 1
    assert (made.aux["index"][~mine] == torch.arange(4000)[~mine]).all()
    assert made.aux["index"][mine].bincount(minlength=10).min() > 130  # of 200


@given(st.lists(st.integers(4, 12), min_size=1, max_size=4), st.integers(0, 5), st.booleans())
def test_a_batch_of_one_component_has_tasks_of_that_component_none_twice(sizes, seed, endless):
    taskset = numbers([*sizes, *([None] if endless else [])], mixed="batch")
    reading = loader(taskset, 4, seed=seed)
    for step in range(12):
        batch = reading.batch_at(step)
        c = int(batch.aux["component"][0])
        assert (batch.target_y[:, 0, 0] == 1000 * c + batch.aux["index"]).all()
        assert len(batch.aux["index"].unique()) == 4
        if c < len(sizes):
            assert batch.aux["index"].max() < sizes[c]


def test_all_tasks_of_a_component_come_equally_often_in_batches_of_one():
    reading, found = loader(numbers([8, 16]), 4), torch.zeros(2, 16)
    for step in range(1600):
        aux = reading.batch_at(step).aux
        found[aux["component"][0]] += aux["index"].bincount(minlength=16)
    assert (abs(found[0, :8] - 400) < 100).all()
    assert (abs(found[1] - 200) < 70).all()


def test_the_length_is_that_of_all_components_and_none_where_one_is_endless():
    assert len(numbers([4, 6])) == 10
    assert len(numbers([4, 6], mixed="tasks")) == 12
    assert len(numbers([None, 6], weights=[0, 1], mixed="tasks")) == 6
    for mixed in ("batch", "tasks"):
        with pytest.raises(TypeError, match=r"infinite: n1"):
            len(numbers([4, None], mixed=mixed))
    assert len(loader(numbers([8, 9]), 4)) == 4


def test_the_components_of_a_finite_mixture_can_be_balanced():
    taskset = numbers([10, 30], mixed="tasks", weights=[1, 5])
    assert taskset.classes.tolist() == components(taskset, 1, batch_size=60, shuffle=False)[0]
    for batch in components(taskset, 20, balance={"alpha": 1}):
        assert sum(batch) == 4
    unused = numbers([10, 5, 30], mixed="tasks", weights=[1, 0, 1])
    assert set(unused.classes.tolist()) == {0, 1}
    assert numbers([10, 30]).classes is None
    assert numbers([10, None], mixed="tasks").classes is None


# --- one global batch --------------------------------------------------------------------------


@both
@counts
@given(shards=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 50))
@settings(max_examples=8)
def test_the_ranks_parts_joined_are_the_batch_for_every_legal_world_size(
    mixed, n_tasks, shards, step
):
    more = {"shards": shards, "n_batches": 5}
    alone = loader(mixture(mixed, n_tasks), **more).batch_at(step)
    for world_size in [k for k in (1, 2, 4, 8) if shards % k == 0]:
        parts = [
            loader(mixture(mixed, n_tasks), **more, rank=r, world_size=world_size).batch_at(step)
            for r in range(world_size)
        ]
        assert all(part.aux.keys() == alone.aux.keys() for part in parts)
        for name in Task._fields[:4]:
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(alone, name))
        for name, field in alone.aux.items():
            joined = torch.cat([part.aux[name] for part in parts])
            torch.testing.assert_close(joined, field, equal_nan=True, rtol=0, atol=0)


@both
@counts
def test_batches_do_not_depend_on_workers_or_on_what_was_read_before(mixed, n_tasks):
    more = {"n_batches": 4}
    expected = [digest(loader(mixture(mixed, n_tasks), **more).batch_at(s)) for s in range(6)]
    with loader(mixture(mixed, n_tasks), **more, workers=2) as reading:
        read = [digest(batch) for batch, _ in zip(reading.stream(), range(6), strict=False)]
    assert read == expected


@both
def test_the_splits_are_different_tasks(mixed):
    found = {
        digest(loader(mixture(mixed, (40, 40), split=split)).batch_at(0))
        for split in ("train", "val", "test")
    }
    assert len(found) == 3


@both
def test_a_mixture_travels_to_a_spawned_worker(mixed):
    taskset = mixture(mixed, (20, 30))
    loader(taskset).batch_at(0)
    copy = pickle.loads(pickle.dumps(taskset))
    assert digest(loader(copy).batch_at(3)) == digest(loader(taskset).batch_at(3))


def test_another_mixture_is_another_configuration():
    states = [
        loader(taskset).state_dict()
        for taskset in (
            mixture("tasks"),
            mixture("batch"),
            mixture("tasks", weights=[1, 2]),
            Mixture({"sin": sine(), "saw": sawtooth()}, mixed="tasks"),
            Mixture({"sine": sine(), "saw": Numbers(None)}, mixed="tasks"),
        )
    ]
    assert len({state["sizes"] for state in states}) == 5
    assert loader(mixture("tasks", weights=[5, 5])).state_dict() == states[0]


# --- components of single tasks ----------------------------------------------------------------


@both
@pytest.mark.parametrize("n_tasks", [None, 40])
def test_components_of_single_tasks_are_mixed_with_those_of_whole_batches(mixed, n_tasks):
    taskset = Mixture({"one": Single(n_tasks), "whole": Numbers(n_tasks, 1000)}, mixed=mixed)
    random.seed(5)
    before = random.getstate(), torch.get_rng_state().tolist()
    reading = loader(taskset)
    batches = [reading.batch_at(step) for step in range(20)]
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    for batch in batches:
        value = 1000 * batch.aux["component"] + batch.aux["index"]
        assert (batch.target_y[:, 0, 0] == value).all()
        assert batch.target_y.dtype == torch.float32
    noise = torch.cat([b.aux["noise"] for b in batches if "noise" in b.aux] or
                      [b.aux["one.noise"] for b in batches])  # fmt: skip
    drawn = noise[~noise.isnan()]
    assert len(drawn) > 40
    assert len(drawn.unique()) == len(drawn)
    assert digest(loader(taskset).batch_at(7)) == digest(batches[7])


# --- what is known of a task -------------------------------------------------------------------


@both
@counts
def test_the_truth_is_that_of_each_tasks_component(mixed, n_tasks):
    taskset = mixture(mixed, n_tasks)
    for step in range(5):
        batch = loader(taskset).batch_at(step)
        truth = taskset.truth(batch, batch.target_x)
        torch.testing.assert_close(truth, batch.target_y)


def test_where_one_component_knows_no_truth_its_tasks_have_none():
    taskset = Mixture({"sine": sine(), "numbers": Numbers(None)}, mixed="tasks")
    batch = loader(taskset, 30).batch_at(0)
    truth = taskset.truth(batch, batch.target_x)
    unknown = batch.aux["component"] == 1
    assert truth[unknown].isnan().all()
    torch.testing.assert_close(truth[~unknown], batch.target_y[~unknown])
    nobody = numbers([None, None], mixed="tasks")
    batch = loader(nobody).batch_at(0)
    assert nobody.truth(batch, batch.target_x) is None


class Knows(Numbers):
    """Has an oracle, for one score more than others."""

    def __init__(self, base: int, *more: str) -> None:
        super().__init__(None, base)
        self.more = more

    def oracle(self, tasks):
        return dict.fromkeys(("mse", *self.more), tasks.target_y[:, 0, 0])


@both
def test_the_oracle_knows_what_all_components_know(mixed):
    taskset = Mixture({"a": Knows(0, "other"), "b": Knows(1000)}, mixed=mixed)
    for step in range(6):
        batch = loader(taskset).batch_at(step)
        oracle = taskset.oracle(batch)
        assert set(oracle) == {"mse"}
        assert torch.equal(oracle["mse"], batch.target_y[:, 0, 0])
    silent = Mixture({"a": Knows(0), "b": Numbers(None)}, mixed=mixed)
    assert silent.oracle(loader(silent).batch_at(0)) is None


def test_further_fields_are_shared_where_all_have_them_and_named_where_not():
    taskset = mixture("tasks", weights=[1, 9])
    batch = loader(taskset, 40).batch_at(0)
    assert set(batch.aux) == {"component", "sine.parameters", "saw.parameters"}
    of_sine = batch.aux["component"] == 0
    assert batch.aux["sine.parameters"].shape == (40, 4)
    assert torch.equal(batch.aux["sine.parameters"].isnan().all(1), ~of_sine)
    assert torch.equal(batch.aux["saw.parameters"].isnan().all(1), of_sine)
    assert set(loader(numbers([9, 9], mixed="tasks")).batch_at(0).aux) == {"component", "index"}
    twins = Mixture({"a": sine(), "b": sine()}, mixed="tasks")
    assert set(loader(twins).batch_at(0).aux) == {"component", "parameters"}


def test_a_batch_that_happens_to_lack_a_component_has_all_fields_all_the_same():
    taskset = mixture("tasks")
    batches = [loader(taskset, 1).batch_at(step) for step in range(20)]
    assert {int(batch.aux["component"]) for batch in batches} == {0, 1}
    assert len({(tuple(b.aux), b.aux["saw.parameters"].shape) for b in batches}) == 1


# --- agreement ---------------------------------------------------------------------------------


class Specified(Numbers):
    """Says what it is."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(9)
        self._spec = TaskSpec(**{"x_shape": (1,), "y_shape": (1,), **spec})

    @property
    def spec(self):
        return self._spec


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"x_shape": (2,)}, "x_shape"),
        ({"y_shape": (3,)}, "y_shape"),
        ({"kind": "image"}, "kind"),
        ({"units": {"y_mean": [1.0]}}, "units"),
        ({"ways": 5}, "ways"),
    ],
)
def test_components_that_do_not_fit_together_are_named_with_what_differs(spec, name):
    with pytest.raises(ValueError, match=rf"tasksets\.one and tasksets\.three .* {name} is"):
        Mixture({"one": Specified(), "two": Numbers(9), "three": Specified(**spec)})


def test_the_spec_is_what_all_agree_on_and_the_most_ways():
    assert mixture().spec == sine().spec
    ways = {"y_shape": (), "kind": "classification"}
    mixed = Mixture({"a": Specified(ways=5, **ways), "b": Specified(ways=20, **ways)})
    assert mixed.spec.ways == 20
    assert numbers([3, 4]).spec is None


class Doubles(Numbers):
    def __gettasks__(self, *arguments, **more):
        tasks = super().__gettasks__(*arguments, **more)
        return tasks._replace(target_y=tasks.target_y.double())


@both
def test_tasks_of_different_types_are_refused_in_the_first_batch(mixed):
    taskset = Mixture({"a": Numbers(20), "b": Doubles(20)}, mixed=mixed)
    with pytest.raises(TypeError, match=r"tasksets\.a and tasksets\.b .* target_y is .*float32"):
        loader(taskset).batch_at(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weights": [1]}, ["weights=[1]", "2 components", "sine, saw"]),
        ({"weights": [0, 0]}, ["weights=[0, 0]", "more than 0"]),
        ({"weights": [1, -1]}, ["weights.saw=-1", "at least 0"]),
        ({"weights": [1, float("nan")]}, ["weights.saw=nan"]),
        ({"weights": {"sine": 1}}, ["none for saw"]),
        ({"weights": {"sine": 1, "saww": 1}}, ["weights.saww", "did you mean 'saw'?"]),
        ({"mixed": "task"}, ["mixed='task'", "did you mean 'tasks'?"]),
        ({"n_tasks": (10**6, 2), "weights": [1e-9, 1]}, ["weights=", "mixed=batch"]),
        ({"split": "valid"}, ["split='valid'", "train, val, test"]),
    ],
)
def test_what_cannot_be_mixed_says_why(arguments, said):
    with pytest.raises(ValueError) as error:
        mixture(**arguments)
    for words in said:
        assert words in str(error.value)


def test_components_are_task_sets_with_names():
    with pytest.raises(TypeError, match=r"tasksets\.a is a int, not a TaskSet"):
        Mixture({"a": 3})
    with pytest.raises(TypeError, match=r"tasksets\.a is a mixture itself"):
        Mixture({"a": mixture()})
    with pytest.raises(ValueError, match="must be a mapping"):
        Mixture({})
    with pytest.raises(ValueError, match=r"tasksets\.a\.b: a name has no dot"):
        Mixture({"a.b": sine()})


def test_mixed_tasks_need_common_sizes():
    sets = {"sine": sine(), "saw": sawtooth(max_ctx_pts=4)}
    with pytest.raises(
        ValueError, match=r"mixed=tasks needs the same sizes .* sine has .* saw has"
    ):
        Mixture(sets, mixed="tasks")
    Mixture(sets, mixed="tasks", **SIZES)


def test_a_batch_larger_than_a_component_is_refused_at_once():
    with pytest.raises(ValueError, match=r"batch_size=8 .* at most batch_size=6"):
        loader(numbers([20, 6]))
    loader(numbers([20, 6]), 6)
    loader(numbers([20, 6], weights=[1, 0]), 8)


def test_batches_of_finite_components_need_shuffling_and_no_balance():
    with pytest.raises(ValueError, match="shuffle=True"):
        loader(numbers([20, 20]), shuffle=False)
    with pytest.raises(ValueError, match="contradict"):
        loader(numbers([20, 20]), balance={})
    loader(mixture("batch"), shuffle=False)


# --- splits ------------------------------------------------------------------------------------


@both
def test_a_mixture_hands_its_split_to_all_components(mixed):
    taskset = mixture(mixed, split="test")
    assert {t.split for t in taskset.tasksets.values()} == {taskset.split} == {"test"}
    taskset.belong_to("val")
    assert {(t.split, t.eval) for t in [taskset, *taskset.tasksets.values()]} == {("val", True)}
    assert mixture(mixed, eval=True).split == "val"


def test_without_a_split_it_has_that_of_its_components():
    sets = {"sine": sine(split="test"), "saw": sawtooth(split="test")}
    assert Mixture(sets).split == "test"
    with pytest.raises(ValueError, match="sine is test, saw is train"):
        Mixture({"sine": sine(split="test"), "saw": sawtooth()})


class Grey:
    def select(self, split: str) -> LabelledImages:
        value = {"train": 0, "val": 100, "test": 200}[split]
        return LabelledImages.from_labels(np.full((6, 1, 4, 4), value, np.uint8), np.arange(6) % 2)


def test_images_of_one_split_are_never_taken_for_those_of_another():
    images = ImageCompletion(Grey(), 1, 2, 3)
    with pytest.raises(ValueError, match=r"tasksets\.images: split='val': .* 'train'"):
        Mixture({"images": images}, split="val")


def declared(*overrides: str) -> Any:
    base = ("taskset=mixture", "model=cnp", "learner=neural_process", "loader.device=cpu")
    return check(resolve(composed(*base, "trainer.threads=1", *overrides)))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@both
def test_nested_task_sets_of_a_configuration_are_built_for_the_split(mixed, split):
    config = declared(f"taskset.mixed={mixed}", "taskset.weights={sine: 3, sawtooth: 1}")
    config.taskset["tasksets"]["sine"]["n_tasks"] = 50
    taskset = build_taskset(config, split)
    assert isinstance(taskset, Mixture)
    assert taskset.weights == [Fraction(3, 4), Fraction(1, 4)]
    assert {t.split for t in taskset.tasksets.values()} == {split}
    reading = build_loader(config, taskset)
    batch = reading.batch_at(0)
    torch.testing.assert_close(taskset.truth(batch, batch.target_x), batch.target_y)
    assert torch.isfinite(build_learner(config, taskset.spec)(batch))


def test_nested_task_sets_that_open_a_split_open_the_right_one():
    config = declared()
    dataset = {"_target_": f"{__name__}.Grey"}
    sizes = {"min_pts": 1, "max_ctx_pts": 2, "max_tgt_pts": 3, "split": "train"}
    node = {"_target_": "tasksets.images.ImageCompletion", "dataset": dataset, **sizes}
    config.taskset["tasksets"] = {"images": node}
    for split, value in (("train", 0), ("val", 100), ("test", 200)):
        taskset = build_taskset(config, split)
        assert (loader(taskset, 4).batch_at(0).target_y * 255 == value).all()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("taskset.tasksets.sine.n_tasks=0", "taskset.tasksets.sine.n_tasks=0: is not allowed"),
        ("+taskset.tasksets.sine.noize=1", "taskset.tasksets.sine.noize: "),
        ("taskset.tasksets.sine.dataset.phase=a", "taskset.tasksets.sine.dataset.phase=a: "),
        ("taskset.mixed=task", "taskset.mixed=task: is not allowed"),
        ("taskset.tasksets.sine.max_tgt_pts=5", "taskset.tasksets.sine.max_tgt_pts=5 must be"),
        ("taskset.weights=[1]", "taskset.weights=[1.0] are 1 for 2 components"),
        ("+taskset.tasksets.third=3", "taskset.tasksets.third is a int, not a TaskSet"),
    ],
)
def test_a_mistake_in_a_nested_task_set_is_said_under_its_own_key(override, said):
    with pytest.raises(UserError) as error:
        build_taskset(declared(override), "train")
    assert str(error.value).startswith(said)


def test_a_plan_without_parts_is_as_it_was():
    law = mixture("batch").law
    assert law.parts is None
    plan = Plan(n_tasks=None, law=law, batch_size=4)
    assert plan.indices(3).tolist() == [12, 13, 14, 15]


def test_tasks_of_sizes_of_their_own_cannot_be_mixed_and_the_component_is_named():
    class Ragged(Functions):
        ragged = True

    with pytest.raises(TypeError, match=r"tasksets\.b is ragged"):
        Mixture({"a": sine(), "b": Ragged(Sine(), 1, 3, 5)})
