"""`module:function` of a spec: found beside it first, and kept apart from that of another spec."""

import sys

import pytest
import torch

from gate.errors import DataError, RunError, SpecError
from gate.factory import failure_of, load_callable, local_sources, state_digest

WHERE = "[model] factory"


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _path_is_left_as_it_was():
    before = list(sys.path)
    yield
    assert sys.path == before


def test_function_is_found_beside_the_spec(tmp_path):
    write(tmp_path, "model.py", "def load():\n    return 7\n")
    assert load_callable("model:load", tmp_path, where=WHERE)() == 7


def test_function_is_found_in_a_package_beside_the_spec(tmp_path):
    write(tmp_path / "pkg", "__init__.py", "")
    write(tmp_path / "pkg", "model.py", "def load():\n    return 8\n")
    assert load_callable("pkg.model:load", tmp_path, where=WHERE)() == 8


def test_function_is_found_in_the_environment(tmp_path):
    assert load_callable("math:floor", tmp_path, where=WHERE)(1.5) == 1


def test_two_specs_may_each_have_a_module_of_one_name(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, "names.py", f"NAME = {name!r}\n")
        write(tmp_path / name, "data.py", "from names import NAME\ndef load():\n    return NAME\n")
    first = load_callable("data:load", tmp_path / "a", where=WHERE)
    second = load_callable("data:load", tmp_path / "b", where=WHERE)
    assert (first(), second(), first()) == ("a", "b", "a")


def test_imports_inside_a_function_find_the_folder_of_their_own_spec(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, "late.py", f"NAME = {name!r}\n")
        write(tmp_path / name, "data.py", "def load():\n    import late\n    return late.NAME\n")
    first = load_callable("data:load", tmp_path / "a", where=WHERE)
    second = load_callable("data:load", tmp_path / "b", where=WHERE)
    assert (first(), second(), first()) == ("a", "b", "a")


def test_module_beside_the_spec_hides_a_loaded_one_only_while_it_is_used(tmp_path):
    import json

    write(tmp_path, "json.py", "def load():\n    return 'mine'\n")
    assert load_callable("json:load", tmp_path, where=WHERE)() == "mine"
    assert sys.modules["json"] is json


def test_module_that_imports_its_neighbour_by_name_gets_one_copy_of_it(tmp_path):
    write(tmp_path, "model.py", "class Net: pass\ndef load():\n    return Net()\n")
    write(tmp_path, "data.py", "from model import Net\ndef net():\n    return Net\n")
    made = load_callable("model:load", tmp_path, where=WHERE)()
    assert isinstance(made, load_callable("data:net", tmp_path, where=WHERE)())


def test_signature_is_that_of_the_users_function(tmp_path):
    import inspect

    write(tmp_path, "data.py", "def load(seed):\n    return seed\n")
    assert list(inspect.signature(load_callable("data:load", tmp_path, where=WHERE)).parameters) == ["seed"]


def test_missing_module_names_the_nearest(tmp_path):
    write(tmp_path, "model.py", "")
    with pytest.raises(SpecError, match=r"no module 'modle'.*did you mean 'model'\?"):
        load_callable("modle:load", tmp_path, where=WHERE)


def test_missing_function_names_the_nearest(tmp_path):
    write(tmp_path, "model.py", "def load(): pass\n")
    with pytest.raises(SpecError, match=r"no function 'laod'; did you mean 'load'\?"):
        load_callable("model:laod", tmp_path, where=WHERE)


def test_what_cannot_be_called_is_an_error(tmp_path):
    write(tmp_path, "model.py", "load = 3\n")
    with pytest.raises(SpecError, match="is a int, not a function"):
        load_callable("model:load", tmp_path, where=WHERE)


@pytest.mark.parametrize("name", ["model", ":load", "model:", ""])
def test_malformed_name_is_an_error(tmp_path, name):
    with pytest.raises(SpecError, match="expected 'module:function'"):
        load_callable(name, tmp_path, where=WHERE)


def test_exception_at_import_shows_the_users_own_line(tmp_path):
    write(tmp_path, "model.py", "\n\nweights = {}['w']\n")
    with pytest.raises(DataError, match=r"(?s)importing 'model' failed with KeyError.*model.py.*line 3") as caught:
        load_callable("model:load", tmp_path, where=WHERE, error=DataError)
    assert "importlib" not in str(caught.value)


def test_module_missing_inside_the_users_module_is_told_as_theirs(tmp_path):
    write(tmp_path, "model.py", "import nothing_of_that_name\n")
    with pytest.raises(SpecError, match=r"importing 'model' failed with ModuleNotFoundError.*nothing_of_that_name"):
        load_callable("model:load", tmp_path, where=WHERE)


def test_module_that_failed_is_tried_again_when_it_is_mended(tmp_path):
    write(tmp_path, "model.py", "raise ValueError\n")
    with pytest.raises(SpecError, match="ValueError"):
        load_callable("model:load", tmp_path, where=WHERE)
    write(tmp_path, "model.py", "def load():\n    return 'mended'\n")
    assert load_callable("model:load", tmp_path, where=WHERE)() == "mended"


def test_failure_ends_with_the_last_lines_of_the_traceback():
    try:
        raise ValueError("no weights")
    except ValueError as err:
        error = failure_of(err, where="here", error=RunError, doing="loading")
    assert isinstance(error, RunError)
    assert str(error).splitlines()[0] == "here: loading failed with ValueError: no weights"
    assert str(error).splitlines()[-1] == "  | ValueError: no weights"


def test_local_sources_are_the_users_files_and_no_others(tmp_path):
    write(tmp_path, "layers.py", "import torch\nclass Net(torch.nn.Module): pass\n")
    write(tmp_path, "model.py", "import layers\ndef load():\n    return layers.Net()\n")
    made = load_callable("model:load", tmp_path, where=WHERE)()
    found = local_sources("model:load", tmp_path, made)
    assert found == (tmp_path / "layers.py", tmp_path / "model.py")


def test_state_digest_changes_with_a_value_a_name_a_dtype_and_a_shape():
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    one = state_digest(net())
    assert state_digest(net()) == one
    changed = net()
    with torch.no_grad():
        changed[0].weight[0, 0] += 1e-7
    buffer = net()
    buffer[1].running_mean += 1
    flat = net()
    flat[0].weight = torch.nn.Parameter(flat[0].weight.reshape(3, 2))
    renamed = torch.nn.Sequential(*net(), torch.nn.Identity())
    renamed.register_buffer("more", torch.zeros(0), persistent=False)
    digests = {one, *map(state_digest, (changed, buffer, net().half(), net().to(torch.bfloat16), flat, renamed))}
    assert len(digests) == 7
