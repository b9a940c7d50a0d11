"""Object detection with XCiT."""

from shared.packages import need_packages

need_packages("xcit/detection", pycocotools="pycocotools")
