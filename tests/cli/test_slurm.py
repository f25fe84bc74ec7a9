"""A sweep through a real Slurm, where there is one: a job that is queued again loses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.cli.program import SCRIPT, TINY, metabatch

PATIENCE = 600.0  # seconds; a job that was queued again begins two minutes later


def has_slurm() -> bool:
    if shutil.which("sinfo") is None:
        return False
    asked = subprocess.run(["sinfo", "-h"], capture_output=True, timeout=30, check=False)
    return asked.returncode == 0 and bool(asked.stdout)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_slurm(), reason="no Slurm answers here (sinfo, $SLURM_CONF)"),
]

SWEEP = (
    *("train", "-m", *TINY, "seed=0,1", "trainer.max_steps=1500"),
    "trainer.checkpoint_every=100000",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["learner"]


def test_a_job_that_is_queued_again_ends_with_the_same_bits(tmp_path):
    words = ["launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [SCRIPT, *SWEEP, *words, "hydra.sweep.dir=slurm"],
            cwd=tmp_path,
            stdout=said,
            stderr=said,
        )
    first, until, requeued = tmp_path / "slurm" / "seed=0", time.monotonic() + PATIENCE, False
    while process.poll() is None:
        assert time.monotonic() < until, (tmp_path / "said").read_text()
        rows = first / "metrics.jsonl"
        if not requeued and rows.exists() and rows.read_text().count("\n") > 50:
            queue = ["squeue", "-h", "-t", "RUNNING", "-o", "%i"]
            running = subprocess.run(queue, capture_output=True, text=True, check=True)
            for job in running.stdout.split():
                if job.endswith("_0"):
                    subprocess.run(["scontrol", "requeue", job], check=True)
                    requeued = True
        time.sleep(0.2)
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert requeued
    assert "resumed from step" in (first / "train.log").read_text()
    metabatch(*SWEEP, "hydra.sweep.dir=here", cwd=tmp_path)
    for name in ("seed=0", "seed=1"):
        pair = [tmp_path / folder / name for folder in ("slurm", "here")]
        one, other = (json.loads((run / "result.json").read_text()) for run in pair)
        assert one["metrics"] == other["metrics"]
        there, here = map(weights, pair)
        assert all(torch.equal(there[key], here[key]) for key in here)
