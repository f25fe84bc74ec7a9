"""A logger to TensorBoard: event files in the run's directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metabatch_cli.engine.run_directory import RunDirectory
from metabatch_cli.engine.same_run import flatten
from metabatch_cli.report.loggers import final_scores, read_rows, run_name, shown

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorboardLogger:
    """Curves, hyper-parameters, test scores and figures, in `tensorboard/`.

    A training that goes on writes a further file, which hides the steps beyond the checkpoint in
    the ones before. Where there are none, the logger being new to the run, it begins with all rows.

    Args:
        directory: of the run.
    """

    needs = "tensorboard"

    def __init__(self, directory: str | Path) -> None:
        self.run = RunDirectory(directory)
        self.folder = self.run.path / "tensorboard"
        self.writer: SummaryWriter | None = None

    def rewind(self, step: int) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        begun = any(self.folder.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if begun else None)
        if not begun:
            for row in read_rows(self.run.metrics_file):
                self.log(row)
        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(self.run.read_config()).items()
        }
        self._write(hparams_pb(settings, trial_id=run_name(self.run.path)))
        self.writer.flush()

    def log(self, row: dict[str, Any]) -> None:
        assert self.writer is not None
        for name, value in shown(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a kill loses none, and somebody may be watching

    def close(self) -> None:
        if self.writer is None:  # it never came to begin
            return
        result = self.run.read_result()
        for name, value in final_scores(result).items():
            self.writer.add_scalar(name, value, result["step"])
        for file in sorted(self.run.figures.glob("*.png")):
            self._write(_image(file), result["step"])
        self._write(_ending(result.get("status") == "completed"))
        self.writer.close()

    def _write(self, summary: Any, step: int | None = None) -> None:
        assert self.writer is not None
        self.writer._get_file_writer().add_summary(summary, step)


def _image(file: Path) -> Any:
    """A picture as it is on disk: neither decoded nor scaled."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(file) as picture:
        width, height = picture.size
    image = Summary.Image(
        width=width, height=height, colorspace=4, encoded_image_string=file.read_bytes()
    )
    return Summary(value=[Summary.Value(tag=f"figures/{file.stem}", image=image)])


def _ending(completed: bool) -> Any:
    """What the tab of hyper-parameters shows as the status."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if completed else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    about = metadata.create_summary_metadata(
        plugin_data_pb2.HParamsPluginData(session_end_info=end)
    )
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR
    )
    return Summary(value=[value])
