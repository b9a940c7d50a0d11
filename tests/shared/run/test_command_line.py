import errno

import pytest

from shared.run.command_line import file_error, plain_exit


@pytest.mark.parametrize("words", [["--output_dir", "{}"], ["--output_dir={}"]])
def test_an_error_of_the_system_names_the_flag_and_the_file(tmp_path, monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["main.py", "--seed", "3", *(word.format(tmp_path) for word in words)])
    file = tmp_path / "runs" / "attempt.json"
    inside = OSError(errno.EACCES, "Permission denied", str(file))
    assert file_error(inside) == f"--output_dir {tmp_path}: Permission denied: {file}"
    assert file_error(OSError(errno.ENOENT, "No such file", "/elsewhere")) == "No such file: /elsewhere"
    assert file_error(OSError(errno.EBADF, "Bad file descriptor", 7)) == "[Errno 9] Bad file descriptor: 7"
    assert file_error(OSError("a sentence of ours")) == "a sentence of ours"


def test_a_folder_that_is_a_file_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["main.py", "--output_dir", str(tmp_path / "file")])
    said = []
    with pytest.raises(SystemExit), plain_exit(said.append):
        (tmp_path / "file").mkdir()
    assert said == [f"--output_dir {tmp_path}/file: File exists: {tmp_path}/file"]
