"""Figures show what they promise, and leave everything else as it was."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from metabatch_cli.batching.task import Task
from metabatch_cli.batching.taskset import TaskSet, TaskSpec
from metabatch_cli.learners.autoregressive import AutoregressiveDeployment
from metabatch_cli.learners.learner import Learner, Metric
from metabatch_cli.learners.neural_process import NeuralProcess
from metabatch_cli.models.cnp import CNP
from metabatch_cli.models.predictive import Paths
from metabatch_cli.report import calibration_figure, curves, figures, pixels, style
from metabatch_cli.report.calibration_figure import draw_calibration
from metabatch_cli.report.curves import draw_learning_curves
from metabatch_cli.report.figures import draw_predictions
from metabatch_cli.report.steps_figure import curves_of, draw_inner_steps
from tasksets.functions import Functions, Sine
from tasksets.gp import GaussianProcess
from tasksets.kernels import RBF

# --- task sets and learners to draw ----------------------------------------------------------


def sines(**arguments: object) -> Functions:
    sizes = {"min_pts": 3, "max_ctx_pts": 50, "max_tgt_pts": 100} | arguments
    return Functions(Sine(), **sizes)


class WithoutTruth(Functions):
    def truth(self, tasks, x):
        return None


class Table(TaskSet):
    """Twelve rows of a group in all, made one task at a time from the global generators."""

    def __init__(self, columns: int = 1) -> None:
        super().__init__(2, 8, total_tgt_pts=12, sizes="rest")
        self.columns = columns

    def __len__(self):
        return 2

    @property
    def spec(self):
        return TaskSpec(x_shape=(self.columns,), y_shape=(2,))

    def __gettask__(self, index, n_context, n_target):
        if n_context + n_target > 12:
            raise ValueError("a group has twelve rows")
        x = np.random.rand(12, self.columns).astype(np.float32) + random.random() + index * 100
        y = torch.randn(12, 2)
        c, t = slice(n_context), slice(n_context, n_context + n_target)
        return {"context_x": x[c], "context_y": y[c], "target_x": x[t], "target_y": y[t]}


class Gradients(TaskSet):
    """Images `[C, 6, 8]` of random gradients, all of their pixels the target."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, 20, 30, total_tgt_pts=48, predict_full_target=True)
        self.channels = channels

    def __len__(self):
        return 100

    @property
    def spec(self):
        shape = (self.channels, 6, 8)
        return TaskSpec((2,), (self.channels,), "image", image_shape=shape)

    def __gettasks__(self, indices, n_context, n_target, generator):
        centres = [(2 * torch.arange(side) + 1) / side - 1 for side in (6, 8)]
        x = torch.cartesian_prod(*centres).expand(len(indices), 48, 2)
        slope = torch.rand(len(indices), 2, self.channels, generator=generator)
        y = (x @ slope).sin() * 0.4 + 0.5
        order = torch.rand(len(indices), 48, generator=generator).argsort(dim=1)[:, :n_context]
        chosen = order[..., None]
        context_x = x.gather(1, chosen.expand(-1, -1, 2))
        return Task(context_x, y.gather(1, chosen.expand(-1, -1, self.channels)), x, y)


class Shades(TaskSet):
    """Episodes of images whose brightness is their class, in mixed order."""

    def __init__(self, ways: int, shots: int, queries: int, x_shape=(1, 5, 4)) -> None:
        law = {"law": "way_shot", "ways": ways, "shots": shots, "queries": queries}
        super().__init__(sizes=law)
        self.x_shape = x_shape
        self.ways = ways

    def __len__(self):
        return 1000

    @property
    def spec(self):
        return TaskSpec(self.x_shape, (), "classification", ways=self.ways)

    def __gettasks__(self, indices, n_context, n_target, ways, shots, queries, generator):
        def points(count):
            labels = torch.randperm(ways * count, generator=generator) % ways
            labels = labels.expand(len(indices), -1)
            dims = (..., *[None] * len(self.x_shape))
            return (labels[dims] * 9).to(torch.uint8).expand(*labels.shape, *self.x_shape), labels

        return Task(*points(shots), *points(queries))


class Guess(Learner):
    """Predicts one mean and σ everywhere, or for images: their brightness, classes 0 … as 0 …"""

    def __init__(self, mean: float = 0.0, sigma: float = 1.0, ways: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.mean, self.sigma, self.ways = mean, sigma, ways

    @property
    def metric(self):
        return Metric("mse", higher_is_better=False)

    def score(self, tasks):
        return {"mse": (tasks.target_y - self.mean).square().mean(dim=(1, 2))}

    def predict(self, context_x: Tensor, context_y: Tensor, target_x: Tensor) -> Distribution:
        assert not self.training
        assert not torch.is_grad_enabled()
        if self.ways is not None:
            shade = target_x.flatten(2)[..., 0].long() // 9
            wrong_about_one = torch.where(shade == 1, 0, shade)
            return Categorical(logits=nn.functional.one_hot(wrong_about_one, self.ways).float())
        mean = torch.full((*target_x.shape[:2], context_y.shape[2]), self.mean)
        return Independent(Normal(mean, self.sigma, validate_args=False), 1)


class Sampler(Guess):
    """Draws from all global generators while it predicts."""

    def predict(self, context_x, context_y, target_x):
        noise = random.random() + np.random.rand() + torch.rand(())
        prediction = super().predict(context_x, context_y, target_x)
        return Independent(Normal(prediction.mean + noise, prediction.stddev), 1)


@pytest.fixture
def shown(monkeypatch) -> list[Figure]:
    """The figures that were saved, still to be looked into."""
    seen: list[Figure] = []

    def keep(figure, path):
        seen.append(figure)
        return path

    for module in (figures, curves, calibration_figure):
        monkeypatch.setattr(module, "save", keep)
    return seen


def assert_is_a_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 50


def titles(figure: Figure, loc: str = "left") -> list[str]:
    return [panel.get_title(loc) for panel in figure.axes if panel.get_title(loc)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- functions -------------------------------------------------------------------------------


def test_functions_are_drawn_for_growing_contexts(tmp_path):
    learner = NeuralProcess(CNP(1, 1, width=16))
    path = tmp_path / "new" / "folder" / "predictions.png"
    assert draw_predictions(learner, sines(), path) == path
    assert_is_a_picture(path)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.png"]


def test_a_row_is_one_function_and_a_column_one_context_size(shown, tmp_path):
    draw_predictions(NeuralProcess(CNP(1, 1, width=16)), sines(), tmp_path / "p.png")
    (figure,) = shown
    assert len(figure.axes) == 3 * 4
    assert titles(figure) == [f"{size} context points" for size in (3, 8, 20, 50)]
    rows = np.array(figure.axes).reshape(3, 4)
    for row in rows:
        contexts = [line_of(panel, "context") for panel in row]
        for size, context in zip((3, 8, 20, 50), contexts, strict=True):
            np.testing.assert_array_equal(context, contexts[-1][:size])
        assert len({panel.get_ylim() for panel in row}) == 1
        truth = line_of(row[0], "true function")
        assert len(truth) == 300
        assert truth[0, 0] == pytest.approx(-5, abs=0.5)
    assert legend(figure)[:4] == ["context", "true function", "prediction", "± 2σ"]


def line_of(panel, label: str) -> np.ndarray:
    return next(line for line in panel.lines if line.get_label() == label).get_xydata()


def test_context_sizes_can_be_chosen(shown, tmp_path):
    draw_predictions(Guess(), sines(), tmp_path / "p.png", context_sizes=[70, 1, 1])
    assert titles(shown[0]) == ["1 context point", "70 context points"]


def test_a_single_context_size_makes_one_row(shown, tmp_path):
    draw_predictions(Guess(), sines(sizes="fixed"), tmp_path / "p.png")
    (figure,) = shown
    assert len(figure.axes) == 4
    assert len({panel.get_position().y0 for panel in figure.axes}) == 1


def test_where_the_truth_is_not_known_held_out_points_are_shown(shown, tmp_path):
    taskset = WithoutTruth(Sine(), 3, 50, 100)
    draw_predictions(Guess(), taskset, tmp_path / "p.png")
    assert "held out" in legend(shown[0])
    assert "true function" not in legend(shown[0])


def test_a_learner_without_spread_has_no_band(shown, tmp_path):
    learner = Guess()
    learner.has_spread = False
    draw_predictions(learner, sines(), tmp_path / "p.png")
    assert "± 2σ" not in legend(shown[0])
    assert not any(panel.collections for panel in shown[0].axes)


class TwoLevels(Guess):
    """A function is −1 everywhere, or +1."""

    def predict(self, context_x, context_y, target_x):
        mean = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, *target_x.shape)
        return Paths(Independent(Normal(mean, 1e-3), 1))


def test_of_a_joint_prediction_whole_functions_are_drawn(shown, tmp_path):
    draw_predictions(TwoLevels(), sines(), tmp_path / "p.png")
    draw_predictions(Guess(), sines(), tmp_path / "p.png")
    joint, alone = shown
    assert "samples" in legend(joint)
    assert "samples" not in legend(alone)
    levels = set()
    for panel in joint.axes:
        drawn = [line.get_ydata() for line in panel.lines if line.get_linewidth() == 0.6]
        assert len(drawn) == 3
        for y in drawn:
            assert y.std() < 0.01
            levels.add(round(y.mean()))
    assert levels == {-1, 1}


def test_a_model_deployed_autoregressively_is_drawn_with_functions_too(shown, tmp_path):
    learner = AutoregressiveDeployment(NeuralProcess(CNP(1, 1, width=8)))
    draw_predictions(learner, sines(), tmp_path / "p.png", context_sizes=[3])
    assert "samples" in legend(shown[0])


def test_functions_are_drawn_in_any_order_and_shown_from_left_to_right(shown, tmp_path):
    class Straight(Guess):
        def predict(self, context_x, context_y, target_x):
            seen.append(target_x)
            return Paths(Independent(Normal(3 * target_x[None], 1e-6), 1))

    seen = []
    draw_predictions(Straight(), sines(), tmp_path / "p.png")
    assert any((x.diff(dim=1) < 0).any() for x in seen)
    for panel in shown[0].axes:
        for line in panel.lines:
            if line.get_linewidth() == 0.6:
                x, y = line.get_xydata().T
                np.testing.assert_allclose(y, 3 * x, atol=1e-4)
                assert (np.diff(x) > 0).all()


def test_the_exact_posterior_of_observations_stands_beside_the_prediction(shown, tmp_path):
    dataset = RBF(lengthscale=[0.5, 0.5], amplitude=[1.0, 1.0])
    gp = GaussianProcess(dataset, 3, 20, None, 25, sizes="rest", noise=0.3)
    draw_predictions(Guess(), gp, tmp_path / "p.png", context_sizes=[1, 20])
    assert "exact posterior ± 2σ" in legend(shown[0])
    for panel in shown[0].axes:
        mean, low, high = (line.get_ydata() for line in panel.lines if line.get_lw() == 0.9)
        np.testing.assert_allclose(mean - low, high - mean, atol=1e-5)
        # with the noise, and no more than what is known without any context
        assert 2 * 0.3 < (mean - low).min() < (mean - low).max() < 2 * (1 + 0.3**2) ** 0.5 + 1e-4
    draw_predictions(Guess(), sines(), tmp_path / "p.png")
    assert "exact posterior ± 2σ" not in legend(shown[1])


def test_a_long_legend_goes_over_two_lines_within_the_figure(tmp_path, shown):
    dataset = RBF(lengthscale=[0.5, 0.5], amplitude=[1.0, 1.0])
    gp = GaussianProcess(dataset, 3, 20, None, 25, sizes="rest")
    draw_predictions(TwoLevels(), gp, tmp_path / "p.png")
    (figure,) = shown
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("mean", "sigma"), [(0.0, 1e6), (1e9, 1.0), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_absurd_predictions_do_not_flatten_the_data(shown, tmp_path, mean, sigma):
    draw_predictions(Guess(mean, sigma), sines(), tmp_path / "p.png")
    for panel in shown[0].axes:
        low, high = panel.get_ylim()
        assert high - low < 40  # the largest sine is 10 high


def test_a_set_that_refuses_sizes_is_drawn_with_its_own(shown, tmp_path):
    draw_predictions(Guess(), Table(), tmp_path / "p.png")
    (figure,) = shown
    assert titles(figure)[-1] == "8 context points"
    assert len(figure.axes) == 2 * 4  # it has two tasks only
    # their x lie a hundred apart, so that each row has its own range
    upper, lower = sorted(figure.axes[panel].get_xlim() for panel in (0, 4))
    assert upper[1] < lower[0]
    assert figure.axes[0].get_ylabel() == "y₁"


def test_a_set_that_makes_no_tasks_at_all_says_why(tmp_path):
    class Broken(Functions):
        def __gettasks__(self, *args, **kwargs):
            raise ValueError("no such table")

    with pytest.raises(ValueError, match="no such table"):
        draw_predictions(Guess(), Broken(Sine(), 3, 50, 100), tmp_path / "p.png")


# --- images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_completed_from_growing_contexts(shown, tmp_path, channels):
    draw_predictions(Guess(0.5, 0.1), Gradients(channels), tmp_path / "p.png")
    (figure,) = shown
    assert len(figure.axes) == 4 * (3 * 4 + 1) + 1  # context, mean and σ; truth; colour bar
    sizes = (2, 4, 9, 20)
    assert titles(figure, "center")[:4] == [f"{size} pixels" for size in sizes]
    contexts = [panel for panel in figure.axes if panel.get_title("center").endswith("pixels")]
    unknown = np.array([int(pixels.UNKNOWN[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    truths = [panel for panel in figure.axes if panel.get_title("center") == "truth"]
    assert len(truths) == 4
    known_before = None
    for panel, size in zip(contexts, sizes, strict=False):
        picture = np.asarray(panel.images[0].get_array())
        assert picture.shape == (6, 8, 3)
        known = ~np.isclose(picture, unknown).all(axis=-1)
        assert known.sum() == size
        np.testing.assert_allclose(picture[known], truths[0].images[0].get_array()[known])
        if known_before is not None:
            assert known[known_before].all()
        known_before = known


def test_the_image_figure_is_a_picture(tmp_path):
    learner = NeuralProcess(CNP(2, 3, width=16))
    path = draw_predictions(learner, Gradients(3), tmp_path / "p.png", context_sizes=[0, 48])
    assert_is_a_picture(path)


def test_a_learner_without_spread_completes_without_deviation(shown, tmp_path):
    learner = Guess(0.5)
    learner.has_spread = False
    draw_predictions(learner, Gradients(1), tmp_path / "p.png")
    assert len(shown[0].axes) == 4 * (2 * 4 + 1)


def test_images_are_drawn_of_diverged_learners_too(shown, tmp_path):
    learner = Guess(float("nan"), float("nan"))
    draw_predictions(learner, Gradients(1), tmp_path / "p.png", context_sizes=[9])
    assert len(shown[0].axes) == 4 * (3 + 1) + 1


# --- episodes --------------------------------------------------------------------------------


def test_queries_are_framed_by_right_and_wrong(shown, tmp_path):
    draw_predictions(Guess(ways=3), Shades(3, shots=1, queries=4), tmp_path / "p.png")
    (figure,) = shown
    assert len(figure.axes) == 2 * (3 * 1 + 3 * 4)  # two episodes: supports and queries
    frames = [to_hex(panel.spines["left"].get_edgecolor()).upper() for panel in figure.axes]
    assert frames.count(style.GREEN) == 2 * 2 * 4
    assert frames.count(style.VERMILLION) == 2 * 4  # class B is taken for A
    texts = [text.get_text() for text in figure.texts]
    assert texts.count("✗ A") == 2 * 4
    assert "Episode 1: 8 of 12 queries right" in texts


def test_large_episodes_are_shown_in_part(shown, tmp_path):
    draw_predictions(Guess(ways=20), Shades(20, shots=7, queries=9), tmp_path / "p.png")
    (figure,) = shown
    assert len(figure.axes) == 6 * (5 + 6)  # one episode
    assert "(6 of 20 classes are shown)" in legend(figure)
    assert "Episode 1: 171 of 180 queries right" in [text.get_text() for text in figure.texts]


def test_the_episode_figure_is_a_picture(tmp_path):
    path = draw_predictions(Guess(ways=5), Shades(5, 5, 15), tmp_path / "p.png")
    assert_is_a_picture(path)


# --- what drawing must not do ----------------------------------------------------------------


def test_nothing_is_drawn_where_there_is_nothing_to_draw(tmp_path):
    class Unknown(Functions):
        spec = None

    path = tmp_path / "p.png"
    assert draw_predictions(Guess(), Table(columns=2), path) is None
    assert draw_predictions(Guess(), Unknown(Sine(), 3, 50, 100), path) is None
    assert draw_predictions(Guess(ways=3), Shades(3, 1, 1, x_shape=(7,)), path) is None
    assert not path.exists()


@pytest.mark.parametrize("sizes", [[], [3, -1], [2.5], [True, "a"]])
def test_impossible_context_sizes_are_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match="context_sizes="):
        draw_predictions(Guess(), sines(), tmp_path / "p.png", context_sizes=sizes)


@pytest.mark.parametrize("taskset", [Table(), sines()], ids=["each", "whole"])
def test_global_random_states_stay_as_they_were(shown, tmp_path, taskset):
    def states():
        numpy_state = np.random.get_state()
        return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state()

    before = states()
    draw_predictions(Sampler(), taskset, tmp_path / "p.png")
    after = states()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_a_figure_depends_on_nothing_but_weights_and_seed(tmp_path):
    def drawn(name: str, seed: int) -> bytes:
        path = draw_predictions(Sampler(), Table(), tmp_path / name, seed=seed, context_sizes=[5])
        return path.read_bytes()

    first = drawn("a.png", seed=0)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert drawn("b.png", seed=0) == first
    assert drawn("c.png", seed=1) != first


def test_users_matplotlib_settings_do_not_show_through_or_change(tmp_path):
    import matplotlib

    taskset = sines(sizes="fixed")
    first = draw_predictions(Guess(), taskset, tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context({"axes.grid": True, "lines.linestyle": ":", "savefig.dpi": 30}):
        settings = dict(matplotlib.rcParams)
        assert draw_predictions(Guess(), taskset, tmp_path / "b.png").read_bytes() == first
        assert dict(matplotlib.rcParams) == settings


def test_training_modes_come_back_also_after_an_error(shown, tmp_path):
    learner = Guess()
    learner.add_module("trained", nn.Dropout())
    learner.add_module("frozen", nn.Dropout().eval())
    draw_predictions(learner, sines(), tmp_path / "p.png")
    assert (learner.training, learner.trained.training, learner.frozen.training) == (1, 1, 0)

    learner.predict = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        draw_predictions(learner, sines(), tmp_path / "p.png")
    assert (learner.training, learner.trained.training, learner.frozen.training) == (1, 1, 0)
    assert torch.is_grad_enabled()


def test_tasks_come_in_the_asked_precision(shown, tmp_path):
    learner = NeuralProcess(CNP(1, 1, width=16)).double()
    draw_predictions(learner, sines(), tmp_path / "p.png", dtype=torch.float64)
    assert len(shown) == 1


@pytest.mark.slow
def test_pyplot_and_its_global_state_are_left_alone():
    code = (
        "import sys; from metabatch_cli.report import curves, figures; "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- calibration -----------------------------------------------------------------------------


def test_every_test_set_has_a_curve_of_coverage(shown, tmp_path):
    curve = {"levels": [0.25, 0.5, 0.75], "coverage": [0.2, 0.4, 0.7]}
    sets = {"test@noise=0,x=1": curve, "test@noise=1": curve}
    assert draw_calibration(sets, tmp_path / "c.png") == tmp_path / "c.png"
    (panel,) = shown[0].axes
    labels = [line.get_label() for line in panel.lines]
    assert labels == ["calibrated", "noise=0, x=1", "noise=1"]
    expected = [[0, 0], [0.25, 0.2], [0.5, 0.4], [0.75, 0.7], [1, 1]]
    np.testing.assert_array_equal(line_of(panel, "noise=1"), expected)
    draw_calibration({"test": curve}, tmp_path / "c.png")
    assert shown[1].axes[0].lines[1].get_label() == "prediction"


def test_without_a_spread_there_is_no_calibration_to_draw(tmp_path):
    assert draw_calibration({}, tmp_path / "c.png") is None
    assert list(tmp_path.iterdir()) == []


def test_the_calibration_figure_is_a_picture(tmp_path):
    curve = {"levels": [0.5], "coverage": [0.4]}
    assert_is_a_picture(draw_calibration({"test": curve}, tmp_path / "c.png"))


# --- learning curves -------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path):
    def write(rows: list[dict], tail: str = "") -> Path:
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        return file

    return write


def losses(count: int, scale: float = 1.0) -> list[dict]:
    return [{"step": step, "loss": scale / step - 0.3} for step in range(1, count + 1)]


def validations(name: str, values: list[float], **more: float) -> list[dict]:
    return [
        {"step": 100 * step, f"val/{name}": value}
        | {f"val/{name}/{key}": width for key, width in more.items()}
        for step, value in enumerate(values, start=1)
    ]


def test_loss_and_validation_stand_side_by_side(metrics, tmp_path):
    rows = losses(300) + validations("log_likelihood", [0.1, 0.5, 0.4], ci95=0.1, oracle=0.9)
    path = draw_learning_curves(
        metrics(rows), tmp_path / "c.png", metric="log_likelihood", higher_is_better=True
    )
    assert path == tmp_path / "c.png"
    assert_is_a_picture(path)


def test_the_best_step_the_band_and_the_oracle_are_marked(shown, metrics, tmp_path):
    rows = losses(300) + validations("log_likelihood", [0.1, 0.5, 0.4], ci95=0.1, oracle=0.9)
    file = metrics(rows, tail='{"step": 400, "val/log_li')  # killed while writing
    draw_learning_curves(file, tmp_path / "c.png", metric="log_likelihood", higher_is_better=True)
    training, validation = shown[0].axes
    assert [line.get_label() for line in training.lines] == ["as logged", "moving average"]
    assert line_of(training, "as logged").shape == (300, 2)
    labels = [line.get_label() for line in validation.lines]
    assert "best 0.5 at step 200" in labels
    assert "best possible 0.9" in labels
    assert len(validation.collections) == 1
    assert "95%" in validation.get_title("left")


@pytest.mark.parametrize(
    ("metric", "drawn"),
    [
        ("mse@steps=1", ["shots=5", "shots=10"]),
        ("mse@shots=5,steps=1", [""]),
        ("mse", ["shots=5, steps=1", "shots=10, steps=1", "shots=10, steps=10"]),
    ],
)
def test_every_set_with_that_metric_has_a_curve(shown, metrics, tmp_path, metric, drawn):
    row = {"step": 1}
    for name in ("mse@shots=5,steps=1", "mse@shots=10,steps=1", "mse@shots=10,steps=10", "mse2"):
        row |= {f"val/{name}": 1.0, f"val/{name}/ci95": 0.1, f"test/{name}": 1.0}
    draw_learning_curves(metrics([row]), tmp_path / "c.png", metric=metric, higher_is_better=False)
    (panel,) = shown[0].axes
    labels = [line.get_label() for line in panel.lines if "best" in line.get_label()]
    assert [label.rpartition("best")[0].rstrip(": ") for label in labels] == drawn


def test_positive_values_over_decades_are_logarithmic(shown, metrics, tmp_path):
    def scales(rows: list[dict], higher_is_better: bool = False) -> list[str]:
        file = metrics(rows)
        draw_learning_curves(
            file, tmp_path / "c.png", metric="mse", higher_is_better=higher_is_better
        )
        return [panel.get_yscale() for panel in shown.pop().axes]

    wide, narrow = validations("mse", [10.0, 1.0, 0.1]), validations("mse", [3.0, 2.0, 1.0])
    decades = [{"step": step, "loss": 10.0**-step} for step in range(4)]
    assert scales(decades + wide) == ["log", "log"]
    assert scales(losses(9) + narrow) == ["linear", "linear"]
    assert scales(wide, higher_is_better=True) == ["linear"]


def test_losses_that_are_not_finite_leave_a_gap(shown, metrics, tmp_path):
    rows = [*losses(9), {"step": 10, "loss": float("nan")}, {"step": 11, "loss": None}]
    draw_learning_curves(metrics(rows), tmp_path / "c.png", metric="mse", higher_is_better=False)
    (line,) = shown[0].axes[0].lines
    assert len(line.get_xydata()) == 9


def test_of_two_rows_of_a_step_the_later_one_counts(shown, metrics, tmp_path):
    rows = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    draw_learning_curves(metrics(rows), tmp_path / "c.png", metric="mse", higher_is_better=False)
    np.testing.assert_array_equal(shown[0].axes[0].lines[0].get_xydata(), [[1, 1], [2, 2]])


def test_without_anything_to_draw_there_is_no_figure(metrics, tmp_path):
    path = tmp_path / "c.png"
    options = {"metric": "mse", "higher_is_better": False}
    assert draw_learning_curves(tmp_path / "missing.jsonl", path, **options) is None
    assert draw_learning_curves(metrics([]), path, **options) is None
    other = metrics([{"step": 1, "lr": 0.1, "val/accuracy": 0.5}], tail='{"st')
    assert draw_learning_curves(other, path, **options) is None
    assert not path.exists()


# --- inner steps -----------------------------------------------------------------------------


def after(**scores: list[float]) -> dict[str, dict[str, float]]:
    return {
        f"test/{score}@shots={shots},steps={steps}": {"mean": mean / shots, "ci95": 0.1}
        for score, means in scores.items()
        for shots in (1, 5)
        for steps, mean in enumerate(means)
    }


def test_a_score_after_ever_more_steps_is_a_curve_for_each_test_set(tmp_path):
    curves = curves_of(after(mse=[5.0, 2.0, 1.0]))
    assert curves == {
        ("mse", f"shots={n}"): {0: (5 / n, 0.1), 1: (2 / n, 0.1), 2: (1 / n, 0.1)} for n in (1, 5)
    }
    assert_is_a_picture(draw_inner_steps(after(mse=[5.0, 2.0, 1.0]), tmp_path / "s.png"))


@pytest.mark.parametrize("scores", [{}, {"mse": [5.0, 2.0]}])
def test_fewer_than_three_numbers_of_steps_are_no_curve(tmp_path, scores):
    assert draw_inner_steps(after(**scores), tmp_path / "s.png") is None
    assert not (tmp_path / "s.png").exists()


def test_scores_without_steps_are_left_alone(tmp_path):
    metrics = {"test/accuracy@ways=5": {"mean": 0.9, "ci95": None}}
    assert curves_of(metrics) == {}
    assert draw_inner_steps(metrics, tmp_path / "s.png") is None
