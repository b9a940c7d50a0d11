import json
from types import SimpleNamespace

from shared.run.summary import command, end_of_run

VAL = SimpleNamespace(source=SimpleNamespace(describe=lambda: "val: 10 images", classes=[*"abc"]))


def write_log(folder, *lines) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_summary_names_what_was_learned_the_problems_the_files_and_the_commands(tmp_path):
    write_log(
        tmp_path,
        {"step": 0, "epoch": 0, "knn_top1": 30.0},
        {"step": 10, "epoch": 0, "loss": None},  # every step was left out
        {"step": 20, "epoch": 0, "loss": 6.2},
        {"step": 30, "epoch": 0, "loss": 5.1},
        {"step": 30, "epoch": 1, "knn_top1": 42.5},
    )
    knn = SimpleNamespace(disabled_reason=None, val=VAL)
    weights, picture = tmp_path / "checkpoint.pth", tmp_path / "views.png"
    text = end_of_run(tmp_path, weights, knn, [picture], ["python next.py"], ["as much"], ["step 30: COLLAPSE"])
    assert text.splitlines() == [
        "Learned   loss 6.200 at step 20, loss 5.100 at step 30",
        "          as much",
        "          k-NN on val: 10 images: 30.0 % after 0 steps, 42.5 % after 30 steps (chance 33.3 %)",
        "Problems  step 30: COLLAPSE",
        f"Files     {weights} (the same command resumes from it)",
        f"          {tmp_path / 'metrics.jsonl'} (every few steps), {tmp_path / 'log.txt'} (every epoch)",
        f"Pictures  {picture}",
        "Next      python next.py",
    ]


def test_a_run_without_labels_or_finite_steps(tmp_path):
    write_log(tmp_path, {"step": 10, "epoch": 0, "loss": None})
    knn = SimpleNamespace(disabled_reason="the images have no classes")
    text = end_of_run(tmp_path, tmp_path / "checkpoint.pth", knn, [], [])
    assert "no k-NN evaluation: the images have no classes" in text
    assert "Problems" not in text and "Pictures" not in text


def test_commands_can_be_pasted_and_leave_out_flags_without_a_value():
    assert command("a.py", arch="vit", image_size=None, data_path="/my images") == (
        "python a.py --arch vit --data_path '/my images'"
    )
