"""Search spaces: what YAML may say, and what it means to Optuna."""

from __future__ import annotations

import pytest

from metabatch_cli.config.errors import ConfigError
from metabatch_cli.sweeps.space import flat_space, read_space

optuna = pytest.importorskip("optuna")
distributions = optuna.distributions

CONFIG = {"model": {"width": 64, "activation": "relu"}, "optimizer": {"lr": 0.1}}


def test_ranges_and_choices_are_distributions():
    space = {
        "model.width": {"low": 8, "high": 64, "step": 8},
        "optimizer.lr": {"low": 1e-4, "high": 1, "log": True},
        "model.activation": {"choices": ["relu", "gelu"]},
    }
    assert read_space(space, CONFIG) == {
        "model.width": distributions.IntDistribution(8, 64, step=8),
        "optimizer.lr": distributions.FloatDistribution(1e-4, 1.0, log=True),
        "model.activation": distributions.CategoricalDistribution(["relu", "gelu"]),
    }


def test_a_space_may_be_nested_as_the_configuration_is():
    entry = {"low": 1, "high": 2}
    assert flat_space({"model": {"width": entry}, "optimizer.lr": entry}) == {
        "model.width": entry,
        "optimizer.lr": entry,
    }


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "tune.space: is empty"),
        ({"model.widht": {"low": 1, "high": 2}}, "did you mean 'width'?"),
        ({"modle.width": {"low": 1, "high": 2}}, "did you mean 'model'?"),
        ({"model.width": 3}, "tune.space.model.width=3: is no range"),
        ({"model.width": {"low": 1}}, "is no range"),
        ({"model.width": {"low": 1, "hihg": 2}}, "is no range"),
        ({"model.width": {"choices": []}}, "is no range"),
        ({"model.width": {"low": 2, "high": 1}}, "is no range"),
        ({"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}, "is no range"),
        ({"optimizer.lr": {"low": "a", "high": 1}}, "is no range"),
        ({"optimizer.lr": {"low": 0.1, "high": float("inf")}}, "must be finite"),
    ],
)
def test_what_is_no_range_is_said_under_its_key(space, said):
    with pytest.raises(ConfigError) as caught:
        read_space(space, CONFIG)
    assert said in str(caught.value)
