"""Semantic segmentation with XCiT."""

from shared.packages import need_packages

need_packages("xcit/semantic_segmentation", torchmetrics="torchmetrics")
