"""Every script understands its published commands, and ends with one line for a mistake of its user."""

import importlib

import pytest

from dino.flags import choose_network
from tests.command_lines import assert_values_arrive, error_of

NOWHERE = "/no/such/place"
RANDOM = ("--arch", "vit_tiny", "--patch_size", "16", "--pretrained_weights", "random", "--device", "cpu")
COMMANDS = {
    "main_dino": ("--device", "cpu", "--data_path", NOWHERE),
    "eval_knn": (*RANDOM, "--data_path", NOWHERE),
    "eval_linear": (*RANDOM, "--data_path", NOWHERE),
    "eval_image_retrieval": (*RANDOM, "--data_path", NOWHERE),
    "eval_copy_detection": (*RANDOM, "--data_path", NOWHERE),
    "eval_video_segmentation": (*RANDOM, "--data_path", NOWHERE),
    "visualize_attention": (*RANDOM, "--image_path", NOWHERE),
    "video_generation": (*RANDOM, "--input_path", NOWHERE),
    "export": ("--pretrained_weights", NOWHERE),
}
NETWORK = "--pretrained_weights w.pth --checkpoint_key teacher --arch vit_small --patch_size 8 "
PROCESSES = "--num_workers 4 --dist_url env:// --local_rank 1 "
EVALUATIONS = {  # a published command, and the official defaults
    "eval_knn": (
        f"{NETWORK} {PROCESSES} --data_path /imagenet --batch_size_per_gpu 64 --nb_knn 10 20 --temperature 0.1 "
        "--use_cuda False --dump_features f --load_features g",
        "--data_path x --nb_knn 10 20 100 200 --temperature 0.07 --batch_size_per_gpu 128 --checkpoint_key teacher",
    ),
    "eval_linear": (
        f"{NETWORK} {PROCESSES} --n_last_blocks 1 --avgpool_patchtokens true --epochs 100 --lr 0.001 --evaluate "
        "--batch_size_per_gpu 128 --data_path /imagenet --val_freq 1 --output_dir out --num_labels 1000",
        "--data_path x --n_last_blocks 4 --avgpool_patchtokens false --lr 0.001 --epochs 100 --batch_size_per_gpu 128 "
        "--num_labels 1000",
    ),
    "eval_copy_detection": (
        f"{NETWORK} {PROCESSES} --data_path /copydays --whitening_path /whitening --distractors_path /distractors "
        "--imsize 320 --batch_size_per_gpu 16 --use_cuda true",
        "--data_path x --imsize 320 --batch_size_per_gpu 16",
    ),
    "eval_image_retrieval": (
        f"{NETWORK} {PROCESSES} --imsize 512 --multiscale 1 --data_path /data --dataset rparis6k --use_cuda true",
        "--data_path x --imsize 224 --multiscale 0 --dataset roxford5k",
    ),
    "eval_video_segmentation": (
        f"{NETWORK} --data_path /davis --output_dir out --n_last_frames 7 --size_mask_neighborhood 12 --topk 5 --bs 6",
        "--data_path x --n_last_frames 7 --size_mask_neighborhood 12 --topk 5",
    ),
}
TRUTHS = ("--multiscale", "--use_cuda", "--avgpool_patchtokens")  # words that become truth values


@pytest.mark.parametrize("script", EVALUATIONS)
def test_published_command_lines_parse_and_defaults_are_the_official_ones(script):
    parser = importlib.import_module(f"dino.{script}").get_args_parser()
    published, defaults = (line.split() for line in EVALUATIONS[script])
    assert_values_arrive(parser, published, parser.parse_args(published), TRUTHS)
    assert parser.parse_args(defaults) == parser.parse_args(["--data_path", "x"])


@pytest.mark.parametrize(
    ("script", "arch", "patch_size"), [("eval_knn", "vit_small", 16), ("eval_copy_detection", "vit_base", 8)]
)
def test_networks_that_no_flag_and_no_checkpoint_names(script, arch, patch_size):
    args = importlib.import_module(f"dino.{script}").get_args_parser().parse_args(["--data_path", "x"])
    choose_network(args)
    assert (args.arch, args.patch_size, getattr(args, "image_size", 224)) == (arch, patch_size, 224)


@pytest.mark.parametrize("script", COMMANDS)
def test_a_path_that_does_not_exist_is_one_line(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed = error_of(importlib.import_module(f"dino.{script}").main, *COMMANDS[script])
    assert printed.startswith("error: ") and printed.count("\n") == 1 and NOWHERE in printed
