import importlib.metadata
import inspect

import pytest

import gate


def test_all_is_sorted_and_without_doubles():
    assert sorted(set(gate.__all__)) == gate.__all__


@pytest.mark.parametrize("name", gate.__all__)
def test_public_name_resolves_to_an_object_of_that_name(name):
    assert getattr(gate, name).__name__ == name


@pytest.mark.parametrize("name", gate.__all__)
def test_public_name_has_a_docstring_of_its_own(name):
    found = getattr(gate, name)
    doc = inspect.cleandoc(vars(found).get("__doc__") or "") if inspect.isclass(found) else inspect.getdoc(found)
    assert doc
    assert doc.splitlines()[0].endswith((".", ":", ";"))


@pytest.mark.parametrize("name", gate.__all__)
def test_public_object_says_where_it_lives(name):
    module = importlib.import_module(getattr(gate, name).__module__)
    assert getattr(module, name) is getattr(gate, name)


def test_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gate' has no attribute 'chekc'"):
        gate.__getattr__("chekc")


def test_dir_lists_the_public_names():
    assert set(gate.__all__) <= set(dir(gate))


def test_every_error_is_public():
    errors = importlib.import_module("gate.errors")
    names = {
        name
        for name, found in vars(errors).items()
        if inspect.isclass(found) and issubclass(found, errors.GateError) and found.__module__ == "gate.errors"
    }
    assert names <= set(gate.__all__)


def test_version_is_that_of_the_distribution():
    try:
        installed = importlib.metadata.version("trt-gate")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("trt-gate is not installed: `make test` installs it")
    assert installed == gate.__version__
