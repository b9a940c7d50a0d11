"""Some images of a source: those of a list of names, such as the published lists of labelled images, or a share."""

import zlib
from pathlib import Path

import numpy as np

from shared.run.randomness import derive_seed

from .decode import DecodedImage, EncodedImage
from .sources import FileSource, ImageSource


class Subset(ImageSource):
    """Some images of a source, by their indices."""

    def __init__(self, source: ImageSource, indices: np.ndarray, name: str):
        super().__init__(name, None if source.labels is None else source.labels[indices], source.classes)
        self.source, self.indices, self.channels = source, indices, source.channels

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, index: int) -> str:
        return self.source.path(self.indices[index])

    def load(self, index: int) -> EncodedImage | DecodedImage:
        return self.source.load(self.indices[index])

    def checksum(self) -> int:
        chosen = zlib.crc32(self.indices, self.source.checksum())
        return chosen if self.labels is None else zlib.crc32(self.labels, chosen)


def listed_images(train: ImageSource, list_path: str, flag: str = "--subset_list") -> np.ndarray:
    """Indices of the images in a list such as SimCLR's ``imagenet_subsets/10percent.txt``.

    A line is a file name, whose part before the underscore is the class folder, or a path relative to the train folder.

    Args:
        flag: The flag that names the list, for messages.

    Raises:
        ValueError: If the list cannot be read, is empty, or names an image that is not there.
    """
    if not isinstance(train, FileSource):
        raise ValueError(f"{flag} {list_path}: {train.name} has no files to list")
    try:
        lines = [line.strip() for line in Path(list_path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {list_path} cannot be read: {error}") from error
    wanted = {line if "/" in line else f"{line.split('_')[0]}/{line}" for line in lines if line}
    if not wanted:
        raise ValueError(f"{flag} {list_path} is empty")
    indices = [index for index, name in enumerate(train.names) if name in wanted]
    if len(indices) < len(wanted):
        missing = min(wanted - {train.names[index] for index in indices})
        raise ValueError(
            f"{flag} {list_path}: {len(wanted) - len(indices)} of its {len(wanted)} images are not in "
            f"{train.name}, the first is {missing}"
        )
    return np.array(indices)


def labelled_subset(train: ImageSource, percent: float, list_path: str | None, seed: int) -> Subset:
    """The images whose labels may be seen: those of a list, or a share of every class.

    Raises:
        ValueError: If the list or the percentage does not fit the images.
    """
    if list_path is not None:
        return Subset(train, listed_images(train, list_path), f"labelled images of {list_path}")
    if not 0 < percent <= 100:
        raise ValueError(f"--labels_perc {percent:g} is outside (0, 100]")
    name = f"labelled images: {percent:g} % of every class, drawn with --seed {seed}"
    return Subset(train, drawn_images(train.labels, percent, seed), name)


def drawn_images(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Indices of ``percent`` % of the images of every class, at least one of each."""
    chosen = []
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        number = max(1, round(len(members) * percent / 100))
        generator = np.random.default_rng(derive_seed(seed, int(label)))
        chosen.append(generator.permutation(members)[:number])
    return np.sort(np.concatenate(chosen))
