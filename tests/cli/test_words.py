"""The command line itself: help, versions, mistakes, completion; none of it needs torch."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time

import pytest
import torch
import yaml

import metabatch_cli
from metabatch_cli.app import COMMANDS
from metabatch_cli.commands.hydra_app import sorted_out
from metabatch_cli.config.compose import config_dir
from metabatch_cli.engine.run_directory import RunDirectory
from tests.cli.program import SCRIPT, TINY, metabatch, only_message

# --- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], []])
def test_help_names_every_verb(tmp_path, words):
    said = metabatch(*words, cwd=tmp_path).stdout
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} .*{re.escape(command.summary)}$", said, re.MULTILINE), name


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_a_help_of_its_own(tmp_path, verb):
    said = metabatch(verb, "--help", cwd=tmp_path).stdout
    assert f"metabatch {verb}" in said or verb == "check"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["eval", "--help"], ["resume", "--help"]])
def test_a_reader_that_leaves_is_no_error(tmp_path, words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [SCRIPT, *words],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_the_version_is_the_packages(tmp_path):
    said = metabatch("--version", cwd=tmp_path).stdout
    assert said == f"metabatch {metabatch_cli.__version__}\n"


@pytest.mark.parametrize(
    ("word", "near"), [("trian", "train"), ("evaluate", "eval"), ("--hlep", None), ("xyzzy", None)]
)
def test_an_unknown_verb_ends_with_2_and_the_nearest(tmp_path, word, near):
    said = only_message(metabatch(word, cwd=tmp_path, code=2))
    assert repr(word) in said
    assert near is None or f"did you mean {near!r}?" in said
    assert all(verb in said for verb in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [("train", "--foo"), ("ls", "--foo"), ("resume",), ("report",), ("report", ".", "--foo")],
    ids=" ".join,
)
def test_an_unknown_option_ends_with_2_and_the_usage(tmp_path, words):
    said = metabatch(*words, cwd=tmp_path, code=2).stderr
    assert "usage: metabatch" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("ls", "model"),
        ("train", *TINY[:1], "--cfg", "job"),
        ("train", "--help"),
        ("eval", "--help"),
        ("report", "nowhere"),
        ("bench",),
        ("bench", "loader", "--help"),
        ("bench", "loader", "--cfg", "job"),
        ("bench", "train", "--cfg", "job", *TINY),
        ("train", "model=cnnp"),
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_for(tmp_path, words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "metabatch_cli", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "metabatch_cli.app" in imported
    assert not {"torch", "numpy", "matplotlib"} & imported


@pytest.mark.slow
def test_help_takes_less_than_a_third_of_importing_torch(tmp_path):
    def median_of_three(command: list[str]) -> float:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    torch_alone = median_of_three([sys.executable, "-c", "import torch"])
    assert median_of_three([SCRIPT, "--help"]) < torch_alone / 3


# --- what there is ---------------------------------------------------------------------------


def test_the_configuration_is_printed_as_yaml(tmp_path):
    said = metabatch("train", "--cfg", "job", *TINY, "seed=7", cwd=tmp_path).stdout
    config = yaml.safe_load(said)
    assert config["seed"] == 7
    assert config["model"]["width"] == 8
    assert config["trainer"]["max_steps"] == 10  # debug=short comes after the experiment
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "train --cfg job +experiment=cnp_sine debug=short",
        "train --cfg job debug=short +experiment=cnp_sine",
        "check --cfg job +experiment=cnp_sine debug=short",
        ("train +experiment=cnp_sine debug=short --cfg job"),
        ("train debug=short +experiment=cnp_sine --cfg job"),
        ("check +experiment=cnp_sine debug=short --cfg job"),
        ("train +experiment=cnp_sine --config-dir . debug=short --cfg job"),
    ],
)
def test_options_may_stand_before_and_behind_the_overrides(tmp_path, words):
    config = yaml.safe_load(metabatch(*words.split(), cwd=tmp_path).stdout)
    assert config["trainer"]["max_steps"] == 10


def test_everything_is_listed_with_a_line_that_says_what_it_is(tmp_path):
    said = metabatch("ls", cwd=tmp_path).stdout
    for group in ("experiment", "taskset", "model", "learner", "optimizer", "debug", "logger"):
        assert re.search(rf"^{group}  \(", said, re.MULTILINE), group
    assert re.search(r"^  cnp_sine +A conditional neural process", said, re.MULTILINE)


def test_one_group_is_listed_alone_and_with_ones_own(tmp_path):
    said = metabatch("ls", "model", cwd=tmp_path).stdout
    assert said.splitlines()[0] == "model  (model=NAME)"
    assert re.search(r"^  cnp +Conditional neural process", said, re.MULTILINE)
    assert "optimizer" not in said
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("# My own network.\n_target_: a.B\n")
    said = metabatch("ls", "model", "--config-dir", "conf", cwd=tmp_path).stdout
    assert re.search(r"^  mine +My own network\.$", said, re.MULTILINE)
    assert re.search(r"^  cnp ", said, re.MULTILINE)


def test_a_group_that_is_not_there_is_named_with_the_nearest(tmp_path):
    said = only_message(metabatch("ls", "mdel", cwd=tmp_path, code=1))
    assert "did you mean 'model'?" in said


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loader.batchsize=3"], ["loader.batchsize", "did you mean 'batch_size'?"]),
        (["loader.batch_size=0"], ["loader.batch_size=0", "at least 1"]),
        (["taskset.min_pts=30", "taskset.max_ctx_pts=10"], ["max_ctx_pts=10", "min_pts=30"]),
        (["model=cnnp"], ["model=cnnp", "did you mean 'cnp'?"]),
        (["learner=protonet"], ["learner: ProtoNet tells classes apart", "omniglot_episodes"]),
        (["model._target_=my_models.Net"], ["model._target_=my_models.Net", "'my_models'"]),
        pytest.param(
            ["loader.device=cuda"],
            ["loader.device=cuda", "auto, cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_message_and_leaves_no_run_directory(tmp_path, words, said):
    done = metabatch("train", "+experiment=cnp_sine", *words, cwd=tmp_path, code=1)
    message = only_message(done)
    assert all(part in message for part in said), message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(tmp_path.glob("outputs/*/*")) == []


def test_an_unknown_key_is_named_with_the_nearest_while_debugging_too(tmp_path):
    words = ("+experiment=cnp_sine", "debug=short", "loader.batchsize=3")
    done = metabatch("train", *words, cwd=tmp_path, code=1)
    assert "did you mean 'batch_size'?" in only_message(done)


def test_a_mistake_leaves_nothing_at_all(tmp_path):
    metabatch("train", *TINY, "loader.batch_size=0", cwd=tmp_path, code=1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_run_cannot_be_scored(tmp_path):
    (tmp_path / "empty").mkdir()
    for directory, said in (("empty", "is no run"), ("nowhere", "there is no such directory")):
        message = only_message(metabatch("eval", f"run={directory}", cwd=tmp_path, code=1))
        assert message.startswith(f"metabatch: run={directory}: {said}")
    message = only_message(metabatch("resume", "empty", cwd=tmp_path, code=1))
    assert "is no run" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_directory_in_use_is_refused(tmp_path):
    with RunDirectory(tmp_path / "run").lock():
        done = metabatch("train", *TINY, "hydra.run.dir=run", cwd=tmp_path, code=1)
        assert f"is in use by process {os.getpid()}" in only_message(done)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_with_debug_a_mistake_shows_its_traceback(tmp_path):
    done = metabatch("train", "--debug", *TINY, "model=cnnp", cwd=tmp_path, code=1)
    assert "Traceback" in done.stderr


MODELS = [file.stem for file in (config_dir() / "model").glob("*.yaml")]

# --- completion ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("metabatch tr", {"train"}),
        ("metabatch ", set(COMMANDS)),
        ("metabatch train model=", {f"model={name}" for name in MODELS}),
        ("metabatch train model=conv4", {"model=conv4", "model=conv4_maml"}),
        ("metabatch train optim", {"optimizer=", "optimizer."}),
        ("metabatch train +experiment=cnp_s", {"+experiment=cnp_sine"}),
        ("metabatch check model=ml", {"model=mlp"}),
        ("metabatch ls mo", {"model"}),
        ("metabatch bench ", {"learner", "loader", "train"}),
        ("metabatch bench lo", {"loader"}),
        ("metabatch bench loader sec", {"seconds="}),
        ("metabatch bench train bench.", {"bench.out=", "bench.seconds=", "bench.warm_up="}),
        ("metabatch bench train model=ml", {"model=mlp"}),
        ("metabatch bench nothing model=", set()),
        ("metabatch eval ", {"run="}),
        ("metabatch eval run=", {"run=outputs/", "run=other/"}),
        ("metabatch eval run=outputs/", {"run=outputs/one/", "run=outputs/two/"}),
        ("metabatch resume ot", {"other/"}),
        ("metabatch report ou", {"outputs/"}),
        ("metabatch --version ", set()),
    ],
)
def test_completion_offers(tmp_path, line, offered):
    for folder in ("outputs/one", "outputs/two", "other"):
        (tmp_path / folder).mkdir(parents=True)
    done = metabatch("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stderr == ""
    assert set(done.stdout.split()) == offered


def test_completion_is_installed_by_a_script_for_this_name(tmp_path):
    script = metabatch("-sc", "install=bash", cwd=tmp_path).stdout
    assert "metabatch" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


# --- the order of words ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options", "overrides"),
    [
        ("a=1 --cfg job b=2", "--cfg job", "a=1 b=2"),
        ("--config-dir conf +e=x -m s=0,1", "--config-dir conf -m", "+e=x s=0,1"),
        ("+e=x --info", "--info all", "+e=x"),
        ("--info +e=x", "--info all", "+e=x"),
        ("--info searchpath +e=x", "--info searchpath", "+e=x"),
        ("a=-1 ~b", "", "a=-1 ~b"),
    ],
)
def test_options_may_stand_anywhere_among_overrides(words, options, overrides):
    assert sorted_out(words.split()) == (options.split(), overrides.split())
