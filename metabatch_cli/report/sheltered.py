"""A logger whose failures end no training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from metabatch_cli.config.errors import UserError
from metabatch_cli.engine.stop import Stopped
from metabatch_cli.report.loggers import Logger

log = logging.getLogger("metabatch")


class Sheltered:
    """Passes everything on to a logger; where that fails, the training goes on without it.

    A failure is told once, with all of it in train.log, and the logger is left alone until it is
    closed: a server that does not answer would make every row wait. Before the first step, in
    `rewind`, a failure is an error: somebody is there to correct it, and nothing is lost.

    Args:
        key: where the logger stands in the configuration.
        logger: the one that may fail.
        say: tells a person.
    """

    def __init__(self, key: str, logger: Logger, say: Callable[[str], None]) -> None:
        self.key, self.logger, self.say = key, logger, say
        self.works = True

    def log(self, row: dict[str, Any]) -> None:
        if self.works:
            with self._surviving():
                self.logger.log(row)

    def rewind(self, step: int) -> None:
        """As the logger does.

        Raises:
            UserError: it cannot begin.
        """
        try:
            self.logger.rewind(step)
        except (UserError, Stopped):
            raise
        except Exception as error:
            raise UserError(f"{self.key}: {_in_words(error)}") from error

    def close(self) -> None:
        with self._surviving():
            self.logger.close()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Stopped:  # no failure: it is how a logger ends a training
            raise
        except Exception as error:
            log.exception("%s failed", self.key)
            if self.works:
                self.say(f"warning: {self.key} failed: {_in_words(error)} (see train.log)")
            self.works = False


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
