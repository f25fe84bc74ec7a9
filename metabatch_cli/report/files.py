"""Files that are whole at any moment: the old one until the new one is written."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

_UNFINISHED = ".unfinished-"


def write_atomically(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file as a whole: whoever reads it sees the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f"{_UNFINISHED}{file.name}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Delete what a killed process was writing; only for whoever holds the folder's lock."""
    for file in folder.glob(f"{_UNFINISHED}*"):
        file.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Replace a text file as a whole."""
    write_atomically(file, lambda stream: stream.write(text.encode()))


def write_json(file: Path, tree: Any) -> None:
    """Replace a JSON file as a whole; what is not finite becomes null."""
    write_text(file, json.dumps(finite(tree), indent=2) + "\n")


def finite(tree: Any) -> Any:
    """The tree with None for every number that JSON cannot hold."""
    if isinstance(tree, Mapping):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
