"""A stream of unlabelled images that is read once: its files or shards, its order, where a run stands in it."""

import argparse
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from shared import distributed
from shared.images.decode import EXTENSIONS, EncodedImage
from shared.images.loading import BadImages, default_num_workers, make_loader
from shared.images.sources import ImageSource, PackedStrings
from shared.images.training_data import TrainingData, open_images, write_recipes
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset
from shared.run.randomness import derive_seed

RECORD = tarfile.RECORDSIZE  # what zeros behind the last member fill up, at least 512 bytes of them


class TarShards(ImageSource):
    """The images in tar files, in the order in which they lie there.

    Only headers are read at the start; an image is read from its place in the file.
    """

    def __init__(self, shards: Sequence[Path], max_pixels: int):
        super().__init__(f"{len(shards)} shards", None, None)
        self.shards, self.max_pixels = list(shards), max_pixels
        names, places = [], []
        for number, shard in enumerate(self.shards):
            for member in members(shard):
                if member.isfile() and member.name.lower().endswith(EXTENSIONS):
                    names.append(f"{shard.name}/{member.name}")
                    places.append((number, member.offset_data, member.size))
        if not names:
            raise ValueError(f"--data_path {self.shards[0].parent}: no images ({' '.join(EXTENSIONS)}) in the shards")
        self.names, self.places = PackedStrings(names), np.array(places)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> EncodedImage:
        number, offset, size = self.places[index].tolist()
        with open(self.shards[number], "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        return EncodedImage(data, self.names[index], self.max_pixels)

    def checksum(self) -> int:
        return zlib.crc32(self.places, self.names.checksum())


def members(shard: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as archive:
            yield from archive
            with open(shard, "rb") as file:  # tarfile stops without a word at what it cannot read
                file.seek(archive.offset)
                rest = file.read(2 * RECORD)
            if len(rest) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
            if any(rest) or len(rest) > RECORD + tarfile.BLOCKSIZE:
                left = shard.stat().st_size - archive.offset
                raise tarfile.ReadError(f"{left:,} bytes lie behind the last image that can be read")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"--data_path: the shard {shard} is torn or no tar file: {error}") from error


def find_shards(data_path: str | None) -> list[Path]:
    """The tar files that ``--data_path`` means, in the order of their names; none for anything else."""
    path = Path(data_path or "").expanduser()
    if path.suffix == ".tar" and path.is_file():
        return [path]
    return sorted(path.glob("*.tar")) if data_path and path.is_dir() else []


class StreamSampler:
    """Batches of (pass, index) of a stream that is read from its beginning to the end of the run.

    Images are shuffled in windows of neighbours, by a permutation that depends on the seed, the pass and the number of
    the window alone. Of the images of a step rank r takes every W-th from r on, so that it is the same images on any
    number of processes, and a run goes on at any step without reading what lies before it.

    Args:
        stream_length: Images of a pass.
        total_images: Of the run; the last ones that fill no step are left out.
        batch_size: Images per process.
        window: Images that are shuffled together.
    """

    def __init__(
        self, stream_length: int, total_images: int | None, passes: int, batch_size: int, seed: int, window: int
    ):
        available = stream_length * passes
        self.total_images = available if total_images is None else total_images
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.stream_length, self.batch_size, self.seed, self.window = stream_length, batch_size, seed, window
        self.start_step = 0
        if self.total_images > available:
            raise ValueError(
                f"--total_images {total_images} is more than the {available} images of the stream, {stream_length} "
                f"read --passes {passes} times"
            )
        if len(self) < 1:
            raise ValueError(
                f"the {self.total_images} images of the run do not fill one step of --batch_size {batch_size} on "
                f"{self.world_size} process(es)"
            )

    def __len__(self) -> int:
        return self.total_images // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Begin behind so many steps; there is one epoch, the run."""
        self.start_step = start_step

    def order(self, position: int) -> Iterator[tuple[int, int]]:
        """(pass, index) from a position of the stream on."""
        while True:
            number, inside = divmod(position, self.stream_length)
            window, skipped = divmod(inside, self.window)
            first = window * self.window
            size = min(self.window, self.stream_length - first)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, number, window))
            for i in torch.randperm(size, generator=generator)[skipped:].tolist():
                yield number, first + i
            position += size - skipped

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step_size = self.batch_size * self.world_size
        images = self.order(self.start_step * step_size)
        for _ in range(self.start_step, len(self)):
            batch = [next(images) for _ in range(step_size)]
            yield batch[self.rank :: self.world_size]


def open_stream(
    args: argparse.Namespace, recipes: Sequence[ViewRecipe], output_dir: Path, device: torch.device
) -> TrainingData:
    """The images of ``--data_path`` as batches of views: tar shards, or anything that the other methods take."""
    largest_px = max(recipe.size_px for recipe in recipes)
    if shards := find_shards(args.data_path):
        for flag, value in (("cache", args.cache), ("value_range", args.value_range)):
            if value not in (None, "none"):
                raise ValueError(f"--{flag} {value}: --data_path {args.data_path} holds tar shards, read as they come")
        source = TarShards(shards, round(1e6 * args.max_megapixels))
        checksum = source.checksum()
        distributed.check_same_on_all_processes((len(source), checksum), "the stream (number of images, checksum)")
        policy = args.on_bad_image, args.max_bad_fraction
        bad_images = BadImages(len(source), output_dir / "bad_images.txt", *policy)
    else:
        source, checksum, bad_images = open_images(args, output_dir, largest_px, "--size_crops")
    write_recipes(output_dir, recipes)
    views = MultiCropDataset(source, recipes, args.seed, args.augmentation, args.in_chans, bad_images)
    sampler = StreamSampler(
        len(source), args.total_images, args.passes, args.batch_size, args.seed, args.shuffle_window
    )
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader = make_loader(views, batch_sampler=sampler, num_workers=num_workers, device=device)
    distributed.print_once(f"{source.describe()}: {len(sampler)} steps")
    batch_size = args.batch_size * sampler.world_size
    return TrainingData(views, sampler, loader, bad_images, checksum, batch_size, num_workers)
