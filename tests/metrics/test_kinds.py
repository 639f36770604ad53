"""Kinds by name: those built in, those of other packages, and those that are not there."""

import subprocess
import sys

import pytest

from gate.errors import SpecError
from gate.metrics.interface import MetricKind
from gate.metrics.kinds import kind_named, names

BUILT_IN = (
    "detection",
    "instance_segmentation",
    "keypoints",
    "semantic_segmentation",
    "regression",
    "embedding",
    "tokens",
    "tracking",
)

PLUGIN = """
from gate.metrics.interface import MetricKind, MetricValue
from gate.metrics.regression import KIND as REGRESSION

KIND = MetricKind(name="depth", values={"delta1": MetricValue()}, make=REGRESSION.make, read=REGRESSION.read)
OTHER = MetricKind(name="other", values={"a": MetricValue()}, make=REGRESSION.make, read=REGRESSION.read)
EMPTY = MetricKind(name="depth", values={}, make=REGRESSION.make, read=REGRESSION.read)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a distribution with entry points."""

    def install(name, points, module="depth_metric", text=PLUGIN):
        (tmp_path / f"{module}.py").write_text(text)
        folder = tmp_path / f"{name}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "\n".join(f"{key} = {value}" for key, value in points.items())
        (folder / "entry_points.txt").write_text(f"[trt_gate.metrics]\n{lines}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    sys.modules.pop("depth_metric", None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_kind_has_its_name_and_says_what_it_measures(name):
    kind = kind_named(name)
    assert isinstance(kind, MetricKind)
    assert kind.name == name
    assert name in names()
    assert all(value.what.endswith(".") for value in kind.values.values())


def test_asking_for_one_kind_loads_no_other():
    code = """
import sys
from gate.metrics.kinds import kind_named, names
names()
assert not [each for each in sys.modules if each.startswith("gate.metrics.") and each[13:] not in ("kinds", "interface")]
kind_named("tracking")
assert "gate.metrics.regression" not in sys.modules
assert not {"motmetrics", "pandas", "scipy", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_told_the_nearest_and_all():
    with pytest.raises(
        SpecError, match=r"no kind of task 'regresion', did you mean 'regression'\? There is .*tracking"
    ):
        kind_named("regresion")
    with pytest.raises(SpecError, match=r"no kind of task 'zzz'\. There is classification, "):
        kind_named("zzz")


def test_entry_point_gives_a_kind(installed):
    installed("depth-pack", {"depth": "depth_metric:KIND"})
    assert kind_named("depth").name == "depth"
    assert names()[-1] == "depth"
    with pytest.raises(SpecError, match="did you mean 'depth'"):
        kind_named("dept")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module_here:KIND", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("depth_metric:KINDS", "cannot be loaded: AttributeError: .*KINDS"),
        ("depth_metric:REGRESSION.make", "is a function, expected a MetricKind"),
        ("depth_metric:OTHER", "gives a MetricKind named 'other'"),
        ("depth_metric:EMPTY", "measures no value"),
    ],
)
def test_broken_entry_point_is_named_with_its_distribution_and_cause(installed, value, message):
    installed("depth-pack", {"depth": value})
    with pytest.raises(SpecError, match=f"entry point depth = {value} of depth-pack 1.2 {message}"):
        kind_named("depth")
    assert "depth" in names()


def test_entry_point_whose_module_raises_is_named_with_the_cause(installed):
    installed("depth-pack", {"depth": "depth_metric:KIND"}, text="raise RuntimeError('no licence')")
    with pytest.raises(SpecError, match="of depth-pack 1.2 cannot be loaded: RuntimeError: no licence"):
        kind_named("depth")


def test_broken_entry_point_does_not_keep_from_other_kinds(installed):
    installed("depth-pack", {"depth": "no_such_module_here:KIND"})
    assert kind_named("regression").name == "regression"


@pytest.mark.parametrize("name", ["regression", "classification"])
def test_entry_point_may_not_replace_what_is_built_in(installed, name):
    installed("depth-pack", {name: "depth_metric:KIND"})
    with pytest.raises(SpecError, match=f"depth-pack 1.2 has an entry point .* '{name}', which is built in"):
        kind_named(name)
    assert names().count("regression") == 1
    assert "classification" not in names()


def test_two_distributions_with_one_name_are_refused(installed):
    installed("depth-pack", {"depth": "depth_metric:KIND"})
    installed("other-pack", {"depth": "depth_metric:OTHER"})
    with pytest.raises(SpecError, match="depth-pack 1.2 and other-pack 1.2 each have an entry point"):
        kind_named("depth")
