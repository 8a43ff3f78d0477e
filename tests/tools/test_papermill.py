"""The experiment command as a person types it (a terminal), and as scripts run it (pipes, files)."""
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import BIN
from hypothesis import given
from hypothesis import strategies as st
from papermill.cli import papermill as papermill_command

from fedmpqkd.tools.papermill_plugin import safe_name, with_output

PAPERMILL = str(BIN / "papermill")
ALPHA = "alpha: float = 0.5  # weight of the KD term"


def write_notebook(path: Path, parameters: str, body: str) -> Path:
    "A notebook of two cells, the first tagged `parameters`."
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb.cells = [tagged, nbformat.v4.new_code_cell(body)]
    nbformat.write(nb, path)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    "A notebook that prints its two parameters."
    parameters = ALPHA + "\nseed: int = 0  # random seed"
    return write_notebook(tmp_path / "tiny.ipynb", parameters, "print(f'{alpha=} {seed=}')")


def printed(path: Path) -> str:
    "What the last cell of an executed notebook printed."
    return json.loads(path.read_text())["cells"][-1]["outputs"][0]["text"][0]


def injected(path: Path) -> str:
    "The cell that papermill wrote."
    cells = json.loads(path.read_text())["cells"]
    return next("".join(c["source"]) for c in cells if "injected-parameters" in c["metadata"].get("tags", []))


def on_terminal(args: list[str], cwd: Path) -> tuple[int, str]:
    "Run a command on a pseudo-terminal; return its exit code and what it printed."
    master, slave = pty.openpty()
    process = subprocess.Popen(args, cwd=cwd, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    out = b""
    while True:
        try: chunk = os.read(master, 65536)
        except OSError: break  # Linux reports the end of a pseudo-terminal as an error
        if not chunk: break
        out += chunk
    os.close(master)
    return process.wait(), out.decode(errors="replace")


def in_pipes(args: list[str], cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    "Run a command with its output in pipes, and nothing at its input unless said otherwise."
    if "input" not in kwargs: kwargs["stdin"] = subprocess.DEVNULL
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=120, **kwargs)


def test_no_output_path_on_a_terminal(tiny: Path):
    code, out = on_terminal([PAPERMILL, "tiny.ipynb"], tiny.parent)
    assert code == 0, out
    assert printed(tiny.parent / "runs/tiny.ipynb") == "alpha=0.5 seed=0\n"
    assert "runs/tiny.ipynb" in out  # the person is told where it went


def test_no_output_path_in_a_pipe(tiny: Path):
    p = in_pipes([PAPERMILL, "tiny.ipynb", "-p", "alpha", "1.0", "-r", "seed", "2"], tiny.parent)
    assert p.returncode == 0, p.stderr
    said = "alpha=1.0 seed='2'\nnotebook in runs/tiny_alpha=1.0_seed=2.ipynb\n"
    assert p.stdout == said  # no JSON in the pipe
    assert printed(tiny.parent / "runs/tiny_alpha=1.0_seed=2.ipynb") == "alpha=1.0 seed='2'\n"


def test_as_a_module(tiny: Path):
    words = "-m papermill tiny.ipynb -p seed 3 --prepare-only".split()
    p = in_pipes([sys.executable, *words], tiny.parent)
    assert p.returncode == 0, p.stderr
    assert "seed = 3" in injected(tiny.parent / "runs/tiny_seed=3.ipynb")


def test_named_output_is_respected(tiny: Path):
    p = in_pipes([PAPERMILL, "tiny.ipynb", "mine.ipynb", "--prepare-only"], tiny.parent)
    assert p.returncode == 0, p.stderr
    assert (tiny.parent / "mine.ipynb").exists() and not (tiny.parent / "runs").exists()


def test_redirection_into_a_file_gives_words_and_the_notebook_goes_to_runs(tiny: Path):
    log = tiny.parent / "log"
    with log.open("w") as f:
        p = subprocess.run([PAPERMILL, "tiny.ipynb", "-p", "alpha", "2"], cwd=tiny.parent,
                           stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.PIPE, text=True)
    assert p.returncode == 0, p.stderr
    assert printed(tiny.parent / "runs/tiny_alpha=2.ipynb") == "alpha=2 seed=0\n"
    assert log.read_text() == "alpha=2 seed=0\nnotebook in runs/tiny_alpha=2.ipynb\n"
    assert "Warning" not in p.stderr and "TCP" not in p.stderr  # nothing that nobody can act on


def test_a_dash_gives_the_notebook(tiny: Path):
    p = in_pipes([PAPERMILL, "tiny.ipynb", "-"], tiny.parent)
    assert json.loads(p.stdout)["cells"][-1]["outputs"][0]["text"] == ["alpha=0.5 seed=0\n"], p.stderr
    assert not (tiny.parent / "runs").exists()


SHOWS = """
from IPython.display import Markdown, display
line = display(Markdown("starting"), display_id=True, metadata={"fedmpqkd": {"done": 0, "total": 2}})
for i in (1, 2): line.update(Markdown(f"round {i}"), metadata={"fedmpqkd": {"done": i, "total": 2}})
display(Markdown("| a | table |"))
"""


def test_the_terminal_hears_rounds_and_tables(tmp_path: Path):
    write_notebook(tmp_path / "speaks.ipynb", ALPHA, SHOWS)
    p = in_pipes([PAPERMILL, "speaks.ipynb"], tmp_path)
    assert p.stdout == "round 1\nround 2\n\n| a | table |\nnotebook in runs/speaks.ipynb\n", p.stderr


@pytest.mark.parametrize("body, said", [
    ("raise ValueError('preset=7: allowed are auto')", "Error: preset=7: allowed are auto"),
    ("1 / 0", "ZeroDivisionError")])
def test_a_failed_run_says_why_and_leaves_the_copy_before_it(tmp_path: Path, body: str, said: str):
    "An earlier copy of the same name stays; without one there is none."
    write_notebook(tmp_path / "breaks.ipynb", ALPHA, body)
    p = in_pipes([PAPERMILL, "breaks.ipynb"], tmp_path)
    assert p.returncode == 1 and said in p.stderr and list(tmp_path.glob("runs/*")) == []
    assert ("Traceback" in p.stderr) == ("ZeroDivision" in said)
    (tmp_path / "runs/breaks.ipynb").write_text("of yesterday")
    in_pipes([PAPERMILL, "breaks.ipynb"], tmp_path)
    assert (tmp_path / "runs/breaks.ipynb").read_text() == "of yesterday"


@pytest.mark.parametrize("content", ["nothing", "another notebook"])
@pytest.mark.parametrize("redirected", [False, True], ids=["pipe", "file"])
def test_a_pipe_at_the_input_never_overwrites_the_notebook(tiny: Path, content: str, redirected: bool):
    "Without the plug-in papermill runs what comes through the pipe and writes it over `tiny.ipynb`."
    other = write_notebook(tiny.parent / "other.ipynb", ALPHA, "raise SystemExit('the wrong notebook ran')")
    before = tiny.read_bytes()
    command = f'"{PAPERMILL}" tiny.ipynb -p alpha 1.0 --prepare-only' + (" > out.json" if redirected else "")
    sent = "" if content == "nothing" else other.read_text()
    p = in_pipes(["bash", "-c", command], tiny.parent, input=sent)
    assert p.returncode == 0, p.stderr
    assert tiny.read_bytes() == before
    out = tiny.parent / "runs/tiny_alpha=1.0.ipynb"
    assert "alpha = 1.0" in injected(out) and "wrong" not in out.read_text()


def test_a_notebook_through_a_pipe_still_works(tiny: Path):
    p = in_pipes([PAPERMILL, "new.ipynb", "--prepare-only"], tiny.parent, input=tiny.read_text())
    assert p.returncode == 0, p.stderr
    cells = json.loads((tiny.parent / "new.ipynb").read_text())["cells"]
    assert cells[1]["source"] == ["print(f'{alpha=} {seed=}')"]


def test_a_misspelt_parameter_is_refused(tiny: Path):
    code, out = on_terminal([PAPERMILL, "tiny.ipynb", "-p", "alhpa", "1.0"], tiny.parent)
    out = " ".join(out.split())
    assert code == 1
    assert "unknown parameter alhpa (did you mean alpha?); the notebook declares: alpha, seed" in out
    assert "Traceback" not in out
    assert list(tiny.parent.glob("runs/*")) == []  # nothing was run and nothing was written


@pytest.mark.parametrize("parameters", [
    "fields: str = 'lr=1,rounds=2'  # more\nseed: int = 0", "fields = \"a=b\"\nseed = 0",
    "# two\nfields: str = ''\nseed: dict = {'a': 'b=c'}"])
def test_a_default_may_contain_an_equals_sign(tmp_path: Path, parameters: str):
    write_notebook(tmp_path / "tiny.ipynb", parameters, "print(fields, seed)")
    words = ["tiny.ipynb", "-p", "fields", "x=1,y=2", "-p", "seed", "7"]
    p = in_pipes([PAPERMILL, *words], tmp_path)
    assert p.returncode == 0, p.stderr
    assert printed(tmp_path / "runs/tiny_fields=x=1,y=2_seed=7.ipynb") == "x=1,y=2 7\n"
    p = in_pipes([PAPERMILL, "tiny.ipynb", "-p", "sed", "7"], tmp_path)
    assert p.returncode == 1 and "did you mean seed?" in " ".join(p.stderr.split())


def test_within_the_repository_copies_go_to_its_top_folder(tiny: Path):
    (tiny.parent / "settings.ini").write_text("[DEFAULT]\nlib_name = fedmpqkd\n")
    pages = tiny.parent / "nbs" / "study"
    pages.mkdir(parents=True)
    tiny.rename(pages / "tiny.ipynb")
    p = in_pipes([PAPERMILL, "tiny.ipynb", "--prepare-only"], pages)
    assert p.returncode == 0, p.stderr
    assert (tiny.parent / "runs/tiny.ipynb").exists() and not (pages / "runs").exists()


def test_a_missing_notebook_is_named(tmp_path: Path):
    p = in_pipes([PAPERMILL, "nbs/exp99.ipynb"], tmp_path)
    assert p.returncode == 1 and "exp99.ipynb" in p.stderr


def test_a_program_that_imports_papermill_sees_no_change(tmp_path: Path):
    script = tmp_path / "prog.py"
    script.write_text(
        "import sys, papermill, papermill.engines as e\n"
        "stock = e.papermill_engines.get_engine(None) is e.NBClientEngine\n"
        "print(sys.argv[1:], stock, 'torch' in sys.modules)")
    p = in_pipes([sys.executable, str(script), "x.ipynb"], tmp_path)
    assert p.stdout == "['x.ipynb'] True False\n", p.stderr
    assert not (tmp_path / "runs").exists()


WORD = st.text("abz09./_=, ", min_size=1, max_size=12).filter(lambda s: s.strip())
FLAG, NUMBER = st.sampled_from(["-p", "--parameters", "-r"]), st.floats(allow_nan=False).map(str)
PAIR = st.tuples(FLAG, WORD, WORD | NUMBER)
OPTION = PAIR | st.sampled_from(
    [("-k", "python3"), ("--log-output",), ("--cwd", "nbs"), ("--engine=x",), ("-y", "{a: 1}")])


@given(st.lists(OPTION, max_size=5), st.integers(0, 5))
def test_papermill_reads_the_completed_command_as_meant(options: list[tuple], place: int):
    "papermill's own parser is the witness: notebook and options stay, an output path appears."
    def read(argv: list[str]) -> dict: return papermill_command.make_context("papermill", argv[1:]).params
    words = [w for option in [*options[:place], ("nbs/exp2.ipynb",), *options[place:]] for w in option]
    before = read([*"papermill".split(), *words, "given.ipynb"])
    after = read(with_output(["papermill", *words]))
    output = after.pop("output_path")
    assert output.startswith("runs/exp2") and output.count("/") == 1
    assert after == {k: v for k, v in before.items() if k != "output_path"}


@given(st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_file_names_are_safe_and_distinct(texts: list[str]):
    names = [safe_name(t) for t in texts]
    assert all(re.fullmatch(r"[A-Za-z0-9_.,=+~-]{0,157}", n) for n in names)
    assert names[0] != names[1]
