"""End-of-run report: curves of the log, the views as they enter the networks, and the text that names all pictures."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor, classify_pixels
from shared.evaluation.neighbours import Gallery, galleries, save_nearest
from shared.images.loading import BadImages, EvalDataset, tell_unreadable
from shared.images.sources import ImageSource, has_parts
from shared.multicrop import MultiCropDataset
from shared.run.log import read_log
from shared.run.run import Run
from shared.run.summary import accuracy, command, margin, next_command, paragraphs, start_of, without_labels

from .curves import Curve, Panel, save_panels
from .sheets import Tile, save_sheet, to_pixels

PIXELS_UP_TO = 10_000  # training images that a report reads once more to classify raw pixels


# --- Curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """One panel of the curves, over the steps of a run.

    Attributes:
        title, ylabel: Of the panel.
        series: Legend of each curve, by its key in the lines of the log; lines that lack one of them are left out.
        reference: Key and legend of a constant of these lines, drawn dashed.
        points: For the few values of evaluations: marked, the first and the last one written beside them.
        least_range: Keeps the y axis from magnifying noise; of a loss it is one nat.
    """

    title: str
    ylabel: str
    series: dict[str, str]
    reference: tuple[str, str] | None = None
    points: bool = False
    least_range: float = 1.0


def accuracy_plot(title: str, key: str = "knn_top1") -> Plot:
    """An accuracy in percent, measured between epochs."""
    return Plot(title, "top-1 accuracy (%)", {key: ""}, ("knn_chance", "chance"), points=True, least_range=10)


RECALL = Plot(
    "Images found again from a mirrored half",
    "recall@1 (%)",
    {"recall_at_1": ""},
    ("recall_chance", "chance"),
    points=True,
    least_range=10,
)


SUPERVISED_PLOTS = (Plot("Training", "loss", {"loss": ""}), accuracy_plot("Accuracy on the val part", "test_acc1"))


def save_curves(log_path: str | Path, path: str | Path, heading: str, plots: Sequence[Plot]) -> Path:
    """Curves of a run; plots without lines are left out.

    Args:
        log_path: ``metrics.jsonl`` of a run.
        path: PNG file to write.
        plots: The first one is of every training step.

    Raises:
        ValueError: If the log holds no training steps.
    """
    lines, panels = read_log(log_path), []
    for plot in plots:
        drawn = [line for line in lines if all(line.get(key) is not None for key in plot.series)]  # None: not finite
        if not drawn and not panels:
            raise ValueError(f"{log_path} holds no training steps")
        if not drawn:
            continue
        x = [line["step"] for line in drawn]
        style = "points" if plot.points else "line"
        curves = [Curve(x, [line[key] for line in drawn], label, style) for key, label in plot.series.items()]
        if plot.reference is not None and plot.reference[0] in drawn[-1]:
            key, label = plot.reference
            curves.append(Curve([x[0], x[-1]], [drawn[-1][key]] * 2, label, "reference"))
        panels.append(Panel(plot.title, "step", plot.ylabel, curves, plot.least_range))
    return save_panels(panels, path, heading)


# --- Views ------------------------------------------------------------------------------------------------------------


def save_views(
    groups: Sequence[Sequence[Tensor | np.ndarray]],
    titles: Sequence[str],
    path: str | Path,
    heading: str,
    per_row: int = 8,
) -> Path:
    """The views of one image at relative sizes; every group starts a row.

    Args:
        groups: Views (uint8, (C, H, W), or pixels) of one size, as a :class:`shared.multicrop.MultiCropDataset` gives
            them.
        titles: Of each view, in which ``{n}`` counts those with the same title and ``{px}`` is the height.
        path: PNG file to write.
        per_row: Groups of more views go on in further rows.
    """
    numbers, titles = Counter(), iter(titles)
    rows = []
    for group in groups:
        tiles = []
        for pixels, title in zip(map(to_pixels, group), titles, strict=False):
            numbers[title] += 1
            tiles.append(Tile(pixels, title.format(n=numbers[title], px=len(pixels))))
        rows += [tiles[i : i + per_row] for i in range(0, len(tiles), per_row)]
    largest = max(len(tile.pixels) for row in rows for tile in row)
    heights = [max(2.6 * len(row[0].pixels) / largest, 1.15) for row in rows]
    return save_sheet(rows, path, heading, heights)


# --- Report -----------------------------------------------------------------------------------------------------------

# what a picture can fail from: odd images or names, a full disk, too little memory, drawing libraries
PICTURE_ERRORS = (ArithmeticError, ImportError, LookupError, MemoryError, OSError, RuntimeError, ValueError)


class Report:
    """Pictures of a finished run and the text at its end. Every process makes the same calls, rank 0 draws and prints.

    Args:
        run: After its last epoch; its flag ``pictures`` says whether there are any.
        script: That trained, a path below the root of the repository.

    Attributes:
        lines: Of ``metrics.jsonl``.
        files: Sentences about files that the text names besides those of every run.
        commands: What to run next.
    """

    def __init__(self, run: Run, script: str = ""):
        self.run, self.script, self.galleries = run, script, None
        self.files, self.pictures, self.commands = [], [], []
        self.folder = run.output_dir / "pictures"
        self.log = run.output_dir / "metrics.jsonl"
        self.lines = read_log(self.log) if distributed.is_main_process() else []

    def draw(self, name: str, save: Callable[[Path], object]) -> None:
        """Let ``save`` write the picture ``name``; if it fails, the text says so and the run ends as it would."""
        if not (self.run.args.pictures and distributed.is_main_process()):
            return
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path)
            self.pictures.append(str(path))
        except PICTURE_ERRORS as error:
            self._failed(path, error)

    def _failed(self, path: Path, error: Exception) -> None:
        self.pictures.append(_failure(path, error))

    def draw_views(self, dataset: MultiCropDataset, titles: Sequence[str], heading: str) -> None:
        """The views of the first image, see :func:`save_views`."""
        self.draw("views.png", lambda path: save_views(dataset[(0, 0)][0], titles, path, heading))

    def draw_curves(self, heading: str, plots: Sequence[Plot]) -> None:
        self.draw("curves.png", lambda path: save_curves(self.log, path, heading, [*plots, RECALL]))

    def draw_neighbours(self, backbone: nn.Module, source: ImageSource, knn: KNNMonitor) -> None:
        """Neighbours of ten validation images, or of images of ``source`` where there was no k-NN."""
        if not self.run.args.pictures:
            return
        try:
            found = galleries(backbone, source, knn)
        except ValueError as error:  # of features, the same on every process
            self._failed(self.folder / "neighbours.png", error)
        else:
            self.galleries = found
            self.draw("neighbours.png", lambda path: save_nearest(*found, path))

    def top1(self, train: ImageSource, val: ImageSource) -> list[str]:
        """The accuracies of a supervised training, and for few images that of raw pixels; on every process."""
        what, start = f"top-1 on {val.describe()}", start_of(vars(self.run.args))
        found = accuracy(self.lines, "test_acc1", what, len(val), len(val.classes), start=start)
        if len(train) > PIXELS_UP_TO:
            return found
        pixels = classify_pixels(train, val, self.run.device)
        return [*found, f"k-NN of raw pixels: {pixels:.1f} +- {margin(pixels, len(val)):.1f} %"]

    def then(self, script: str, *arguments: str, **flags) -> None:
        """Name a command that evaluates the trained network, see :func:`shared.run.summary.next_command`."""
        self.commands.append(next_command(self.run.args, self.script, script, *arguments, **flags))

    def finish(
        self,
        learned: Sequence[str] = (),
        knn: KNNMonitor | None = None,
        lr_flag: str = "--lr",
        own_images: str = "",
        **own_flags,
    ) -> None:
        """Print what came out, what went wrong, where the files are, what to run next.

        Args:
            learned: Lines of the method's own about what came out.
            knn: The run's evaluations; None for a method without them.
            lr_flag: The flag for the learning rate, to advise on it.
            own_images: The command for other images, of no use to those who have just given theirs; by default that of
                ``script`` with ``own_flags``.
        """
        own_flags = {"data_path": "YOUR_IMAGES", "output_dir": "YOUR_RUN"} | own_flags
        own_images = own_images or command(self.script, **own_flags)
        start = start_of(vars(self.run.args))
        losses = [line for line in self.lines if line.get("loss") is not None]
        values = [f"loss {line['loss']:.3f} at step {line['step']}" for line in (losses[:1] + losses[1:][-1:])]
        result = [", ".join(values), *learned]
        if getattr(self.run.args, "small_data", True) is False:
            lr_flag += ", or for few images with --small_data"
        if knn is not None and knn.disabled_reason:
            result.append(f"no k-NN evaluation: {knn.disabled_reason}")
        elif knn is not None:
            val = knn.val.source
            sizes = len(val), len(val.classes)
            result += accuracy(self.lines, "knn_top1", f"k-NN on {val.describe()}", *sizes, lr_flag, start)
        if knn is not None and knn.without_labels:
            images = knn.without_labels
            result += without_labels(self.lines, images.name, len(images.images), lr_flag, start)
        files = [
            f"{self.run.path} (the same command resumes from it)",
            f"{self.log} (every few steps), {self.log.with_name('log.txt')} (every epoch)",
        ]
        if path := self.run.args.data_path:
            features = {"out": self.run.output_dir / "features.npz", "split": "train" if has_parts(path) else None}
            method = self.script.split("/")[0]
            self.then("shared/evaluation/extract_features.py", method, str(self.run.path), **features)
        else:
            self.commands.append(own_images)
        blocks = {
            "Result": result,
            "Problems": [*self.run.health.warnings.values(), *tell_unreadable(self.run.output_dir)],
            "Files": files + self.files,
            "Pictures": self.pictures,
            "Next": self.commands,
            "Page": save_page(self.run, self.galleries) if self.run.args.pictures else [],
        }
        distributed.print_once(paragraphs(blocks))


def save_page(run: Run, galleries: tuple[Gallery, Gallery] | None = None) -> list[str]:
    """Write the page about a finished run; where it is, or why there is none, on rank 0.

    Args:
        galleries: Queries and what to search, if their features are known.
    """
    if not distributed.is_main_process():
        return []
    try:
        from .report_page import write_page  # SciPy and others, of which the training needs nothing

        problems = list(run.health.warnings.values())
        return [str(write_page(run.path, vars(run.args), galleries, problems, run.device).resolve())]
    except (*PICTURE_ERRORS, AttributeError, TypeError) as error:  # networks of any kind are looked into
        return [_failure(run.path.with_name("report.html"), error)]


def _failure(path: Path, error: Exception) -> str:
    return f"{path} could not be drawn: {type(error).__name__}: {' '.join(str(error).split())}"


def first_image(source: ImageSource, knn: KNNMonitor) -> Tensor:
    """The whole of a validation image, or of one of ``source`` where there was no k-NN: normalised, (C, H, W)."""
    source = source if knn.disabled_reason else knn.val.source
    transform = copy.copy(knn.transform)
    transform.resize_px = transform.crop_px
    return EvalDataset(source, transform, BadImages(len(source), max_fraction=1))[0][0]
