"""The layers of docs/architecture.md, held by reading the imports of every module, those inside functions too."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gate"

# From the bottom up. `name.*` is a folder whose files may import each other.
LAYERS = {
    "errors": ("errors",),
    "words": (
        "data.image_spec",
        "latency.bounds",
        "latency.config",
        "latency.measurement",
        "latency.ratio",
        "manifest",
        "postprocess.config",
        "release.policy",
        "release.statements",
        "spec",
        "statistics",
        "targets",
        "tensors",
        "toml_errors",
        "verdict",
        "wording",
    ),
    "results": ("engines.interface", "metadata", "results"),
    "judges": (
        "calibration",
        "compare",
        "diagnosis",
        "latency.*",
        "metamorphic",
        "metrics.*",
        "postprocess.*",
        "precision",
        "rebuilds",
        "release.*",
        "tolerances",
    ),
    "ground": (
        "atomic",
        "author",
        "cache",
        "chatter",
        "device",
        "engines.graph",
        "factory",
        "memory",
        "processes",
        "timing",
        "utc",
    ),
    "effects": (
        "baseline",
        "compare_on_device",
        "data.*",
        "doctor",
        "engines.*",
        "export",
        "ledger",
        "lower.*",
        "probe",
        "reference",
        "sessions.*",
        "signing",
        "store",
        "trust",
        "verification",
    ),
    "steps": ("steps.*",),
    "pipeline": ("loading", "pipeline", "promotion", "schemas"),
    "edges": ("cli.*", "pytest_benchmark_table", "pytest_plugin", "report.*"),
    "entry": ("__main__",),
}
CORE = ("errors", "words", "results", "judges")

# Within one layer imports go nowhere, but for these: importer -> what it may import.
SIDEWAYS = {
    "latency.bounds": {"statistics", "verdict"},
    "latency.ratio": {"statistics", "verdict"},
    "release.policy": {"manifest", "release.statements", "toml_errors"},
    "release.statements": {"manifest"},
    "spec": {"data.image_spec", "latency.config", "postprocess.config", "toml_errors"},
    "statistics": {"verdict"},
    "wording": {"verdict"},
    "metadata": {"engines.interface", "results"},
    "results": {"engines.interface"},
    "cache": {"atomic"},
    "export": {"engines"},
    "reference": {"data", "engines"},
    "doctor": {"probe"},
    "probe": {"engines"},
    "sessions": {"engines", "reference"},
    "ledger": {"signing", "trust"},
    "store": {"baseline"},
    "trust": {"baseline", "signing"},
    "verification": {"engines", "signing", "store", "trust"},
    "cli": {"report"},
    "pytest_plugin": {"pytest_benchmark_table", "report"},
}

FRAMEWORKS = (
    "PIL",
    "cryptography",
    "cuda",
    "datasets",
    "faster_coco_eval",
    "jsonschema",
    "matplotlib",
    "modelopt",
    "motmetrics",
    "onnx",
    "onnx_graphsurgeon",
    "onnxruntime",
    "onnxscript",
    "onnxslim",
    "pandas",
    "polygraphy",
    "pycocotools",
    "pynvml",
    "rich",
    "scipy",
    "securesystemslib",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
)
VAGUE = ("base", "common", "core", "helper", "helpers", "manager", "misc", "shared", "types", "util", "utils")


@cache
def _modules() -> dict[str, ast.Module]:
    """The syntax tree of each module by its dotted name below `gate`; `""` is the package's face itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


NAMES = sorted(name for name in _modules() if name)


def _layer(name):
    """The layer of a module, counted from the bottom."""
    for level, members in enumerate(LAYERS.values()):
        if name in members:
            return level
    for level, members in enumerate(LAYERS.values()):
        if any(member.endswith(".*") and (name + ".").startswith(member[:-1]) for member in members):
            return level
    raise AssertionError(f"gate.{name} has no layer; give it one in LAYERS and in docs/architecture.md")


def _part(name):
    """The name under which SIDEWAYS lists a module: its own where LAYERS has it, or its folder's."""
    return name if any(name in members for members in LAYERS.values()) else name.split(".")[0]


def _imported(tree):
    """Each module of the gate that a tree imports, with its line; `""` for a name of the package's face."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gate":
                    yield alias.name.removeprefix("gate").lstrip("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if (node.module or "").split(".")[0] == "gate":
                base = node.module.removeprefix("gate").lstrip(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    if inner in _modules():
                        yield inner, node.lineno
                    elif base or alias.name != "__version__":
                        yield base, node.lineno
        elif isinstance(node, ast.Call):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    name = argument.value.removeprefix("gate.")
                    if name != argument.value and name in _modules():
                        yield name, node.lineno


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    for other, line in _imported(_modules()[name]):
        where = f"gate/{name.replace('.', '/')}.py:{line}"
        assert other, f"{where} imports from the package's face: import from the module that has it"
        assert other in _modules(), f"{where} imports gate.{other}, which does not exist"
        mine, its = _layer(name), _layer(other)
        if mine == its:
            folders = {name.split(".")[0], other.split(".")[0]}
            same_folder = len(folders) == 1 and ("." in name or "." in other)
            allowed = same_folder or _part(other) in SIDEWAYS.get(_part(name), set())
            assert allowed, f"{where} imports gate.{other} sideways; move what both need down, or list it in SIDEWAYS"
        else:
            layers = list(LAYERS)
            assert mine > its, f"{where} ({layers[mine]}) imports gate.{other} ({layers[its]}) upward"


def test_modules_do_not_import_in_a_circle():
    graph = {name: {other for other, _ in _imported(_modules()[name])} - {name} for name in NAMES}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


def test_every_exception_is_used():
    used = {(_part(name), _part(other)) for name in NAMES for other, _ in _imported(_modules()[name]) if other}
    unused = {(name, other) for name, others in SIDEWAYS.items() for other in others} - used
    assert not unused, f"SIDEWAYS lists what nobody needs: {sorted(unused)}"


@pytest.mark.parametrize("name", NAMES)
def test_module_has_a_name_that_says_something(name):
    assert not set(name.split(".")) & set(VAGUE)


@pytest.mark.parametrize("name", sorted(_modules()))
def test_frameworks_are_imported_inside_functions(name):
    for node in _modules()[name].body:
        top = [node] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        for each in top:
            roots = [alias.name for alias in each.names] if isinstance(each, ast.Import) else [each.module or ""]
            heavy = {root.split(".")[0] for root in roots} & set(FRAMEWORKS)
            assert not heavy, f"gate.{name}:{each.lineno} imports {heavy} when it is imported"


@pytest.mark.parametrize("name", sorted(_modules()))
def test_package_neither_asserts_nor_unpickles(name):
    for node in ast.walk(_modules()[name]):
        assert not isinstance(node, ast.Assert), f"gate.{name}:{node.lineno}: raise an error instead of asserting"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, f"gate.{name}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"gate.{name}:{node.lineno}"
            assert node.value.value is False, f"gate.{name}:{node.lineno}"


def test_layers_name_only_modules_that_exist():
    for member in (member for members in LAYERS.values() for member in members):
        assert member.removesuffix(".*") in _modules(), f"LAYERS lists gate.{member}, which does not exist"


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_gate_loads_no_framework_and_nothing_of_its_own():
    code = "import sys; before = set(sys.modules); import gate; print(*sorted(set(sys.modules) - before))"
    loaded = _run(code).split()
    assert not {name.split(".")[0] for name in loaded} & {*FRAMEWORKS, "numpy", "msgspec"}
    assert [name for name in loaded if name.startswith("gate.")] == []


BLOCK = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FRAMEWORKS!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_every_module_imports_without_the_frameworks():
    names = [f"gate.{name}" for name in NAMES if name != "__main__"]
    _run(BLOCK + f"for name in {names!r}:\n    importlib.import_module(name)\n")


def test_the_core_loads_nothing_above_it():
    levels = {list(LAYERS).index(layer) for layer in CORE}
    core = [f"gate.{name}" for name in NAMES if _layer(name) in levels]
    code = BLOCK + f"for name in {core!r}:\n    importlib.import_module(name)\nprint(*sorted(sys.modules))\n"
    loaded = [name.removeprefix("gate.") for name in _run(code).split() if name.startswith("gate.")]
    folders = {name.split(".")[0] for name in NAMES if "." in name}
    assert [name for name in loaded if name not in folders and _layer(name) not in levels] == []


def test_layers_are_those_of_the_documentation():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| *([a-z]*) *\| *((?:`[^`]+`(?:, )?)+) *\|", text, re.MULTILINE)
    documented, layer = {}, None
    for first, names in rows:
        layer = first or layer
        found = (name.rstrip("/").replace("/", ".") for name in re.findall(r"`([^`]+)`", names))
        documented.setdefault(layer, set()).update(found)
    assert documented == {layer: {name.removesuffix(".*") for name in names} for layer, names in LAYERS.items()}
