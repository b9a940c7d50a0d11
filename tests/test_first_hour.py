"""The first hour of a new user, from an empty folder, by the commands of the README: each takes ten minutes at most."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from shared.images.materials import draw_materials
from shared.run.log import read_log

ROOT = Path(__file__).resolve().parents[1]
CORES, MOST_S = 2, 600
OWN = "--data_path /path/to/images"


def command(words: str) -> str:
    """The line of the README's shell blocks, or the command within its text, that holds these words."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return min((line for line in lines if words in line), key=len)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The repository's files beside 200 pictures without classes, and a home without anything."""
    folder = tmp_path_factory.mktemp("hour")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for file in filter(None, files):
        (folder / "project" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / "project" / file)
    (folder / "project/.venv").symlink_to(sys.prefix)
    (folder / "images").mkdir()
    for i, pixels in enumerate(draw_materials(200, size_px=96, seed=5).pixels):  # in noise there is nothing to learn
        Image.fromarray(pixels).save(folder / f"images/{i}.jpg")
    return folder / "project"


def start(line: str, project: Path) -> subprocess.Popen:
    line = line.replace("/path/to/images", str(project.parent / "images")).replace("python ", f"{sys.executable} ")
    home = {name: str(project.parent / "home") for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        f"exec {line}" if "&&" not in line else line.replace("&& ", "&& exec "),
        shell=True,
        cwd=project,
        env=os.environ | home,
        **pipes,
    )


def processor_s(pid: int) -> float:
    """Seconds that a living process has computed."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run(line: str, project: Path, most_s: float = MOST_S) -> str:
    """What a command prints that takes no more than its share of two cores, whoever else is at work on them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(line, project)
    printed = process.communicate()[0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, printed
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CORES * most_s, line
    return printed


@pytest.mark.slow
def test_the_demonstration_learns_and_ends_with_its_page(project):
    assert command("make demo") == "make demo"
    printed = run("make -o .venv/installed demo", project, most_s=240)
    lines = read_log(project / "dino/runs/materials/metrics.jsonl")
    knn = [line["knn_top1"] for line in lines if "knn_top1" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert knn[-1] >= knn[0] + 15 and knn[-1] >= 80 and losses[-1] < 0.7 * losses[0]
    assert "learned" in printed and printed.split()[-1] == str(project / "dino/runs/materials/report.html")
    assert Path(printed.split()[-1]).stat().st_size < 8e6


@pytest.mark.slow
def test_200_pictures_without_small_data_are_told_what_it_takes_and_can_be_looked_at(project):
    process, printed, reached = start(command(f"--arch vit_small {OWN}"), project), "", {}
    deadline = threading.Timer(3 * MOST_S, process.kill)
    deadline.start()
    for line in process.stdout:
        printed += line
        for words in ("steps in all", "try --small_data"):
            if words in line:
                reached[words] = processor_s(process.pid)
        if "try --small_data" in reached:  # after the first step
            process.send_signal(signal.SIGINT)
            break
    printed += process.stdout.read()
    deadline.cancel()
    assert reached.keys() == {"steps in all", "try --small_data"}, printed
    assert reached["steps in all"] < 10 and reached["try --small_data"] < MOST_S * CORES, reached
    assert process.wait() == 128 + signal.SIGINT, printed
    assert (
        "3 steps per epoch" in printed and "momentum_teacher 0.996: after 300 steps the teacher still keeps" in printed
    )
    page = run(command("report_page RUN").replace("RUN", "dino/run"), project).strip()
    assert "0 of 100 epochs, not finished" in (project / page).read_text()


@pytest.mark.slow
def test_200_pictures_with_small_data_have_measures_and_a_page(project):
    printed = run(command(f"{OWN} --small_data"), project)
    found = re.search(r"found again .*: (\S+) \+- (\S+) % with random weights, .* (\S+) \+- \S+ % after", printed)
    before, margin, after = map(float, found.groups())
    assert after > before + margin and "(chance 0.5 %): learned" in printed
    page = project / "dino/runs/mine/report.html"
    assert printed.split()[-1] == str(page)
    page.unlink()
    assert project / run(command("report_page RUN").replace("RUN", "dino/runs/mine"), project).strip() == page


def test_idle_threads_are_told_to_sleep_before_torch_is_loaded():
    """In every script but those that submit jobs and those that do without torch."""
    without = {"run_with_submitit", "main_distributed", "compare_queries", "convertmrtydi2beir", "preprocess_xmkqa"}
    without |= {"evaluate_retrieved_passages", "materials"}
    files = [
        file
        for folder in ("shared", *(hub.parent.name for hub in ROOT.glob("*/hub.py")))
        for file in (ROOT / folder).rglob("*.py")
        if file.stem not in without
    ]
    scripts = {file: text for file in files if '\nif __name__ == "__main__":' in (text := file.read_text())}
    assert {ROOT / "dino/main_dino.py", ROOT / "shared/evaluation/extract_features.py"} < scripts.keys()
    for file, text in scripts.items():
        asleep, torch = text.find("import shared.run.passive_threads"), re.search(r"^(import|from) torch\b", text, re.M)
        assert 0 < asleep < (torch.start() if torch else len(text)), file.relative_to(ROOT)
