"""The text at the end of a run: what was learned, what went wrong, where the files are, what to do next."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from shared.evaluation.knn_monitor import KNNMonitor

from .log import read_log


def end_of_run(
    output_dir: Path,
    weights: Path,
    knn: KNNMonitor | None,
    pictures: Sequence[Path],
    commands: Sequence[str],
    learned: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> str:
    """A paragraph for each of these.

    Args:
        output_dir: Folder of the run, with its ``metrics.jsonl``.
        weights: Its last checkpoint.
        knn: The run's evaluations; None for a method without them.
        pictures: Files to look at.
        commands: What to run next.
        learned: Lines of the method's own about what was learned.
        problems: Sentences of the method's collapse monitor.
    """
    lines = read_log(output_dir / "metrics.jsonl")
    losses = [line for line in lines if line.get("loss") is not None]
    accuracies = [line for line in lines if "knn_top1" in line]
    values = [f"loss {line['loss']:.3f} at step {line['step']}" for line in (losses[:1] + losses[1:][-1:])]
    learned = [", ".join(values), *learned]
    if accuracies and knn is not None and knn.disabled_reason is None:
        before = f"{accuracies[0]['knn_top1']:.1f} % after {accuracies[0]['step']} steps, " if accuracies[1:] else ""
        learned.append(
            f"k-NN on {knn.val.source.describe()}: {before}{accuracies[-1]['knn_top1']:.1f} % after "
            f"{accuracies[-1]['step']} steps (chance {100 / len(knn.val.source.classes):.1f} %)"
        )
    elif knn is not None and knn.disabled_reason:
        learned.append(f"no k-NN evaluation: {knn.disabled_reason}")
    files = [
        f"{weights} (the same command resumes from it)",
        f"{output_dir / 'metrics.jsonl'} (every few steps), {output_dir / 'log.txt'} (every epoch)",
    ]
    blocks = {
        "Learned": learned,
        "Problems": problems,
        "Files": files,
        "Pictures": [str(path) for path in pictures],
        "Next": commands,
    }
    return "\n".join(
        f"{title if i == 0 else '':10s}{line}" for title, block in blocks.items() for i, line in enumerate(block)
    )


def command(script: str, **flags) -> str:
    """A command line; flags without a value are left out."""
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    return " ".join(["python", script, *given])
