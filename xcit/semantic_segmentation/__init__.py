"""Semantic segmentation with XCiT."""

from shared.run.packages import need_packages

need_packages("xcit/semantic_segmentation", torchmetrics="torchmetrics")
