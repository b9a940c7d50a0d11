import errno
import json
from pathlib import Path

import pytest

from shared.run import attempt
from shared.run.attempt import Attempt, Superseded, owner_of


def test_the_last_attempt_to_claim_a_folder_owns_it(tmp_path):
    first, second = Attempt("7", 0), Attempt("7", 1)
    first.claim(tmp_path)
    first.check(tmp_path)
    second.claim(tmp_path)
    second.check(tmp_path)
    with pytest.raises(SystemExit, match=r"attempt 0 of job 7 .* attempt 1 of job 7") as refusal:
        first.check(tmp_path)
    assert isinstance(refusal.value, Superseded)
    assert owner_of(tmp_path) == second


def test_a_zombie_that_starts_late_cannot_claim_the_folder_back(tmp_path):
    Attempt("7", 2).claim(tmp_path)
    with pytest.raises(Superseded):
        Attempt("7", 1).claim(tmp_path)
    assert owner_of(tmp_path) == Attempt("7", 2)


def test_a_new_job_takes_the_folder_of_an_older_one_over(tmp_path):
    old, new = Attempt("7", 3), Attempt("8", 0)
    old.claim(tmp_path)
    new.claim(tmp_path)
    with pytest.raises(Superseded, match="job 8"):
        old.check(tmp_path)


def test_an_attempt_may_claim_its_folder_twice(tmp_path):
    for _ in range(2):
        Attempt("7", 1).claim(tmp_path)
    Attempt("7", 1).check(tmp_path)


def test_an_unclaimed_folder_is_free(tmp_path):
    Attempt("7", 0).check(tmp_path)
    (tmp_path / "attempt.json").write_text("")  # what a power cut can leave
    Attempt("7", 0).check(tmp_path)
    Attempt("7", 0).claim(tmp_path)
    assert json.loads((tmp_path / "attempt.json").read_text()) == {"job": "7", "number": 0}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_owner(tmp_path, monkeypatch):
    Attempt("7", 0).claim(tmp_path)

    def no_space(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/attempt.json'"):
        Attempt("8", 0).claim(tmp_path)
    assert owner_of(tmp_path) == Attempt("7", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["attempt.json"]


def test_a_job_of_the_launcher_is_known_by_slurms_variables(monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)  # absent in the first attempt
    assert Attempt.current() == Attempt("12", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert Attempt.current() == Attempt("12", 3)


@pytest.mark.parametrize("place", ["an interactive job", "containers with the same names"])
def test_any_other_run_has_a_name_of_its_own(monkeypatch, place):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    monkeypatch.setattr("os.getpid", lambda: 1)
    if place == "an interactive job":
        monkeypatch.setenv("SLURM_JOB_ID", "12")
    first = Attempt.current()
    assert first == Attempt.current()
    attempt._digits_of_this_process.cache_clear()  # as in another process
    assert first != Attempt.current() and first.number == Attempt.current().number == 0


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "3"])
def test_another_attempt_json_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "attempt.json").write_text(text)
    with pytest.raises(ValueError, match=r"attempt\.json is of no run"):
        owner_of(tmp_path)
