"""End-of-run report: curves, packed sequences, accuracy over cost, and what to run next."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from navit.pack import Example, PackedBatches
from shared.images.sources import ImageSource
from shared.pictures.report import SUPERVISED_PLOTS, Report
from shared.pictures.sheets import Tile, save_sheet, to_pixels
from shared.run.run import Run

from .eval_resolutions import evenly, measure, save_cost


def draw_sequence(sequence: Sequence[Example], length: int, patch: int, per_row: int) -> np.ndarray:
    """A sequence as tiles: each token a patch, framed in the colour of its image; padding is grey."""
    import matplotlib

    frame, place = max(1, patch // 8), 0
    side = patch + 2 * frame
    tiles = np.full((-(-length // per_row) * per_row, side, side, 3), 255, dtype=np.uint8)
    tiles[:length] = 225
    for example in sequence:
        n = len(example.patches)
        tiles[place : place + n] = matplotlib.colormaps["hsv"](example.number * 0.618 % 1, bytes=True)[:3]
        pixels = to_pixels(example.patches.reshape(n * patch, patch, -1)).reshape(n, patch, patch, 3)
        tiles[place : place + n, frame:-frame, frame:-frame] = pixels
        place += n
    return tiles.reshape(-1, per_row, side, side, 3).swapaxes(1, 2).reshape(-1, per_row * side, 3)


def save_packing(sequences: Sequence[Sequence[Example]], length: int, patch: int, path: Path) -> Path:
    """Some packed sequences, each a block of tiles."""
    rows = []
    for sequence in sequences:
        pixels = draw_sequence(sequence, length, patch, min(length, 64)).repeat(2, axis=0).repeat(2, axis=1)
        free = length - sum(len(example.patches) for example in sequence)
        grids = ", ".join("{}x{}".format(*example.grid) for example in sequence)
        title = f"{len(sequence)} images of {grids} patches; {free} of {length} places are padding"
        rows.append([Tile(pixels, title)])
    heading = "Images packed into sequences\nA tile is a token, a colour is an image, grey is padding"
    return save_sheet(rows, path, heading, [10 * len(row[0].pixels) / row[0].pixels.shape[1] for row in rows])


def report(
    run: Run, train: ImageSource, val: ImageSource | None, batches: PackedBatches, look: Callable[[float], dict]
) -> None:
    """Evaluate the network over the range of the training, draw, and print the text.

    Args:
        look: See :func:`navit.eval_resolutions.measure`.
    """
    args, ending, learned = run.args, Report(run, "navit/main.py"), []
    ending.draw_curves("NaViT", SUPERVISED_PLOTS if val is not None else SUPERVISED_PLOTS[:1])
    length = args.sequence_length
    if batches.shown:  # else the run was finished before, and the picture is there
        ending.draw("packed.png", lambda path: save_packing(batches.shown, length, args.patch_size, path))
    if val is not None:
        rows, cascades = zip(*measure(evenly(*args.resolution), look), strict=True)
        cascades = [row for pairs in cascades for row in pairs]
        ending.draw("cost.png", lambda path: save_cost(rows, cascades, path, "Accuracy and cost of one NaViT"))
        by_side = ", ".join(f"{row['resolution']} px ({row['tokens']:.0f} tokens) {row['acc1']:.1f} %" for row in rows)
        learned = [*ending.top1(train, val), f"top-1 by effective resolution: {by_side}"]
        ending.then("navit/eval_resolutions.py", pretrained=run.path, output_dir=run.output_dir / "resolutions")
    for last in [line for line in ending.lines if "padding" in line][-1:]:
        learned.append(
            f"in the last steps: {last['tokens']:.0f} tokens an image, {last['images_per_sequence']:.1f} images a "
            f"sequence, {100 * last['padding']:.1f} % padding, {100 * last['shrunk']:.1f} % of the images shrunk to fit"
        )
    ending.finish(learned)
