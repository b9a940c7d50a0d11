"""Batches of labelled images with the same number of images of every class they hold: the supports."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

MOST_SUPPORTS = 16  # of a class in a batch, where no flag says how many


class SupportSampler:
    """Batches of (step, index) keys; what a step gets is a function of its number, so a run resumes anywhere.

    A *round* is one pass over the classes: a permutation of them is cut into groups of C, each group is a batch, and
    each of its classes gives S images. So within a round no class and no image comes twice. ``inner_epochs`` rounds
    make one iteration of the released loader, which is started again when it is exhausted, whatever epoch it is then.
    A batch lists, for image slot 1 to S, one image of each class: its position modulo C is the class.

    Ranks have the same classes, and each its own contiguous share of their images; with ``unique_classes`` each rank
    has its own classes and all of their images.

    Args:
        labels: Class of every image of the data set, -1 where there is none, shape (N,).
        imgs_per_class: S.
        classes_per_batch: C, on each process.
        steps_per_epoch: Batches per epoch of the training.
        seed: Of the classes and of the images.
        inner_epochs: Rounds per iteration; by default enough for one epoch of the training.
        class_names: For messages.

    Raises:
        ValueError: If a class has too few labelled images, or C does not fit the number of classes.
    """

    def __init__(
        self,
        labels: np.ndarray,
        imgs_per_class: int,
        classes_per_batch: int,
        steps_per_epoch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        unique_classes: bool = False,
        inner_epochs: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.imgs_per_class, self.classes_per_batch = imgs_per_class, classes_per_batch
        self.steps_per_epoch, self.seed = steps_per_epoch, seed
        self.rank, self.world_size, self.unique_classes = rank, world_size, unique_classes
        num_classes = int(labels.max(initial=-1)) + 1 if class_names is None else len(class_names)
        self.members = [np.flatnonzero(labels == label) for label in range(num_classes)]
        self._check(class_names or [str(label) for label in range(num_classes)])
        self.batches_per_round = num_classes // (classes_per_batch * (world_size if unique_classes else 1))
        self.inner_epochs = inner_epochs or -(-steps_per_epoch // self.batches_per_round)
        self.epoch = self.start_step = 0
        self._cached: tuple[tuple[int, int], list[list[int]]] | None = None

    def _check(self, names: Sequence[str]) -> None:
        classes, share = len(self.members), 1 if self.unique_classes else self.world_size
        needed = self.classes_per_batch * (self.world_size if self.unique_classes else 1)
        if self.classes_per_batch < 1 or self.imgs_per_class < 1:
            raise ValueError(
                f"--classes_per_batch {self.classes_per_batch} and --supervised_imgs_per_class {self.imgs_per_class} "
                "must be at least 1"
            )
        for name, members in zip(names, self.members, strict=True):
            if len(members) == 0:
                raise ValueError(f"class {name!r} has no labelled image: it cannot be a support")
            if len(own := self._share(members)) < self.imgs_per_class:
                on_ranks = f", {len(own)} for each of {self.world_size} processes" if share > 1 else ""
                raise ValueError(
                    f"class {name!r} has {len(members)} labelled image(s){on_ranks}; --supervised_imgs_per_class "
                    f"{self.imgs_per_class} needs more: lower it, or label more images"
                )
        if needed > classes or (not self.unique_classes and classes % needed):
            what = "is more than" if needed > classes else "does not divide"
            processes = f" on {self.world_size} processes with classes of their own" if self.unique_classes else ""
            raise ValueError(
                f"--classes_per_batch {self.classes_per_batch}{processes} {what} the {classes} classes of the labels"
            )

    def _share(self, members: np.ndarray) -> np.ndarray:
        """This rank's images of a class: a contiguous share without the remainder; all where that would be none."""
        size = len(members) // self.world_size
        if self.unique_classes or size == 0:
            return members
        return members[self.rank * size : (self.rank + 1) * size]

    def __len__(self) -> int:
        """Steps of a whole epoch of the training."""
        return self.steps_per_epoch

    @property
    def batches_per_iteration(self) -> int:
        return self.inner_epochs * self.batches_per_round

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the training and how many of its steps were done already."""
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.epoch * self.steps_per_epoch
        for step in range(first + self.start_step, first + self.steps_per_epoch):
            yield [(step, index) for index in self.batch(step)]

    def batch(self, step: int) -> list[int]:
        """Images of a step, counted from the start of the training; S * C indices into the data set."""
        iteration, position = divmod(step, self.batches_per_iteration)
        inner, batch = divmod(position, self.batches_per_round)
        # the epoch of the training in which the round began
        epoch = (step - batch) // self.steps_per_epoch
        return self.round(iteration, inner, epoch)[batch]

    def round(self, iteration: int, inner: int, epoch: int) -> list[list[int]]:
        """All batches of a round.

        Args:
            iteration: How often the released loader would have been started before.
            inner: Number of the round in this iteration.
            epoch: Of the training when the round began.
        """
        # the released sampler counts one seed up at the start of an iteration and at the end of each of its rounds
        class_seed = self.seed + 1 + inner + iteration * (self.inner_epochs + 1)
        image_seed = self.seed + inner + self.inner_epochs * (self.rank + epoch * self.world_size)
        if self._cached is None or self._cached[0] != (class_seed, image_seed):
            self._cached = (class_seed, image_seed), self._draw_round(class_seed, image_seed)
        return self._cached[1]

    def _draw_round(self, class_seed: int, image_seed: int) -> list[list[int]]:
        classes = torch.randperm(len(self.members), generator=torch.Generator().manual_seed(class_seed)).tolist()
        generator = torch.Generator().manual_seed(image_seed)
        chosen = []
        for members in map(self._share, self.members):
            if len(members) > 1:  # a single image consumes no random number
                members = members[torch.randperm(len(members), generator=generator).numpy()]
            chosen.append(members[: self.imgs_per_class].tolist())
        size = self.classes_per_batch
        first, stride = (self.rank * size, self.world_size * size) if self.unique_classes else (0, size)
        starts = [first + batch * stride for batch in range(self.batches_per_round)]
        return [
            [chosen[label][slot] for slot in range(self.imgs_per_class) for label in classes[start : start + size]]
            for start in starts
        ]
