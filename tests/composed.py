"""Configurations for tests: what takes Hydra its time is done once for all of the same choices."""

from __future__ import annotations

import functools
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from metabatch_cli.config.compose import compose

_chosen = functools.cache(compose)


def composed(*overrides: str) -> DictConfig:
    """As `compose`, for keys that there are; values are put into a copy of what was chosen."""
    values = [word for word in overrides if re.match(r"\w+(\.\w+)+=", word)]
    config = _chosen(*(word for word in overrides if word not in values)).copy()
    for override in OverridesParser.create().parse_overrides(values):
        OmegaConf.update(config, override.key_or_group, override.value())
    return config
