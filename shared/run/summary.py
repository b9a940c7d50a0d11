"""End-of-run summary: what was learned, what went wrong, where the files are, what to run next."""

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
    values = [f"loss {line['loss']:.3f} at step {line['step']}" for line in (losses[:1] + losses[1:][-1:])]
    learned = [", ".join(values), *learned]
    if knn is not None and knn.disabled_reason:
        learned.append(f"no k-NN evaluation: {knn.disabled_reason}")
    elif knn is not None:
        learned += accuracy(lines, "knn_top1", f"k-NN on {knn.val.source.describe()}", len(knn.val.source.classes))
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
    return paragraphs(blocks)


def accuracy(lines: Sequence[dict], key: str, what: str, num_classes: int) -> list[str]:
    """The first and the last accuracy of a log as one sentence; nothing where it holds none."""
    values = [f"{line[key]:.1f} % after {line['step']} steps" for line in lines if key in line]
    both = ", ".join(values[:1] + values[1:][-1:])
    return [f"{what}: {both} (chance {100 / num_classes:.1f} %)"] if values else []


def paragraphs(blocks: dict[str, Sequence[str]]) -> str:
    """Lines under the titles of their blocks, which stand in a column of their own."""
    return "\n".join(
        f"{title if i == 0 else '':10s}{line}" for title, block in blocks.items() for i, line in enumerate(block)
    )


def command(script: str, **flags) -> str:
    """A command line; flags without a value are left out."""
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    return " ".join(["python", script, *given])
