"""What a configuration may say: a dataclass for each section, with bounds and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, ConfigDict

Component = dict[str, Any]
"""A `_target_`, the import path of a class or function, and its keyword arguments."""

Count = Annotated[int, Ge(1)]
Auto = Literal["auto"]

_SEVERAL = (MinLen(1), BeforeValidator(lambda v: v if isinstance(v, list) else [v]))
"""A list, where a single value is a list of one."""

_STRICT = ConfigDict(extra="forbid")


@dataclass
class BalanceConfig:
    """The shares of a task set's classes in a batch."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    alpha: Annotated[float, Ge(0), Le(1)] = 1.0
    """1: all classes equally often; 0: as often as their tasks are; a mix in between."""

    kind: Literal["fixed", "random"] = "fixed"
    """Whether every batch has those shares, or every place of it draws its class by itself."""


@dataclass
class LoaderConfig:
    """How batches of tasks are made and moved."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    batch_size: Count = 16
    """Tasks of one optimisation step, over all ranks."""

    workers: Annotated[int, Ge(0)] | Auto = "auto"
    """Processes that create tasks, 0 for the training process; auto: as many as pay, measured."""

    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers are started; null: as Python does on this system."""

    prefetch_factor: Count = 2
    """Messages of one or more batches that each worker is ahead."""

    persistent_workers: bool = True
    """Whether workers live on from one epoch to the next."""

    pin_memory: bool | Auto = "auto"
    """Page-locked memory for the copy to a GPU; auto: where the device is one."""

    device: str = "auto"
    """Where model and batches live: cpu, cuda, cuda:1, mps; auto: cuda where there is one."""

    create_on: Literal["cpu", "device"] = "cpu"
    """Where tasks are created; device: by the device's own generator, other tasks than cpu's."""

    shuffle: bool = True
    """Whether every epoch of a finite task set has an order of its own."""

    drop_last: bool = True
    """Whether an epoch's last batch is left out where it is not full."""

    n_batches: Count | None = None
    """Full batches in an epoch, over repeated passes; null: one pass."""

    shards: Count = 1
    """Equal parts of the batch with a random stream each; as many ranks can share it."""

    timeout: Annotated[float, Ge(0)] = 0.0
    """Seconds to wait for a worker's batch; 0 waits for ever."""

    balance: BalanceConfig | None = None
    """{alpha, kind}: shares of the task set's classes in a batch; null: tasks as they come."""


@dataclass
class TrainerConfig:
    """The loop: how long, how exact, and what it does every so many steps."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    max_steps: Count = 10_000
    """Optimisation steps."""

    max_time: Annotated[float, Gt(0)] | None = None
    """Seconds of training after which it ends, over all resumes; null: no limit."""

    log_every: Count = 100
    """Steps between two rows of training metrics."""

    eval_every: Count = 1_000
    """Steps between two validations."""

    eval_tasks: Count = 256
    """Validation tasks, the same ones every time."""

    checkpoint_every: Count = 1_000
    """Steps between two checkpoints; one is also written at the end and when interrupted."""

    clip_norm: Annotated[float, Gt(0)] | None = None
    """The largest norm of a gradient, larger ones are scaled down; null: no limit."""

    accumulate: Count = 1
    """Parts that a batch is cut into, one after the other, to save memory; the step is the same."""

    precision: Literal[64, 32, "bf16"] = 32
    """Bits of the numbers; bf16 computes in bfloat16 where that is safe, weights stay float32."""

    compile: bool | Auto = "auto"
    """Whether the step is compiled, which takes a while to begin with; auto: where a training is
    long enough to earn that back, of learners that gain by it."""

    threads: Count | Auto = "auto"
    """CPU threads of each training process; auto: $OMP_NUM_THREADS, else its share of the cores."""

    processes: Count = 1
    """Processes on this machine that share every batch; torchrun's own number goes before."""

    timeout: Annotated[float, Gt(0), Le(1e6)] = 600.0
    """Seconds that processes wait for each other before the training fails."""

    monitor: str | None = None
    """The validation metric that picks best.pt; null: the learner's own. Of another one, less is
    better where its name has a word such as loss, error, mse, nll, crps; else more."""

    patience: Count | None = None
    """Validations without a better score after which training ends; null: no limit."""

    test_on: Literal["best", "last"] = "best"
    """Which weights the final test takes."""

    init_from: str | None = None
    """A run directory or checkpoint whose weights training begins with; null: none."""

    overfit: bool = False
    """Whether every step sees the first batch again: a test of the learner, not a training."""

    profile: bool = False
    """Whether to write a profile of some steps, profile.json, for chrome://tracing."""


@dataclass
class EvaluationConfig:
    """Held-out tasks: how many, which ones, and how they differ from the training tasks."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    tasks: Count = 1_000
    """Test tasks for each test set."""

    batch_size: Count = 16
    """Tasks at a time; part of what makes them the same tasks again."""

    seed: int = 0
    """Chooses the validation and test tasks; the training seed does not."""

    predict: Literal["once", "autoregressive"] = "once"
    """How test tasks are predicted: as the learner does; or one target after the other, each given
    the ones before it, by a conditional model."""

    order: Literal["given", "random"] = "given"
    """The targets' order where predict is autoregressive: theirs, or one that the seed draws."""

    figures: bool = True
    """Whether to draw predictions, calibration and learning curves at the end."""

    val: dict[str, Any] | None = None
    """Keys of the task set that differ for validation; or several such sets, named key=value."""

    test: dict[str, Any] | None = None
    """Keys of the task set that differ for the test; or several such sets, named key=value."""


@dataclass
class Config:
    """A whole configuration. Components are checked against their own signatures."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    taskset: Component
    """The task set that training draws from."""

    model: Component
    """The network."""

    learner: Component
    """The meta-learning algorithm around it."""

    optimizer: Component
    """A torch.optim class; it is given the learner's parameters."""

    scheduler: Component = field(default_factory=dict)
    """A torch.optim.lr_scheduler class, stepped once a step; empty: none."""

    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How batches are made and moved."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The training loop."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation and test."""

    logger: dict[str, Component] = field(default_factory=dict)
    """Further loggers by name; metrics.jsonl is always written."""

    launcher: dict[str, Any] = field(default_factory=dict)
    """How a sweep's jobs are run."""

    seed: int = 0
    """Seeds the initialisation of the model, the training tasks and the loop's own draws."""

    data_dir: str | None = None
    """A folder for each dataset; null: $METABATCH_DATA, else the user's cache folder."""

    fresh: bool = False
    """Whether to start anew where the run directory holds a run already."""


@dataclass
class TuneConfig:
    """A search for the values with which a configuration validates best."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    trials: Count = 20
    """Trainings in all, those of earlier calls and of other processes included."""

    space: dict[str, Any] | None = None
    """By key: {low, high}, whole numbers if both are, with log: true or step; or {choices};
    null: the learning rate."""

    sampler: Component = field(default_factory=dict)
    """Which values are tried next: one of Optuna's samplers."""

    pruner: Component | None = None
    """Which trials end early, by their validation scores; null: none."""


COMPONENTS = ("taskset", "model", "learner", "optimizer", "scheduler")


@dataclass
class BenchTrainSection:
    """How long a training is watched, and where that is written."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    seconds: Annotated[float, Gt(0)] = 10.0
    """How long steps are measured, and the loader alone once more."""

    warm_up: Count = 20
    """Steps before the clock starts: memory is allocated, kernels are chosen or compiled."""

    out: str | None = "bench-train.json"
    """The JSON to write; null: none."""


@dataclass
class BenchTrainConfig(Config):
    """A whole configuration of a training, and how it is watched."""

    bench: BenchTrainSection = field(default_factory=BenchTrainSection)
    """The measurement."""


@dataclass
class BenchLoaderConfig:
    """Which loaders do which work, how often, and what becomes of the rates."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    work: Annotated[list[Literal["sine", "python", "images"]], *_SEVERAL] = field(
        default_factory=lambda: ["sine", "python", "images"]
    )
    """Kinds of task."""

    batch_sizes: Annotated[list[Count], *_SEVERAL] = field(default_factory=lambda: [16, 128])
    """Tasks in a batch."""

    max_batch_mib: Annotated[float, Gt(0)] = 100.0
    """Batches of more MiB are left out: several are in memory at once."""

    workers: Annotated[list[Annotated[int, Ge(0)]], *_SEVERAL] = field(
        default_factory=lambda: [0, 1, 2]
    )
    """Worker processes, for the rivals that have some."""

    rivals: Annotated[
        list[Literal["bare", "naive", "dataloader", "metabatch", "ours", "ours_whole"]], *_SEVERAL
    ] = field(
        default_factory=lambda: ["bare", "naive", "dataloader", "metabatch", "ours", "ours_whole"]
    )
    """Who makes the batches; metabatch is version 0.9.1 from PyPI."""

    seconds: Annotated[float, Gt(0)] = 2.0
    """How long a rate is measured, each time."""

    repeats: Count = 3
    """Rounds over all rivals; medians count."""

    out: str | None = "bench-loader.json"
    """The JSON to write; null: none."""

    figure: str | None = None
    """The PNG to draw; null: none."""

    read: str | None = None
    """The JSON of an earlier run, to show and draw again without measuring; null: measure."""


@dataclass
class BenchLearnerConfig:
    """Who takes which meta-steps, on how many threads, how often, and what becomes of the rates."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    work: Annotated[list[Literal["sine_mlp", "omniglot_conv4"]], *_SEVERAL] = field(
        default_factory=lambda: ["sine_mlp", "omniglot_conv4"]
    )
    """Networks, and the tasks that they learn from."""

    rivals: Annotated[
        list[
            Literal[
                "conventional",
                "ours",
                "ours_compiled",
                "ours_eager",
                "ours_loop",
                "ours_bf16",
                "jax",
            ]
        ],
        *_SEVERAL,
    ] = field(
        default_factory=lambda: [
            "conventional", "ours", "ours_eager", "ours_loop", "ours_bf16", "jax",
        ]
    )  # fmt: skip
    """Who takes the steps."""

    threads: Annotated[list[Count], *_SEVERAL] = field(default_factory=lambda: [1])
    """CPU threads; several for one after the other."""

    tasks: Count = 16
    """Tasks in a batch."""

    inner_steps: Count | None = None
    """Gradient steps on a context; null: 5 of sine_mlp, 1 of omniglot_conv4."""

    first_order: bool = False
    """Whether the derivative of the inner gradients is left out."""

    training: Count = 60_000
    """Steps of the training for which ours decides whether to compile."""

    cold: bool = True
    """Whether ours compiles as if for the first time, not from what earlier runs left on disk."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where is computed; auto: cuda where there is one."""

    seconds: Annotated[float, Gt(0)] = 0.5
    """How long a rate is measured, each time."""

    repeats: Count = 15
    """Rounds over all rivals; medians count."""

    out: str | None = "bench-learner.json"
    """The JSON to write; null: none."""
