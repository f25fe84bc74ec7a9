"""Validation: whatever is shipped passes, whatever cannot be is named with what is allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metabatch_cli.config.check import FROM_SPEC, check, check_component, locate, test_sets
from metabatch_cli.config.compose import compose, config_dir
from metabatch_cli.config.errors import ConfigError, UserError
from tests.config.examples import BASE, checked, plain, with_value

test_sets.__test__ = False  # it is no test

HERE = "tests.config.examples"
GROUPS = sorted(
    folder.name for folder in config_dir().iterdir() if folder.is_dir() and folder.name != "hydra"
)
FILES = [
    (group, file.relative_to(config_dir() / group).with_suffix("").as_posix())
    for group in GROUPS
    for file in sorted((config_dir() / group).rglob("*.yaml"))
]
ADDED = {"experiment", "setup", "sweep", "debug"}  # groups that nothing is chosen from by default


def mistake(*overrides: str, **changed: Any) -> str:
    """What is said about a configuration with one thing wrong."""
    config = plain(*overrides)
    for key, value in changed.items():
        with_value(config, key.replace("__", "."), value)
    with pytest.raises(UserError) as caught:
        check(config)
    return str(caught.value)


def refusal(node: Any, **more: Any) -> ConfigError:
    """What is said about a component."""
    with pytest.raises(ConfigError) as caught:
        check_component("part", node, **more)
    return caught.value


# --- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "name"), [f for f in FILES if f[0] not in ADDED])
def test_every_shipped_choice_composes_and_passes(group, name):
    needs = ["taskset.dataset.root=images"] if name.startswith("image_folder") else []
    needs += ["taskset=gp"] if (group, name) == ("evaluation", "ranges") else []
    config = checked(f"{group}={name}", *needs)
    assert config.trainer.max_steps >= 1


EXPERIMENTS = [name for group, name in FILES if group == "experiment"]
DEBUGS = [name for group, name in FILES if group == "debug"]


@pytest.mark.parametrize(
    ("experiment", "debug"),
    [
        *((experiment, None) for experiment in EXPERIMENTS),
        *(("cnp_sine", debug) for debug in DEBUGS),
        *(
            pytest.param(experiment, debug, marks=pytest.mark.slow)
            for experiment in EXPERIMENTS
            for debug in DEBUGS
            if experiment != "cnp_sine"
        ),
    ],
)
def test_every_experiment_passes_also_while_debugging(experiment, debug):
    from metabatch_cli.config.choices import resolve

    config = resolve(compose(f"+experiment={experiment}", *([f"+debug={debug}"] if debug else [])))
    check(config)
    if debug is not None:
        assert config["trainer"]["max_steps"] <= 500


@pytest.mark.parametrize("setup", [name for group, name in FILES if group == "setup"])
def test_every_setup_takes_a_model(setup):
    from metabatch_cli.config.choices import resolve

    config = resolve(compose(f"+setup={setup}", "model=cnp"))
    assert check(config).trainer.max_steps >= 1


@pytest.mark.parametrize("sweep", [name for group, name in FILES if group == "sweep"])
def test_every_sweep_names_experiments_that_there_are(sweep):
    params = yaml.safe_load((config_dir() / "sweep" / f"{sweep}.yaml").read_text())["hydra"]
    names = params["sweeper"]["params"]["+experiment"].split(",")
    assert set(names) <= {name for group, name in FILES if group == "experiment"}


def test_every_shipped_file_opens_with_a_line_that_says_what_it_is():
    for group, name in FILES:
        text = (config_dir() / group / f"{name}.yaml").read_text()
        comments = [line for line in text.splitlines() if line.startswith("# ")]
        described = [line for line in comments if "@package" not in line]
        assert described, f"{group}/{name}"
        assert len(described[0]) > 10, f"{group}/{name}"


@pytest.mark.parametrize("experiment", [name for group, name in FILES if group == "experiment"])
def test_every_experiment_opens_with_the_command_that_runs_it(experiment):
    text = (config_dir() / "experiment" / f"{experiment}.yaml").read_text()
    assert f"metabatch train +experiment={experiment}" in text


# --- the sections ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sede", "seed"),
        ("taskest", "taskset"),
        ("loader.batchsize", "batch_size"),
        ("loader.worker", "workers"),
        ("loader.balance.alpah", "alpha"),
        ("trainer.max_step", "max_steps"),
        ("evaluation.task", "tasks"),
        ("model.widht", "width"),
        ("taskset.noize", "noise"),
        ("taskset.dataset.amplitud", "amplitude"),
        ("optimizer.learning_rate", None),
        ("optimizer.lrr", "lr"),
        ("learner.inner_lr", None),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(key, near):
    said = mistake(**{key.replace(".", "__"): 1})
    assert said.startswith(f"{key}: ")
    assert "allowed: " in said
    assert near is None or f"did you mean '{near}'?" in said


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", "abc", "a whole number"),
        ("seed", None, "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("fresh", "perhaps", "true or false"),
        ("data_dir", 3, "text"),
        ("loader.batch_size", 0, "at least 1"),
        ("loader.balance", 3, "a mapping"),
        ("loader.balance.alpha", 1.5, "at most 1"),
        ("loader.balance.alpha", "abc", "a number"),
        ("loader.balance.kind", "fixd", "'fixed' or 'random'"),
        ("loader.batch_size", "many", "a whole number"),
        ("loader.workers", "abc", "a whole number or 'auto'"),
        ("loader.workers", -2, "at least 0 or 'auto'"),
        ("loader.workers", 1.5, "a whole number or 'auto'"),
        ("loader.shards", 0, "at least 1"),
        ("loader.timeout", -1, "at least 0"),
        ("loader.n_batches", 0, "at least 1"),
        ("loader.device", 3, "text"),
        ("trainer.max_steps", 0, "at least 1"),
        ("trainer.max_steps", 10.5, "a whole number"),
        ("trainer.max_time", 0, "more than 0"),
        ("trainer.max_time", float("nan"), "more than 0"),
        ("trainer.clip_norm", -1.0, "more than 0"),
        ("trainer.precision", 16, "64, 32 or 'bf16'"),
        ("trainer.precision", "fp16", "64, 32 or 'bf16'"),
        ("trainer.test_on", "first", "'best' or 'last'"),
        ("trainer.threads", 0, "at least 1 or 'auto'"),
        ("trainer.patience", 0, "at least 1"),
        ("trainer", 3, ""),
        ("evaluation.tasks", 0, "at least 1"),
        ("evaluation.val", 3, "a mapping"),
        ("logger", 3, "a mapping"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(key, value, allowed):
    said = mistake(**{key.replace(".", "__"): value})
    shown = {None: "null"}.get(value, value)
    assert said.startswith(f"{key}={shown}: is not allowed")
    assert allowed in said


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "trainer.max_steps",
        "loader.workers",
        "loader.timeout",
        "loader.balance.alpha",
    ],
)
def test_true_is_no_number(key):
    assert mistake(**{key.replace(".", "__"): True}).startswith(f"{key}=true: is not allowed")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation.figures", 3),
        ("fresh", "perhaps"),
        ("optimizer.betas", [0.9]),
        ("taskset.x_range", [1, 2, 3]),
        ("taskset.dataset.amplitude", "abc"),
    ],
)
def test_what_is_allowed_is_said_in_plain_words(key, value):
    said = mistake(**{key.replace(".", "__"): value})
    for theirs in ("unable to interpret", "Field required", "Tuple should", "a valid tuple"):
        assert theirs not in said


@given(st.integers(1, 10**9))
def test_scientific_notation_is_accepted_where_it_is_a_whole_number(number):
    config = with_value(plain(), "trainer.max_steps", float(number))
    steps = check(config).trainer.max_steps
    assert steps == number
    assert isinstance(steps, int)


def test_1e5_is_accepted_as_it_is_typed():
    assert checked("trainer.max_steps=1e5").trainer.max_steps == 100_000
    assert checked("loader.batch_size=1e2").loader.batch_size == 100


@pytest.mark.parametrize("section", ["taskset", "model", "learner"])
def test_what_is_not_chosen_is_said_with_the_choices(section):
    config = plain()
    del config[section]
    with pytest.raises(ConfigError) as caught:
        check(config)
    said = str(caught.value)
    assert said.startswith(f"{section}: ")
    assert "+experiment=" in said
    names = {name for group, name in FILES if group == section}
    assert all(f"{section}={name}" in said for name in names)


def test_a_model_of_another_shape_is_refused_by_its_arguments():
    said = mistake("model=mlp", model__min_sigma=0.1)
    assert "model.min_sigma: MLP has no such argument" in said


# --- held-out sets -----------------------------------------------------------------------------


def test_overrides_are_one_set_without_a_name_or_several_named_by_what_differs():
    taskset = {"noise": 0.0, "max_ctx_pts": 20, "dataset": {"amplitude": 1.0}}
    assert test_sets(None, taskset) == test_sets({}, taskset) == {"": {}}
    assert test_sets({"noise": 0.1}, taskset) == {"": {"noise": 0.1}}
    several = {"shots=1": {"max_ctx_pts": 1}, "shots=5": {"max_ctx_pts": 5}, "noise=0": None}
    assert test_sets(several, taskset) == {
        "shots=1": {"max_ctx_pts": 1},
        "shots=5": {"max_ctx_pts": 5},
        "noise=0": {},
    }
    named = {"loud": {"noise": 1.0}, "quiet": {"noise": 0.0}}
    assert test_sets(named, taskset) == named
    nested = {"dataset": {"amplitude": 2.0}}  # a part of the task set is no name of one
    assert test_sets(nested, taskset) == {"": nested}


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"noize": 1}, "noize"),
        ({"noise": -1}, "noise"),
        ({"noise": "abc"}, "noise"),
        ({"dataset": {"_target_": "tasksets.functions.Sine", "height": 1}}, "dataset.height"),
        ({"shots=1": {"max_ctx_pt": 1}}, "shots=1.max_ctx_pt"),
        ({"shots=1": {"max_ctx_pts": 1}, "shots=5": {"noise": -1}}, "shots=5.noise"),
    ],
)
def test_overrides_of_a_held_out_set_are_checked_under_their_own_key(split, overrides, key):
    said = mistake(**{f"evaluation__{split}": overrides})
    assert said.startswith(f"evaluation.{split}.{key}")


def test_overrides_that_fit_pass():
    config = plain()
    config["evaluation"]["test"] = {"shots=1": {"max_ctx_pts": 1}, "shots=5": {"noise": 0.5}}
    config["evaluation"]["val"] = {"max_tgt_pts": 100}
    assert check(config).evaluation.test == config["evaluation"]["test"]


# --- components --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "argument"),
    [
        ("metabatch_cli.learners.anil.ANIL", "inner_lr"),
        ("metabatch_cli.learners.protomaml.ProtoMAML", "inner_steps"),
        ("metabatch_cli.models.banp.BANP", "width"),
    ],
)
def test_arguments_that_a_class_passes_on_are_checked_as_its_bases_say(target, argument):
    said = str(refusal({"_target_": target, argument: "many"}, provided=FROM_SPEC | {"model"}))
    assert said.startswith(f"part.{argument}=many: ")


@pytest.mark.parametrize("node", [None, 3, "text", [], {}, {"size": 3}, {"_target_": None}])
def test_a_component_without_a_target_says_so(node):
    assert str(refusal(node)).startswith("part._target_: is missing")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("metabatch_cli.models.cnp.CPN", "did you mean 'metabatch_cli.models.cnp.CNP'?"),
        ("metabatch_cli.models.conv.Conv4", "did you mean 'metabatch_cli.models.conv4'?"),
        ("metabatch_cli.learner.maml.MAML", "did you mean 'metabatch_cli.learners'?"),
        ("torch.nn.Sequental", "did you mean 'torch.nn.Sequential'?"),
        ("no_such_module_anywhere.Thing", "there is no module 'no_such_module_anywhere'"),
        ("Thing", "is no import path"),
        ("a b.C", "is no import path"),
        (".models.CNP", "is no import path"),
        ("torch.optim", "is a module, not a class"),
        (f"{HERE}.NUMBER", "is a int, not a class"),
    ],
)
def test_a_target_that_is_not_there_says_which_part_is_wrong(target, said):
    error = refusal({"_target_": target})
    assert str(error).startswith(f"part._target_={target}: ")
    assert said in str(error)
    assert error.key == "part._target_"


def test_a_near_class_is_offered_before_a_module_of_the_same_letters():
    assert "did you mean 'torch.optim.Adam'?" in str(refusal({"_target_": "torch.optim.Adm"}))


def test_a_module_that_fails_when_it_is_imported_is_not_taken_for_a_missing_one(
    tmp_path, monkeypatch
):
    (tmp_path / "broken_module.py").write_text("import no_such_dependency\n")
    (tmp_path / "failing_module.py").write_text("1 / 0\n")
    (tmp_path / "garbled_module.py").write_text("class :\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, cause in (
        ("broken", "no_such_dependency"),
        ("failing", "ZeroDivisionError"),
        ("garbled", "SyntaxError"),
    ):
        said = str(refusal({"_target_": f"{module}_module.Thing"}))
        assert f"importing {module}_module failed" in said
        assert cause in said


def test_classes_functions_and_methods_are_found():
    from tests.config import examples

    assert locate("part", f"{HERE}.Inner") is examples.Inner
    assert locate("part", f"{HERE}.function") is examples.function
    assert locate("part", f"{HERE}.Config.__eq__")


def test_an_unknown_argument_is_named_with_the_nearest():
    error = refusal({"_target_": f"{HERE}.Inner", "size": 3, "nam": "x"})
    assert str(error).startswith("part.nam: Inner has no such argument")
    assert "did you mean 'name'?" in str(error)


def test_a_missing_argument_is_named_unless_the_builder_provides_it():
    node = {"_target_": f"{HERE}.Inner"}
    assert str(refusal(node)) == "part.size: is missing: Inner needs it"
    assert check_component("part", node, {"size"}) == node


@pytest.mark.parametrize("size", [0, 10, "abc", 1.5, None, [1]])
def test_an_argument_is_checked_against_its_annotation(size):
    assert str(refusal({"_target_": f"{HERE}.Inner", "size": size})).startswith("part.size=")


def test_components_in_components_are_checked_under_their_own_keys():
    inner = {"_target_": f"{HERE}.Inner", "size": 3}
    good = {"_target_": f"{HERE}.Outer", "inner": inner, "others": [inner, inner]}
    assert check_component("part", good) == good
    assert refusal({**good, "inner": {**inner, "size": 0}}).key == "part.inner.size"
    assert refusal({**good, "inner": {**inner, "siz": 1}}).key == "part.inner.siz"
    bad = refusal({**good, "others": [inner, {**inner, "size": "abc"}]})
    assert bad.key == "part.others.1.size"
    assert refusal({**good, "inner": 3}).key == "part.inner"


def test_values_become_what_the_annotation_asks_for():
    inner = {"_target_": f"{HERE}.Inner", "size": 3.0}
    node = {"_target_": f"{HERE}.Outer", "inner": inner, "rate": 2}
    result = check_component("part", node)
    assert result["inner"]["size"] == 3
    assert isinstance(result["inner"]["size"], int)
    assert isinstance(result["rate"], float)


def test_what_is_not_annotated_is_passed_as_it_is():
    node = {"_target_": f"{HERE}.TakesAnything", "whatever": [1, {"a": None}]}
    assert check_component("part", node) == node


def test_hydras_own_keys_are_no_arguments():
    node = {"_target_": f"{HERE}.Inner", "size": 3, "_convert_": "all", "_recursive_": False}
    assert check_component("part", node) == node


@pytest.mark.parametrize("name", ["csv", "mine"])
def test_loggers_are_checked_by_their_names(name):
    said = mistake(logger={name: {"_target_": "metabatch_cli.report.loggers.CsvLoger"}})
    assert said.startswith(f"logger.{name}._target_=")
    assert "CsvLogger" in said


def test_checking_changes_nothing_in_the_configuration():
    config = plain()
    before = copy.deepcopy(config)
    check(config)
    assert config == before


def test_the_base_of_these_tests_is_one_of_each():
    assert {word.partition("=")[0] for word in BASE} == {"taskset", "model", "learner"}
