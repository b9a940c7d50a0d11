"""COCO's average precision of boxes and masks, computed by pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

KINDS = {"box": "bbox", "mask": "segm"}  # ours: COCOeval's
AP, AP50, AP75 = range(3)  # of COCOeval.stats


def as_detections(prediction: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[dict]:
    """What torchvision's Mask R-CNN finds in one image, in COCO's layout of results.

    Args:
        prediction: ``boxes`` (D, 4) as left, top, right, bottom in pixels; ``labels`` (D,) from 1; ``scores`` (D,);
            ``masks`` (D, 1, H, W), probabilities.
        category_ids: COCO's number of every label, from label 1 on.
    """
    boxes = box_convert(prediction["boxes"].float(), "xyxy", "xywh")
    masks = (prediction["masks"][:, 0] > 0.5).byte().permute(1, 2, 0).cpu().numpy()
    columns = (boxes, prediction["labels"], prediction["scores"].float())
    rows = zip(*(column.tolist() for column in columns), run_lengths.encode(np.asfortranarray(masks)), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": box,
            "segmentation": mask,
            "score": score,
        }
        for box, label, score, mask in rows
    ]


def average_precision(annotations: dict, detections: list[dict]) -> dict[str, float]:
    """AP over thresholds from .5 to .95, and at .5 and .75, in percent, over classes that have objects.

    All areas, at most 100 detections per image and class. The annotations' own areas are not needed.

    Args:
        annotations: ``images``, ``annotations`` and ``categories`` in COCO's layout.
        detections: See :func:`as_detections`.

    Returns:
        ``box_ap``, ``box_ap50``, ``box_ap75``, and the same of masks.

    Raises:
        ValueError: If there are no objects.
    """
    if all(annotation.get("iscrowd") for annotation in annotations["annotations"]):
        raise ValueError("there are no objects to detect in the val part")
    result = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth, results = (_indexed(annotations, rows) for rows in (annotations["annotations"], detections))
        for ours, theirs in KINDS.items():
            evaluation = COCOeval(truth, results, theirs)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats = 100 * evaluation.stats
            result |= {f"{ours}_ap": stats[AP], f"{ours}_ap50": stats[AP50], f"{ours}_ap75": stats[AP75]}
    return {name: float(value) for name, value in result.items()}


def _indexed(annotations: dict, rows: list[dict]) -> COCO:
    index = COCO()
    defaults = [{"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]} for row in rows]
    # copies, since COCOeval writes into them; with numbers from 1 on, since it takes an object 0 for none
    numbered = [d | row | {"id": i} for i, (d, row) in enumerate(zip(defaults, rows, strict=True), start=1)]
    index.dataset = annotations | {"annotations": numbered}
    index.createIndex()
    return index
