"""Runs the console script's function in forks of a process that has imported what it needs.

Importing torch takes seconds, and most tests of the command line do nothing else for so long. Every
fork begins with the same modules, of which nothing was called, and ends as a program ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

IMPORTED = (
    "metabatch_cli.app",
    "metabatch_cli.commands.train",
    "metabatch_cli.commands.bench",
    "metabatch_cli.engine.run",
    "metabatch_cli.report.figures",
)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Answer each request with the exit code of a fork; return in the fork, with the request.

    A request is a line of JSON: `argv`, `cwd`, `env`, `out`, `err`. The answer is two lines: the
    fork's process id when it begins, its exit code when it has ended.
    """
    with channel, channel.makefile("rw") as lines:
        for line in lines:
            child = os.fork()
            if child == 0:
                return json.loads(line)
            print(child, file=lines, flush=True)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=lines, flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take on the words, folder, environment and files of a request."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    for number, path in ((1, request["out"]), (2, request["err"])):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)


if __name__ == "__main__":
    for name in IMPORTED:
        __import__(name)
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        become(asked)
        from metabatch_cli.app import main

        sys.exit(main())
