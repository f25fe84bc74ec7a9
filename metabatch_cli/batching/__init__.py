"""The batching core: plan a batch, create its tasks, move them. Usable without the rest."""

from metabatch_cli.batching.balance import Balance
from metabatch_cli.batching.loader import StateMismatch, TaskLoader
from metabatch_cli.batching.plan import BatchSpec, Plan
from metabatch_cli.batching.ragged import PackedTask, PaddedTask, Tasks, pack, pad
from metabatch_cli.batching.strict import NotReproducible, check_strictly
from metabatch_cli.batching.task import Task, as_task, digest, slice_tasks
from metabatch_cli.batching.taskset import TaskSet, TaskSpec

__all__ = [
    "Balance",
    "BatchSpec",
    "NotReproducible",
    "PackedTask",
    "PaddedTask",
    "Plan",
    "StateMismatch",
    "Task",
    "TaskLoader",
    "TaskSet",
    "TaskSpec",
    "Tasks",
    "as_task",
    "check_strictly",
    "digest",
    "pack",
    "pad",
    "slice_tasks",
]
