"""Linear evaluation, fine-tuning, k-NN, attention pictures and export of one small run."""

import json

import numpy as np
import pytest
import torch

from msn import eval_knn, export, fine_tune, linear_eval, visualize_attention
from msn.fine_tune import AugmentedImages, layer_of, param_groups, train_transform
from msn.linear_eval import LinearClassifier, RateInMomentumSGD
from msn.pretrained import load_encoder
from msn.vision_transformer import VisionTransformer
from shared.checkpoint import load_latest
from shared.data import BadImages
from shared.sources import open_source
from tests.msn.runs import CHECKPOINT


class Stop(Exception):
    pass


def stop_after(monkeypatch, module, calls: int) -> None:
    """``module.train_one_epoch`` ends the run in its call after so many."""
    real, done = module.train_one_epoch, []

    def train_one_epoch(*args, **kwargs):
        done.append(args)
        if len(done) > calls:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train_one_epoch", train_one_epoch)


# --- Linear evaluation ------------------------------------------------------------------------------------------------


def linear(run, images, folder, *flags) -> dict[str, float]:
    network = ["--model_name", "deit_tiny", "--pretrained", str(run), "--pretrain_path", CHECKPOINT]
    data = ["--data_path", str(images), "--val_path", str(images), "--image_size", "32", "--num_classes", "3"]
    others = ["--epochs", "2", "--batch_size", "8", "--num_workers", "0", "--lr", "0.5", "--device", "cpu"]
    args = linear_eval.parse_args([*network, *data, *others, "--folder", str(folder), *map(str, flags)])
    return linear_eval.linear_eval(args)


def test_linear_evaluation_learns_resumes_and_writes_the_official_layout(run, images, tmp_path, monkeypatch):
    whole = linear(run, images, tmp_path / "whole")
    assert whole["acc1"] > 50  # chance is 33
    state = load_latest(tmp_path / "whole" / "msn-lin-eval.pth.tar")
    official = {"target_encoder", "classifier", "opt", "epoch", "world_size", "best_top1_acc", "batch_size", "lr"}
    assert official <= state.keys()
    assert set(state["classifier"]) == {"norm.weight", "norm.bias", "linear.weight", "linear.bias"}

    stop_after(monkeypatch, linear_eval, 1)
    with pytest.raises(Stop):
        linear(run, images, tmp_path / "stopped")
    monkeypatch.undo()
    assert linear(run, images, tmp_path / "stopped") == whole
    resumed = load_latest(tmp_path / "stopped" / "msn-lin-eval.pth.tar")
    for name, value in state["classifier"].items():
        assert torch.equal(value, resumed["classifier"][name])
    assert resumed["log"] == state["log"]

    assert linear(run, images, tmp_path / "whole", "--training", "false") == whole
    with pytest.raises(ValueError, match=r"--num_blocks 2 does not fit .*--num_blocks 1"):
        linear(run, images, tmp_path / "whole", "--num_blocks", 2)
    with pytest.raises(ValueError, match="of other weights"):
        linear(run, images, tmp_path / "whole", "--pretrain_path", "msn-ep1.pth.tar")
    with pytest.raises(ValueError, match="--num_classes 2 is less than the 3 classes"):
        linear(run, images, tmp_path / "x", "--num_classes", 2)
    with pytest.raises(ValueError, match="--training false: there is no"):
        linear(run, images, tmp_path / "y", "--training", "false")


def test_the_published_linear_config_is_understood():
    config = linear_eval.Path(linear_eval.__file__).parent / "configs/eval/lineval_msn_vits16.yaml"
    args = linear_eval.parse_args(["--fname", str(config), "--data_path", "/imagenet", "--folder", "/run"])
    assert (args.lr, args.epochs, args.num_blocks, args.normalize, args.device) == (6.4, 100, 1, True, "cuda")
    assert (args.pretrained, args.pretrain_path) == ("/run", "msn-vits16-latest.pth.tar")


def test_steps_keep_the_learning_rate_they_were_made_with():
    """The recurrence by hand, beside torch's SGD, with which it agrees while the rate is constant."""
    mine, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizer = RateInMomentumSGD([mine], lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    p, buffer = np.array([1.0, -2.0]), None
    for step, lr in enumerate((0.1, 0.1, 0.05)):
        for parameter, opt in ((mine, optimizer), (theirs, sgd)):
            parameter.grad = 2 * parameter.detach()
            opt.param_groups[0]["lr"] = lr
            opt.step()
        update = -lr * (2 * p + 0.01 * p)
        buffer = update if buffer is None else 0.9 * buffer + update
        p = p + update + 0.9 * buffer
        np.testing.assert_allclose(mine.detach().numpy(), p, rtol=1e-5)
        assert torch.allclose(mine, theirs) == (step < 2)


def test_the_linear_classifier_normalises():
    classifier = LinearClassifier(6, 3)
    features = torch.randn(4, 6)
    torch.testing.assert_close(classifier(5 * features), classifier(features), rtol=1e-3, atol=1e-4)


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


def tune(run, images, folder, *flags) -> dict[str, float]:
    network = ["--model_name", "deit_tiny", "--pretrained", str(run), "--fname", CHECKPOINT]
    data = ["--data_path", str(images), "--val_path", str(images), "--image_size", "32", "--num_classes", "3"]
    others = ["--epochs", "2", "--warmup_epochs", "0", "--batch_size", "8", "--num_workers", "0", "--device", "cpu"]
    args = fine_tune.parse_args([*network, *data, *others, "--output_dir", str(folder), *map(str, flags)])
    return fine_tune.fine_tune(args)


def test_fine_tuning_resumes_with_all_of_its_augmentation(run, images, tmp_path, monkeypatch):
    whole = tune(run, images, tmp_path / "whole")
    stop_after(monkeypatch, fine_tune, 1)
    with pytest.raises(Stop):
        tune(run, images, tmp_path / "stopped")
    monkeypatch.undo()
    assert tune(run, images, tmp_path / "stopped", "--num_workers", 1) == whole
    states = [load_latest(tmp_path / name / "fine-tune.pth.tar") for name in ("whole", "stopped")]
    for name, value in states[0]["encoder"].items():
        assert torch.equal(value, states[1]["encoder"][name]), name
    assert states[0]["log"] == states[1]["log"]
    with pytest.raises(ValueError, match=r"--mixup 0.0 does not fit .*--mixup 0.8"):
        tune(run, images, tmp_path / "whole", "--mixup", 0)
    with pytest.raises(SystemExit):
        tune(run, images, tmp_path / "odd", "--batch_size", 7)


def test_fine_tuning_learns(run, images, tmp_path):
    plain = ("--mixup", 0, "--cutmix", 0, "--rand_augment", "", "--erase", 0, "--drop_path", 0, "--crop_scale", 0.8, 1)
    result = tune(run, images, tmp_path, *plain, "--epochs", 8, "--lr", 0.5)
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "fine-tune.txt").read_text().splitlines()]
    assert result["acc1"] > 60 and losses[-1] < losses[0]


def test_learning_rates_fall_from_block_to_block():
    network = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=3)
    network.fc = torch.nn.Linear(24, 2)
    groups = param_groups(network, 0.05, 0.5)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == dict(network.named_parameters()).keys()
    assert found["fc.weight"] == (1.0, 0.05) and found["fc.bias"] == (1.0, 0.0) and found["norm.weight"] == (1.0, 0.0)
    assert found["blocks.2.attn.qkv.weight"] == (0.5, 0.05) and found["blocks.0.mlp.fc1.bias"] == (0.125, 0.0)
    assert found["pos_embed"] == (0.0625, 0.0) and found["patch_embed.proj.weight"] == (0.0625, 0.05)
    assert layer_of("blocks.11.norm1.weight", 12) == 12


def test_augmented_images_are_a_function_of_seed_epoch_and_index(images):
    source = open_source(str(images), "all")
    for in_chans in (1, 3):
        transform = train_transform(16, (0.5, 1.0), True, "rand-m9-mstd0.5-inc1", 0.25, in_chans)
        dataset = AugmentedImages(source, transform, 0, BadImages(len(source)))
        first, label, index = dataset[(3, 5)]
        torch.manual_seed(9)
        assert torch.equal(first, dataset[(3, 5)][0]) and first.shape == (in_chans, 16, 16)
        assert (label, index) == (source.label(5), 5)
        assert not torch.equal(first, dataset[(4, 5)][0])


# --- k-NN, attention, export ------------------------------------------------------------------------------------------


def test_knn(run, images):
    flags = f"--model_name deit_tiny --pretrained {run} --fname {CHECKPOINT} --data_path {images} --val_path {images} "
    others = "--image_size 32 --num_workers 0 --device cpu --nb_knn 1 5"
    accuracies = eval_knn.eval_knn(eval_knn.parse_args([*flags.split(), *others.split()]))
    assert accuracies[1] == (100.0, 100.0) and accuracies[5][0] > 50  # an image's nearest neighbour is itself
    with pytest.raises(ValueError, match="--nb_knn 100 is more than the 24 images"):
        eval_knn.eval_knn(eval_knn.parse_args([*flags.split(), *others.split(), "100"]))


def test_attention_pictures(run, images, tmp_path):
    image = next(images.rglob("*.png"))
    flags = f"--model_name deit_tiny --pretrained {run} --fname {CHECKPOINT} --image_path {image} --image_size 40 "
    args = visualize_attention.parse_args([*flags.split(), "--output_dir", str(tmp_path), "--threshold", "0.6"])
    paths = visualize_attention.visualize_attention(args)
    names = {path.name for path in paths}
    assert {"attention.png", "attn-head0.png", "attn-head1.png", "overlay-mean.png", "mask_th0.6_mean.png"} <= names
    encoder = load_encoder("deit_tiny", run, CHECKPOINT)
    attention = visualize_attention.class_attention(encoder, torch.randn(2, 3, 33, 24))
    assert attention.shape == (2, 2, 4, 3) and attention.sum(dim=(2, 3)).max() < 1
    with pytest.raises(SystemExit):
        visualize_attention.parse_args(["--threshold", "2"])


def test_images_are_prepared_for_one_and_three_channels():
    pixels = np.full((10, 20, 3), 255, dtype=np.uint8)
    assert visualize_attention.prepare_image(pixels, [5]).shape == (3, 5, 10)
    grey = visualize_attention.prepare_image(pixels, [4, 4], in_chans=1)
    torch.testing.assert_close(grey, torch.full((1, 4, 4), (1 - 0.449) / 0.226), rtol=1e-4, atol=1e-4)


def test_export_gives_the_same_features_everywhere(run, tmp_path):
    pytest.importorskip("onnxruntime")
    encoder = load_encoder("deit_tiny", run, CHECKPOINT)
    files = export.export(encoder, "deit_tiny", tmp_path, image_size=48)
    assert files.keys() == {"safetensors", "onnx"}  # timm has no ViT of these shapes
    assert all(path.stat().st_size > 10_000 for path in files.values())


def test_timm_knows_the_published_shapes():
    with torch.device("meta"):
        encoder = export.build("deit_small", img_size=32)
    options = {"name": "deit_small", **export.sizes_in(encoder.state_dict(), "deit_small")}
    expected = {
        "model_name": "vit_small_patch16_224",
        "num_classes": 0,
        "patch_size": 16,
        "img_size": 32,
        "in_chans": 3,
    }
    assert export.timm_options(encoder, options) == expected
