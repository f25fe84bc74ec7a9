"""What is left to the machine is decided once, and then stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from metabatch_cli.batching.auto import cores
from metabatch_cli.config.choices import CHOICES, check_device, default_data_dir, resolve
from metabatch_cli.config.compose import compose
from metabatch_cli.config.errors import ConfigError, UserError
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.same_run import refuse_other_configuration
from tests.config.examples import BASE

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def leaf(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


def test_nothing_is_left_to_be_chosen():
    plain = resolve(compose(*BASE))
    for key in CHOICES:
        assert leaf(plain, key) not in (None, "auto"), key


def test_resolving_leaves_the_composed_configuration_as_it_was():
    config = compose(*BASE)
    before = OmegaConf.to_yaml(config)
    resolve(config)
    assert OmegaConf.to_yaml(config) == before


def test_nothing_is_left_to_be_interpolated():
    plain = resolve(compose(*BASE, "scheduler=cosine", "trainer.max_steps=123"))
    assert plain["scheduler"]["T_max"] == 123
    assert "${" not in str(plain)


@NO_CUDA
def test_without_a_gpu_everything_is_on_the_cpu_and_nothing_is_pinned():
    plain = resolve(compose(*BASE))
    assert plain["loader"]["device"] == "cpu"
    assert plain["loader"]["pin_memory"] is False


def test_threads_are_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert resolve(compose(*BASE))["trainer"]["threads"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.threads=3", "trainer.threads", 3),
        ("loader.device=cpu", "loader.device", "cpu"),
        ("loader.pin_memory=true", "loader.pin_memory", True),
        ("data_dir=somewhere", "data_dir", os.path.abspath("somewhere")),
        ("data_dir='~/somewhere'", "data_dir", os.path.expanduser("~/somewhere")),
    ],
)
def test_what_is_typed_is_not_chosen(override, key, value):
    assert leaf(resolve(compose(*BASE, override)), key) == value


def test_a_data_folder_stays_where_it_was_when_the_run_is_resumed_from_elsewhere(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert resolve(compose(*BASE, "data_dir=somewhere"))["data_dir"] == str(tmp_path / "somewhere")


def test_what_a_run_chose_stays_when_it_is_resumed():
    saved = {
        "data_dir": "/elsewhere",
        "loader": {"device": "cpu", "pin_memory": True},
        "trainer": {"threads": 97},
    }
    plain = resolve(compose(*BASE), saved)
    for key in CHOICES:
        assert leaf(plain, key) == leaf(saved, key), key


def test_what_is_typed_beats_what_a_run_chose():
    plain = resolve(compose(*BASE, "trainer.threads=2"), {"trainer": {"threads": 97}})
    assert plain["trainer"]["threads"] == 2


@pytest.mark.parametrize("saved", [{}, {"loader": None}, {"trainer": {}}, {"data_dir": None}])
def test_what_a_run_did_not_save_is_chosen_anew(saved):
    assert leaf(resolve(compose(*BASE), saved), "trainer.threads") >= 1


@pytest.mark.parametrize("device", ["cppu", "tpu", "meta", "cpu:1", 3])
def test_a_device_that_is_not_there_is_named_with_those_that_are(device):
    with pytest.raises(ConfigError) as caught:
        check_device(device)
    said = str(caught.value)
    assert said.startswith(f"loader.device={device}: ")
    assert "auto, cpu" in said


@NO_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=f"loader.device={device}: there is no such device here"):
        resolve(compose(*BASE, f"loader.device={device}"))


def test_a_run_goes_on_with_whatever_gpu_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    saved = resolve(compose(*BASE, "loader.device=cuda:1"))
    now = resolve(compose(*BASE), saved)
    assert leaf(now, "loader.device") == "cuda"
    run = RunDirectory(tmp_path)
    refuse_other_configuration(run, saved, now)
    with pytest.raises(UserError, match=r"loader\.device: cuda:1 in the run, cpu asked for"):
        refuse_other_configuration(run, saved, resolve(compose(*BASE, "loader.device=cpu"), saved))


def test_threads_are_shared_by_processes(monkeypatch):
    monkeypatch.setattr("metabatch_cli.config.choices.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    four = ("loader.shards=4", "trainer.processes=4")
    alone, shared = resolve(compose(*BASE)), resolve(compose(*BASE, *four))
    assert leaf(alone, "trainer.threads") == 8
    assert leaf(shared, "trainer.threads") == 2
    assert leaf(resolve(compose(*BASE, *four), alone), "trainer.threads") == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert leaf(resolve(compose(*BASE, *four)), "trainer.threads") == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert leaf(resolve(compose(*BASE, *four)), "trainer.threads") == 2


def test_a_near_name_of_a_device_is_offered():
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        check_device("cppu")


def test_the_data_folder_is_the_environments_else_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("METABATCH_DATA", str(tmp_path / "here"))
    assert default_data_dir() == str(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METABATCH_DATA", "relative")
    assert default_data_dir() == str(tmp_path / "relative")
    monkeypatch.delenv("METABATCH_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Path(default_data_dir()).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    ("given", "threads"), [("3", 3), ("5,2", 5), ("", None), ("0", None), ("many", None)]
)
def test_threads_are_those_that_a_launcher_sets_else_one_a_core(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert resolve(compose(*BASE))["trainer"]["threads"] == (threads or cores())


def test_a_slurm_job_has_the_cores_that_it_was_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("METABATCH_JOBS", raising=False)
    here = cores()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert cores() == resolve(compose(*BASE))["trainer"]["threads"] == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    assert cores() == here
    monkeypatch.setenv("METABATCH_JOBS", str(2 * here))
    assert cores() == 1
