"""Strict mode: what no seed reaches is caught, and named."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from metabatch_cli.batching import NotReproducible, TaskLoader, check_strictly
from tests.batching.examples import KINDS, Draws, Episodes, Waves, global_draws, global_states


@pytest.mark.parametrize("kind", [*KINDS, Episodes])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_depends_on_seed_and_step_alone_passes(kind, shards):
    global_draws()
    before = global_states()
    loader = TaskLoader(kind(n_tasks=None), batch_size=4, shards=shards)
    check_strictly(loader)
    assert global_states() == before
    assert loader.state_dict()["step"] == 0


class OwnNumpy(Waves):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __gettasks__(self, indices, n_context, n_target, generator):
        tasks = super().__gettasks__(indices, n_context, n_target, generator)
        noise = torch.from_numpy(self.rng.normal(size=tasks.target_y.shape)).float()
        return tasks._replace(target_y=tasks.target_y + noise)


class OwnPython(Draws):
    def __init__(self):
        super().__init__()
        self.chance = random.Random(0)

    def __gettask__(self, index, n_context, n_target):
        task = super().__gettask__(index, n_context, n_target)
        return {**task, "target": task["target"] + self.chance.random()}


class OwnTorch(Waves):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def __gettasks__(self, indices, n_context, n_target, generator):
        return super().__gettasks__(indices, n_context, n_target, self.generator)


class Counts(Draws):
    """Every task that was made makes the next one harder."""

    made = 0

    def __gettask__(self, index, n_context, n_target):
        self.made += 1
        return {**super().__gettask__(index, n_context, n_target), "level": self.made}


class Remembers(Draws):
    """A cache of what should be drawn anew."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def __gettask__(self, index, n_context, n_target):
        first = self.cache.setdefault("first", index)
        return {**super().__gettask__(index, n_context, n_target), "first": first}


class FirstBatch(Waves):
    """Normalises by the first batch that this object happens to make."""

    scale = None

    def __gettasks__(self, indices, n_context, n_target, generator):
        tasks = super().__gettasks__(indices, n_context, n_target, generator)
        if self.scale is None:
            self.scale = tasks.target_y.abs().mean().item()
        return tasks._replace(target_y=tasks.target_y / self.scale)


class Constructed(Waves):
    """Draws something when it is made that no seed reaches."""

    def __init__(self):
        super().__init__()
        self.shift = np.random.default_rng().normal()

    def __gettasks__(self, indices, n_context, n_target, generator):
        tasks = super().__gettasks__(indices, n_context, n_target, generator)
        return tasks._replace(target_y=tasks.target_y + self.shift)


def test_what_its_constructor_draws_shows_in_a_second_one():
    with pytest.raises(NotReproducible, match="target_y of task 0"):
        check_strictly(TaskLoader(Constructed(), batch_size=4), Constructed())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Remembers, r"first of task 0 of step 1000.*Remembers\.cache, a dict, changes"),
        (FirstBatch, r"target_y of task 0 of step 1000.*FirstBatch\.scale, a float, changes"),
        (OwnNumpy, r"target_y of task 0 of step 1000.*OwnNumpy\.rng, a numpy\.Generator, changes"),
        (OwnPython, r"target of task 0 of step 1000.*OwnPython\.chance, a random\.Random, changes"),
        (OwnTorch, r"context_x of task 0 of step 1000.*OwnTorch\.generator, a torch.*changes"),
        (Counts, r"level of task 0 of step 1000.*Counts\.made, a int, changes"),
    ],
)
def test_a_generator_or_state_of_ones_own_is_named(kind, said):
    with pytest.raises(NotReproducible, match=said):
        check_strictly(TaskLoader(kind(), batch_size=4, shuffle=True))


def draws_from(source):
    class Global(Waves):
        def __gettasks__(self, indices, n_context, n_target, generator):
            tasks = super().__gettasks__(indices, n_context, n_target, generator)
            return tasks._replace(target_y=tasks.target_y + source())

    return Global()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("random", random.random),
        ("numpy.random", np.random.rand),
        ("torch", lambda: torch.rand(())),
    ],
)
def test_a_whole_batch_from_a_global_generator_is_caught_and_the_generator_named(name, source):
    before = global_states()
    said = rf"the global generator of {name}\n(.*\n)*.*draw from the generator that __gettasks__"
    with pytest.raises(NotReproducible, match=said):
        check_strictly(TaskLoader(draws_from(source), batch_size=4))
    assert global_states() == before


def test_drawing_without_using_it_is_caught_too():
    with pytest.raises(NotReproducible, match="draws from the global generator of torch, which"):
        check_strictly(TaskLoader(draws_from(lambda: 0 * torch.rand(())), batch_size=4))


class Reseeds(Waves):
    """A seed set by hand hides what is drawn, and spoils the program's own numbers."""

    def __gettasks__(self, indices, n_context, n_target, generator):
        torch.manual_seed(3)
        return super().__gettasks__(indices, n_context, n_target, generator)


def test_reseeding_a_global_generator_is_caught():
    torch.manual_seed(5)
    with pytest.raises(NotReproducible, match="global generator of torch"):
        check_strictly(TaskLoader(Reseeds(), batch_size=4))
