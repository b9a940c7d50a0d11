"""A video of the class token's attention, from a video or a folder of frames (Caron et al. 2021, supplementary video).

    python video_generation.py --input_path film.mp4 --output_path out            # released ViT-S/8
    python video_generation.py --input_path frames/ --resize 360 640 --threshold 0.6
    python video_generation.py --input_path out/attention --video_only --fps 25   # join pictures again

Writes ``frames/`` (when the input is a video), ``attention/attn-*.jpg`` (the mean over the heads) and ``video.mp4``.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dino.attention import class_row
from dino.flags import evaluation_parser
from dino.hub import MEAN, STD
from dino.visualize_attention import load_attentive
from shared import distributed
from shared.images.decode import EXTENSIONS, read_image
from shared.networks.backbones import input_channels
from shared.pictures.attention import attended_patches, class_attention, prepare_image
from shared.pictures.sheets import colorize
from shared.run.flags import add_device_flag

CODECS = {"mp4": "mp4v", "avi": "XVID"}
DEFAULT_FPS = 30.0


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__, patch_size=8)
    add = parser.add_argument_group("video").add_argument
    add("--input_path", required=True, help="a video, or a folder of frames or (--video_only) of attention pictures")
    add("--output_path", default="./", help="where frames, attention pictures and the video go")
    add("--threshold", type=float, default=None, help="show only the patches that hold this share of the attention")
    add("--resize", type=int, nargs="+", default=None, help="height and width, or the short side, in pixels")
    add("--video_only", action="store_true", help="only join the pictures in --input_path")
    add("--fps", type=float, default=None, help="pictures per second; by default those of the input video, or 30")
    add("--video_format", default="mp4", choices=sorted(CODECS))
    add_device_flag(add)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.threshold is not None and not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold} is not in (0, 1]")
    if args.resize is not None and (len(args.resize) > 2 or min(args.resize) < 1):
        parser.error(f"--resize {args.resize}: give one or two positive numbers")
    if args.fps is not None and args.fps <= 0:
        parser.error(f"--fps {args.fps} is not positive")
    return args


def list_frames(folder: Path, pattern: str = "*") -> list[Path]:
    """Images of a folder in the order of the numbers in their names: frame-9 before frame-10, frame-10000 last."""
    frames = [path for path in folder.glob(pattern) if path.suffix.lower() in EXTENSIONS]
    if not frames:
        raise ValueError(f"--input_path: no images {folder / pattern}")
    return sorted(frames, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def extract_frames(video: Path, folder: Path) -> tuple[list[Path], float]:
    """Write the frames of a video as ``frame-{number:04}.jpg``.

    Returns:
        The frames in order, and the video's frames per second.

    Raises:
        ValueError: If the file is no video that OpenCV can read.
    """
    capture = cv2.VideoCapture(str(video))
    fps = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS
    frames = []
    decoded, frame = capture.read()
    while decoded:
        folder.mkdir(parents=True, exist_ok=True)
        frames.append(folder / f"frame-{len(frames):04}.jpg")
        _write_jpeg(frames[-1], frame)
        decoded, frame = capture.read()
    if not frames:
        raise ValueError(f"--input_path {video} is no video that can be read")
    return frames, fps


def _write_jpeg(path: Path, bgr: np.ndarray) -> None:
    if not cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f"could not write {path}")


def draw_attention(
    model: nn.Module,
    frames: Iterable[Path],
    folder: Path,
    resize: list[int] | None,
    threshold: float | None,
    device: torch.device,
) -> list[Path]:
    """Write ``attn-{name}.jpg`` for every frame: the mean over the heads, one square for each patch.

    With a threshold the patches outside of the mask of every head are black.
    """
    folder.mkdir(parents=True, exist_ok=True)
    patch_size = model.patch_embed.patch_size
    in_chans = input_channels(model)
    written = []
    for frame in tqdm(list(frames), unit="frame", disable=None):
        pixels = read_image(frame).decode()
        image = prepare_image(pixels, resize or pixels.shape[:2], MEAN, STD, in_chans).to(device)
        attention = class_attention(model, image[None], class_row)[0].float().cpu()
        if threshold is not None:
            attention = attention * attended_patches(attention, threshold)
        colours = colorize(attention.mean(dim=0).numpy(), "inferno")
        picture = colours.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
        written.append(folder / f"attn-{frame.stem}.jpg")
        _write_jpeg(written[-1], picture[..., ::-1])
    return written


def join_frames(frames: list[Path], video: Path, fps: float) -> Path:
    """Write pictures of equal size as a video, ``.mp4`` or ``.avi``.

    Raises:
        ValueError: If a picture cannot be read or has another size than the first.
        OSError: If the video cannot be written.
    """
    video.parent.mkdir(parents=True, exist_ok=True)
    height, width = read_image(frames[0]).decode().shape[:2]
    codec = cv2.VideoWriter_fourcc(*CODECS[video.suffix[1:]])
    writer = cv2.VideoWriter(str(video), codec, fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"--output_path: could not write {video}")
    try:
        for frame in frames:
            pixels = read_image(frame).decode()
            if pixels.shape[:2] != (height, width):  # OpenCV would leave it out without a word
                raise ValueError(
                    f"{frame} has {pixels.shape[0]} x {pixels.shape[1]} pixels, {frames[0].name} {height} x {width}; "
                    "give --resize with a height and a width"
                )
            writer.write(np.ascontiguousarray(pixels[..., ::-1]))
    finally:
        writer.release()
    return video


def generate_video(args: argparse.Namespace) -> Path:
    """Do what the flags ask for and return the path of the video."""
    device = distributed.init(device=args.device)
    source, output = Path(args.input_path), Path(args.output_path)
    if not source.exists():
        raise ValueError(f"--input_path {source} does not exist")
    fps = DEFAULT_FPS
    if args.video_only:
        if not source.is_dir():
            raise ValueError(f"--video_only joins the pictures of a folder; --input_path {source} is none")
        pictures = list_frames(source, "attn-*")
    else:
        model = load_attentive(args, device)
        if source.is_dir():
            frames = list_frames(source)
        else:
            frames, fps = extract_frames(source, output / "frames")
        pictures = draw_attention(model, frames, output / "attention", args.resize, args.threshold, device)
    video = join_frames(pictures, output / f"video.{args.video_format}", args.fps or fps)
    print(f"{video}: {len(pictures)} frames, {args.fps or fps:g} per second")
    return video


def main() -> None:
    distributed.run_script(generate_video, parse_args)


if __name__ == "__main__":
    main()
