"""Errors: one message that names the place, the value, what is allowed and the nearest."""

from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from metabatch_cli.config.check import check
from metabatch_cli.config.choices import resolve
from metabatch_cli.config.compose import compose
from metabatch_cli.config.errors import ConfigError, UserError, explain, nearest, readable
from metabatch_cli.engine.parts import Parts

EXPERIMENT = "+experiment=cnp_sine"
names = st.text(string.ascii_lowercase + "_", min_size=4, max_size=12)


def said(*words: str, user_dir: object = None) -> str:
    """What the command line says about these words; it must be a mistake."""
    with pytest.raises(Exception) as caught:  # explain takes whatever comes
        resolve(compose(*words, user_dir=None if user_dir is None else str(user_dir)))
    text = explain(caught.value, words)
    assert readable(caught.value) is not None, text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 4
    return text


def building(*words: str) -> str:
    """What is said when what these words declare is built; it must be a mistake."""
    with pytest.raises(UserError) as caught:
        Parts(check(resolve(compose(*words)))).build()
    return str(caught.value)


# --- messages --------------------------------------------------------------------------------


@given(names, st.integers(), st.lists(names, min_size=1, max_size=5, unique=True))
def test_a_message_names_key_value_and_what_is_allowed(key, value, allowed):
    text = str(ConfigError(key, "cannot be", value=value, allowed=allowed))
    first, second = text.splitlines()
    assert first == f"{key}={value}: cannot be"
    assert all(name in second for name in allowed)


@pytest.mark.parametrize(
    ("value", "shown"), [(True, "true"), (False, "false"), (None, "null"), ("x", "x"), (1.0, "1.0")]
)
def test_values_are_shown_as_yaml_writes_them(value, shown):
    assert str(ConfigError("key", "cannot be", value=value)) == f"key={shown}: cannot be"


def test_a_long_value_is_cut():
    text = str(ConfigError("key", "cannot be", value="x" * 1000))
    assert len(text) < 120
    assert "..." in text


def test_nothing_allowed_is_said_so():
    assert "allowed: nothing" in str(ConfigError("key", "no such", allowed=[]))


@given(st.lists(names, min_size=1, max_size=8, unique=True), st.data())
def test_the_nearest_name_of_one_with_two_letters_swapped_is_a_name_at_hand(candidates, data):
    name = data.draw(st.sampled_from(candidates))
    place = data.draw(st.integers(0, len(name) - 2))
    swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    assert nearest(swapped, candidates) in candidates


def test_nothing_is_near_to_something_quite_different():
    assert nearest("zzzz", ["batch_size", "workers"]) is None
    assert nearest("x", []) is None


def test_capitals_are_no_difference():
    assert nearest("cnp", ["CNP", "Conv4"]) == "CNP"


# --- Hydra's and OmegaConf's mistakes --------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("loader.batchsize=3", "batch_size"),
        ("model.widht=3", "width"),
        ("taskset.dataset.amplitud=3", "amplitude"),
        ("sede=3", "seed"),
        ("trainer.maxsteps=3", "max_steps"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(word, near):
    text = said(EXPERIMENT, word)
    assert text.startswith(f"{word.partition('=')[0]}: there is no such key")
    assert f"did you mean '{near}'?" in text


@pytest.mark.parametrize("word", ["lodaer.batch_size=3", "taskset.datset.amplitude=1"])
def test_an_unknown_key_above_the_last_is_named_too(word):
    assert said(EXPERIMENT, word).startswith(word.partition("=")[0])


@pytest.mark.parametrize(
    ("word", "near"),
    [("model=cnnp", "cnp"), ("optimizer=adma", "adam"), ("+experiment=cnp_sin", "cnp_sine")],
)
def test_an_unknown_choice_is_named_with_the_nearest_and_all_others(word, near):
    words = [word] if "experiment" in word else [EXPERIMENT, word]
    text = said(*words)
    assert text.startswith(word.lstrip("+") + ": there is no ")
    assert f"did you mean '{near}'?" in text
    assert "allowed: " in text


def test_an_experiment_without_its_plus_is_helped():
    assert "did you mean '+experiment=cnp_sine'?" in said("experiment=cnp_sine")


@pytest.mark.parametrize("word", ["a b", "model width=3", "+ a=1"])
def test_what_is_no_override_is_said_to_be_none(word):
    assert said(EXPERIMENT, word).startswith(f"{word}: is no override: key=value")


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("model.width=[1", "every bracket and quote is closed"),
        ("model.width={", "every bracket and quote is closed"),
        ("model.width=[a=b]", "in quotes, 'model.width="),
        ("model.width=a=b", "in quotes, 'model.width="),
        ('evaluation.test={"noise=1": {noise: 1}}', r"behind a backslash, {a\=1: …}"),
    ],
)
def test_a_value_that_cannot_be_read_is_shown_with_the_way_out(word, way_out):
    text = said(EXPERIMENT, word)
    assert text.startswith(f"{word}: the value cannot be read")
    assert way_out in text


@pytest.mark.parametrize("word", ["loader=3", "trainer=null", "=3"])
def test_a_group_that_is_given_no_name_is_a_mistake_of_the_user(word):
    said(EXPERIMENT, word)


def test_a_held_out_set_given_without_its_plus_is_helped():
    text = said(EXPERIMENT, "evaluation.test.max_ctx_pts=5")
    assert "evaluation.test: there is no such key" not in text
    assert "+evaluation.test" in text


@pytest.mark.parametrize("word", ["model.width=${nope}", "model.width=${oc.env:NO_SUCH_VARIABLE}"])
def test_an_interpolation_that_leads_nowhere_is_named(word):
    text = said(EXPERIMENT, word)
    assert text.startswith("model.width: cannot be resolved")
    assert "nope" in text or "NO_SUCH_VARIABLE" in text


def test_an_argument_of_another_learner_is_named_rather_than_what_it_leads_to():
    text = said("+experiment=maml_omniglot", "learner=r2d2")
    assert text.startswith("learner.inner_lr: R2D2 has no such argument")


@pytest.mark.parametrize("learner", ["anil_sine", "maml_sine"])
def test_an_argument_that_a_learner_hands_to_its_base_is_known_by_name_too(learner):
    text = building(f"+experiment={learner}", "+learner.inner_lrr=0.1")
    assert text.startswith("learner.inner_lrr: ")
    assert "did you mean 'inner_lr'?" in text


def test_what_a_constructor_takes_as_it_comes_is_left_to_it():
    text = building("+experiment=anil_sine", "+learner.pace=1")
    assert "unexpected keyword argument 'pace'" in text


@pytest.mark.parametrize(
    ("word", "begins"),
    [
        ("taskset.sizes={law: fixed, max_ctx_pts: 10.5}", "max_ctx_pts=10.5 must be a whole"),
        (
            "taskset.sizes={law: rest, max_ctx_pts: ten, total_tgt_pts: 9}",
            "max_ctx_pts='ten' must",
        ),
        ("taskset.sizes={law: way_shot, ways: 2.5, shots: 1, queries: 1}", "ways=2.5 must be a nu"),
    ],
)
def test_fields_of_a_law_are_checked_too(word, begins):
    assert begins in building(EXPERIMENT, word)


def test_a_batch_of_an_evaluation_that_is_too_large_is_named_by_its_key():
    words = ["taskset=mixture", "model=cnp", "learner=neural_process", "loader.batch_size=8"]
    words += [f"taskset.tasksets.{name}.n_tasks=12" for name in ("sine", "sawtooth")]
    assert building(*words).startswith("evaluation.batch_size=16 is larger than")


@pytest.mark.parametrize(
    "word", ["taskset.split=val", "+taskset.eval=true", "+evaluation.val.split=train"]
)
def test_a_split_that_would_be_ignored_is_refused(word):
    assert building(EXPERIMENT, word).startswith(f"{word.lstrip('+')}: has no effect")


def test_a_mandatory_value_that_is_missing_is_named():
    text = said("taskset=image_folder_episodes", "model=conv4", "learner=protonet")
    assert text.startswith("taskset.dataset.root")


def test_a_syntax_error_in_a_users_yaml_names_file_and_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntrainer:\n  max_steps: 10\n  log_every: [1, 2\n")
    text = said("+experiment=mine", user_dir=tmp_path)
    assert str(file) in text
    assert "line 5" in text or "line 4" in text
    assert "not valid YAML" in text


def test_a_bad_indentation_names_its_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntrainer:\n  max_steps: 10\n log_every: 1\n")
    text = said("+experiment=mine", user_dir=tmp_path)
    assert f"{file}, line 4" in text or f'{file}", line 4' in text


def test_a_users_group_file_that_is_no_choice_is_named_among_the_others(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 1\n")
    text = said("+experiment=mone", user_dir=tmp_path)
    assert "did you mean 'mine'?" in text
    assert "cnp_sine" in text


def test_a_users_choice_is_found(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 17\n")
    assert compose("+experiment=mine", user_dir=str(tmp_path)).seed == 17


def divide(one: float, other: float) -> float:
    return one / other


def test_other_errors_are_no_mistakes_of_the_user_and_say_where_they_happened():
    with pytest.raises(ZeroDivisionError) as caught:
        divide(1, 0)
    caught.value.add_note("while creating BatchSpec(step=3)")
    assert readable(caught.value) is None
    text = explain(caught.value)
    assert "ZeroDivisionError: division by zero" in text
    assert __file__ in text
    assert "BatchSpec(step=3)" in text
    assert "--debug" in text


def test_a_users_mistake_is_shown_as_it_is():
    error = UserError("one\n  two")
    assert readable(error) is error
    assert explain(error) == "one\n  two"


# --- composing from Python -------------------------------------------------------------------


def test_composing_is_the_same_every_time_and_leaves_nothing_behind():
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    one, other = compose(EXPERIMENT, "seed=3"), compose(EXPERIMENT, "seed=3")
    assert OmegaConf.to_yaml(one) == OmegaConf.to_yaml(other)
    assert one.seed == 3
    with pytest.raises(UserError):
        compose(EXPERIMENT, "model=cnnp")
    assert GlobalHydra.instance().hydra is outer


def test_an_error_arrives_in_another_process_as_it_was_sent():
    sent = ConfigError("model.width", "is too small", value=0, allowed="at least 1")
    received = pickle.loads(pickle.dumps(sent))
    assert (type(received), str(received), received.key) == (ConfigError, str(sent), "model.width")
