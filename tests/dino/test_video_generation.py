"""Videos of attention: every input kind, order, speed and size of the frames, and errors instead of lost frames."""

import cv2
import numpy as np
import pytest
from PIL import Image

from dino.video_generation import generate_video, join_frames, list_frames, parse_args
from tests.dino.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pth", patch_size=8)


def write_video(path, num_frames: int = 4, fps: float = 12.0, size: tuple[int, int] = (48, 32)):
    """Frames of growing brightness; ``size`` is (width, height)."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, size)
    for i in range(num_frames):
        writer.write(np.full((size[1], size[0], 3), 20 + 50 * i, dtype=np.uint8))
    writer.release()
    return path


def read_video(path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        decoded, frame = capture.read()
        if not decoded:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


def run(checkpoint, *flags) -> object:
    network = ["--arch", "vit_tiny", "--patch_size", "8", "--pretrained_weights", str(checkpoint)]
    return generate_video(parse_args([*network, *(str(flag) for flag in flags)]))


@pytest.mark.parametrize("video_format", ["mp4", "avi"])
def test_video_in_video_out_at_the_speed_of_the_input(video_format, checkpoint, tmp_path):
    source = write_video(tmp_path / "film.avi")
    flags = ["--input_path", source, "--output_path", tmp_path / "out", "--video_format", video_format]
    video = run(checkpoint, *flags)
    frames, fps = read_video(video)
    assert (len(frames), frames[0].shape, fps) == (4, (32, 48, 3), 12.0)
    assert sorted(p.name for p in (tmp_path / "out/frames").iterdir()) == [f"frame-{i:04}.jpg" for i in range(4)]
    assert sorted(p.name for p in (tmp_path / "out/attention").iterdir()) == [
        f"attn-frame-{i:04}.jpg" for i in range(4)
    ]


def test_folder_of_frames_with_a_size_and_a_speed(checkpoint, tmp_path):
    (tmp_path / "frames").mkdir()
    for i, size in enumerate([(40, 30), (50, 50)]):
        Image.effect_noise(size, 60).save(tmp_path / "frames" / f"{i}.png")
    flags = ("--input_path", tmp_path / "frames", "--output_path", tmp_path / "out", "--resize", 24, 40, "--fps", 5)
    frames, fps = read_video(run(checkpoint, *flags))
    assert (len(frames), frames[0].shape, fps) == (2, (24, 40, 3), 5.0)


def test_video_only_joins_without_a_network(tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / f"attn-{i}.jpg")
    video = generate_video(parse_args(["--input_path", str(tmp_path), "--output_path", str(tmp_path), "--video_only"]))
    frames, fps = read_video(video)
    assert (len(frames), fps) == (3, 30.0)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10000, 9999, 10, 9):
        Image.new("L", (8, 8)).save(tmp_path / f"frame-{number:04}.jpg")
    assert [p.stem for p in list_frames(tmp_path)] == ["frame-0009", "frame-0010", "frame-9999", "frame-10000"]


def test_frame_of_another_size_is_an_error(tmp_path):
    frames = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.new("RGB", (32, 32)).save(frames[0])
    Image.new("RGB", (32, 48)).save(frames[1])
    with pytest.raises(ValueError, match=r"b\.png has 48 x 32 pixels, a\.png 32 x 32"):
        join_frames(frames, tmp_path / "video.mp4", 10)


@pytest.mark.parametrize(
    ("contents", "message"),
    [(None, "does not exist"), (b"no video", "is no video"), ("folder", "no images")],
)
def test_bad_input_is_named(contents, message, checkpoint, tmp_path):
    source = tmp_path / "input"
    if contents == "folder":
        source.mkdir()
    elif contents is not None:
        source.write_bytes(contents)
    with pytest.raises(ValueError, match=rf"input.*{message}|{message}.*input"):
        run(checkpoint, "--input_path", source, "--output_path", tmp_path)


def test_a_network_without_a_class_token_is_refused(tmp_path):
    (tmp_path / "frames").mkdir()
    flags = f"--arch resnet18 --pretrained_weights random --input_path {tmp_path / 'frames'}"
    with pytest.raises(ValueError, match="--arch resnet18: attention maps need vit_tiny"):
        generate_video(parse_args(flags.split()))
