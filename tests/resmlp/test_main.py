"""The real script: flags, fine-tuning, evaluation, losses and augmentation; the loop is tested with XCiT."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from resmlp import main
from resmlp.augmentations import ThreeAugment
from resmlp.hub import MEAN, STD, build_network
from resmlp.main import SubmodelLoss
from shared.supervised.data import build_mixup
from shared.supervised.losses import ClassificationLoss, class_probabilities
from tests.command_lines import error_of
from tests.resmlp.tiny import FLAGS, train
from tests.run_folders import lines, losses, state_of


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--distillation-type hard --teacher-path t --cosub", "--cosub and --distillation-type hard"),
        ("--eval-crop-ratio 1.5", "--eval-crop-ratio 1.5"),
        ("--src", "--src belongs to --ThreeAugment"),
        ("--model resmlp_13", "did you mean resmlp_"),
        ("--drop-path 1", "--drop-path 1.0 is not in [0, 1)"),
        ("--bce-loss --smoothing 0.1", "--smoothing 0.1 would make every class right"),
        ("--patch-size 3", "patches of 3 pixels do not fill an image of 16 pixels"),
        ("--model test_resnet", "--patch-size 4 --embed-dim 16 --depth 2: the sizes of --model test_resnet"),
        ("--eval", "checkpoint.pth is neither a file nor a release"),
        ("--finetune nowhere.pth", "--finetune nowhere.pth is neither a file nor a release"),
    ],
)
def test_bad_input_is_one_clear_message(flags, message, images, tmp_path):
    given = (*FLAGS.split(), "--data_path", images, "--output_dir", tmp_path)
    assert message in error_of(main.main, *given, *flags.split())


def test_eval_repeats_the_last_evaluation_also_of_a_flat_file(finished, images, tmp_path, capsys):
    last = [line for line in lines(finished) if "test_acc1" in line][-1]
    assert (finished / "best_checkpoint.pth").exists() or state_of(finished)["best_acc1"] == 0
    torch.save(state_of(finished)["model"], tmp_path / "flat.pth")
    train(finished, "--data_path", images, "--eval")
    train(finished, "--data_path", images, "--eval", "--resume", tmp_path / "flat.pth")
    printed = [line for line in capsys.readouterr().out.splitlines() if "top-1" in line]
    assert len(printed) == 2 and all(f"top-1 {last['test_acc1']:.2f} %" in line for line in printed)
    backbone = {name: value for name, value in state_of(finished)["model"].items() if "head" not in name}
    torch.save(backbone, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="no classifier for the 3 classes"):
        train(tmp_path / "run", "--data_path", images, "--eval", "--finetune", tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"--input_size 24 contradicts the checkpoint, .* --input_size 16"):
        train(finished, "--data_path", images, "--eval", "--input-size", 24)
    train(finished, "--eval", "--val_path", images)  # needs no training images
    assert f"{images}: 24 images, 3 classes: top-1" in capsys.readouterr().out


def test_finetuning_at_another_resolution_and_for_other_classes(finished, images, tmp_path, capsys):
    two = shutil.copytree(images, tmp_path / "two")
    shutil.rmtree(two / "class2")
    flags = ("--finetune", finished / "checkpoint.pth", "--input-size", 24, "--lr", 0, "--warmup-lr", 0, "--min-lr", 0)
    train(tmp_path / "run", "--data_path", two, *flags, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "its classifier is for other classes" in printed
    assert "cross-patch layers for 4x4 patches, interpolated to 6x6" in printed
    before, after = (state_of(folder)["model"] for folder in (finished, tmp_path / "run"))
    assert after["head.weight"].shape == (2, 16) and after["blocks.0.attn.weight"].shape == (36, 36)
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


def test_attn_only_trains_the_cross_patch_layers_and_the_classifier(finished, images, tmp_path):
    train(tmp_path, "--data_path", images, "--finetune", finished / "checkpoint.pth", "--attn-only", "--lr", 0.05)
    before, after = (state_of(folder)["model"] for folder in (finished, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert moved == expected | {"head.weight", "head.bias"}


def test_attn_only_needs_attention():
    with pytest.raises(ValueError, match="--attn-only: the network has no layer of that name"):
        main.keep_cross_patch_layers_trainable(build_network("convnext_atto", 3))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_learns_what_its_teacher_says(kind, images, tmp_path):
    """The teacher calls every image class 2; with alpha 1 the labels have no say."""
    torch.manual_seed(0)
    teacher = build_network("test_resnet", 3)
    last = [module for module in teacher.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.0, 0.0, 6.0])
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    distilled = ("--distillation-type", kind, "--teacher-model", "test_resnet", "--distillation-alpha", 1)
    flags = ("--data_path", images, "--input-size", 32, "--patch-size", 8, "--epochs", 6, "--lr", 4, "--mixup", 0)
    flags += ("--batch-size", 8, "--cutmix", 0, "--saveckp_steps", 0)
    train(tmp_path / "run", *flags, *distilled, "--teacher-path", tmp_path / "teacher.pth")
    student = build_network("resmlp_12", 3, img_size=32, patch_size=8, embed_dim=16, depth=2).eval()
    student.load_state_dict(state_of(tmp_path / "run")["model"])
    assert (student(torch.randn(20, 3, 32, 32)).argmax(dim=1) == 2).float().mean() > 0.9
    first, *_, last_loss = losses(tmp_path / "run")
    assert last_loss < 0.7 * first


def as_it_is(images: torch.Tensor) -> torch.Tensor:
    """A network whose images are its logits."""
    return images


def test_in_the_binary_loss_every_class_of_a_mixed_image_is_right():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    p = logits.sigmoid()
    for target, right in ((targets, targets > 0), (torch.tensor([0, 2]), F.one_hot(torch.tensor([0, 2])) > 0)):
        loss = ClassificationLoss(binary=True)(as_it_is, logits, target)
        torch.testing.assert_close(loss, -torch.where(right, p, 1 - p).log().mean())


def test_labels_of_the_binary_loss_are_not_smoothed_and_others_are():
    args = main.parse_args(["--bce-loss", "--mixup", "0.8"])
    _, targets = build_mixup(args, 5)(torch.zeros(2, 3, 8, 8), torch.tensor([0, 2]))
    assert set((targets > 0).sum(dim=1).tolist()) <= {1, 2} and args.smoothing == 0
    smoothed = ClassificationLoss(smoothing=0.1)(as_it_is, torch.eye(3), torch.arange(3))
    torch.testing.assert_close(F.cross_entropy(torch.eye(3), class_probabilities(torch.arange(3), 3, 0.1)), smoothed)


def test_cotraining_of_submodels():
    """The network sees the images twice; the second half of its output is that of the other submodel."""
    torch.manual_seed(0)
    one, other = torch.randn(2, 2, 3, requires_grad=True)
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    loss = SubmodelLoss()(lambda images: torch.cat([one, other])[: len(images)], torch.zeros(2, 1, 1, 1), targets)

    def bce(logits, target):
        p = logits.sigmoid()
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()

    expected = bce(one, targets) + bce(other, targets)
    expected = (expected + bce(one, other.detach().sigmoid()) + bce(other, one.detach().sigmoid())) / 4
    torch.testing.assert_close(loss, expected)
    for logits in (one, other):
        found, gradient = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(found, gradient)


def test_three_augment_takes_one_of_three():
    pixels = np.array(Image.effect_noise((20, 24), 60).convert("RGB"))
    pixels[..., 1] //= 2
    plain = ThreeAugment(16, color_jitter=0.0, simple_crop=True)
    kinds = set()
    for seed in range(30):
        random.seed(seed)
        torch.manual_seed(seed)
        view = plain(pixels)
        assert view.shape == (3, 16, 16)
        rgb = view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        grey = bool(((rgb[0] - rgb[1]).abs() < 1e-3).all())
        kinds.add("grey" if grey else "solarised" if rgb[1].max() <= 0.51 and rgb[0].max() < 0.51 else "blurred")
    assert kinds == {"grey", "solarised", "blurred"}
    assert ThreeAugment(16, color_jitter=0.3, in_chans=1)(pixels).shape == (1, 16, 16)


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixup", 0, "--cutmix", 0, "--opt", "lamb", "--unscale-lr", "--in_chans", 1, "--remode", "const"),
        ("--ThreeAugment", "--src", "--bce-loss", "--cosub", "--drop-path", 0.3, "--no-model-ema", "--no-train-mode"),
    ],
)
def test_other_recipes_train(flags, images, tmp_path):
    train(tmp_path, "--data_path", images, "--epochs", 1, *flags)
    assert len(losses(tmp_path)) >= 2 and all(map(math.isfinite, losses(tmp_path)))
