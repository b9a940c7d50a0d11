"""Which files of a folder are read, and how many are left out for which reason."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from .formats import SUFFIXES, missing_library

IGNORE_FILES = (".ignore", ".gitignore")  # the first that has a word about a file decides
REASONS = {  # why something is left out, and how that is told; files of other types are counted by their suffix
    "hidden": "hidden",
    "ignored": "by .gitignore or .ignore",
    "excluded": "by --exclude",
    "linked": "behind links (--follow_links)",
    "documents": "PDF or DOCX (pip install -e '.[documents]')",
    "problems": "could not be read",
}
MOST_SUFFIXES = 5  # that are told one by one


def text_files(
    root: Path,
    on_unreadable: Callable[[OSError], object] = lambda error: None,
    left_out: Counter[str] | None = None,
    exclude: Iterable[str] = (),
    follow_links: bool = False,
) -> Iterator[Path]:
    """The file ``root``, or the files below the folder ``root``, those of a folder before those of its subfolders.

    Args:
        on_unreadable: Called for each folder that cannot be listed.
        left_out: Counts files and whole folders that are left out, by the keys of ``REASONS`` and by suffix.
        exclude: Patterns as in ``.gitignore``, relative to the root.
        follow_links: To folders, too. Each folder is read once, and where it lies rather than behind a link.
    """
    left_out = Counter() if left_out is None else left_out
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--passages {root}: expected a folder or a file ending in {', '.join(SUFFIXES)}")
        if library := missing_library(root):
            raise ValueError(f"--passages {root} needs {library}: pip install -e '.[documents]'")
        yield root
        return
    if not root.is_dir():
        raise ValueError(f"--passages {root}: no such file or folder")
    first = [_Rules(root, exclude)] if exclude else []
    pending, links, seen = [(root, [])], deque(), set()
    while pending or links:
        folder, rules = pending.pop() if pending else links.popleft()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            names = {entry.name for entry in entries if entry.is_file()}
            files = [folder / name for name in IGNORE_FILES if name in names]
            rules = [*(_Rules(folder, file.read_text(errors="replace").splitlines(), file) for file in files), *rules]
        except OSError as error:
            error.filename = str(folder)
            on_unreadable(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders = []
        for entry in entries:
            is_folder, suffix = entry.is_dir(), os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                left_out["hidden"] += is_folder or suffix in SUFFIXES
            elif reason := _reason(f"{entry.path}/" if is_folder else entry.path, first + rules):
                left_out[reason] += 1
            elif not is_folder and suffix not in SUFFIXES:
                left_out[suffix or "no suffix"] += 1
            elif not is_folder:
                yield folder / entry.name
            elif not entry.is_symlink():
                subfolders.append((folder / entry.name, rules))
            elif follow_links:
                links.append((folder / entry.name, rules))
            else:
                left_out["linked"] += 1
        pending += reversed(subfolders)


class _Rules:
    """Patterns for what lies below a folder: those of ``--exclude``, or of a file."""

    def __init__(self, folder: Path, patterns: Iterable[str], file: Path | None = None):
        if find_spec("pathspec") is None:
            raise ValueError(f"{file or '--exclude'}: patterns need pathspec, pip install -e '.[contriever]'")
        from pathspec import GitIgnoreSpec

        valid = []
        for pattern in patterns:
            try:
                valid += GitIgnoreSpec.from_lines([pattern]).patterns
            except ValueError:
                if file is None:  # git passes over those in its files
                    raise ValueError(f"--exclude {pattern}: this is no pattern of .gitignore") from None
        self.spec = GitIgnoreSpec(valid)
        self.start, self.reason = len(os.path.join(folder, "")), "ignored" if file else "excluded"


def _reason(path: str, rules: list[_Rules]) -> str | None:
    """Why a path, of a folder with a slash at its end, is left out: the first rule that is about it decides."""
    for rule in rules:
        decision = rule.spec.check_file(path[rule.start :]).include
        if decision is not None:
            return rule.reason if decision else None
    return None


def describe_left_out(left_out: Counter[str]) -> str:
    """In one line how many files and folders are left out, and why; empty if none is."""
    parts = [f"{left_out[reason]} {told}" for reason, told in REASONS.items() if left_out[reason]]
    types = Counter({suffix: count for suffix, count in left_out.items() if suffix not in REASONS})
    parts += [f"{count} {suffix}" for suffix, count in types.most_common(MOST_SUFFIXES)]
    if rest := types.total() - sum(count for _, count in types.most_common(MOST_SUFFIXES)):
        parts.append(f"{rest} of other types")
    return f"left out: {', '.join(parts)}" if parts else ""
