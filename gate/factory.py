"""Loading what a spec names as `module:function`, and finding out what it depends on."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gate.errors import GateError, SpecError

_OWN_FOLDER = Path(__file__).resolve().parent
_MODULES_OF: dict[Path, dict[str, ModuleType]] = {}
_TRACE_LINES = 6
_LISTENING: list[list[str]] = []
_hooked = False
_LOADED = "__gate_loaded__"


def load_callable(name: str, folder: Path, *, where: str, error: type[GateError] = SpecError) -> Callable[..., Any]:
    """The function that `module:function` names, from the spec's folder first, else from the environment.

    Modules of two folders do not clash, even if both have a `data.py`: each folder keeps its own, and they are
    in place while its functions are imported and called.

    Args:
        name: `module:function`; the module may be dotted.
        folder: The spec's folder; it comes first on the import path during import and calls.
        where: What to name in errors, such as `[model] factory = 'model:load'`.
        error: What an exception of the user's own code at import time becomes.

    Raises:
        SpecError: The name is malformed, there is no such module or function, or it cannot be called.
        GateError: `error`: the module exists and fails to import; the message ends with the last lines of its
            traceback.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise SpecError(f"expected 'module:function', got {name!r}", where=where)
    folder = folder.resolve()
    with _imports_from(folder):
        try:
            module = _load(module_name, folder)
        except _NoModule as err:
            raise SpecError(
                f"there is no module {err.name!r} in {folder} or in the environment"
                f"{_nearest(module_name, _modules_in(folder))}",
                where=where,
            ) from None
        except Exception as err:
            raise failure_of(err, where=where, error=error, doing=f"importing {module_name!r}") from err
    found = getattr(module, function_name, None)
    if found is None:
        callables = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise SpecError(
            f"module {module_name!r} has no function {function_name!r}{_nearest(function_name, callables)}",
            where=where,
        )
    if not callable(found):
        raise SpecError(f"{name!r} is a {type(found).__name__}, not a function", where=where)

    @functools.wraps(found)
    def call(*args: object, **kwargs: object) -> object:
        with _imports_from(folder):
            return found(*args, **kwargs)

    return call


def failure_of(err: BaseException, *, where: str, error: type[GateError], doing: str) -> GateError:
    """An exception of the user's code as an error of ours, with the last lines of its traceback in the message.

    Args:
        err: What was raised.
        where: As in GateError.
        error: The class to make.
        doing: What failed, such as `importing 'model'`.
    """
    lines = [
        line
        for chunk in traceback.format_exception(type(err), err, _user_part(err))
        for line in chunk.rstrip().splitlines()
    ]
    shown = "\n".join(f"  | {line}" for line in lines[-_TRACE_LINES:])
    return error(f"{doing} failed with {type(err).__name__}: {err}\n{shown}", where=where)


def local_sources(name: str, folder: Path, model: object, *, apart: Sequence[str] = ()) -> tuple[Path, ...]:
    """Files of the user's own code that a model depends on: not the standard library, not installed, not the gate.

    Found by following what the factory's module and the model's classes refer to, from module to module, and by
    every other module that was loaded from the spec's folder by now. So the answer does not depend on what else this
    process has loaded. A local module outside the folder that is only imported inside a function is not seen.

    Args:
        name: `module:function` of the factory.
        folder: The spec's folder.
        model: What the factory returned.
        apart: Modules of the folder that the model does not depend on unless it imports them: those of the data.
    """
    folder = folder.resolve()
    own = _MODULES_OF.get(folder, {})
    factory = name.partition(":")[0]
    stack: list[ModuleType] = [module for key, module in own.items() if key not in apart or key == factory]
    if factory not in own and factory in sys.modules:
        stack.append(sys.modules[factory])
    layers = model.modules() if callable(getattr(model, "modules", None)) else ()  # type: ignore[attr-defined]
    for layer in (model, *layers):
        stack.extend(each for cls in type(layer).__mro__ if (each := _module_of(cls, own)) is not None)
    found: set[Path] = set()
    while stack:
        module = stack.pop()
        path = _local_file(module)
        if path is None or path in found:
            continue
        found.add(path)
        for value in list(vars(module).values()):
            other = value if isinstance(value, ModuleType) else _module_of(value, own)
            if other is not None:
                stack.append(other)
    return tuple(sorted(found))


@contextlib.contextmanager
def opened_files() -> Iterator[list[Path]]:
    """Files that Python opens meanwhile, in order: not source code, not installed, not the system's."""
    global _hooked  # noqa: PLW0603 - an audit hook cannot be removed, so there is one for the process
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    names: list[str] = []
    found: list[Path] = []
    _LISTENING.append(names)
    try:
        yield found
    finally:
        _LISTENING.remove(names)
        apart = (*_installed_folders(), *map(Path, ("/proc", "/sys", "/dev")))
        for name in dict.fromkeys(names):
            path = Path(name).resolve()
            source = path.suffix in (".py", ".pyc")
            if not source and path.is_file() and not any(path.is_relative_to(each) for each in apart):
                found.append(path)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _LISTENING and isinstance(arguments[0], (str, os.PathLike)):
        name = str(Path.cwd() / os.fsdecode(arguments[0]))
        for each in _LISTENING:
            each.append(name)


def _module_of(value: object, own: Mapping[str, ModuleType]) -> ModuleType | None:
    """The module that defines a class or function, or an instance's class."""
    name = getattr(value, "__module__", None)
    if not isinstance(name, str):
        return None
    return own.get(name) or sys.modules.get(name)


def _local_file(module: ModuleType) -> Path | None:
    """The module's file if it is the user's own."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    return path if path.is_file() and not any(path.is_relative_to(each) for each in _installed_folders()) else None


def state_digest(module: Any) -> str:
    """SHA-256 of a `torch.nn.Module`'s parameters and buffers: names, dtypes, shapes and bytes, sorted by name."""
    import torch

    state: dict[str, Any] = dict(module.named_buffers())
    state.update(module.state_dict())
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            tensor = value.detach().to("cpu").contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            if tensor.numel():
                digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        else:
            digest.update(f"{name}\0{value!r}\0".encode())
    return digest.hexdigest()


class _NoModule(Exception):
    """The module itself is not there, as opposed to one that it imports."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


def _load(name: str, folder: Path) -> ModuleType:
    own = _MODULES_OF.setdefault(folder, {})
    if name in own:
        return own[name]
    top = name.partition(".")[0]
    if not (_file_of(top, folder)):
        return _from_environment(name)
    if "." in name:
        return _from_environment(name)
    path = _file_of(name, folder)
    if path is None:
        raise _NoModule(name)
    private = f"gate_spec_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}_{name}"
    is_package = path.name == "__init__.py"
    spec = importlib.util.spec_from_file_location(
        private, path, submodule_search_locations=[str(path.parent)] if is_package else None
    )
    if spec is None or spec.loader is None:
        raise _NoModule(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module
    own[name] = module
    previous = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del own[name], sys.modules[private]
        sys.modules.pop(name, None)
        if previous is not None:
            sys.modules[name] = previous
        raise
    return module


def _from_environment(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name is not None and (name == err.name or name.startswith(f"{err.name}.")):
            raise _NoModule(name) from err
        raise


@contextlib.contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Imports find the folder first; modules of the same names from elsewhere are set aside meanwhile."""
    own = _MODULES_OF.setdefault(folder, {})
    if any(_changed(module) for module in own.values()):
        for name, module in own.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        own.clear()
    tops = set(_modules_in(folder))
    aside: dict[str, ModuleType] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in tops and not _is_inside(module, folder):
            aside[name] = sys.modules.pop(name)
    for name, module in own.items():
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in tops and _is_inside(module, folder):
                own[name] = module
                vars(module).setdefault(_LOADED, _stamp(module))
        for name, module in aside.items():
            sys.modules[name] = module


def _stamp(module: ModuleType) -> tuple[int, int] | None:
    """Change time and size of a module's file."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not Path(file).exists():
        return None
    status = Path(file).stat()
    return status.st_mtime_ns, status.st_size


def _changed(module: ModuleType) -> bool:
    return vars(module).get(_LOADED) != _stamp(module)


def _is_inside(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return Path(file).resolve().is_relative_to(folder)
    places = [str(each) for each in getattr(module, "__path__", ())]
    return any(Path(place).resolve().is_relative_to(folder) for place in places)


def _file_of(name: str, folder: Path) -> Path | None:
    for path in (folder / name / "__init__.py", folder / f"{name}.py"):
        if path.is_file():
            return path
    return None


def _modules_in(folder: Path) -> list[str]:
    """Top-level names that can be imported from a folder by file."""
    if not folder.is_dir():
        return []
    names = {path.stem for path in folder.glob("*.py") if path.stem.isidentifier()}
    names |= {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(names)


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is {', '.join(valid[:8])}" if valid else ""


def _user_part(err: BaseException) -> Any:
    """The traceback without the frames of this module and of the import machinery."""
    trace = err.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen importlib"):
            return trace
        trace = trace.tb_next
    return err.__traceback__


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(_OWN_FOLDER)]
    return tuple(dict.fromkeys(Path(folder).resolve() for folder in folders))
