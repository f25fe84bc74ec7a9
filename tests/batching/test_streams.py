"""The random streams: addressable, far apart from each other, the same everywhere."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching.streams import (
    GeneratorStates,
    StepStream,
    Stream,
    borrowed_global_generators,
    integer,
    permutation,
    seed_global_generators,
    uniforms,
    unit,
)
from tests.batching.examples import global_draws, global_states

seeds = st.integers(-(2**70), 2**70)
coordinates = st.integers(0, 2**63)
words64 = st.integers(0, 2**64 - 1)


# --- words -------------------------------------------------------------------------------------


def test_the_words_of_a_stream_never_change():
    # these pin the law: whoever changes them must raise STREAM_VERSION
    assert Stream(0, "train", "sizes").words(4, 0).tolist() == [
        17605250170845742308,
        18270426562676823559,
        15009037863816095761,
        4158757251838315356,
    ]
    assert Stream(-(2**80), "test", "order").words(2, 10**6, 3).tolist() == [
        10459059754579024313,
        10965687828723429564,
    ]


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox-4x64-10 as its paper writes it (Salmon et al. 2011, §4.3)."""
    (a, b, c, d), (left, right), mask = counter, key, 2**64 - 1
    for _ in range(10):
        one, two = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = two >> 64 ^ b ^ left, two & mask, one >> 64 ^ d ^ right, one & mask
        left, right = left + 0x9E3779B97F4A7C15 & mask, right + 0xBB67AE8584CAA73B & mask
    return [a, b, c, d]


@given(seeds, coordinates, coordinates)
def test_words_are_philox_of_the_hashed_name_and_the_coordinates(seed, major, minor):
    label = repr((seed, "train", "order")).encode()
    digest = hashlib.blake2b(label, digest_size=16, person=b"metabatch-v1").digest()
    key = [int.from_bytes(half, "little") for half in (digest[:8], digest[8:])]
    expected = [word for n in (1, 2) for word in philox(key, [n, 0, minor, major])]
    assert Stream(seed, "train", "order").words(8, major, minor).tolist() == expected


@given(seeds, coordinates, coordinates, st.integers(1, 40), st.integers(0, 40))
def test_words_are_addressed_not_drawn(seed, major, minor, count, other):
    stream = Stream(seed, "a")
    expected = stream.words(count, major, minor)
    stream.words(other, minor, major)
    stream.fill(torch.Generator(), major)
    assert np.array_equal(stream.words(count, major, minor), expected)
    assert np.array_equal(stream.words(count + other, major, minor)[:count], expected)
    assert expected.dtype == np.uint64


@given(seeds, st.integers(0, 2**62), st.integers(0, 2**62))
def test_neighbouring_streams_share_no_word(seed, major, minor):
    here = Stream(seed, "train", "task")
    streams = [
        here.words(1000, major, minor),
        here.words(1000, major + 1, minor),
        here.words(1000, major, minor + 1),
        Stream(seed + 1, "train", "task").words(1000, major, minor),
        Stream(seed, "train", "batch").words(1000, major, minor),
        Stream(seed, "val", "task").words(1000, major, minor),
        Stream(seed, "traintask").words(1000, major, minor),
    ]
    assert len(np.unique(np.concatenate(streams))) == 7 * 1000


@given(seeds)
def test_seeds_that_share_their_lower_32_bits_differ(seed):
    one, other = torch.Generator(), torch.Generator()
    Stream(seed, "a").fill(one, 0)
    Stream(seed + 2**32, "a").fill(other, 0)
    assert not torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=other))


def test_the_parts_of_a_name_do_not_run_together():
    names = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ()]
    words = {int(Stream(0, *name).words(1, 0)[0]) for name in names}
    assert len(words) == len(names)


@given(seeds, coordinates, coordinates)
def test_a_stream_survives_pickling(seed, major, minor):
    stream = Stream(seed, "a", "b")
    copy = pickle.loads(pickle.dumps(stream))
    copy.words(3, minor, major)  # the copy has a counter of its own
    assert np.array_equal(copy.words(9, major, minor), stream.words(9, major, minor))
    one, other = torch.Generator(), torch.Generator()
    stream.fill(one, major, minor)
    copy.fill(other, major, minor)
    assert torch.equal(one.get_state(), other.get_state())


# --- a stream for each step ----------------------------------------------------------------------


@given(seeds, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), max_size=20))
def test_the_words_of_a_step_do_not_depend_on_what_was_asked_before(seed, asked):
    stream = Stream(seed, "a")
    steps = StepStream(seed, "a", width=8)
    for start, lane in asked:
        for step in range(start, start + 3):  # reading on makes many steps at once
            expected = stream.words(8 * (step + 1), 0, lane)[8 * step :]
            assert steps.at(step, lane) == expected.tolist()


@given(seeds, st.integers(0, 2**50), st.integers(0, 3))
def test_a_generators_state_is_that_of_its_step_and_lane(seed, step, lane):
    words = Stream(seed, "a").words(312, 0, lane, skip=312 * step)
    expected = np.random.MT19937()
    expected.state = {
        **expected.state,
        "state": {"key": words.view(np.uint32), "pos": 624},
    }
    states, generator = GeneratorStates(seed, "a"), torch.Generator()
    for _ in range(3):  # alone, then the first of many, then of those
        generator.set_state(states.at(step, lane))
        drawn = torch.randint(2**16, (5,), generator=generator)
        raw = np.random.MT19937()
        raw.state = expected.state
        assert drawn.tolist() == [int(word) & (2**16 - 1) for word in raw.random_raw(5)]
        step += 1
        words = Stream(seed, "a").words(312, 0, lane, skip=312 * step)
        expected.state = {
            **expected.state,
            "state": {"key": words.view(np.uint32), "pos": 624},
        }


def test_a_stream_of_steps_survives_pickling_without_what_it_has_made():
    steps = GeneratorStates(3, "a")
    expected = [steps.at(step).clone() for step in range(5)]
    sent = pickle.dumps(steps)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    assert all(torch.equal(copy.at(step), state) for step, state in enumerate(expected))


# --- generators --------------------------------------------------------------------------------


@given(seeds, coordinates, coordinates)
def test_a_filled_generator_is_a_mersenne_twister_in_the_state_of_the_stream(seed, major, minor):
    stream, generator = Stream(seed, "a"), torch.Generator()
    stream.fill(generator, major, minor)
    twister = np.random.MT19937()
    state = twister.state
    state["state"]["key"] = stream.words(312, major, minor).view(np.uint32)
    state["state"]["pos"] = 624  # all used up: the next draw twists
    twister.state = state
    raw = twister.random_raw(1500)  # more than two twists

    lower = torch.randint(2**16, (1500,), generator=generator.clone_state())  # a word each
    assert np.array_equal(lower.numpy().astype(np.uint64), raw & np.uint64(2**16 - 1))
    pairs = torch.randint(2**62, (750,), generator=generator)  # two words each
    expected = (raw[0::2] << np.uint64(32) | raw[1::2]) & np.uint64(2**62 - 1)
    assert np.array_equal(pairs.numpy().astype(np.uint64), expected)


@given(seeds, st.integers(0, 700), st.integers(0, 3))
def test_filling_forgets_what_the_generator_did_before(seed, uniform_draws, normal_draws):
    stream, used, fresh = Stream(seed, "a"), torch.Generator(), torch.Generator()
    torch.rand(uniform_draws, generator=used)
    for _ in range(normal_draws):  # an odd number leaves half a pair of normals behind
        torch.randn((), generator=used)
    stream.fill(used, 5, 6)
    stream.fill(fresh, 5, 6)
    assert torch.equal(torch.randn(3, generator=used), torch.randn(3, generator=fresh))
    assert torch.equal(used.get_state(), fresh.get_state())


def test_filled_generators_do_not_share_their_state():
    stream, one, other = Stream(0, "a"), torch.Generator(), torch.Generator()
    stream.fill(one, 0)
    expected = torch.rand(3, generator=one.clone_state())
    stream.fill(other, 1)
    torch.rand(3, generator=other)
    assert torch.equal(torch.rand(3, generator=one), expected)


# --- numbers from words ------------------------------------------------------------------------


def test_the_numbers_made_of_words_never_change():
    words = Stream(0, "golden").words(8, 0)
    assert permutation(words).tolist() == [0, 3, 2, 7, 4, 5, 6, 1]
    assert [integer(word, 3, 20) for word in words.tolist()] == [6, 19, 7, 6, 10, 12, 14, 9]
    assert unit(int(words[0])) == float.fromhex("0x1.78f698a663e24p-3")
    assert unit(int(words[1])) == float.fromhex("0x1.cb367c0b5fc11p-1")
    assert uniforms(torch.tensor([0, 7]), 2, "golden").tolist() == [
        [0.2993159224831048, 0.4875051792044558],
        [0.26366002674556455, 0.5438576755968896],
    ]


@given(st.lists(words64, max_size=50))
def test_a_permutation_sorts_the_words_and_keeps_ties_in_order(words):
    order = permutation(np.array(words, dtype=np.uint64))
    assert order.tolist() == sorted(range(len(words)), key=words.__getitem__)
    assert order.dtype == np.int64


def test_all_permutations_come_equally_often():
    stream = Stream(0, "permutations")
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for step in range(6000):
        counts[tuple(permutation(stream.words(3, step)).tolist())] += 1
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


@given(words64, st.integers(-1000, 1000), st.integers(0, 10**6))
def test_an_integer_lies_within_its_bounds(word, low, span):
    assert low <= integer(word, low, low + span) <= low + span


@given(st.integers(-1000, 1000), st.integers(0, 10**6))
def test_an_integer_reaches_both_ends_of_its_range(low, span):
    assert integer(0, low, low + span) == low
    assert integer(2**64 - 1, low, low + span) == low + span


def test_all_integers_of_a_range_come_equally_often():
    words = Stream(0, "integers").words(7000, 0).tolist()
    counts = np.bincount([integer(word, 0, 6) for word in words])
    assert len(counts) == 7
    assert counts.min() > 880
    assert counts.max() < 1120


@given(words64)
def test_a_unit_lies_in_the_half_open_interval_and_keeps_53_bits(word):
    assert 0 <= unit(word) < 1
    assert unit(word) * 2**53 == word >> 11


# --- uniforms by index -------------------------------------------------------------------------

index_lists = st.lists(st.integers(0, 2**62), min_size=1, max_size=20)


@given(index_lists, st.integers(1, 5), st.randoms(use_true_random=False))
def test_an_index_has_the_same_numbers_in_any_company(indices, count, chance):
    whole = uniforms(torch.tensor(indices), count, "a", "b")
    assert whole.dtype == torch.float64
    assert whole.shape == (len(indices), count)
    assert bool(((whole >= 0) & (whole < 1)).all())
    row = chance.randrange(len(indices))
    assert torch.equal(uniforms(torch.tensor(indices[row:]), count, "a", "b"), whole[row:])
    global_draws()
    assert torch.equal(uniforms(torch.tensor([indices[row]]), count, "a", "b")[0], whole[row])


def test_uniforms_are_uniform_and_independent_across_columns_and_neighbours():
    drawn = uniforms(torch.arange(20_000), 2, "a").numpy()
    for column in drawn.T:
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert counts.min() > 1850
        assert counts.max() < 2150
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.03
    assert len(np.unique(drawn)) == 40_000


def test_uniforms_differ_by_name():
    indices = torch.arange(1000)
    names = [("a",), ("b",), ("a", "b"), ("ab",), ()]
    drawn = np.concatenate([uniforms(indices, 1, *name).flatten().numpy() for name in names])
    assert len(np.unique(drawn)) == 5 * 1000


# --- the global generators ---------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_borrowed_generators_come_back_as_they_were(seed, draws):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(draws):
        global_draws()
    before = global_states()
    with borrowed_global_generators():
        seed_global_generators(Stream(seed), 1, 2)
        global_draws()
    assert global_states() == before


def test_borrowed_generators_come_back_after_an_error():
    def fail() -> None:
        with borrowed_global_generators():
            global_draws()
            raise ArithmeticError

    before = global_states()
    with pytest.raises(ArithmeticError):
        fail()
    assert global_states() == before


def test_a_normal_number_that_numpy_keeps_back_comes_back_too():
    np.random.seed(0)
    np.random.randn()  # draws two, keeps one for the next call
    before = global_states()
    with borrowed_global_generators():
        np.random.randn(3)
    assert global_states() == before


def test_a_kept_back_normal_number_of_a_bit_generator_of_ones_own_comes_back():
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        np.random.randn()
        before = np.random.get_state(legacy=False)
        with borrowed_global_generators():
            np.random.randn(3)
        assert np.random.get_state(legacy=False) == before
    finally:
        np.random.set_bit_generator(original)


def test_a_bit_generator_of_the_callers_own_comes_back():
    original, own = np.random.get_bit_generator(), np.random.PCG64(1)
    np.random.set_bit_generator(own)
    try:
        before = own.state
        with borrowed_global_generators():
            seed_global_generators(Stream(0), 0, 0)
            np.random.rand(3)
        assert np.random.get_bit_generator() is own
        assert own.state == before
    finally:
        np.random.set_bit_generator(original)


def test_code_that_imported_numpys_functions_by_name_draws_from_the_lent_generator():
    by_name = np.random.standard_normal
    with borrowed_global_generators():
        seed_global_generators(Stream(0), 0, 0)
        expected = np.random.standard_normal(3)
        seed_global_generators(Stream(0), 0, 0)
        assert np.array_equal(by_name(3), expected)


@given(seeds, coordinates, coordinates)
def test_seeding_leaves_nothing_of_what_was_drawn_before(seed, major, minor):
    stream = Stream(seed, "a")
    with borrowed_global_generators():
        seed_global_generators(stream, major, minor)
        expected = global_states()
        global_draws()
        np.random.randn()
        torch.randn(())
        seed_global_generators(stream, major, minor)
        assert global_states() == expected


def test_what_the_seeded_generators_give_never_changes():
    # these pin the law: whoever changes them must raise STREAM_VERSION
    with borrowed_global_generators():
        seed_global_generators(Stream(0, "golden"), 3, 4)
        assert random.random() == 0.19115936507123654
        assert np.random.rand() == 0.02698532993969449
        assert torch.randint(2**53, ()).item() == 2184923679639239


def test_each_place_of_each_stream_seeds_all_three_generators_differently():
    drawn = []
    with borrowed_global_generators():
        places = [(Stream(s), i, j) for s in (0, 1, 2**32) for i in range(3) for j in range(3)]
        for stream, major, minor in places:
            seed_global_generators(stream, major, minor)
            drawn.append(global_draws())
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == len(places)
