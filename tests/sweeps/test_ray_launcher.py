"""What each job on Ray is given: never more than there is, and all devices are in use."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.sweeps.ray_launcher import RayLauncher, Share, is_for_jobs, share_of

COUNTS = st.integers(1, 64)
NOBODYS = Share(0, -1)


@given(cpus=COUNTS, gpus=st.integers(0, 8), waiting=COUNTS, jobs=st.none() | COUNTS)
def test_jobs_on_a_machine_share_its_cores_and_devices(cpus, gpus, waiting, jobs):
    share = share_of({"CPU": cpus, "GPU": gpus}, waiting, NOBODYS, jobs, alone=True)
    at_once = min(jobs or gpus or cpus, waiting)
    assert 1 <= share.cpus <= max(cpus / at_once, 1)
    assert (share.cpus + 1) * at_once > cpus  # nor are cores left over
    if not gpus:
        assert share.gpus == 0
        return
    on_each = math.floor(1 / share.gpus + 1e-9)
    assert on_each * gpus >= at_once  # there is room for all
    assert (on_each - 1) * gpus < at_once  # and none is shared while another is free


def test_a_cluster_is_others_too():
    there = {"CPU": 64, "GPU": 8}
    assert share_of(there, 2, NOBODYS, None, alone=False) == Share(1, 1)
    assert share_of({"CPU": 64, "GPU": 0}, 2, NOBODYS, 1, alone=False) == Share(1, 0)


@pytest.mark.parametrize("alone", [True, False])
def test_what_somebody_wants_is_given(alone):
    wanted = Share(4, 0.5)
    assert share_of({"CPU": 8, "GPU": 2}, 9, wanted, None, alone=alone) == wanted
    assert share_of({"CPU": 8, "GPU": 2}, 9, Share(4, 0), None, alone=alone).gpus == 0


@pytest.mark.parametrize(
    "given", [{"cpus": "two"}, {"gpus": -1}, {"jobs": 1.5}, {"cpus": float("nan")}, {"jobs": True}]
)
def test_what_is_no_number_is_refused_by_its_key(given):
    (key,) = given
    with pytest.raises(ConfigError, match=rf"^launcher\.{key}="):
        RayLauncher(**given)


def test_without_ray_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nothing = cast(Any, None)
    with pytest.raises(UserError, match=r"pip install '\.\[ray\]'"):
        RayLauncher().setup(hydra_context=nothing, task_function=nothing, config=nothing)


@pytest.mark.parametrize(
    ("name", "goes_along"),
    [
        ("METABATCH_DATA", True),
        ("HYDRA_FULL_ERROR", True),
        ("METABATCH_MKL_AVX512", False),  # comes too late for a process that has imported us
        ("PATH", False),
    ],
)
def test_the_variables_of_ours_go_along_with_a_job(name, goes_along):
    assert is_for_jobs(name) is goes_along
