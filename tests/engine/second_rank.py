"""The other process of `test_ranks.py`: it makes the same calls, and rank zero decides.

python -m tests.engine.second_rank [JSON: a list of the overrides of each training]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from metabatch_cli import mkl  # before torch, as in the first process

# isort: split
import torch

from metabatch_cli.engine import checkpoint
from metabatch_cli.engine.run import train
from tests.engine.examples import asked


def blind(*_: object) -> None:
    """Of what is on rank zero's disk there is nothing here."""
    raise FileNotFoundError


def main() -> None:
    if "METABATCH_TEST_BLIND" in os.environ:
        checkpoint.load = checkpoint.load_weights = blind
    if "METABATCH_TEST_OTHER_MKL" in os.environ:
        other = not mkl.avx512_enabled()
        mkl.avx512_enabled = lambda: other
    torch.seed()  # whatever this process has drawn before must not matter
    for overrides in json.loads(sys.argv[1]):
        try:
            train(asked(*overrides), Path("nobody writes here"))
        except (Exception, SystemExit) as error:
            print(type(error).__name__, error, flush=True)


if __name__ == "__main__":
    main()
