"""The small experiments of deepercluster/RESULTS.md: clusters and rotations of an uncurated stream of images.

    UNCURATED_DATA=FOLDER make evidence METHOD=deepercluster          # about 30 core-minutes

The stream is that of :mod:`tests.evidence.uncurated`: 6,000 images of 32 pixels, a long tail of Tiny-ImageNet,
CIFAR-10, frames of CamVid and duplicates. Features are judged by linear classifiers on the maps of two convolutions,
for 20 classes of Tiny-ImageNet, and by what supervised training from them reaches in as many epochs as from scratch.
Every run uses one thread; --parallel of them run at a time.
"""

import re
from pathlib import Path

from tests.evidence.claims import Claim
from tests.evidence.runs import Variant, last_values, main, once, run, run_all, run_script, table, write
from tests.evidence.uncurated import probe_images, uncurated

SIZE, CONVS = 32, (10, 13)
RUN = f"--workers 0 --pictures off --log_freq 50 --eval_knn_freq 0 --checkpoint_freq 0 --image_size {SIZE} --width 16"
RUN += " --sobel 1 --crop_scale 0.4 1 --dim_pca 128 --lr 0.05"
BOTH = "clusters and rotations"
ONE_GROUP = "--super_classes 1 --rotnet 0"
VARIANTS = [
    Variant(BOTH, f"{RUN} --super_classes 4 --k 200 --batch_size 16 --epochs 8 --reassignment 2"),
    # an epoch shows a quarter of the images to each training group, here to one
    Variant("clusters alone", f"{RUN} {ONE_GROUP} --k 200 --batch_size 64 --epochs 32 --reassignment 8"),
    Variant("rotations alone", f"{RUN} --super_classes 4 --k 1 --batch_size 16 --epochs 8"),
]
SCRATCH, TRAINED = "supervised, from scratch", "supervised, from ours"
SUPERVISED = f"--workers 0 --image_size {SIZE} --width 16 --sobel 1 --crop_scale 0.4 1 --batch_size 64 --lr 0.01"
SUPERVISED += " --epochs 12"
RESULTS = "deepercluster_uncurated"
# fmt: off
CLAIMS = [
    *(Claim(f"clusters with rotations are better than {other} alone, convolution {conv} (5.1)", "6,000 uncurated "
            "images of 32 pixels, linear, 20 classes", RESULTS, BOTH, f"{other} alone", f"linear_conv{conv}",
            flaw="all are near chance")
      for other in ("clusters", "rotations") for conv in CONVS),
    Claim("supervised training starts better from them than from scratch (5.4)", "the same, 12 epochs of 2,000 "
          "labelled images, top-1", RESULTS, TRAINED, SCRATCH, "acc1"),
    Claim("one process has the gradients of four groups of processes", "4 processes, to 1e-5",
          numbers="`tests/deepercluster/test_main.py`", found="confirmed"),
    Claim("the number of clusters and of images matters (5.3)"),
    Claim("96 million images: ImageNet, Places and VOC beyond curated pre-training without labels"),
]
# fmt: on


def printed_accuracy(log: Path) -> float:
    """Top-1 after the last epoch, as a script has printed it."""
    return float(re.findall(r"Top-1 accuracy after the last epoch: ([\d.]+) %", log.read_text())[-1])


def probes(result: dict, images: Path) -> dict:
    """Accuracies of linear classifiers on maps of the run of a result."""
    folder, found = result["run"], {}
    for conv in CONVS:
        flags = f"--conv {conv} --epochs 10 --lr 0.05 --crop_scale 0.4 1 --workers 0 --seed {result['seed']}"
        command = ["eval_linear.py", *flags.split(), "--data_path", str(images), "--pretrained", str(folder)]
        command += ["--dump_path", str(folder / "linear")]
        log = folder.with_suffix(f".conv{conv}.log")

        def work(command=command, log=log) -> dict:
            run_script("deepercluster", command, log)
            return {"top1": printed_accuracy(log)}

        found[f"linear_conv{conv}"] = once(folder.with_suffix(f".conv{conv}.json"), command, work)["top1"]
    return result | found


def supervised(folder: Path) -> dict:
    return {"acc1": printed_accuracy(folder.with_suffix(".log"))}


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    images = probe_images(out / "images", SIZE)
    results = []
    for seed in seeds:
        stream = uncurated(out / "stream" / str(seed), SIZE, seed)
        variants = [Variant(v.name, f"{v.flags} --data_path {stream}") for v in VARIANTS]
        results += run_all("deepercluster", variants, out / "runs", parallel, (seed,), last_values)
    results = [probes(result, images) for result in results]
    for result in [r for r in results if r["variant"] == BOTH]:
        for name, weights in ((SCRATCH, ""), (TRAINED, f" --pretrained {result['run']}")):
            flags = f"{SUPERVISED} --data_path {images}{weights}"
            variant = Variant(name, flags, "eval_pretrain.py")
            place = out / "supervised" / name.replace(" ", "_") / str(result["seed"])
            results.append(run("deepercluster", variant, result["seed"], place, supervised))
    columns = {f"linear_conv{conv}": f"linear, conv {conv}" for conv in CONVS} | {"acc1": "supervised, top-1"}
    write(out, RESULTS, results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "deepercluster", claims, lambda *_: None)
