import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler
from torchvision import transforms

from shared.images.decode import ImageError
from shared.images.loading import (
    LEFT_OUT,
    BadImages,
    EpochBatchSampler,
    EvalDataset,
    EvalTransform,
    make_loader,
    short_side,
)
from shared.images.sources import FileSource, open_source
from tests.pictures import write_image
from tests.processes import SERVER
from tests.shared.photographs import encoded, photograph

ROOT = Path(__file__).resolve().parents[3]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(folder, count, bad=()) -> FileSource:
    for i in range(count):
        data = encoded(photograph(i, 12, 16), "JPEG")
        (folder / f"{i}.jpg").write_bytes(data[:-100] if i in bad else data)
    return FileSource("photographs", folder, [f"{i}.jpg" for i in range(count)], np.arange(count) % 2, ["a", "b"])


def load_pixels(source):
    return lambda index: (index, source.load(index).decode())


# -------------------------------------------------------------------------------------------------------- bad images


def test_a_bad_image_is_replaced_listed_once_and_counted(tmp_path):
    source = photographs(tmp_path, 40, bad=(3, 7))
    bad_images = BadImages(40, tmp_path / "bad_images.txt", max_fraction=0.1)
    assert bad_images.count() == 0
    for _ in range(3):
        for index in range(40):
            shown, pixels = bad_images.read(source, index, (0, 1, index), load_pixels(source))
            assert (shown == index) == (index not in (3, 7)) and pixels.shape == (12, 16, 3)
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(tmp_path / "3.jpg"), str(tmp_path / "7.jpg")]
    assert all("premature end" in line.lower() for line in lines)
    assert bad_images.count() == 2


def test_a_resumed_run_goes_on_with_the_list(tmp_path):
    source = photographs(tmp_path, 40, bad=(3, 7))
    for index in (3, 7, 3):
        bad_images = BadImages(40, tmp_path / "bad_images.txt", max_fraction=0.1)
        bad_images.read(source, index, (0,), load_pixels(source))
    assert bad_images.count() == 2


def test_too_many_bad_images_stop_the_run(tmp_path):
    source = photographs(tmp_path, 20, bad=range(0, 20, 4))
    bad_images = BadImages(20, tmp_path / "bad_images.txt", max_fraction=0.1)
    with pytest.raises(
        ImageError,
        match=r"3 of 20 images .* --max_bad_fraction 0.1 allows 2: remove them or raise it, see .*bad_images",
    ):
        for index in range(20):
            bad_images.read(source, index, (0, index), load_pixels(source))


def test_errors_of_other_kinds_are_not_swallowed(tmp_path):
    def broken(index):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        BadImages(4).read(photographs(tmp_path, 4), 0, (0,), broken)


def meet_bad_images(folder):
    source = FileSource("photographs", folder, [f"{i}.jpg" for i in range(30)])
    bad_images = BadImages(30, folder / "bad_images.txt", max_fraction=0.5)
    for index in range(30):
        bad_images.read(source, index, (0, index), load_pixels(source))


def test_several_processes_write_one_line_per_bad_image(tmp_path):
    photographs(tmp_path, 30, bad=range(0, 30, 3))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=meet_bad_images, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(str(tmp_path / f"{i}.jpg") for i in range(0, 30, 3))


def test_an_image_that_is_left_out_is_another_one_without_its_label(tmp_path):
    source = photographs(tmp_path, 6)
    (tmp_path / "2.jpg").write_bytes(b"")
    dataset = EvalDataset(source, EvalTransform(12, 12), BadImages(6, on_bad_image="skip"))
    items = [dataset[i] for i in range(6)]
    assert [label for _, label, _ in items] == [LEFT_OUT if i == 2 else source.label(i) for i in range(6)]
    assert torch.equal(items[2][0], items[items[2][2]][0]) and items[2][2] != 2


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("height, width", [(60, 80), (91, 33), (20, 24), (64, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_eval_transform_equals_torchvision_on_pil_images(interpolation, height, width):
    pixels = photograph(1, height, width)
    reference = transforms.Compose(
        [
            transforms.Resize(48, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(40),
            transforms.PILToTensor(),
        ]
    )(Image.fromarray(pixels))
    ours = EvalTransform(48, 40, interpolation=interpolation)(pixels)
    assert ours.dtype == torch.uint8 and ours.shape == (3, 40, 40)
    difference = (ours.int() - reference.int()).abs()
    assert difference.float().mean() < 0.1 and difference.max() <= 2  # rounding of the two passes


def test_the_eval_transform_normalises():
    pixels = photograph(1, 50, 50)
    raw, normalised = EvalTransform(32, 32)(pixels), EvalTransform(32, 32, MEAN, STD)(pixels)
    torch.testing.assert_close(normalised, transforms.functional.normalize(raw / 255, MEAN, STD))
    grey = EvalTransform(32, 32, MEAN, STD, in_chans=1)(pixels)
    luminance = transforms.functional.rgb_to_grayscale(raw.float())
    torch.testing.assert_close(grey, (luminance / 255 - 0.449) / 0.226, atol=0.02, rtol=0)


def test_eval_items_keep_order_labels_and_indices(tmp_path):
    source = photographs(tmp_path, 5)
    loader = make_loader(EvalDataset(source, EvalTransform(12, 12)), batch_size=2)
    images, labels, indices = (torch.cat(column) for column in zip(*loader, strict=True))
    assert images.shape == (5, 3, 12, 12) and indices.tolist() == list(range(5)) and labels.tolist() == [0, 1, 0, 1, 0]
    picked = make_loader(EvalDataset(source, EvalTransform(12, 12)), batch_size=2, sampler=[4, 1, 3])
    assert torch.cat([batch[2] for batch in picked]).tolist() == [4, 1, 3]


def test_a_bad_image_in_an_evaluation_is_an_error_unless_allowed(tmp_path):
    source = photographs(tmp_path, 6, bad=(2,))
    with pytest.raises(ImageError, match=r"2\.jpg"):
        EvalDataset(source, EvalTransform(12, 12))[2]
    _, label, index = EvalDataset(source, EvalTransform(12, 12), BadImages(6))[2]
    assert index != 2 and label == source.label(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_message_of_a_bad_image_is_the_same_from_a_worker(num_workers, tmp_path):
    source = photographs(tmp_path, 2, bad=(1,))
    loader = make_loader(EvalDataset(source, EvalTransform(12, 12)), batch_size=2, num_workers=num_workers)
    with pytest.raises(ImageError) as error:
        list(loader)
    if num_workers:
        loader._iterator._shutdown_workers()  # the garbage collector closes its queues first, and waits for seconds
    assert re.fullmatch(rf"{tmp_path}/1\.jpg: .+", str(error.value))


# ------------------------------------------------------------------------------------------------- sampler and loader


class Keys(Dataset):
    """Returns the keys themselves, and what a worker's settings are."""

    def __getitems__(self, keys):
        settings = torch.get_num_threads(), cv2.getNumThreads(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return keys, os.getpid(), settings


@pytest.mark.parametrize("num_samples, world_size", [(20, 1), (21, 2), (10, 4)])
def test_the_order_is_that_of_distributed_sampler(num_samples, world_size):
    for rank in range(world_size):
        reference = DistributedSampler(range(num_samples), world_size, rank, shuffle=True, seed=5)
        sampler = EpochBatchSampler(num_samples, 2, 5, rank, world_size, drop_last=False)
        for epoch in (0, 3):
            reference.set_epoch(epoch)
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert [index for batch in batches for _, index in batch] == list(reference)
            assert {key_epoch for batch in batches for key_epoch, _ in batch} == {epoch}
            assert len(batches) == len(sampler)


def test_drop_last_leaves_out_the_incomplete_batch():
    sampler = EpochBatchSampler(11, 4)
    assert [len(batch) for batch in sampler] == [4, 4] and len(sampler) == 2
    assert [len(batch) for batch in EpochBatchSampler(11, 4, drop_last=False)] == [4, 4, 3]


def test_an_epoch_resumes_at_any_step():
    sampler = EpochBatchSampler(40, 4, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    for step in range(len(whole) + 1):
        sampler.set_epoch(2, start_step=step)
        assert list(sampler) == whole[step:]
        assert len(sampler) == len(whole)  # schedules count whole epochs
    sampler.set_epoch(3)
    assert len(list(sampler)) == len(whole)


@pytest.mark.parametrize("num_samples, batch_size, world_size", [(3, 4, 1), (5, 4, 2), (0, 1, 1), (5, 0, 1)])
def test_fewer_images_than_a_batch_is_an_error(num_samples, batch_size, world_size):
    with pytest.raises(ValueError, match=f"{num_samples} images on {world_size} .* batch of {batch_size}"):
        EpochBatchSampler(num_samples, batch_size, world_size=world_size)


def test_workers_persist_compute_with_one_thread_and_leave_signals_to_the_main_process():
    sampler = EpochBatchSampler(12, 2, seed=3)
    loader = make_loader(Keys(), batch_sampler=sampler, num_workers=2)
    processes = set()
    for epoch in range(2):
        sampler.set_epoch(epoch, start_step=epoch)
        expected = list(sampler)
        batches = list(loader)
        assert [keys for keys, _, _ in batches] == expected
        assert {settings for _, _, settings in batches} == {(1, 1, True)}
        processes |= {process for _, process, _ in batches}
    assert len(processes) == 2 and os.getpid() not in processes


def fail_while_loading():
    """With a loader that only the garbage collector finds, which closes its queues first, and one that lives on."""
    loader = make_loader(Keys(), batch_sampler=EpochBatchSampler(100, 2), num_workers=1)
    loader.itself, iterator = loader, iter(loader)
    next(iterator)
    del loader, iterator
    gc.collect()
    loader = make_loader(Keys(), batch_sampler=EpochBatchSampler(100, 2), num_workers=2)
    for _ in loader:  # which the traceback keeps alive to the end
        raise KeyError("a bug")


@pytest.mark.slow
def test_a_script_that_fails_with_workers_ends():
    """Its workers ignore the signal that they are sent at the end; tests/reliability does this in child processes."""
    code = "from tests.shared.images.test_loading import fail_while_loading; fail_while_loading()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and run.stderr.endswith("KeyError: 'a bug'\n")


def load_after_opencv_has_used_its_threads(batches):
    multiprocessing.set_start_method("fork", force=True)  # of the loader's processes, as in a script
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5)
    for (batch,) in make_loader(torch.utils.data.TensorDataset(torch.arange(4)), batch_size=2, num_workers=2):
        batches.put(batch.tolist())


def test_workers_start_after_opencv_has_used_its_threads():
    """OpenCV's pool of threads does not survive a fork: a worker that touched it waited forever."""
    batches = SERVER.Queue()
    process = SERVER.Process(target=load_after_opencv_has_used_its_threads, args=(batches,))
    process.start()
    try:
        assert [batches.get(timeout=120) for _ in range(2)] == [[0, 1], [2, 3]]
        process.join(120)
        assert process.exitcode == 0
    finally:
        process.kill()


TOO_LARGE = """
import sys, time, torch
sys.path.insert(0, {root!r})
from shared import distributed
from shared.images.loading import make_loader

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.zeros(1 << (22 if index > 3 else 4))

    {assembles}

with distributed.clean_exit():
    for batch in make_loader(Large(), batch_size=4, num_workers=2):
        {step}
"""
ASSEMBLES = "def __getitems__(self, indices): return torch.stack([self[index] for index in indices])"


@pytest.mark.parametrize(
    ("assembles", "step"),
    [("", "pass"), (ASSEMBLES, "pass"), (ASSEMBLES, "time.sleep(60)")],  # the last: torch's handler of SIGCHLD raises
)
def test_batches_that_do_not_fit_into_shared_memory_end_the_run(assembles, step, tmp_path):
    """A container has 64 MB of it unless it is told otherwise."""
    code = tmp_path / "large.py"
    code.write_text(TOO_LARGE.format(root=str(ROOT), assembles=assembles, step=step))
    command = f"mount -t tmpfs -o size=16m tmpfs /dev/shm && exec {sys.executable} {code}"
    run = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, timeout=120)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("mounting a small /dev/shm needs privileges")
    assert run.returncode == 4, run.stderr
    assert "--shm-size=8g or --ipc=host" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr


@pytest.mark.parametrize("shape", [(1, 20000), (65535, 2), (300, 3)])
def test_a_centre_crop_of_a_strip_takes_little_memory(shape):
    pixels = np.full((*shape, 3), 77, dtype=np.uint8)
    tracemalloc.start()
    image = EvalTransform(256, 224)(pixels)
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()
    assert image.shape == (3, 224, 224) and (image == 77).all()


def test_names_with_tabs_and_line_ends_take_one_line_of_the_list_each(tmp_path):
    names = ["a\tb.png", "c\nd.png", "e\rf.png", "good.png"]
    for name in names[:3]:
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(photograph(0, 8, 8)).save(tmp_path / "good.png")
    source = FileSource("images", tmp_path, names)
    bad = BadImages(4, tmp_path / "bad_images.txt", max_fraction=1)
    for index in range(3):
        assert bad.read(source, index, (0,), lambda candidate: source.load(candidate).decode()).shape == (8, 8, 3)
    assert bad.count() == 3
    lines = (tmp_path / "bad_images.txt").read_text().split("\n")
    assert [line.partition("\t")[0].rpartition("/")[2] for line in lines[:3]] == [r"a\tb.png", r"c\nd.png", r"e\rf.png"]


def test_the_side_of_images_of_which_none_can_be_read_is_not_called_zero(tmp_path):
    """Before the error about them a run said that images of 0 pixels are smaller than its views."""
    write_image(tmp_path / "small.png", np.zeros((9, 7, 3), np.uint8))
    assert short_side(open_source(tmp_path)) == 7
    (tmp_path / "small.png").write_bytes(b"")
    assert short_side(open_source(tmp_path)) > 1e9
