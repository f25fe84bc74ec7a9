"""What all tests share: where the data is, a cache folder of their own, how hypothesis searches."""

from __future__ import annotations

import os

# workers share the cores: threads beyond them would wait for each other; read when torch is loaded
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import metabatch_cli  # noqa: F401 - before torch: tests compute like the programs they start

# no deadline: machines are shared, and nothing here promises a speed
settings.register_profile(
    "metabatch",
    deadline=None,
    max_examples=int(os.environ.get("METABATCH_EXAMPLES", "10")),  # more find more
    derandomize="CI" in os.environ,
)
settings.load_profile("metabatch")

# a shell's background jobs ignore Ctrl-C, and so would every program that a test interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where that is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker that is through takes over what others have not begun: tests take unlike times."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, for this session: nothing is read from or left in the real one."""
    folder = tmp_path_factory.mktemp("cache_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Are kept again after a test that built a training: hypothesis refuses to run without them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def metabatch_data() -> Path:
    """The folder of the real data sets; tests that read them are skipped where it is absent."""
    named = os.environ.get("METABATCH_DATA")
    if not named:
        pytest.skip("METABATCH_DATA is not set: it names the folder of the real data sets")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"METABATCH_DATA={named} is not a folder: the real data sets are not here")
    return folder
