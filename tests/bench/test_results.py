"""What is refused before anything is measured, and what is read again afterwards."""

from __future__ import annotations

import math

import pytest

from metabatch_cli.bench import results
from metabatch_cli.config.check import check_fields
from metabatch_cli.config.errors import ConfigError
from metabatch_cli.config.schema import BenchLoaderConfig


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("work", [], "a list that has at least 1 item"),
        ("work", ["sine", "pyhton"], "did you mean 'python'?"),
        ("rivals", ["bare", "dataload"], "did you mean 'dataloader'?"),
        ("seconds", 0, "more than 0"),
        ("seconds", True, "a number"),
        ("batch_sizes", [4, 0], "at least 1"),
        ("workers", -1, "at least 0"),
        ("workers", "two", "a whole number"),
        ("repeats", 0, "at least 1"),
        ("max_batch_mib", math.nan, "more than 0"),
        ("out", 3, "text"),
        ("sceonds", 3, "did you mean 'seconds'?"),
    ],
)
def test_a_key_that_cannot_be_is_named_with_what_is_allowed(key, value, said):
    with pytest.raises(ConfigError) as caught:
        check_fields(BenchLoaderConfig, {key: value})
    assert str(caught.value).startswith(key)
    assert said in str(caught.value)


def test_a_single_value_is_a_list_of_one():
    config = check_fields(BenchLoaderConfig, {"work": "sine", "workers": 2, "batch_sizes": 4})
    assert (config.work, config.workers, config.batch_sizes) == (["sine"], [2], [4])


def test_what_was_written_is_read_again(tmp_path):
    file = results.writable("out", str(tmp_path / "found.json"))
    assert file is not None
    results.write(file, "loader", {"cells": [], "rate": math.inf})
    found = results.read("read", str(file), "loader")
    assert found == {"benchmark": "loader", "version": 1, "cells": [], "rate": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[]", "is something else"),
        ('{"benchmark": "train", "version": 1}', "what `metabatch bench loader` wrote"),
        ('{"benchmark": "loader", "version": 99}', "version 1"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, said):
    file = tmp_path / "found.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        results.read("read", str(file), "loader")
    assert str(caught.value).startswith(f"read={str(file)[:70]}")


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    assert results.writable("out", None) is None
    with pytest.raises(ConfigError, match="is a folder"):
        results.writable("out", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no folder"):
        results.writable("out", str(tmp_path / "nowhere" / "found.json"))
    assert list(tmp_path.iterdir()) == []
