"""Images in zip files by number, in the layout of the YFCC100M collection: ``AB/CDE.zip`` holds ``FGH.jpg``."""

import os
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from .decode import MAX_PIXELS, EncodedImage, ImageError
from .sources import ImageSource

OPEN_FILES = 64  # zip files that a process keeps open
CHECKED = 1000  # zip files that are looked into before a run


class ZippedImages(ImageSource):
    """Image number ABCDEFGH is ``FGH.jpg`` of ``<root>/AB/CDE.zip``.

    Args:
        ids: Numbers of the images, below 10^8, as an array of integers in a ``.npy`` file.
        most: Only the first so many.
        flag: Of ``ids``, for messages.

    Raises:
        ValueError: If the file holds no such numbers, or if a zip file (of more than 1,000, some of them) is missing,
            torn or without an image that it should hold; the message names the file and the number.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        ids: str | os.PathLike,
        most: int | None = None,
        max_pixels: int = MAX_PIXELS,
        flag: str = "--image_ids",
    ):
        super().__init__(f"{root} ({Path(ids).name})", None, None)
        try:
            self.ids = np.load(ids, mmap_mode="r", allow_pickle=False)[:most]
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{flag} {ids} is no .npy file of numbers: {error}") from error
        if self.ids.ndim != 1 or self.ids.dtype.kind not in "iu" or not len(self.ids):
            raise ValueError(f"{flag} {ids}: expected a list of integers, got {self.ids.dtype} of {self.ids.shape}")
        outside = (self.ids < 0) | (self.ids >= 10**8)
        if outside.any():
            raise ValueError(f"{flag} {ids}: {self.ids[outside][0]} is no image number below 100000000")
        self.root, self.max_pixels = os.fspath(root), max_pixels
        self._files: OrderedDict[str, zipfile.ZipFile] = OrderedDict()
        self._process = os.getpid()
        self._check(f"{flag} {ids}")

    def _check(self, where: str) -> None:
        numbers, zips = np.unique(self.ids // 1000, return_inverse=True)
        for i in np.linspace(0, len(numbers) - 1, min(CHECKED, len(numbers))).astype(int):
            wanted = np.flatnonzero(zips == i)
            try:
                names = set(self._open(self._place(wanted[0])[0]).namelist())
            except ImageError as error:
                raise ValueError(f"{where}: {error}") from error
            for index in wanted:
                file, name = self._place(index)
                if name not in names:
                    raise ValueError(f"{where}: image {self.ids[index]:08d} is not in {file}, which has no {name}")

    def _place(self, index: int) -> tuple[str, str]:
        number = f"{int(self.ids[index]):08d}"
        return os.path.join(self.root, number[:2], f"{number[2:5]}.zip"), f"{number[5:]}.jpg"

    def _open(self, path: str) -> zipfile.ZipFile:
        if self._process != os.getpid():  # a loader process must not share the place in a file with others
            self._files, self._process = OrderedDict(), os.getpid()
        if path not in self._files:
            try:
                self._files[path] = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                reason = getattr(error, "strerror", None) or error
                raise ImageError(f"{path} cannot be read: {reason}") from error
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return self._files[path]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}  # for loader processes that are not forked

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> str:
        return "/".join(self._place(index))

    def load(self, index: int) -> EncodedImage:
        file, name = self._place(index)
        try:
            data = self._open(file).read(name)
        except (KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ImageError(f"{file}/{name}: {error}") from error
        return EncodedImage(data, self.path(index), self.max_pixels)

    def checksum(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.ids))
