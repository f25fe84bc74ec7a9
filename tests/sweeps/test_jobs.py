"""Jobs are called by what tells them apart, and known again by what was typed."""

from __future__ import annotations

import pytest

from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.sweeps.jobs import identity, job_names, known_jobs, record_failure


def test_a_job_is_called_by_what_it_has_for_itself():
    jobs = [
        ["+experiment=cnp_sine", f"seed={seed}", f"model.width={width}"]
        for seed in (0, 1)
        for width in (8, 16)
    ]
    assert job_names(jobs, {}) == [
        "seed=0,model.width=8",
        "seed=0,model.width=16",
        "seed=1,model.width=8",
        "seed=1,model.width=16",
    ]
    assert job_names([["+experiment=a"], ["+experiment=b"]], {}) == ["experiment=a", "experiment=b"]
    assert job_names([["+experiment=a", "seed=0"]], {}) == ["job"]
    assert job_names([], {}) == []


@pytest.mark.parametrize("values", [("/a/b", "/a_b"), ("[1,2]", "{a: b}"), ("x" * 300, "x" * 301)])
def test_names_are_of_files_and_differ_where_jobs_do(tmp_path, values):
    names = job_names([[f"data_dir={value}"] for value in values], {})
    assert len(set(names)) == 2
    for name in names:
        (tmp_path / name).mkdir()


def test_a_job_is_where_it_was_and_no_other_one_is_there():
    before = [["seed=0", "width=8"], ["seed=0", "width=16"]]
    known = dict(zip(map(identity, before), job_names(before, {}), strict=True))
    assert set(known.values()) == {"width=8", "width=16"}
    after = [["width=8", "seed=1"], ["width=8", "seed=0"], ["width=16", "seed=1"]]
    new, same, other = job_names(after, known)
    assert same == "width=8"
    assert len({new, same, other} | set(known.values())) == 4
    assert job_names(after, known) == [new, same, other]
    (alone,) = job_names([["width=8", "seed=1"]], known | {identity(["x=1"]): "job"})
    assert alone.startswith("job-")


def test_where_and_how_a_job_runs_is_no_part_of_it():
    words = ["launcher=parallel", "launcher.jobs=2", "hydra.sweep.dir=x", "+fresh=true"]
    assert identity(["seed=1", "+a=2", *words]) == identity(["a=2", "seed=1"])
    assert identity(["loggers=1"]) != identity([])


def test_a_job_that_failed_before_it_began_is_remembered_and_found(tmp_path):
    record_failure(tmp_path / "one", ["+experiment=x", "seed=1"], "there is no x")
    found = RunDirectory(tmp_path / "one").read_result()
    assert (found["status"], found["error"]) == ("failed", "there is no x")
    assert known_jobs(tmp_path) == {identity(["seed=1", "experiment=x"]): "one"}


def test_of_a_run_that_is_there_nothing_is_overwritten(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config({"seed": 1}, ["seed=1"])
    run.write_result(status="completed")
    record_failure(tmp_path, ["seed=2"], "another configuration")
    assert run.read_result() == {"status": "completed"}
