"""Object detection with XCiT."""

from shared.run.packages import need_packages

need_packages("xcit/detection", pycocotools="pycocotools")
