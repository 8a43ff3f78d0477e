"Whatever an old plug-in says is still understood."
import importlib
import subprocess
import sys
import warnings

import pytest

import fedmpqkd
from fedmpqkd._names import MOVED

OLD = [
    ("experiments", "run_experiment"), ("experiments", "load_plugins"), ("models", "register_model"),
    ("models", "fold_batchnorm"), ("bits", "RULES"), ("data", "from_tensors"), ("data", "register_dataset"),
    ("methods", "register_method"), ("core", "RunConfig"), ("core", "rng"), ("claims", "caption"),
    ("claims", "reading"), ("evidence", "table"), ("wire", "decode"), ("client", "local_round"),
    ("metrics", "paired_test")]


@pytest.mark.parametrize("module, name", OLD)
def test_old_names_are_found_where_they_are_now(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(importlib.import_module(f"fedmpqkd.{module}"), name)
    if hasattr(found, "__module__"): assert found.__module__.count(".") == 2


def test_every_stand_in_stands_for_something():
    for new in MOVED.values():
        for name in new:
            if name != "tools.papermill_plugin": importlib.import_module(f"fedmpqkd.{name}")


def test_a_name_that_never_was_is_an_ordinary_error():
    with pytest.raises(ModuleNotFoundError): importlib.import_module("fedmpqkd.cellar")
    with pytest.raises(ImportError): exec("from fedmpqkd.data import cellar")
    with pytest.raises(AttributeError): fedmpqkd.cellar  # noqa: B018


def test_the_package_itself_imports_nothing_heavy():
    program = "import sys, fedmpqkd; print([m for m in ('torch', 'numpy', 'papermill') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
