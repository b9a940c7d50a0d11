"""Jobs: every flag of every program is accepted with its default, lists of configurations become several jobs."""

import argparse

import pytest
import yaml

from paws import main as programs
from paws import main_distributed
from tests.paws.tiny import ROOT, TINY, losses, write_noise


@pytest.fixture
def submitted(monkeypatch):
    """The arguments that would have been submitted."""
    calls = []
    monkeypatch.setattr(main_distributed.slurm, "submit", lambda train, args: calls.append((train, args)))
    return calls


@pytest.mark.parametrize("program", ["paws_train", "suncet_train", "fine_tune", "snn_fine_tune"])
def test_every_flag_is_accepted_with_its_default(submitted, program):
    flags = ["--sel", program, "--data_path", "images"]
    flags += ["--pretrained", "x"] if "fine_tune" in program else []
    main_distributed.main([*flags, "--nodes", "4"])
    train, args = submitted[0]
    assert train is programs.program_function(program) and train.__module__ == f"paws.{program}"
    assert vars(programs.parse_args(flags)).items() <= vars(args).items()
    assert (args.nodes, args.job_name) == (4, program)
    assert not hasattr(args, "sel") and not hasattr(args, "batch_launch")


def test_a_list_of_configurations_becomes_as_many_jobs(submitted, tmp_path):
    files = [str(ROOT / "paws/configs/paws" / name) for name in ("imgnt_train.yaml", "cifar10_train.yaml")]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(files))
    main_distributed.main(["--fname", str(tmp_path / "list.yaml"), "--batch-launch", "--data_path", "x"])
    assert [(args.epochs, args.data_path) for _, args in submitted] == [(100, "x"), (600, "x")]
    (tmp_path / "list.yaml").write_text("epochs: 3\n")
    with pytest.raises(SystemExit) as end:
        main_distributed.main(["--fname", str(tmp_path / "list.yaml"), "--batch-launch"])
    assert end.value.code == 2


def test_the_official_command_line_is_understood(submitted):
    words = "--sel paws_train --fname FILE --folder logs --partition gpu --nodes 8 --tasks-per-node 8 --time 1000"
    file = str(ROOT / "paws/configs/paws/imgnt_train.yaml")
    main_distributed.main([*words.replace("FILE", file).split(), "--data_path", "x", "--output_dir", "run"])
    ((_, args),) = submitted
    assert (args.job_dir, args.output_dir, args.partition, args.nodes, args.ngpus, args.timeout) == (
        "logs", "run", "gpu", 8, 8, 1000,
    )  # fmt: skip


def test_debug_trains_in_this_process(tmp_path):
    flags = [*TINY, "--labels_per_class", "2", "--data_path", str(write_noise(tmp_path / "images"))]
    main_distributed.main([*flags, "--cluster", "debug", "--output_dir", str(tmp_path / "%j")])
    assert len(losses(tmp_path / "debug")) == 3


def test_parsers_are_made_for_the_program_that_is_chosen():
    assert isinstance(main_distributed.get_args_parser("suncet_train"), argparse.ArgumentParser)
    assert programs.selected(["--sel", "suncet_train", "--epochs", "3"]) == "suncet_train"
    assert programs.selected([]) == "paws_train"
