"""A page beside exported weights: what the network is, what it was trained on and how, and what came out."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from shared.run.files import atomic_file
from shared.run.log import read_log

from .card import Card
from .weights import flags_of_training, run_file, safe_load

PACKAGES = ("torch", "torchvision", "timm", "onnx", "safetensors")
MEASURES = ("top1", "acc1", "recall", "rankme", "nmi")  # in the names of what is measured between epochs
CARD = """---
library_name: {library}
license: other
pipeline_tag: image-feature-extraction
tags: [self-supervised]
---
# {arch}, exported by {name}

Licence of these weights: not stated. Whoever publishes them says it here and above; the code that trained and exported
them is Apache-2.0, and released weights keep the licence of their authors.

## Network

{network}

## Files

{files}

## Use

{use}

## Data

{data}

## Measures

{measures}

## Flags

```
{flags}
```

## Versions

Exported on {day} with Python {python}, {versions}.
"""


RGB = """```python
import onnxruntime
import torch
from PIL import Image
from torchvision.transforms import v2

prepare = v2.Compose([
    v2.Resize({resized}, v2.InterpolationMode.{interpolation}),
    v2.CenterCrop({image_size}),
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize({mean}, {std}),
])
images = prepare(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
(features,) = onnxruntime.InferenceSession("{file}").run(None, {{"images": images.numpy()}})
```"""
OTHER = (
    "A value x of a channel enters as (clip((x - low) / (high - low), 0, 1) - mean) / std, with low, high, mean and "
    "std as above (where low and high are not stated: 0 and 255)."
)


def how_to_use(card: Card, header: Mapping, file: Path) -> str:
    """Code from an image file to features; of images that are no RGB, what becomes of their values."""
    if header.get("in_chans", 3) != 3 or "low" in header:
        return OTHER
    options = {name: list(header[name]) for name in ("image_size", "mean", "std")}
    resized, interpolation = round(max(header["image_size"]) * 256 / 224), card.interpolation.upper()
    return RGB.format(resized=resized, interpolation=interpolation, file=file.name, **options)


def write_model_card(
    path: Path,
    card: Card,
    arch: str,
    network: nn.Module,
    header: Mapping,
    files: Mapping[str, Path],
    origin: str | Path,
) -> Path:
    """Write ``model_card.md`` or the like.

    Args:
        header: How the network is built and fed, as the other files state it.
        files: By format, with what reads them.
        origin: Where the weights come from: the checkpoint of a run, its folder, or any file or name.
    """
    weights = run_file(origin) if origin else Path("")
    checkpoint = safe_load(weights) if weights.is_file() else {}
    flags, log = dict(flags_of_training(checkpoint)), weights.parent / "metrics.jsonl"
    flags.pop("classes", None)
    measures = {}
    for line in read_log(log) if flags and log.is_file() else ():  # the last value of each, and of the loss
        names = [name for name in line if name == "loss" or any(part in name for part in MEASURES)]
        measures |= {name: f"| {name} | {line[name]:.4g} | {line.get('step', '')} |" for name in names if line[name]}
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    facts = [f"- {key}: {json.dumps(value)}" for key, value in header.items()]
    where = flags.get("data_path") or flags.get("data") or "generated images of this project (none were given)"
    data = f"Weights: `{origin or 'the released ones'}`."
    if flags:
        data = f"Training images: `{where}`; {checkpoint.get('epoch', '?')} epochs done. {data}"
    text = CARD.format(
        library="timm" if "timm" in files else "pytorch",
        arch=arch,
        name=card.name,
        network="\n".join([f"- {millions:.2f} million parameters, maps images (B, C, H, W) to features", *facts]),
        files="\n".join(f"- `{file.name}`: {what}" for what, file in files.items()),
        use=how_to_use(card, header, files["onnx"]),
        data=data,
        measures="\n".join(["| measure | last value | step |", "|---|---|---|", *measures.values()])
        if measures
        else "The weights come without a log.",
        flags="\n".join(f"--{key} {value}" for key, value in sorted(flags.items()) if value is not None) or "not known",
        day=datetime.date.today().isoformat(),
        python=platform.python_version(),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
