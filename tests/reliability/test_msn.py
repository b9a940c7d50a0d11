"""SIGKILL at any instant of MSN: both encoders, prototypes and masks come back bit for bit, on one rank and on two."""

from shared.run.checkpoint import load_latest
from tests.msn.runs import CHECKPOINT, TINY_VIT
from tests.reliability.runs import Run, Script, assert_same_run, kill_at_random_instants, log_lines, start_ranks


def shrink_networks() -> None:
    from msn import vision_transformer

    vision_transformer.ARCHITECTURES["deit_tiny"] = TINY_VIT


MSN = Script(
    "msn.main",
    tuple(
        "--model_name deit_tiny --patch_size 8 --rand_size 32 --focal_size 16 --focal_views 2 --patch_drop 0.5 "
        "--drop_path_rate 0.2 --num_proto 16 --hidden_dim 16 --output_dim 8 --batch_size 4 --warmup 0 --epochs 2 "
        "--num_workers 0 --log_freq 2 --eval_knn_freq 0 --pictures off --device cpu --checkpoint_freq 1 "
        "--saveckp_steps 1".split()
    ),
    shrink_networks,
)


def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, "--data_path", images, script=MSN).assert_ends()
    for folder in kill_at_random_instants(tmp_path, 20, "--data_path", images, script=MSN):
        assert_same_run(folder, uninterrupted)
        assert [line["step"] for line in log_lines(folder)] == [2, 4, 6, 8, 10, 12]


def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(images, tmp_path):
    flags = ("--data_path", images, "--batch_size", 2)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=MSN):
        rank.assert_ends()
    for step in (2, 4, 8):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=MSN)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=MSN):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    state = load_latest(tmp_path / "run" / CHECKPOINT)
    assert state["world_size"] == 2 and all(name.startswith("module.") for name in state["encoder"])
