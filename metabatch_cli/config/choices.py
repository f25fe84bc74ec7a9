"""What is left to the machine, `auto` or null, decided once and written into the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from metabatch_cli.batching.auto import cores
from metabatch_cli.config.beside import own_device
from metabatch_cli.config.check import check_all_names
from metabatch_cli.config.errors import ConfigError


def resolve(
    config: DictConfig, saved: Mapping[str, Any] | None = None, *, fall_back: bool = False
) -> dict[str, Any]:
    """The configuration as plain values, nothing left to be chosen or interpolated.

    Args:
        config: as composed.
        saved: the configuration of the run that is resumed: what was chosen there stays.
        fall_back: whether a device that is not there becomes the CPU.

    Raises:
        ConfigError: a device that is not there.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.pop("tune", None)  # an experiment may say where to search, whoever trains it
    as_many = (select(saved or {}, "trainer.processes") or 1) == _processes(config)
    for key, choose in CHOICES.items():
        if OmegaConf.select(config, key) in (None, "auto"):
            before = select(saved or {}, key)
            if key == "trainer.threads" and not as_many:  # the cores are shared otherwise now
                before = None
            if key == "loader.device" and str(before).startswith("cuda"):  # any of them will do
                before = None
            OmegaConf.update(config, key, choose(config) if before is None else before)
    for key, value in leaves(OmegaConf.to_container(config)):
        before = select(saved or {}, key)
        if value == "auto" and before is not None:  # what is measured when all is built
            OmegaConf.update(config, key, before)
    for key in PATHS:
        path = OmegaConf.select(config, key)
        if isinstance(path, str):  # resumed or scored from another directory, it is the same file
            # no shell expands the tilde of a path in YAML
            OmegaConf.update(config, key, os.path.abspath(os.path.expanduser(path)))
    device = OmegaConf.select(config, "loader.device")
    if device is not None:
        try:
            check_device(device)
        except ConfigError:
            if not fall_back:
                raise
            OmegaConf.update(config, "loader.device", "cpu")
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except InterpolationResolutionError:
        # it may be that of an argument which another class had, and this one's has not
        check_all_names(cast(Mapping[str, Any], OmegaConf.to_container(config)))
        raise
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def default_data_dir() -> str:
    """`$METABATCH_DATA`, else a folder in the user's cache."""
    import platformdirs

    given = os.environ.get("METABATCH_DATA")
    return str(
        Path(given).resolve() if given else platformdirs.user_cache_path("metabatch") / "data"
    )


def default_threads(processes: int = 1) -> int:
    """`$OMP_NUM_THREADS`, which launchers of several jobs a machine set, else a thread a core.

    Args:
        processes: that share the cores; no more threads than they have room for.
    """
    share = max(cores() // processes, 1)
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not given.isdigit() or int(given) < 1:
        return share
    return min(int(given), share) if processes > 1 else int(given)


def check_device(device: Any) -> None:
    """Raise ConfigError unless torch can compute on the device of that name."""
    import torch

    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    here += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if str(device) not in here:
        raise ConfigError(
            "loader.device",
            "there is no such device here",
            value=device,
            allowed=["auto", *here],
            wrong_name=str(device),
        )


def _choose_device(config: DictConfig) -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return own_device(torch.cuda.device_count(), _processes(config))


def _processes(config: DictConfig) -> int:
    asked = OmegaConf.select(config, "trainer.processes")
    return asked if isinstance(asked, int) and asked > 0 else 1


def _choose_pinning(config: DictConfig) -> bool:
    return str(OmegaConf.select(config, "loader.device")).startswith("cuda")


PATHS = ("data_dir", "trainer.init_from")

# in this order: pinning follows the device
CHOICES: dict[str, Callable[[DictConfig], Any]] = {
    "data_dir": lambda config: default_data_dir(),
    "loader.device": _choose_device,
    "loader.pin_memory": _choose_pinning,
    "trainer.threads": lambda config: default_threads(_processes(config)),
}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is no mapping in nested ones, by its dotted name."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def select(tree: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings; None where there is none."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree
