"""Images of a data set that somebody else's Python code reads: ``--data_path package.module:function``.

    def function(split):                # "train", "val" or "all"
        return MyDataset(split)         # of torch, with a length; an item is an image or begins with one

An image is one of Pillow, or pixels in uint8: a tensor (C, H, W) or an array (H, W) or (H, W, C), C = 1 or 3; with
``--in_chans N`` or ``--value_range`` an array or tensor as :mod:`shared.images.channels` takes them. Labels are the
data set's ``targets``, and the names of classes its ``classes``, as in torchvision. A function that has no such part
raises ``ValueError``. Loader processes get a pickled copy of the data set, and item i must always be the same image: a
run resumes by numbers of images. Augmentations are the method's own.
"""

import importlib
import os
import sys
import zlib

import numpy as np
from PIL import Image
from torch import Tensor

from .channels import Channels, as_channels
from .decode import DecodedImage, ImageError, to_rgb
from .sources import HOLDOUT_SHARE, ImageSource
from .subsets import Subset


class DatasetSource(ImageSource):
    """The images of a map-style data set.

    Args:
        name: ``package.module:function (split)``.
        dataset: Has a length; ``dataset[i]`` is an image, or a sequence that begins with one.
        channels: How images that are no RGB are read.

    Raises:
        ValueError: If it is empty, or has not a label for every image.
    """

    def __init__(self, name: str, dataset, channels: Channels | None = None):
        labels = getattr(dataset, "targets", None)
        classes = getattr(dataset, "classes", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise ValueError(f"{name}: {kind} is no map-style data set with __getitem__ and __len__")
        if len(dataset) == 0:
            raise ValueError(f"{name}: an empty data set")
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu" or labels.min() < 0:
                found = f"{labels.dtype} of shape {labels.shape}"
                raise ValueError(f"{name}: targets must be {len(dataset)} class indices, got {found}")
            classes = [str(i) for i in range(labels.max() + 1)] if classes is None else classes
            if labels.max() >= len(classes):
                raise ValueError(f"{name}: a target is {labels.max()}, but there are {len(classes)} classes")
        super().__init__(name, labels, None if labels is None else classes)
        self.dataset, self.channels = dataset, channels

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def load(self, index: int) -> DecodedImage:
        try:
            item = self.dataset[int(index)]
        except (OSError, ValueError) as error:  # such as a file that Pillow cannot read
            raise ImageError(f"{self.path(index)}: {error}") from error
        image = item[0] if isinstance(item, tuple | list) else item
        if self.channels is not None:
            return self.channels.image(as_channels(np.asarray(image), self.channels.number, self.path(index)))
        if isinstance(image, Image.Image):
            return DecodedImage(np.array(to_rgb(image, self.path(index))))
        pixels = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (1,), (3,)) or pixels.ndim < 2 or not pixels.size:
            found = f"{type(image).__name__} of {pixels.dtype} and shape {tuple(np.shape(image))}"
            expected = "an image of Pillow, or uint8 in a tensor (3, H, W) or an array (H, W, 3)"
            raise ImageError(f"{self.path(index)}: expected {expected}, got {found}")
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return DecodedImage(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))

    def checksum(self) -> int:
        """Of the number of images, the labels, the first image and the last one."""
        known = zlib.crc32(str(len(self)).encode(), 0 if self.labels is None else zlib.crc32(self.labels))
        for index in (0, len(self) - 1):
            known = zlib.crc32(self.load(index).decode(), known)
        return known


def open_dataset(data_path: str, split: str, holdout: bool, flag: str, channels: Channels | None = None) -> ImageSource:
    """Call the function that ``data_path`` names with the split; modules of the current folder are found too.

    Args:
        holdout: If the function has no val part, it is every tenth image of the train part.

    Raises:
        ValueError: If there is no such function or no such part, or what it returns is no data set.
    """
    module, _, function = data_path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{flag} {data_path}: {error}") from error
    name = f"{data_path} ({split})"
    if holdout and split != "all":
        try:
            build("val")
        except ValueError:
            train = DatasetSource(data_path, build("train"), channels)
            is_val = np.arange(len(train)) % HOLDOUT_SHARE == HOLDOUT_SHARE - 1
            return Subset(train, np.flatnonzero(is_val == (split == "val")), name)
    return DatasetSource(name, build(split), channels)
