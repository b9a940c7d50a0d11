"""SIGKILL at any instant of PAWS: the run goes on with the very supports that it would have had, bit for bit."""

import pytest

from tests.reliability.runs import Run, Script, assert_same_run, kill_at_random_instants, log_lines, start_ranks

FLAGS = (
    "--dataset digits --image_size 12 --small_image_size 8 --multicrop 1 --model_name wide_resnet10w1 --output_dim 16 "
    "--use_pred_head true --unsupervised_batch_size 4 --supervised_imgs_per_class 2 --labels_per_class 4 --lr 0.5 "
    "--start_lr 0.1 --final_lr 0.01 --warmup 0 --epochs 2 --device cpu --num_workers 0 --log_freq 2 "
    "--eval_knn_freq 0 --pictures off --checkpoint_freq 1 --saveckp_steps 1"
).split()
PAWS = Script("paws.paws_train", tuple(FLAGS))


@pytest.mark.parametrize("kills", [3, 20])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, "--data_path", images, script=PAWS).assert_ends()
    for folder in kill_at_random_instants(tmp_path, kills, "--data_path", images, script=PAWS):
        assert_same_run(folder, uninterrupted)
        assert [line["step"] for line in log_lines(folder)] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("flags", [(), ("--unique_classes_per_rank", "true", "--classes_per_batch", 1)], ids=str)
def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(flags, images, tmp_path):
    flags = ("--data_path", images, "--unsupervised_batch_size", 2, *flags)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=PAWS):
        rank.assert_ends()
    for step in (2, 4, 8):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=PAWS)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=PAWS):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
