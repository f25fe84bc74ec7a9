"""`metabatch tune`: several processes, killed and begun again, make as many trials as asked for."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.program import PATIENCE, SCRIPT, TINY, metabatch, only_message

pytest.importorskip("optuna")

TUNE = ("tune", *TINY, "tune.trials=5", "hydra.run.dir=study", "trainer.max_steps=60")


def steps(folder: Path) -> dict[str, int]:
    files = folder.glob("study/trials/*/result.json")
    return {file.parent.name: json.loads(file.read_text())["step"] for file in files}


@pytest.mark.slow
def test_a_study_that_was_killed_is_finished_by_two_processes(tmp_path):
    process = subprocess.Popen(
        [SCRIPT, *TUNE], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + PATIENCE
    while len(steps(tmp_path)) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    both = [
        subprocess.Popen([SCRIPT, *TUNE], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(steps(tmp_path)) == 5
    last = metabatch(*TUNE, cwd=tmp_path).stdout
    assert (
        sum(line.split()[0:1] == [name] for line in last.splitlines() for name in steps(tmp_path))
        == 5
    )
    assert "trial 0" not in last  # nothing was left to be tried
    assert any("written" in text for text in said)
    done = metabatch("train", "--config-dir", "study", "+experiment=best", cwd=tmp_path)
    assert "test/log_likelihood" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune.space={model.widht: {low: 1, high: 2}}"], "did you mean 'width'?"),
        (["tune.trials=0"], "trials"),
        (["-m", "seed=0,1"], "-m: a study chooses values itself"),
        (["~scheduler"], "such as scheduler=none"),
        (["tune.sampler._target_=optuna.samplers.TPESamplr"], "TPESamplr"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, words, said):
    done = metabatch(*TUNE, *words, cwd=tmp_path, code=1)
    assert said in only_message(done)
    assert not steps(tmp_path)


def test_a_study_of_which_no_trial_completes_says_why_and_fails(tmp_path):
    space = "tune.space={model.width: {choices: [0]}}"
    done = metabatch(*TUNE, "tune.trials=1", space, cwd=tmp_path, code=1)
    assert "model.width=0: is not allowed" in done.stdout
    assert done.stderr.endswith("no trial has completed\n")
