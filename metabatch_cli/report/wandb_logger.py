"""A logger to Weights & Biases: offline in the run's directory, or to a server."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.report.files import write_text
from metabatch_cli.report.loggers import final_scores, read_rows, run_name, shown

if TYPE_CHECKING:
    from wandb import Run

EXIT_CODE = {"completed": 0, "interrupted": 255}  # 255 is what W&B itself makes of a Ctrl-C


class WandbLogger:
    """Metrics, configuration, test scores and figures, in `wandb/`; its run's id is in `wandb/id`.

    A training that goes on goes on in the same run of W&B. Offline, where it is one file, that is
    written anew from the rows that the run has. A server is sent what follows the last step that it
    has: what was written beyond the checkpoint stays there, and all but the seconds are the same.

    Args:
        directory: of the run.
        project: the name under which runs are listed.
        mode: offline needs neither account nor network, and `wandb sync` sends it later.
        entity: the user or team on the server; None: the account's own.
        name: of the run; None: the last two parts of its directory.
        group: what runs are grouped by; None: nothing.
        tags: of the run.
    """

    needs = "wandb"

    def __init__(
        self,
        directory: str | Path,
        project: str = "metabatch",
        mode: Literal["offline", "online"] = "offline",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self.run = RunDirectory(directory)
        self.folder = self.run.path / "wandb"
        self.mode: Literal["offline", "online"] = mode
        self.about: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name or run_name(self.run.path),
            "group": group,
            "tags": tags,
        }
        self.session: Run | None = None

    def rewind(self, step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        memory = self.folder / "id"
        if not memory.exists():
            write_text(memory, secrets.token_hex(4))
        own_id = memory.read_text()
        for folder in self.folder.glob(f"offline-run-*-{own_id}"):
            shutil.rmtree(folder)
        self.session = wandb.init(
            **self.about,
            id=own_id,
            mode=self.mode,
            resume="allow" if self.mode == "online" else None,
            dir=str(self.run.path),
            config=self.run.read_config(),
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                symlink=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        for row in read_rows(self.run.metrics_file):
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        assert self.session is not None
        if row["step"] >= self.session.step:  # of others, W&B would print that it ignores them
            self.session.log(shown(row), step=row["step"])

    def close(self) -> None:
        if self.session is None:  # it never came to begin
            return
        import wandb

        result = self.run.read_result()
        pictures = {
            f"figures/{file.stem}": wandb.Image(str(file))
            for file in sorted(self.run.figures.glob("*.png"))
        }
        if pictures:
            self.session.log(pictures, step=result["step"])
        self.session.summary.update(final_scores(result))
        self.session.finish(EXIT_CODE.get(result.get("status", ""), 1))
