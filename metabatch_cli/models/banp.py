"""The bootstrapping attentive neural process."""

from __future__ import annotations

from metabatch_cli.models.bnp import Bootstrapping
from metabatch_cli.models.canp import CANP


class BANP(Bootstrapping, CANP):  # type: ignore[misc]  # a joint prediction
    """Lee et al. 2020 (arXiv:2008.02956): bootstraps around a `CANP`, whose arguments it has."""
