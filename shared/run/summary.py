"""Text at the end of a run: what came out, where the files are, what to run next."""

import argparse
import importlib
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FEW_STEPS = 50  # in which the statistics of batch norms change more than weights do: features do, at a rate of 0, too


def start_of(flags: Mapping) -> str:
    """What a training with these flags began with."""
    given = [name for name in ("pretrained", "finetune") if flags.get(name)]
    given += ["teacher"] if flags.get("teacher") and flags.get("init") == "teacher" else []
    return f"the weights of --{given[0]}" if given else "random weights"


def accuracy(
    lines: Sequence[dict],
    key: str,
    what: str,
    num_images: int,
    num_classes: float,
    lr_flag: str = "--lr",
    start: str = "random weights",
) -> list[str]:
    """The first and the last accuracy of a log, and what follows, as one sentence; nothing where it holds none.

    Each is told with two standard errors, and that of raw pixels where the log has it.

    Args:
        key: Of the accuracy, in percent.
        what: Was measured.
        num_images: That were classified.
        num_classes: One over the share that a guess gets right.
        lr_flag: The flag for the learning rate, to advise on it.
        start: What the training began with.
    """
    measured = [line for line in lines if key in line]
    if not measured:
        return []
    found = {}
    for line in measured[:1] + measured[1:][-1:]:
        found[f"after {line['step']} steps" if line["step"] else f"with {start}"] = line[key]
        found |= {"of raw pixels": line[f"pixels_{key}"]} if f"pixels_{key}" in line else {}
    values = [f"{value:.1f} +- {margin(value, num_images):.1f} % {name}" for name, value in found.items()]
    sentence = f"{what}: {', '.join(values)} (chance {100 / num_classes:.1f} %)"
    if measured[-1]["step"] == 0:
        return [sentence]
    before = measured[0][key] if measured[0]["step"] == 0 else 100 / num_classes
    return [f"{sentence}: {verdict(before, measured[-1], key, num_images, lr_flag, start, measured[0].get('rankme'))}"]


def verdict(
    before: float, line: dict, key: str, num_images: int, lr_flag: str, start: str, rankme_before: float | None = None
) -> str:
    """What two accuracies in percent of the same images, before and after training, say about learning.

    Differences of less than two standard errors of such an accuracy say nothing.

    Args:
        line: Of the log, with that after training as ``key``.
        rankme_before: With it and a ``rankme`` in the line, ``recall_at_1`` is that of images from their parts, which
            clusters lose as well.
    """
    after = line[key]
    chance = margin((before + after) / 2, num_images)
    if abs(after - before) <= chance:
        return f"not distinguishable from {start} (differences up to {chance:.1f} are chance)"
    if after > before and line["step"] < FEW_STEPS:
        return f"more than with {start}; so few steps do not tell learning from batch norms that settle"
    if after > before:
        return "learned"
    if key == "recall_at_1" and "rankme" in line and rankme_before is not None:
        few = "; so few steps say little" if line["step"] < FEW_STEPS else ""
        grew = line["rankme"] > rankme_before
        how = "in clusters, as RankMe has grown" if grew else "in a collapse, as RankMe has not grown"
        return f"less than with {start}: images became alike, {how}{few}"
    return f"worse than {start}: train longer, or with a lower {lr_flag}"


def margin(percent: float, num_images: int) -> float:
    """Two standard errors of an accuracy."""
    share = (num_images * percent / 100 + 1) / (num_images + 2)  # never 0 or 1, which would have no error
    return 200 * math.sqrt(share * (1 - share) / num_images)


def without_labels(
    lines: Sequence[dict], name: str, num_images: int, lr_flag: str = "--lr", start: str = "random weights"
) -> list[str]:
    """Sentences about recall and RankMe as :mod:`shared.evaluation.without_labels` logs them for ``name``."""
    what = f"found again from a mirrored half, {name}"
    found = accuracy(lines, "recall_at_1", what, num_images, num_images, lr_flag, start)
    measured = [line for line in lines if line.get("rankme") is not None]
    values = [
        f"{line['rankme']:.1f} " + (f"after {line['step']} steps" if line["step"] else f"with {start}")
        for line in measured[:1] + measured[1:][-1:]
    ]
    values += [f"{line['pixels_rankme']:.1f} of raw pixels" for line in measured if "pixels_rankme" in line]
    return found + [f"RankMe, effective dimensions of these features: {', '.join(values)}"] * bool(values)


def paragraphs(blocks: dict[str, Sequence[str]]) -> str:
    """Lines under the titles of their blocks, which stand in a column of their own."""
    return "\n".join(
        f"{title if i == 0 else '':10s}{line}" for title, block in blocks.items() for i, line in enumerate(block)
    )


def command(script: str, *arguments: str, **flags) -> str:
    """A command line that can be pasted where the run was started; flags without a value are left out.

    Args:
        script: Path below the root of the repository.
        flags: True for a flag that takes no value, a list for one that takes several.
    """
    words = ["python", from_here(script), *arguments]
    for name, value in flags.items():
        if value is not None and value is not False:
            words.append(f"--{name}")
            words += [] if value is True else map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return shlex.join(words)


def from_here(file: str) -> str:
    """The path of a file below the root of the repository, relative to the current folder if that is above it."""
    path, here = ROOT / file, Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def next_command(args: argparse.Namespace, training: str, script: str, *arguments: str, **flags) -> str:
    """:func:`command` for what a run has trained, with the flags about the images that the run was given.

    These are the flags of the groups "data..." of the training that are not at their defaults and that ``script`` has
    too.

    Args:
        args: Of the run.
        training: The script that trained, a path as ``script`` is.
        flags: Win over those of the run.
    """
    own, other = (
        importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_args_parser()
        for path in (training, script)
    )
    known = {action.dest: action for action in other._actions if action.option_strings}
    groups = [group._group_actions for group in own._action_groups if group.title.startswith("data")]
    carried = {}
    for action in itertools.chain(*groups):
        value, there = getattr(args, action.dest), known.get(action.dest)
        if there is None or value in (action.default, there.default) or value not in (there.choices or [value]):
            continue
        carried[there.option_strings[0].lstrip("-")] = value if there.nargs == 0 else _text(value)
    return command(script, *arguments, **carried | flags)


def _text(value):
    return str(value).lower() if isinstance(value, bool) else value
