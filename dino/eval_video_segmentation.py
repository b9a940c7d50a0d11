"""Semi-supervised video object segmentation on DAVIS 2017 (Caron et al. 2021, section 4.2.2, table 5).

    python eval_video_segmentation.py --data_path /path/to/DAVIS --output_dir /path/to/masks --arch vit_small

The mask of a video's first frame is carried on by nearest neighbours among the patch tokens of the first and the last
few frames; nothing is trained. The masks are written as indexed PNG files, one folder per video, for the official
tool (davis2017-evaluation); with the released ViT-S/8 it reports a J&F mean of 69.9. A frame that cannot be read ends
the program, which names the file, and there is no flag to go on: every mask is carried on from those before it, and the
official tool wants one for every frame.
"""

import argparse
import sys
from collections import deque
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dino.flags import evaluation_parser, load_chosen
from dino.hub import MEAN
from dino.vision_transformer import VisionTransformer
from shared import distributed
from shared.evaluation.flags import add_process_flags
from shared.images.decode import ImageError, read_image
from shared.networks.backbones import input_channels

STD = (0.228, 0.224, 0.225)  # 0.228 as in the official script; everywhere else it is 0.229
TEMPERATURE = 0.1


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="DAVIS: ImageSets/2017/val.txt, JPEGImages/480p/, Annotations/480p/")
    add("--output_dir", default=".", help="gets one folder of masks per video")
    add("--image_size", type=int, default=480, help="short side of a frame in pixels")

    add = parser.add_argument_group("propagation").add_argument
    add("--n_last_frames", type=int, default=7, help="context besides the first frame")
    add("--size_mask_neighborhood", type=int, default=12, help="reach of a match in patches; 0: the whole frame")
    add("--topk", type=int, default=5, help="matches per patch, over all context frames")
    add("--bs", type=int, default=6, help="not used")
    add_process_flags(parser, launcher=False)
    return parser


def eval_video_segmentation(args: argparse.Namespace) -> Path:
    """Segment all videos of the list; the folder of the masks."""
    device = distributed.init(device=args.device)
    root, output_dir = Path(args.data_path), Path(args.output_dir)
    videos = [Video(root, name) for name in read_video_names(root)]
    backbone, _ = load_chosen(args)
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"--arch {args.arch}: video segmentation needs a ViT")
    backbone.to(device)
    for i, video in enumerate(videos):
        print(f"[{i + 1}/{len(videos)}] {video.name}: {len(video.frames)} frames", flush=True)
        (output_dir / video.name).mkdir(parents=True, exist_ok=True)
        masks = segment_video(
            backbone, video, args.image_size, args.n_last_frames, args.size_mask_neighborhood, args.topk, device
        )
        for frame, mask in zip(tqdm(video.frames, leave=False, disable=not sys.stderr.isatty()), masks, strict=True):
            write_mask(output_dir / video.name / f"{frame.stem}.png", mask)
    return output_dir


def read_video_names(root: Path) -> list[str]:
    file = root / "ImageSets" / "2017" / "val.txt"
    if not file.is_file():
        raise ValueError(f"--data_path {root}: {file} does not exist")
    names = file.read_text().split()
    if not names:
        raise ValueError(f"--data_path {root}: {file} names no video")
    return names


class Video:
    """Frames of a video and the mask of the first one.

    Raises:
        ValueError: If there are no frames or no first mask, or the name leads out of the folder.
    """

    def __init__(self, root: Path, name: str):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"--data_path {root}: video {name} leads out of the folder")
        self.name = name
        folder = root / "JPEGImages" / "480p" / name
        self.frames = sorted(folder.glob("*.jpg"))
        if not self.frames:
            raise ValueError(f"--data_path {root}: no frames (*.jpg) in {folder}")
        self.first_mask = root / "Annotations" / "480p" / name / f"{self.frames[0].stem}.png"
        if not self.first_mask.is_file():
            raise ValueError(f"--data_path {root}: {self.first_mask} does not exist")


@torch.no_grad()
def segment_video(
    backbone: VisionTransformer,
    video: Video,
    image_size: int,
    n_last_frames: int,
    neighborhood: int,
    topk: int,
    device: torch.device,
):
    """Yields the mask (H, W) of each frame at its original size, object indices in uint8."""
    patch_size, in_chans = backbone.patch_embed.patch_size, input_channels(backbone)
    try:
        first = np.array(Image.open(video.first_mask, formats=["PNG"]))
    except (OSError, SyntaxError) as error:  # as Pillow calls damage
        raise ImageError(f"{video.first_mask} cannot be read: {error}") from error
    if first.ndim != 2:
        raise ValueError(f"{video.first_mask} is not an indexed image")
    yield first
    frame = read_frame(video.frames[0], image_size, in_chans)
    rows, columns = (side // patch_size for side in frame.shape[1:])
    small = np.array(Image.fromarray(first).resize((columns, rows), Image.Resampling.NEAREST))
    num_classes = int(first.max()) + 1  # an object lost in the small mask keeps its channel
    soft_mask = one_hot(torch.from_numpy(small), num_classes).to(device)

    window = neighborhood_window(rows, columns, neighborhood).to(device)
    context = [(patch_features(backbone, frame.to(device)), soft_mask)]
    last = deque(maxlen=n_last_frames)
    for path in video.frames[1:]:
        frame = read_frame(path, image_size, in_chans)
        features = patch_features(backbone, frame.to(device))
        context_features, context_masks = (torch.stack(part) for part in zip(*context, *last, strict=True))
        soft_mask = propagate_masks(features, context_features, context_masks, window, topk)
        last.append((features, soft_mask))
        mask = hard_mask(soft_mask, patch_size).to(torch.uint8).cpu().numpy()
        yield np.array(Image.fromarray(mask).resize(first.shape[::-1], Image.Resampling.NEAREST))


def read_frame(path: Path, image_size: int, in_chans: int = 3) -> Tensor:
    """A normalised frame (C, H, W): short side ``image_size``, long side in proportion but a multiple of 64 pixels."""
    pixels = read_image(path).decode()
    height, width = pixels.shape[:2]
    long_side = max(1, int(image_size * max(height, width) / min(height, width) / 64)) * 64
    size = (image_size, long_side) if height > width else (long_side, image_size)  # (width, height)
    pixels = cv2.resize(pixels, size)
    if in_chans == 1:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    return normalize_frame(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def normalize_frame(pixels: Tensor) -> Tensor:
    """Pixels (C, H, W) in [0, 1] to the network's input; one channel takes the averages of mean and deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    if len(pixels) == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    return (pixels - mean) / std


def patch_features(backbone: VisionTransformer, frame: Tensor) -> Tensor:
    """Normed patch tokens of the last block, (3, H, W) -> (N, D)."""
    return backbone.get_intermediate_layers(frame[None], n=1)[0][0, 1:]


def one_hot(mask: Tensor, num_classes: int) -> Tensor:
    """Object indices (H, W) to soft masks (num_classes, H, W)."""
    return F.one_hot(mask.long(), num_classes).permute(2, 0, 1).float()


def neighborhood_window(rows: int, columns: int, size: int) -> Tensor:
    """Which patches may be matched: both distances at most ``size`` patches (0: any), bool, shape (N, N)."""
    if size == 0:
        return torch.ones(rows * columns, rows * columns, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return ((y[:, None] - y).abs() <= size) & ((x[:, None] - x).abs() <= size)


def propagate_masks(
    features: Tensor, context_features: Tensor, context_masks: Tensor, window: Tensor, topk: int
) -> Tensor:
    """Soft mask of a frame: for each patch the mean of its matches' masks, weighted by exp(cosine / 0.1).

    Args:
        features: Patch tokens of the frame, shape (N, D).
        context_features: Those of the context frames, shape (T, N, D).
        context_masks: Their soft masks, shape (T, C, h, w), N = h * w.
        window: Which patches may be matched, shape (N, N).
        topk: Matches per patch among all T * N patches of the context.

    Returns:
        Shape (C, h, w).
    """
    height, width = context_masks.shape[-2:]
    features, context_features = F.normalize(features, dim=-1), F.normalize(context_features, dim=-1)
    masks = context_masks.flatten(2).transpose(1, 2)  # (T, N, C)
    propagated = []
    for targets, allowed in zip(features.split(width), window.split(width), strict=True):  # a row of patches at a time
        near = allowed.any(dim=0).nonzero()[:, 0]  # no match is outside these: half of the frame or less
        affinity = (targets @ context_features[:, near].transpose(1, 2) / TEMPERATURE).exp() * allowed[:, near]
        affinity = affinity.transpose(0, 1).flatten(1)  # (w, T * near)
        least = affinity.topk(min(topk, affinity.shape[1]), dim=1).values[:, -1:]
        affinity = affinity.where(affinity >= least, 0)
        propagated.append(affinity / affinity.sum(dim=1, keepdim=True) @ masks[:, near].flatten(0, 1))
    return torch.cat(propagated).t().unflatten(1, (height, width))


def hard_mask(soft_mask: Tensor, patch_size: int) -> Tensor:
    """Soft masks (C, h, w) to object indices (h * patch_size, w * patch_size): each object's mask is stretched to
    [0, 1] so that small objects keep up with large ones, and the largest wins."""
    masks = F.interpolate(soft_mask[None], scale_factor=patch_size, mode="bilinear")[0]
    low, high = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
    stretched = (masks - low) / (high - low)
    return stretched.where(high > low, masks).argmax(dim=0)  # a constant channel stays as it is


def davis_palette() -> list[int]:
    """Colours of the DAVIS masks: the bits of an index, spread over red, green and blue, then grey from 22 on."""
    colors = [[0, 0, 0] for _ in range(22)]
    for index, color in enumerate(colors):
        for bit in range(6):
            color[bit % 3] += ((index >> bit) & 1) * (128 >> (bit // 3))
    colors = [[min(value, 191) for value in color] for color in colors]
    return [value for color in colors for value in color] + [i for i in range(22, 256) for _ in range(3)]


def write_mask(path: Path, mask: np.ndarray) -> None:
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(davis_palette())  # makes it an indexed image
    image.save(path)


def main() -> None:
    distributed.run_script(eval_video_segmentation, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
