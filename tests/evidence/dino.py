"""The small experiments behind dino/RESULTS.md: the paper's claims on the digits, and CIFAR-10 at small scale.

    make evidence METHOD=dino                                         # the claims, about 30 core-minutes
    python -m tests.evidence.dino --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dino.hub import CARD, MEAN, STD, build, load_pretrained
from shared.images.loading import EpochBatchSampler, make_loader
from shared.images.materials import load_materials
from shared.images.sources import open_source
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.pictures.attention import attended_patches, class_attention
from tests.evidence.claims import Claim
from tests.evidence.probe import Features, Images, Pixels, baselines, with_linear
from tests.evidence.runs import Variant, in_parallel, machine, main, once, run_all, table, with_images, write

# Runs of 220 steps: the teacher follows fast, the centre faster still, and mild views keep what two of them share well
# above the ratio of the temperatures, below which every difference between images dies out.
DIGITS = (
    "--data_path digits --drop_path_rate 0 "
    "--arch vit_tiny --patch_size 8 --global_crop_size 16 --local_crop_size 8 --local_crops_number 2 --out_dim 256 "
    "--global_crops_scale 0.7 1 --local_crops_scale 0.4 0.7 --blur_radius 0.1 0.3 "
    "--batch_size_per_gpu 32 --lr 0.0005 --epochs 5 --warmup_epochs 1 --freeze_last_layer 0 "
    "--teacher_temp 0.015 --warmup_teacher_temp 0.015 --momentum_teacher 0.96 --momentum_teacher_end 0.99 "
    "--center_momentum 0.2 --num_workers 0 --pictures off --saveckp_freq 0 --log_freq 44"
)
VARIANTS = [
    Variant("DINO", DIGITS),
    Variant("no momentum teacher (the student itself)", f"{DIGITS} --momentum_teacher 0 --momentum_teacher_end 0"),
    Variant("two global crops only", f"{DIGITS} --local_crops_number 0"),
    Variant("patches of 4 instead of 8", f"{DIGITS} --patch_size 4"),
    Variant("no centring", f"{DIGITS} --center_momentum 1"),
    Variant("no sharpening", f"{DIGITS} --warmup_teacher_temp 0.1 --teacher_temp 0.1"),
    Variant("neither", f"{DIGITS} --center_momentum 1 --warmup_teacher_temp 0.1 --teacher_temp 0.1"),
]
# A small network with batch norm, which learns faster than a ViT.
CIFAR10 = (
    "--arch resnet10t --global_crop_size 32 --local_crop_size 16 --local_crops_number 4 --out_dim 1024 "
    "--global_crops_scale 0.3 1 --local_crops_scale 0.1 0.3 --blur_radius 0.1 0.5 "
    "--batch_size_per_gpu 64 --lr 0.004 --weight_decay 0.0001 --weight_decay_end 0.0001 --epochs 5 --warmup_epochs 0.3 "
    "--freeze_last_layer 0 --teacher_temp 0.02 --warmup_teacher_temp 0.02 --momentum_teacher 0.98 "
    "--momentum_teacher_end 0.998 --center_momentum 0.5 --num_workers 0 --pictures off --saveckp_freq 0 --log_freq 25"
)
# A step without small crops takes about 0.7 of the time.
CIFAR10_VARIANTS = [
    Variant("DINO", CIFAR10, "main_dino.py"),
    Variant("two crops, 7 epochs", f"{CIFAR10} --local_crops_number 0 --epochs 7", "main_dino.py"),
]
MOMENTUM = f"{CIFAR10} --local_crops_number 0 --epochs 1 --momentum_teacher"
MOMENTA = {"0": ("0", "0"), "0.98 to 0.998": ("0.98", "0.998"), "0.9": ("0.9", "0.9"), "0.5": ("0.5", "0.5")}
MOMENTUM_VARIANTS = [
    Variant(f"momentum {name}", f"{MOMENTUM} {first} --momentum_teacher_end {last}", "main_dino.py")
    for name, (first, last) in MOMENTA.items()
]

DEMONSTRATION = Variant("DINO", "--num_workers 0 --pictures off", "main_dino.py")  # on the generated images
ARCH, PATCH_SIZE, SIDE, EPOCHS = "vit_micro", 4, 32, 8  # of it
PATCHES = [
    Variant(f"patches of {size}", f"{DEMONSTRATION.flags} --patch_size {size}", DEMONSTRATION.script) for size in (4, 8)
]
SUPERVISED = "supervised"


# fmt: off
CLAIMS = [
    Claim("centring and sharpening are both needed (5.3)", "digits, KL",
          "dino_digits", "DINO", ("no centring", "no sharpening"), "kl"),
    Claim("features are learned without labels", "CIFAR-10, 5 epochs, linear", "dino_cifar10", "DINO", "random weights",
          "linear"),
    *(Claim(f"{claim}: {momentum}", test, "dino_momentum", f"momentum {momentum}", "momentum 0", "knn_last")
      for claim, test, momentum in (
          ("a momentum teacher helps (5.1)", "CIFAR-10, 250 steps, k-NN", "0.98 to 0.998"),
          ("the same", "the same", "0.9"), ("the same", "the same", "0.5"))),
    Claim("small crops help", "digits, 220 steps, k-NN", "dino_digits", "DINO", "two global crops only", "knn_last"),
    Claim("the same, at equal compute", "CIFAR-10, 5 and 7 epochs, linear", "dino_cifar10", "DINO",
          "two crops, 7 epochs", "linear"),
    Claim("smaller patches help", "materials, patches of 4 and 8, 480 steps, k-NN", "dino_patches", "patches of 4",
          "patches of 8", "knn_last"),
    *(Claim(f"attention is on objects (figure 1), beside {other}", "materials, share, best head", "dino_attention",
            "DINO", other, "mass") for other in ("random weights", SUPERVISED)),
    *(Claim(f"attention segments them (5.2), beside {other}", "the same, Jaccard of 60 %", "dino_attention", "DINO",
            other, "jaccard") for other in ("random weights", SUPERVISED)),
    Claim("ImageNet, beside other methods and labels"),
    Claim("retrieval, copy detection, video segmentation"),
    Claim("transfer to other data"),
]
# fmt: on


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("dino", VARIANTS, out / "digits", parallel, seeds)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "teacher_entropy": "teacher entropy"}
    columns |= {"kl": "KL", "feature_spread": "feature spread"}
    pixels = Features(CARD, Pixels(), ("digits", None), 16).knn()
    results.append({"variant": "raw pixels", "knn_last": pixels})
    write(out, "dino_digits", results, table(results, columns))
    attention(out, parallel, seeds)
    results = run_all("dino", PATCHES, out / "patches", parallel, seeds)
    write(out, "dino_patches", results, table(results, {"knn_before": "k-NN before", "knn_last": "k-NN after"}))


# --- Attention of the class token beside masks of the objects ---------------------------------------------------------


def attention(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    """The last block's heads of networks that were trained with and without labels, and not at all."""
    results = run_all("dino", [DEMONSTRATION], out / "attention", parallel, seeds)
    for result in results:
        result |= on_objects(load_teacher(ARCH, PATCH_SIZE, result["run"]))

    def others(seed: int) -> list[dict]:
        torch.manual_seed(seed)
        network, rows = build(ARCH, patch_size=PATCH_SIZE, img_size=SIDE), []
        for name in ("random weights", SUPERVISED):
            train = (lambda: {}) if name == "random weights" else partial(train_with_labels, network, seed)
            settings = [name, ARCH, f"seed {seed}", f"{EPOCHS} epochs"]
            work = lambda train=train: train() | on_objects(network)  # noqa: E731
            found = once(out / "attention" / f"{name.replace(' ', '_')}-{seed}.json", settings, work)
            command = f"tests/evidence/dino.py: {settings}"
            rows.append({"variant": name, "seed": seed, **found, "command": command, "machine": machine("fp32")})
        return rows

    results += [row for rows in in_parallel(others, seeds, parallel) for row in rows]
    columns = {"knn_last": "k-NN", "acc1": "top-1", "mass": "on the object (%)", "jaccard": "Jaccard (%)"}
    write(out, "dino_attention", results, table(results, columns | {"kept": "patches with 60 % of it (%)"}))


@torch.no_grad()
def on_objects(network: nn.Module) -> dict[str, float]:
    """Percent of the attention that is on the object, and of the patches that hold 60 % of it.

    ``jaccard`` is that of these patches with the object, by pixels; both are of the best head of every image.
    """
    drawn = load_materials("val")
    pixels, objects = torch.from_numpy(drawn.pixels).permute(0, 3, 1, 2), torch.from_numpy(drawn.masks)[:, None]
    (images,) = normalize_views([pixels], torch.device("cpu"), MEAN, STD)
    maps = class_attention(network.eval(), images)
    patches = attended_patches(maps, 0.6)
    size = objects.shape[2:]
    spread, kept = (F.interpolate(value.float(), size=size, mode="nearest") for value in (maps, patches))
    mass = (spread * objects).sum(dim=(2, 3)) / spread.sum(dim=(2, 3))
    kept = kept.bool()
    jaccard = (kept & objects).sum(dim=(2, 3)) / (kept | objects).sum(dim=(2, 3))
    found = {"mass": mass.amax(dim=1), "jaccard": jaccard.amax(dim=1), "kept": patches.float().mean(dim=(1, 2, 3))}
    return {name: 100 * values.mean().item() for name, values in found.items()}


def train_with_labels(network: nn.Module, seed: int) -> dict[str, float]:
    """Train it on crops like DINO's global ones, without its colours; top-1 in percent."""
    torch.manual_seed(seed)
    source = open_source(None, "train")
    views = MultiCropDataset(source, [ViewRecipe(SIDE, (0.4, 1.0))], seed)
    sampler = EpochBatchSampler(len(source), 32, seed)
    head = nn.Linear(network.embed_dim, len(source.classes))
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, EPOCHS * len(sampler))
    network.train()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch, labels, _ in make_loader(views, batch_sampler=sampler, num_workers=0, device=torch.device("cpu")):
            (images,) = normalize_views(batch, torch.device("cpu"), MEAN, STD)
            optimizer.zero_grad()
            F.cross_entropy(head(network(images)), labels).backward()
            optimizer.step()
            schedule.step()
    val = load_materials("val")
    (images,) = normalize_views([torch.from_numpy(val.pixels).permute(0, 3, 1, 2)], torch.device("cpu"), MEAN, STD)
    with torch.no_grad():
        right = head(network.eval()(images)).argmax(dim=1) == torch.from_numpy(val.labels)
    return {"acc1": 100 * right.double().mean().item()}


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def load_teacher(arch: str, patch_size: int, run: Path) -> nn.Module:
    return load_pretrained(arch, patch_size, run / "checkpoint.pth")[0]


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    images, here = (str(train_images), str(test_images)), out / "cifar10"
    columns = {"knn_last": "k-NN", "linear": "linear", "teacher_entropy": "teacher entropy", "kl": "KL"}
    momentum(out, parallel, seeds, images)
    results = run_all("dino", with_images(CIFAR10_VARIANTS, images), here, parallel, seeds)
    results = with_linear(results, CARD, partial(load_teacher, "resnet10t", 16), images, 32, parallel)
    results = baselines(CARD, images, 32, here, seeds, "resnet10t") + results
    write(out, "dino_cifar10", results, table(results, columns))


def momentum(out: Path, parallel: int, seeds: tuple[int, ...], images: Images) -> None:
    """Teachers that follow the student more and less slowly, judged by k-NN alone."""
    results = run_all("dino", with_images(MOMENTUM_VARIANTS, images), out / "momentum", parallel, seeds)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "teacher_entropy": "teacher entropy", "kl": "KL"}
    write(out, "dino_momentum", results, table(results, columns | {"feature_spread": "feature spread"}))


if __name__ == "__main__":
    main(__doc__, "dino", claims, cifar10)
