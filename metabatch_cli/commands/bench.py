"""`metabatch bench WHAT`: how fast loaders and learners are, what a training's steps wait for."""

from __future__ import annotations

from typing import NamedTuple


class What(NamedTuple):
    """A benchmark: its primary configuration, where its job is, and what it measures."""

    config_name: str
    module: str
    form: str
    summary: str


WHATS = {
    "loader": What(
        "bench_loader",
        "metabatch_cli.bench.loader",
        "[KEY=VALUE …]",
        "tasks a second: ours, torch's, the original's, a plain loop",
    ),
    "learner": What(
        "bench_learner",
        "metabatch_cli.bench.learner",
        "[KEY=VALUE …]",
        "steps of MAML a second: ours, a loop over tasks, JAX's",
    ),
    "train": What(
        "bench_train",
        "metabatch_cli.bench.training",
        "+experiment=NAME …",
        "steps a second of a training, and how long they wait for tasks",
    ),
}


def main(words: list[str]) -> None:
    """Run the benchmark that the first word names, a Hydra application of its own."""
    from hydra.errors import HydraException

    from metabatch_cli.commands.hydra_app import launch, nowhere, sorted_out
    from metabatch_cli.config.errors import ConfigError, UserError, explain

    options, overrides = sorted_out(words)
    name = next((word for word in overrides if "=" not in word and word[0] not in "+~"), None)
    if name is None and (not words or {"--help", "-h"} & set(options)):
        print(usage())
        return
    if name is None:
        raise ConfigError("bench", "what? It is the first word", allowed=WHATS)
    if name not in WHATS:
        raise ConfigError(
            "bench", "there is no such benchmark", value=name, allowed=WHATS, wrong_name=name
        )
    what = WHATS[name]
    overrides.remove(name)
    words = [*options, *overrides, *nowhere()]
    try:
        launch(what.config_name, what.module, f"metabatch bench {name}", words=words)
    except HydraException as error:  # the application at hand knows which keys there are
        raise UserError(explain(error, overrides, what.config_name)) from error


def usage() -> str:
    """What `metabatch bench --help` prints."""
    lines = "\n".join(f"  {name:7} {what.form:20} {what.summary}" for name, what in WHATS.items())
    return f"""How fast are loaders and learners here, and what do a training's steps wait for?

usage: metabatch bench WHAT [KEY=VALUE …]

{lines}

  metabatch bench WHAT --help   its keys"""


def complete(words: list[str]) -> list[str]:
    """Benchmarks that begin as the last word does; behind one of them, Hydra completes."""
    if len(words) < 2:
        return [name for name in WHATS if name.startswith(words[-1])]
    if words[0] in WHATS:
        from metabatch_cli.commands.hydra_app import complete_line

        what = WHATS[words[0]]
        complete_line(what.config_name, what.module, words[1:])
    return []
