"The fingerprint of a user's code: whatever decides what runs changes it, and nothing else does."
import functools
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from fedmpqkd.core.usercode import code_of, import_file, is_users

HEAD = """
import functools, math, torch
from torch import nn
"""
FACTORY = "def made(classes):\n class Net(nn.Module):\n  def forward(self, x): return h(x)\n return Net()"
WRAP = "def d(f):\n @functools.wraps(f)\n def g(x): return f(x)\n return g\n@d\n"
# what is registered is called `made`; the two texts differ in one thing
PAIRS = dict(
    body=("def made(x): return x + 1", "def made(x): return x - 1"),
    constant=("def made(x): return x * 16", "def made(x): return x * 32"),
    default=("def made(x, width=8): return width", "def made(x, width=64): return width"),
    keyword_default=("def made(x, *, width=8): return width", "def made(x, *, width=64): return width"),
    closure=("def outer(w): return lambda x: x * w\nmade = outer(2)",
             "def outer(w): return lambda x: x * w\nmade = outer(3)"),
    helper=("def h(x): return x\ndef made(x): return h(x)", "def h(x): return -x\ndef made(x): return h(x)"),
    helper_of_a_helper=("def g(x): return x\ndef h(x): return g(x)\ndef made(x): return h(x)",
                        "def g(x): return -x\ndef h(x): return g(x)\ndef made(x): return h(x)"),
    helper_within_a_factory=(
        f"def h(x): return x\n{FACTORY}", f"def h(x): return -x\n{FACTORY}"),
    helper_in_a_comprehension=("def h(x): return x\ndef made(xs): return [h(x) for x in xs]",
                               "def h(x): return -x\ndef made(xs): return [h(x) for x in xs]"),
    global_number=("WIDTH = 8\ndef made(x): return WIDTH", "WIDTH = 64\ndef made(x): return WIDTH"),
    global_list=("W = [8, 8]\ndef made(x): return W", "W = [8, 16]\ndef made(x): return W"),
    numpy_number=("import numpy\nW = numpy.int64(8)\ndef made(x): return W",
                  "import numpy\nW = numpy.int64(9)\ndef made(x): return W"),
    kind_of_number=("W = torch.float16\ndef made(x): return W", "W = torch.bfloat16\ndef made(x): return W"),
    library_function=("f = torch.relu\ndef made(x): return f(x)", "f = torch.tanh\ndef made(x): return f(x)"),
    the_order_of_the_same=("def f(): 1\ndef g(): 2\nmade = functools.partial(max, f, g, f)",
                           "def f(): 1\ndef g(): 2\nmade = functools.partial(max, f, g, g)"),
    method=("class made(nn.Module):\n def forward(self, x): return x",
            "class made(nn.Module):\n def forward(self, x): return -x"),
    property=("class made:\n @property\n def width(self): return 8",
              "class made:\n @property\n def width(self): return 9"),
    static=("class made:\n @staticmethod\n def width(): return 8",
            "class made:\n @staticmethod\n def width(): return 9"),
    attribute=("class made(nn.Module):\n width = 8", "class made(nn.Module):\n width = 64"),
    base=("class A(nn.Module):\n width = 8\nclass made(A): pass",
          "class A(nn.Module):\n width = 64\nclass made(A): pass"),
    which_base=("class A: pass\nclass B: pass\nclass made(A): pass",
                "class A: pass\nclass B: pass\nclass made(B): pass"),
    partial=("made = functools.partial(nn.Linear, 2, out_features=3)",
             "made = functools.partial(nn.Linear, 2, out_features=4)"),
    partial_of_mine=("def f(x): return x\nmade = functools.partial(f, 1)",
                     "def f(x): return -x\nmade = functools.partial(f, 1)"),
    cached=("@functools.cache\ndef made(x): return x", "@functools.cache\ndef made(x): return -x"),
    decorated=(f"{WRAP}def made(x): return x", f"{WRAP}def made(x): return -x"),
    bound_method=("class B:\n def __init__(s, w): s.w = w\n def go(s): return s.w\nmade = B(8).go",
                  "class B:\n def __init__(s, w): s.w = w\n def go(s): return s.w\nmade = B(64).go"),
    callable_object=("class B:\n def __init__(s, w): s.w = w\n def __call__(s): return s.w\nmade = B(8)",
                     "class B:\n def __init__(s, w): s.w = w\n def __call__(s): return s.w\nmade = B(64)"),
    slots=("class B:\n __slots__ = ('w',)\n def __init__(s, w): s.w = w\nmade = B(8)",
           "class B:\n __slots__ = ('w',)\n def __init__(s, w): s.w = w\nmade = B(9)"),
)


def made(text: str, name: str = "usercode_written"):
    "What a file with this text registers."
    space = dict(__name__=name)
    exec(HEAD + text, space)
    return space["made"]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_other_code_has_another_fingerprint(pair):
    one, other = (code_of(made(text)) for text in pair)
    assert one and other and one != other
    assert [code_of(made(text)) for text in pair] == [one, other]  # again, from the start


def test_a_namespace_without_a_name_is_the_users():
    functions = []
    for text in ("def made(x): return x", "def made(x): return -x"):
        exec(text, space := {})
        functions.append(space["made"])
    assert "" != code_of(functions[0]) != code_of(functions[1]) != ""


def test_what_changes_nothing_changes_no_fingerprint():
    text = "import math\ndef made(x): return math.sin(x)"
    assert code_of(made(text)) == code_of(made("\n\n# a comment\n" + text))  # moved down by some lines
    other = "loss = 1\nclass made:\n def f(self): return self.loss"  # a variable that only shares a name
    assert code_of(made(other)) == code_of(made(other.replace("loss = 1", "loss = 2")))


def test_a_function_that_calls_itself_ends():
    assert code_of(made("def made(n): return n and made(n - 1)"))
    assert code_of(made("def made(n): return other(n)\ndef other(n): return made(n)"))


def test_a_function_whose_closure_is_not_yet_full():
    "An inner function that is looked at before the name it needs has a value."
    def outer():
        def inner(): return later()
        early = code_of(inner)
        def later(): return 1
        return early, code_of(inner)
    early, full = outer()
    assert early and full and early != full


def network(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.BatchNorm1d(width))


CHANGES = dict(
    weight=lambda m: m[0].weight.data.view(-1)[3].add_(1e-3),
    buffer=lambda m: m[2].running_mean[1].add_(1),
    frozen=lambda m: m[0].weight.requires_grad_(False),
    mode=lambda m: m[2].eval(),
    attribute=lambda m: setattr(m, "depth", 3),
    inner_attribute=lambda m: setattr(m[2], "momentum", 0.5),
    hook=lambda m: m[1].register_forward_hook(lambda module, x, y: y * 2),
    layer=lambda m: m.append(nn.Dropout(0.1)),
    another_layer=lambda m: m.__setitem__(1, nn.Tanh()),
)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_network_is_its_weights_and_all_else_it_holds(change):
    same, other = network(), network()
    assert code_of(same) == code_of(network()) != ""
    change(other)
    assert code_of(other) != code_of(same)


def test_a_network_that_a_function_closes_over():
    def register(net): return lambda classes: net
    one, same, other = (code_of(register(network(seed=s))) for s in (0, 0, 1))
    assert one == same != other


def test_many_networks_in_one_closure_are_all_looked_at():
    """What is made while the code is walked and thrown away again must not make a later thing look like one
    that was met before: the last of fifty small networks differs."""
    def register(nets): return lambda classes: nets
    marks = set()
    for last in (0, 1, 2):
        nets = [network(seed=7) for _ in range(49)]
        marks.add(code_of(register([*nets, network(seed=last)])))
    assert len(marks) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3)])
def test_tensors_of_every_kind(dtype, shape):
    def register(t): return lambda: t
    one = code_of(register(torch.zeros(shape, dtype=dtype)))
    assert one == code_of(register(torch.zeros(shape, dtype=dtype)))
    if 0 not in shape: assert one != code_of(register(torch.ones(shape, dtype=dtype)))


def test_layers_without_weights_yet_and_arrays_of_objects():
    assert code_of(nn.Sequential(nn.LazyLinear(3))) == code_of(nn.Sequential(nn.LazyLinear(3)))
    def register(words): return functools.partial(print, np.array(words, dtype=object))
    assert code_of(register(["a", "b"])) == code_of(register(["a", "b"])) != code_of(register(["a", "c"]))


def test_code_of_packages_has_none():
    from fedmpqkd.models.vision import build_model
    theirs = (nn.Linear, torch.relu, functools.reduce, build_model, RuntimeError)
    assert [code_of(f) for f in theirs] == [""] * len(theirs)
    modules = ("torch", "json", "fedmpqkd.core.config", "fedmpqkd.not.loaded", "os.path", None)
    assert [is_users(m) for m in modules] == [False] * len(modules)
    assert is_users("__main__") and is_users("a_cell_of_somebody")


PROGRAM = """
import sys
from pathlib import Path
from torch import nn
from fedmpqkd.core.usercode import code_of, import_file
print(import_file(Path(sys.argv[1])), code_of(sys.modules['fedmpqkd_plugin_lab'].made))
"""
LAB = """
from torch import nn
from blocks.middle import block
KINDS = {'a', 'b', 'c', 'd'}
def made(classes): return block(classes) if classes in {'x', 'y', 'z'} else KINDS
"""


def lab(folder: Path, width: int = 8, deep: int = 1) -> Path:
    "A plug-in, a package beside it, a module beside that."
    (folder / "blocks").mkdir(exist_ok=True)
    (folder / "blocks" / "__init__.py").write_text("")
    (folder / "blocks" / "middle.py").write_text(
        "import deep\nfrom torch import nn\n"
        f"def block(classes): return nn.Linear({width}, deep.number(classes))\n")
    (folder / "deep.py").write_text(f"def number(x): return x + {deep}\n")
    (folder / "idle.py").write_text("raise SystemExit('nobody imports this file')\n")
    (folder / "lab.py").write_text(LAB)
    return folder / "lab.py"


def test_every_process_finds_the_same_fingerprints(tmp_path):
    "Whatever its seed of hashing, wherever the folder is."
    lines = []
    for seed, name in ((0, "a"), (1, "a"), (2, "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        env = os.environ | dict(PYTHONHASHSEED=str(seed), PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(lab(tmp_path / name))], env=env,
                              capture_output=True, text=True, check=True)
        lines.append(done.stdout.split())
    assert lines[0] == lines[1] == lines[2] and all(len(word) == 12 for word in lines[0])


def test_what_a_plug_in_pulls_in_belongs_to_it(tmp_path):
    """Edited within the same second, to the same size: a file of the package beside it, a file that only
    that one imports. Python's own byte code cannot tell them apart."""
    seen = {}
    for width, deep in ((8, 1), (9, 1), (8, 2), (8, 1)):
        path = lab(tmp_path, width, deep)
        for file in tmp_path.rglob("*.py"): os.utime(file, (1e9, 1e9))
        mark = import_file(path)
        function = sys.modules["fedmpqkd_plugin_lab"].made
        net = sys.modules["blocks.middle"].block(3)
        assert (net.in_features, net.out_features) == (width, 3 + deep)
        marks = mark, code_of(function)
        assert seen.setdefault((width, deep), marks) == marks
    assert [len(set(column)) for column in zip(*seen.values(), strict=True)] == [3, 3]
    assert not list(tmp_path.rglob("*.pyc"))


def test_stale_byte_code_beside_a_plug_in_is_not_believed(tmp_path):
    "Left there by an ordinary import."
    path = lab(tmp_path)
    os.utime(tmp_path / "deep.py", (1e9, 1e9))
    py_compile.compile(str(tmp_path / "deep.py"), doraise=True)
    assert list(tmp_path.rglob("deep*.pyc"))
    (tmp_path / "deep.py").write_text("def number(x): return x + 7\n")
    os.utime(tmp_path / "deep.py", (1e9, 1e9))
    import_file(path)
    assert sys.modules["deep"].number(0) == 7


def test_two_folders_may_use_the_same_names(tmp_path):
    marks = []
    for name, deep in (("a", 1), ("b", 2), ("a", 1)):
        (tmp_path / name).mkdir(exist_ok=True)
        marks.append(import_file(lab(tmp_path / name, deep=deep)))
        assert sys.modules["blocks.middle"].block(3).out_features == 3 + deep
    assert marks[0] == marks[2] != marks[1]


def test_a_plug_in_leaves_the_search_path_as_it_was(tmp_path):
    before = list(sys.path), list(sys.meta_path)
    import_file(lab(tmp_path))
    (tmp_path / "lab.py").write_text("raise KeyError('in the plug-in')")
    with pytest.raises(KeyError, match="in the plug-in"): import_file(tmp_path / "lab.py")
    with pytest.raises(FileNotFoundError, match="plugins: there is no"): import_file(tmp_path / "gone.py")
    assert (sys.path, sys.meta_path) == before


def test_a_module_of_the_users_counts_with_all_it_imports(tmp_path):
    "A notebook imports a module; what that one takes from a third is changed, and both are loaded again."
    program = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
from pathlib import Path
from fedmpqkd.core.usercode import code_of
import second
def made(x): return second.helper(x)
marks = [code_of(made)]
for text in ('def third(x): return -x', 'def third(x): return x'):
    (Path(sys.argv[1]) / 'third.py').write_text(text)
    importlib.reload(sys.modules['third'])
    importlib.reload(second)
    marks.append(code_of(made))
print(*marks)
"""
    (tmp_path / "second.py").write_text("from third import third\ndef helper(x): return third(x)")
    (tmp_path / "third.py").write_text("def third(x): return x")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True,
                          check=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    first, changed, back = done.stdout.split()
    assert first == back != changed
