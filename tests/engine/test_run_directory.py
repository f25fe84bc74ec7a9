"""A run's directory: whole files at any moment, one process at a time, nothing else touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.report.files import finite, write_atomically, write_json, write_text

LOCKED = """
    import sys
    from metabatch_cli.config.errors import UserError
    from metabatch_cli.engine.run_directory import RunDirectory
    try:
        with RunDirectory(sys.argv[1]).lock():
            print("mine")
    except UserError as error:
        print(error)
"""
HOLDS_WITH_A_FORKED_WORKER = """
    import os, signal, sys
    from metabatch_cli.engine.run_directory import RunDirectory
    with RunDirectory(sys.argv[1]).lock():
        worker = os.fork()
        if not worker:
            signal.pause()
        print(worker, flush=True)
        signal.pause()
"""


def another_process(directory: Path) -> str:
    """What another process says when it tries to lock the directory."""
    code = textwrap.dedent(LOCKED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# --- whole files -----------------------------------------------------------------------------


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_file_is_replaced_as_a_whole(tmp_path_factory, old, new):
    file = tmp_path_factory.mktemp("files") / "sub" / "file"
    for content in (old, new):
        write_atomically(file, lambda stream, content=content: stream.write(content))
        assert file.read_bytes() == content
    assert os.listdir(file.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "file"
    file.write_text("old")

    def fail(stream):
        stream.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_keeps_the_file_that_it_has_opened(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with file.open() as reader:
        write_text(file, "new")
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_files_are_as_readable_as_the_user_wants_files_to_be(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(values)
def test_whatever_is_written_is_json_of_the_strict_kind(tmp_path_factory, tree):
    def refuse(constant):
        raise AssertionError(constant)

    file = tmp_path_factory.mktemp("json") / "tree.json"
    write_json(file, tree)
    assert json.loads(file.read_text(), parse_constant=refuse) == finite(tree)


def test_numbers_that_json_cannot_hold_become_null():
    tree = {"a": [1.5, float("nan")], "b": {"c": float("inf")}, 3: (float("-inf"), 2)}
    assert finite(tree) == {"a": [1.5, None], "b": {"c": None}, "3": [None, 2]}


# --- one process at a time -------------------------------------------------------------------


def test_a_lock_keeps_a_second_process_out_and_names_the_first(tmp_path):
    with RunDirectory(tmp_path / "run").lock():
        said = another_process(tmp_path / "run")
        assert "is in use by" in said
        assert str(os.getpid()) in said
    assert another_process(tmp_path / "run") == "mine"


def test_a_process_keeps_itself_out_too(tmp_path):
    with RunDirectory(tmp_path).lock():
        with pytest.raises(UserError, match="is in use"), RunDirectory(tmp_path).lock():
            pass
        with RunDirectory(tmp_path / "other").lock():
            pass
    with RunDirectory(tmp_path).lock():
        pass


def test_an_attempt_of_the_same_process_does_not_open_the_door_to_others(tmp_path):
    with RunDirectory(tmp_path).lock():
        with pytest.raises(UserError, match="is in use"), RunDirectory(tmp_path).lock():
            pass
        assert "is in use" in another_process(tmp_path)


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path).lock():
        raise ZeroDivisionError
    with RunDirectory(tmp_path).lock():
        pass


def test_a_lock_dies_with_its_killed_owner_even_while_workers_live_on(tmp_path):
    code = textwrap.dedent(HOLDS_WITH_A_FORKED_WORKER)
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    worker = int(owner.stdout.readline())
    try:
        held = pytest.raises(UserError, match=f"is in use by process {owner.pid}")
        with held, RunDirectory(tmp_path).lock():
            pass
        owner.kill()
        owner.wait()
        os.kill(worker, 0)  # it lives
        with RunDirectory(tmp_path).lock():
            pass
    finally:
        owner.stdout.close()
        os.kill(worker, signal.SIGKILL)


# --- what is a run, and what belongs to it ---------------------------------------------------


def full_of_a_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.write_config({"seed": 1}, ["seed=1"])
    run.write_result(status="completed")
    for file in (run.metrics_file, run.log_file, run.profile_file):
        write_text(file, "something")
    for file in (
        run.last_checkpoint,
        run.best_checkpoint,
        run.figures / "predictions.png",
        run.evaluations / "test.json",
    ):
        write_text(file, "something")
    return run


def test_clearing_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = full_of_a_run(tmp_path)
    mine = [
        tmp_path / name
        for name in ("notes.txt", "data/x.csv", "config.yaml.bak", "metrics.txt", "figures/own.pdf")
    ]
    mine += [tmp_path / "checkpoints" / "other.ckpt", tmp_path / "evaluations" / "mine.csv"]
    for file in mine:
        write_text(file, "mine")
    run.clear()
    left = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(mine)
    assert not run.holds_run


@pytest.mark.parametrize("file", ["metrics.csv", "tensorboard/x", "mlflow/run.json", "wandb/id"])
def test_clearing_deletes_what_further_loggers_wrote(tmp_path, file):
    run = full_of_a_run(tmp_path)
    write_text(tmp_path / file, "something")
    run.clear()
    assert not (tmp_path / file).exists()


def test_clearing_a_directory_without_a_run_does_nothing(tmp_path):
    RunDirectory(tmp_path / "nowhere").clear()
    run = full_of_a_run(tmp_path)
    run.config_file.unlink()
    before = sorted(tmp_path.rglob("*"))
    run.clear()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_kill_leaves_of_clearing_is_still_a_run(tmp_path, monkeypatch):
    run = full_of_a_run(tmp_path)
    deleted = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda f, **kw: deleted.append(f) or unlink(f, **kw))
    run.clear()
    assert deleted[-1] == run.config_file


def test_configuration_and_what_was_typed_are_read_back(tmp_path):
    config = {"seed": 1, "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999]}, "trainer": {"x": None}}
    run = RunDirectory(tmp_path)
    assert not run.holds_run
    run.write_config(config, ["optimizer.lr=1e-5", "seed=1"])
    assert run.holds_run
    assert run.read_config() == config
    assert list(run.read_config()) == list(config)
    assert "optimizer.lr=1e-5" in run.overrides_file.read_text()


def test_results_are_updated_entry_by_entry_and_survive_damage(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.read_result() == {}
    run.write_result(status="running", step=3)
    assert run.write_result(step=4) == {"status": "running", "step": 4}
    assert run.read_result() == {"status": "running", "step": 4}
    run.result_file.write_text('{"status": "runn')
    assert run.read_result() == {}


@pytest.mark.parametrize("text", ["a: [1", "just text", "- 1\n- 2\n"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    run = RunDirectory(tmp_path)
    run.config_file.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        run.read_config()


def test_a_directory_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "first_run").mkdir()
    with pytest.raises(UserError) as caught:
        RunDirectory.existing(tmp_path / "frist_run")
    assert "there is no such directory" in str(caught.value)
    assert f"did you mean {tmp_path / 'first_run'}?" in str(caught.value)


def test_a_directory_that_is_no_run_is_named_with_the_runs_in_it(tmp_path):
    full_of_a_run(tmp_path / "sweep" / "0")
    with pytest.raises(UserError) as caught:
        RunDirectory.existing(tmp_path / "sweep", "init_from")
    assert str(caught.value).startswith(f"init_from={tmp_path / 'sweep'}: is no run")
    assert f"a run in it: {tmp_path / 'sweep' / '0'}" in str(caught.value)
    assert RunDirectory.existing(tmp_path / "sweep" / "0").read_config() == {"seed": 1}


def test_a_relative_path_stays_where_it_was_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("run")
    monkeypatch.chdir("/")
    assert run.path == tmp_path / "run"
