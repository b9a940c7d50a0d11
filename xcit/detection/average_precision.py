"""COCO's average precision of boxes or masks, over all areas, at most 100 detections per image."""

from dataclasses import dataclass, field

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0, 1, 101)


def box_iou(detections: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D, 4) and (G, 4) to (D, G); with a crowd, the share of the detection that lies inside it."""
    top_left = np.maximum(detections[:, None, :2], objects[None, :, :2])
    bottom_right = np.minimum(detections[:, None, 2:], objects[None, :, 2:])
    intersection = (bottom_right - top_left).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (detections, objects)]
    return _over_union(intersection, *areas, crowd)


def mask_iou(detections: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """The same for masks (D, H, W) and (G, H, W) of 0 and 1."""
    flat = [
        masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.float32) for masks in (detections, objects)
    ]
    return _over_union(flat[0] @ flat[1].T, flat[0].sum(axis=1), flat[1].sum(axis=1), crowd)


def _over_union(intersection: np.ndarray, first: np.ndarray, second: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    union = np.where(crowd[None], first[:, None], first[:, None] + second[None] - intersection)
    return intersection / np.maximum(union, 1e-9)


def match(iou: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign detections, the most certain first, to objects, each to the best one that is free.

    Args:
        iou: (D, G), detections by falling score.
        crowd: (G,); any number of detections may lie in a crowd, and they do not count.

    Returns:
        Whether each detection has found an object, and whether it does not count: (10, D) each, one row per threshold.
    """
    found = np.zeros((len(THRESHOLDS), len(iou)), dtype=bool)
    ignored = np.zeros_like(found)
    for t, threshold in enumerate(THRESHOLDS):
        free = ~crowd
        for d, row in enumerate(iou):
            candidates = np.where(free, row, -1.0)
            if candidates.size and candidates.max() >= threshold:
                free[candidates.argmax()] = False
                found[t, d] = True
            elif (row[crowd] >= threshold).any():
                ignored[t, d] = True
    return found, ignored


@dataclass
class AveragePrecision:
    """Collects images one by one, keeps scores and matches only.

    Attributes:
        results: Of each class, a list over images of (scores, found, ignored).
        objects: Of each class, how many there are to find.
    """

    results: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    objects: dict[int, int] = field(default_factory=dict)

    def add(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        iou: np.ndarray,
        object_labels: np.ndarray,
        crowd: np.ndarray,
        most: int = 100,
    ) -> None:
        """One image: scores and labels (D,), IoU with its objects (D, G), their labels and crowds (G,)."""
        for label in np.union1d(labels, object_labels).tolist():
            mine, theirs = np.flatnonzero(labels == label), object_labels == label
            mine = mine[np.argsort(-scores[mine], kind="stable")[:most]]
            found, ignored = match(iou[mine][:, theirs], crowd[theirs])
            self.results.setdefault(label, []).append((scores[mine], found, ignored))
            self.objects[label] = self.objects.get(label, 0) + int((~crowd[theirs]).sum())

    def merge(self, other: "AveragePrecision") -> None:
        """Take over what another process has collected."""
        for label, results in other.results.items():
            self.results.setdefault(label, []).extend(results)
            self.objects[label] = self.objects.get(label, 0) + other.objects[label]

    def compute(self) -> dict[str, float]:
        """``ap`` (mean over thresholds from .5 to .95), ``ap50``, ``ap75``, in percent, over classes with objects."""
        per_class = [self._of_class(label) for label in sorted(self.results) if self.objects[label]]
        if not per_class:
            raise ValueError("there are no objects to detect in the val part")
        mean = 100 * np.mean(per_class, axis=0)
        return {"ap": float(mean.mean()), "ap50": float(mean[0]), "ap75": float(mean[5])}

    def _of_class(self, label: int) -> np.ndarray:
        """Average precision at each threshold: the mean over 101 recalls of the best precision from there on."""
        scores, found, ignored = (np.concatenate(parts, axis=-1) for parts in zip(*self.results[label], strict=True))
        order = np.argsort(-scores, kind="stable")
        precisions = np.zeros(len(THRESHOLDS))
        for t in range(len(THRESHOLDS)):
            counted = order[~ignored[t, order]]
            hits = found[t, counted].cumsum()
            recall = hits / self.objects[label]
            precision = hits / np.arange(1, len(hits) + 1)
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(recall, RECALLS, side="left")
            precisions[t] = np.where(at < len(hits), np.append(precision, 0)[np.minimum(at, len(hits))], 0).mean()
        return precisions
