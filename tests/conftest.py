"""One thread per process: the tests' processes share the cores already, and threads that wait for others cost more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; child processes take it over

import pytest


def pytest_addoption(parser):
    parser.addoption("--reverse", action="store_true", help="run the tests in reverse order: none may need another one")
    parser.addoption("--pretended_gpu", action="store_true", help="scripts compute on that of tests/pretended_gpu")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--reverse"):
        items.reverse()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not item.config.getoption("pretended_gpu"):
        return (yield)
    from tests.pretended_gpu.device import scripts_on_pretended_gpu

    with scripts_on_pretended_gpu():  # its fixtures, too
        return (yield)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("pretended_gpu"):
        from tests.pretended_gpu import device

        terminalreporter.write_line(f"{device.chosen} scripts on the pretended GPU")


@pytest.fixture
def on_a_cpu(request):
    """For bits of this process that another one, which pretends nothing, has to give."""
    if request.config.getoption("pretended_gpu"):
        pytest.skip("another process is on the CPU")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of small noise images in three classes."""
    from tests.reliability.runs import write_images

    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from tests.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def no_network(monkeypatch):
    """A connection is an error."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: (figures.append(figure), save(figure, *args)))
    return figures


@pytest.fixture
def submitted(monkeypatch):
    """Functions and arguments of the jobs that would have been submitted."""
    calls = []
    monkeypatch.setattr("shared.launch.slurm.submit", lambda function, args: calls.append((function, args)))
    return calls


@pytest.fixture(scope="session")
def places(images, tmp_path_factory):
    """What stands for ``{images}``, ``{tokens}`` and ``{encoder}`` in flags that lead to data."""
    from tests.contriever.tiny import make_data

    text = make_data(tmp_path_factory.mktemp("text"))
    return {"images": images, "tokens": text / "tokens", "encoder": text / "encoder"}
