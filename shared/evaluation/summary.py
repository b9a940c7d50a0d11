"""The text at the end of a run: what was learned, where the files are, what to do next."""

from pathlib import Path

from shared.pictures import read_log

from .knn_monitor import KNNMonitor


def end_of_run(
    output_dir: Path, weights: Path, knn: KNNMonitor, pictures: list[Path], commands: list[str], learned: tuple = ()
) -> str:
    """Four paragraphs.

    Args:
        output_dir: Folder of the run, with its ``metrics.jsonl``.
        weights: Its last checkpoint.
        knn: The run's evaluations.
        pictures: Files to look at.
        commands: What to run next.
        learned: Lines of the method's own about what was learned.
    """
    lines = read_log(output_dir / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    accuracies = [line["knn_top1"] for line in lines if "knn_top1" in line]
    first, last = training[0], training[-1]
    text = [f"loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}", *learned]
    if len(accuracies) > 1:
        text.append(
            f"k-NN on {knn.val.source.describe()}: {accuracies[0]:.1f} % before training, {accuracies[-1]:.1f} % after "
            f"(chance {100 / len(knn.val.source.classes):.1f} %)"
        )
    elif knn.off:
        text.append(f"no k-NN evaluation: {knn.off}")
    rows = [("Learned", text), ("Checkpoint", [f"{weights} (the same command resumes from it)"])]
    if pictures:
        rows.append(("Pictures", [str(path) for path in pictures]))
    rows.append(("Next", commands))
    return "\n".join(f"{title if i == 0 else '':12s}{line}" for title, block in rows for i, line in enumerate(block))
