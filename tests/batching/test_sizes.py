"""The laws of the sizes: their bounds, their ends, their errors."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.batching.sizes import (
    LAWS,
    WORDS,
    Fixed,
    LogUniform,
    Metabatch,
    Rest,
    SizeLaw,
    WayShot,
    extremes,
    make_law,
)
from metabatch_cli.batching.streams import Stream

LAST = 2**64 - 1
words64 = st.integers(0, LAST) | st.sampled_from([0, LAST])
word_lists = st.lists(words64, min_size=WORDS, max_size=WORDS)


def draws(law: SizeLaw, steps: int) -> list[dict[str, int]]:
    stream = Stream(0, "a", "test", "of", "sizes")
    return [law.draw(stream.words(WORDS, step).tolist()) for step in range(steps)]


# --- metabatch, the original's -----------------------------------------------------------------

contexts = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted)


@given(contexts, st.integers(1, 30), st.booleans(), word_lists)
def test_metabatch_draws_the_target_from_the_context_size_upwards(context, more, held_out, words):
    low, high = context
    drawn = Metabatch(low, high, high + more, eval=held_out).draw(words)
    assert set(drawn) == {"n_context", "n_target"}
    assert low <= drawn["n_context"] <= high
    assert max(1, drawn["n_context"]) <= drawn["n_target"] <= high + more


def test_a_task_without_context_has_a_target_all_the_same():
    sizes = {law["n_context"]: law["n_target"] for law in extremes(Metabatch(0, 2, 3))}
    assert sizes[0] >= 1
    assert {law["n_target"] for law in draws(Metabatch(0, 0, 3), 50)} == {1, 2, 3}


@given(contexts, st.integers(1, 30), st.integers(1, 60), st.booleans(), word_lists)
def test_metabatch_predicts_the_full_target_where_told(context, more, total, held_out, words):
    low, high = context
    law = Metabatch(low, high, high + more, total, held_out, predict_full_target=True)
    assert low <= law.draw(words)["n_context"] <= high
    assert law.draw(words)["n_target"] == total


@given(contexts, st.integers(1, 30), word_lists)
def test_metabatch_predicts_the_rest_only_during_evaluation(context, more, words):
    low, high = context
    law = {"min_pts": low, "max_ctx_pts": high, "max_tgt_pts": high + more, "total_tgt_pts": 70}
    plain = Metabatch(**law)
    held_out = Metabatch(**law, eval=True, predict_full_target_during_eval=True).draw(words)
    training = Metabatch(**law, eval=False, predict_full_target_during_eval=True).draw(words)
    assert held_out["n_context"] == plain.draw(words)["n_context"]
    assert held_out["n_target"] == 70 - held_out["n_context"]
    assert training == plain.draw(words)


@given(contexts, st.integers(1, 30), word_lists)
def test_metabatch_prefers_the_full_target_to_the_rest(context, more, words):
    low, high = context
    law = Metabatch(low, high, high + more, 70, True, True, True)
    assert law.draw(words)["n_target"] == 70


def test_metabatch_draws_context_and_target_independently_and_uniformly():
    counts = Counter((d["n_context"], d["n_target"]) for d in draws(Metabatch(1, 3, 4), 12_000))
    share = {(c, t): 12_000 / 3 / (4 - c + 1) for c in (1, 2, 3) for t in range(c, 5)}
    assert set(counts) == set(share)
    for pair, expected in share.items():
        assert abs(counts[pair] - expected) < 5 * expected**0.5


# --- the other laws ----------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Rest, LogUniform])
@given(contexts, st.integers(1, 10), st.integers(0, 30), word_lists)
def test_the_rest_of_the_points_bounds_the_target(law, context, least, spare, words):
    low, high = context
    total = high + least + spare
    drawn = law(low, high, total, least).draw(words)
    assert set(drawn) == {"n_context", "n_target"}
    assert low <= drawn["n_context"] <= high
    assert least <= drawn["n_target"] <= total - drawn["n_context"]


@pytest.mark.parametrize("law", [Rest, LogUniform])
@given(st.integers(1, 9), st.integers(0, 9), word_lists)
def test_the_smallest_target_is_min_pts_unless_told(law, low, more, words):
    high, total = low + more, 2 * (low + more) + 5
    assert law(low, high, total).draw(words) == law(low, high, total, low).draw(words)


@pytest.mark.parametrize(
    ("law", "lowest", "highest"),
    [
        (Metabatch(2, 5, 9), (2, 2), (5, 9)),
        (Rest(3, 47, 50, 3), (3, 3), (47, 3)),
        (Rest(0, 4, 10, 2), (0, 2), (4, 6)),
        (LogUniform(0, 40, 50, 3), (0, 3), (40, 10)),
        (LogUniform(7, 7, 50, 3), (7, 3), (7, 43)),
        (Fixed(10, 15), (10, 15), (10, 15)),
        (WayShot((2, 5), (1, 3), (4, 6)), (2, 8), (15, 30)),
    ],
)
def test_every_range_reaches_both_of_its_ends(law, lowest, highest):
    low, high = law.draw([0] * WORDS), law.draw([LAST] * WORDS)
    assert (low["n_context"], low["n_target"]) == lowest
    assert (high["n_context"], high["n_target"]) == highest


def test_rest_draws_every_context_equally_often():
    counts = np.bincount([drawn["n_context"] for drawn in draws(Rest(3, 12, 30), 5000)])
    assert not counts[:3].any()
    assert counts[3:].min() > 400
    assert counts[3:].max() < 600


def test_log_uniform_draws_small_contexts_as_often_as_large_ones():
    sizes = np.array([drawn["n_context"] for drawn in draws(LogUniform(1, 63, 100, 1), 6000)])
    octaves = np.bincount(np.log2(sizes).astype(int))  # 1, 2–3, 4–7, … 32–63
    assert len(octaves) == 6
    assert octaves.min() > 0.7 * 1000
    assert octaves.max() < 1.3 * 1000
    assert set(range(1, 16)) <= set(sizes.tolist())


@given(st.integers(0, 50), st.integers(1, 50), word_lists)
def test_fixed_is_fixed(context, target, words):
    assert Fixed(context, target).draw(words) == {"n_context": context, "n_target": target}


ranges = st.tuples(st.integers(2, 9), st.integers(2, 9)).map(sorted)


@given(ranges, ranges, ranges, word_lists)
def test_way_shot_multiplies_and_tells_the_factors(ways, shots, queries, words):
    drawn = WayShot(ways, shots, queries).draw(words)
    for name, (low, high) in {"ways": ways, "shots": shots, "queries": queries}.items():
        assert low <= drawn[name] <= high
    assert drawn["n_context"] == drawn["ways"] * drawn["shots"]
    assert drawn["n_target"] == drawn["ways"] * drawn["queries"]


def test_way_shot_draws_its_factors_independently():
    drawn = draws(WayShot([2, 3], [1, 2], [4, 5]), 400)
    assert len({(d["ways"], d["shots"], d["queries"]) for d in drawn}) == 8
    assert {d["shots"] for d in draws(WayShot(5, 1, 15), 20)} == {1}


# --- making a law ------------------------------------------------------------------------------

KNOWN = {"min_pts": 1, "max_ctx_pts": 5, "max_tgt_pts": 10, "total_tgt_pts": 20}


def test_a_law_is_named_or_named_with_fields_or_given():
    assert make_law("metabatch", KNOWN) == Metabatch(1, 5, 10, 20)
    assert make_law({"law": "fixed"}, KNOWN) == Fixed(5, 10)
    assert make_law({"min_pts": 2}, KNOWN) == Metabatch(2, 5, 10, 20)
    own = Fixed(3, 4)
    assert make_law(own, KNOWN) is own


def test_the_laws_own_fields_come_before_those_of_the_task_set():
    law = make_law({"law": "rest", "min_tgt_pts": 3, "max_ctx_pts": 7}, KNOWN)
    assert law == Rest(min_pts=1, max_ctx_pts=7, total_tgt_pts=20, min_tgt_pts=3)
    assert make_law({"law": "way_shot", "ways": 5, "shots": [1, 5], "queries": 15}, KNOWN) == (
        WayShot(5, (1, 5), 15)
    )


def test_making_a_law_leaves_its_mapping_alone():
    sizes = {"law": "rest", "min_tgt_pts": 3}
    make_law(sizes, KNOWN)
    assert sizes == {"law": "rest", "min_tgt_pts": 3}


@pytest.mark.parametrize(
    ("law", "numbers"),
    [
        (Metabatch(2, 5, 11), ["2", "5", "11"]),
        (Metabatch(2, 5, 11, 31, predict_full_target=True), ["2", "5", "31"]),
        (Metabatch(2, 5, 11, 31, True, predict_full_target_during_eval=True), ["31", "n_context"]),
        (Rest(3, 46, 50, 4), ["3", "46", "50", "4"]),
        (LogUniform(3, 46, 50, 4), ["log-uniform", "3", "46", "50", "4"]),
        (Fixed(10, 15), ["10", "15"]),
        (WayShot((2, 5), 1, 15), ["2", "5 ways", "1 shots", "15 queries"]),
    ],
)
def test_a_law_describes_itself_in_its_numbers(law, numbers):
    for number in numbers:
        assert re.search(rf"\b{number}\b", law.describe())


def test_every_law_describes_itself_in_one_line():
    assert set(LAWS) == {"metabatch", "rest", "fixed", "way_shot", "log_uniform"}
    extra = {"ways": 5, "shots": 1, "queries": 15}
    for name in LAWS:
        law = make_law({"law": name, **(extra if name == "way_shot" else {})}, KNOWN)
        assert law.describe()
        assert "\n" not in law.describe()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "known", "said"),
    [
        ("metabatch", {"min_pts": -1}, ["min_pts=-1", "at least 0"]),
        ("metabatch", {"max_ctx_pts": 0}, ["max_ctx_pts=0", "min_pts=1"]),
        ("metabatch", {"max_tgt_pts": 5}, ["max_tgt_pts=5", "max_ctx_pts=5"]),
        ("metabatch", {"min_pts": None}, ["min_pts is missing", "'metabatch'"]),
        (
            "metabatch",
            {"predict_full_target": True, "total_tgt_pts": None},
            ["total_tgt_pts=None"],
        ),
        (
            "metabatch",
            {"predict_full_target_during_eval": True, "total_tgt_pts": 5},
            ["total_tgt_pts=5", "at least 6"],
        ),
        ("rest", {"total_tgt_pts": None}, ["total_tgt_pts is missing", "'rest'"]),
        ("rest", {"total_tgt_pts": 5}, ["total_tgt_pts=5", "at least 6"]),
        ("rest", {"min_pts": 6}, ["max_ctx_pts=5", "min_pts=6"]),
        ("rest", {"min_pts": 0}, ["min_tgt_pts=0", "at least 1"]),
        ({"law": "rest", "min_tgt_pts": 0}, {}, ["min_tgt_pts=0", "at least 1"]),
        ("log_uniform", {"max_ctx_pts": 20}, ["total_tgt_pts=20", "at least 21"]),
        ("fixed", {"max_ctx_pts": -2}, ["max_ctx_pts=-2", "at least 0"]),
        ("fixed", {"max_tgt_pts": 0}, ["max_tgt_pts=0", "at least 1"]),
        ("fixed", {"max_tgt_pts": None}, ["max_tgt_pts is missing", "'fixed'"]),
        ({"law": "way_shot", "ways": 5, "shots": 1}, {}, ["queries is missing", "'way_shot'"]),
        (
            {"law": "way_shot", "ways": 1, "shots": 1, "queries": 1},
            {},
            ["ways=1", "at least 2"],
        ),
        (
            {"law": "way_shot", "ways": 5, "shots": [0, 3], "queries": 1},
            {},
            ["shots=0", "at least 1"],
        ),
        (
            {"law": "way_shot", "ways": [5, 2], "shots": 1, "queries": 1},
            {},
            ["ways=[5, 2]", "smaller"],
        ),
        (
            {"law": "way_shot", "ways": 5, "shots": [1, 2, 3], "queries": 1},
            {},
            ["shots=[1, 2, 3]", "[low, high]"],
        ),
        (
            {"law": "way_shot", "ways": "many", "shots": 1, "queries": 1},
            {},
            ["ways='many'", "[low, high]"],
        ),
    ],
)
def test_sizes_that_cannot_be_are_named_with_their_value(sizes, known, said):
    with pytest.raises(ValueError) as error:
        make_law(sizes, KNOWN | known)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize("wrong", [0, -3])
def test_a_full_target_has_a_point_at_least(wrong):
    with pytest.raises(ValueError, match=f"total_tgt_pts={wrong}"):
        Metabatch(1, 5, 10, wrong, predict_full_target=True)


@pytest.mark.parametrize(
    ("sizes", "wrong", "near"),
    [
        ("metabach", "metabach", "metabatch"),
        ("way-shot", "way-shot", "way_shot"),
        ({"law": "fixd"}, "fixd", "fixed"),
        ({"law": "rest", "min_tgt": 3}, "min_tgt", "min_tgt_pts"),
        ({"law": "way_shot", "way": 5}, "way", "ways"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_right_one(sizes, wrong, near):
    with pytest.raises(ValueError) as error:
        make_law(sizes, KNOWN)
    assert wrong in str(error.value)
    assert f"did you mean {near!r}?" in str(error.value)


def test_a_name_far_from_all_is_answered_with_the_choices():
    with pytest.raises(ValueError) as error:
        make_law("gaussian", KNOWN)
    assert "did you mean" not in str(error.value)
    for name in LAWS:
        assert name in str(error.value)


# --- a law of one's own ------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubling(SizeLaw):
    start: int

    def draw(self, words):
        n_context = self.start << (words[0] >> 63)
        return {"n_context": n_context, "n_target": n_context, "doubled": words[0] >> 63}

    def describe(self):
        return f"context {self.start} or twice that"


def test_a_law_of_ones_own_draws_what_it_likes():
    sizes = {(d["n_context"], d["doubled"]) for d in draws(make_law(Doubling(4), KNOWN), 50)}
    assert sizes == {(4, 0), (8, 1)}
