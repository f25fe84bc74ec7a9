"""From the words on the command line to a verb: subcommands, exit codes, completion.

    metabatch train +experiment=cnp_sine
    eval "$(metabatch -sc install=bash)"

Nothing here imports torch: help, completion and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A verb: where its function is, what it does, and who reads its words."""

    module: str
    summary: str
    form: str


COMMANDS = {
    "train": Command(
        "metabatch_cli.commands.train", "train what a configuration declares", "+experiment=NAME …"
    ),
    "resume": Command("metabatch_cli.commands.resume", "go on with a run", "DIR"),
    "eval": Command(
        "metabatch_cli.commands.eval", "score a run on held-out tasks", "run=DIR [KEY=VALUE …]"
    ),
    "tune": Command(
        "metabatch_cli.commands.tune", "search for the best values", "+experiment=NAME …"
    ),
    "check": Command(
        "metabatch_cli.commands.check", "try a configuration, leave nothing", "+experiment=NAME …"
    ),
    "bench": Command(
        "metabatch_cli.commands.bench",
        "how fast: loaders, learners, training steps",
        "WHAT [KEY=VALUE …]",
    ),
    "report": Command(
        "metabatch_cli.commands.report", "one table from runs and sweeps, over seeds", "DIR …"
    ),
    "ls": Command("metabatch_cli.commands.ls", "what there is: experiments, models …", "[GROUP]"),
}

USAGE_ERROR = 2


def main() -> None:
    """The console script `metabatch`."""
    try:
        try:
            dispatch()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # `metabatch ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def dispatch() -> None:
    """What the words of the command line ask for."""
    program, *words = sys.argv
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words and words[0] in ("-sc", "--shell-completion"):
        with contextlib.suppress(BrokenPipeError):
            complete(program, words)
        return
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] == "--version":
        from metabatch_cli import __version__

        print(f"metabatch {__version__}")
        return
    name, *words = words
    if name not in COMMANDS:
        from metabatch_cli.config.errors import nearest

        near = nearest(name, COMMANDS)
        hint = f" (did you mean {near!r}?)" if near else ""
        kind = "option" if name.startswith("-") else "command"
        fail(f"there is no {kind} {name!r}{hint}; choose from {', '.join(COMMANDS)}", USAGE_ERROR)
    sys.path.append(os.getcwd())  # a `_target_` may live beside the user
    run(name, words, debug)


def run(name: str, words: list[str], debug: bool) -> None:
    """Run a verb; whatever goes wrong ends in one message and an exit code."""
    # Hydra's own handling would print some of its frames and exit: let it raise, we explain
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if debug:
        os.environ["METABATCH_DEBUG"] = "1"
        import_module(COMMANDS[name].module).main(words)
        return
    try:
        import_module(COMMANDS[name].module).main(words)
    except KeyboardInterrupt:
        print("\nmetabatch: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        raise
    except Exception as error:
        from metabatch_cli.config.errors import explain

        fail(explain(error, words), 1)


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong on standard error and end."""
    print(f"metabatch: {message}", file=sys.stderr)
    sys.exit(code)


def usage() -> str:
    """What `metabatch --help` prints."""
    verbs = "\n".join(
        f"  {name:7} {command.form:24} {command.summary}" for name, command in COMMANDS.items()
    )
    return f"""Meta-learning from YAML: task sets, models and learners, trained at full speed.

usage: metabatch COMMAND [...]

{verbs}

  --help, --version             behind a command: its own help
  --debug                       show tracebacks
  -sc install=bash              completion: eval "$(metabatch -sc install=bash)"

examples:
  metabatch train +experiment=cnp_sine
  metabatch train +experiment=cnp_sine model.width=256 trainer.max_steps=50000
  metabatch train -m +experiment=cnp_sine seed=0,1,2
  metabatch eval run=outputs/… taskset.max_ctx_pts=5"""


def complete(program: str, words: list[str]) -> None:
    """Shell completion: of the verbs here, of a verb's words by Hydra."""
    name = "train"
    if words[-1].startswith("query="):
        typed = os.environ.get("COMP_LINE", "").split(" ")
        if len(typed) < 3:
            begun = typed[1] if len(typed) == 2 else ""
            print(" ".join(verb for verb in COMMANDS if verb.startswith(begun)))
            return
        name = typed[1]
        if name not in COMMANDS:
            return
        own = getattr(import_module(COMMANDS[name].module), "complete", None)
        if own is not None:
            print(" ".join(own(typed[2:])))
            return
        os.environ["COMP_LINE"] = " ".join([typed[0], *typed[2:]])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    sys.argv = [program, *words]
    import_module("metabatch_cli.commands.hydra_app").launch(
        "train", "metabatch_cli.commands.train", program
    )
