"""What makes each precision: the tool, its method, and whether it is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gate.chatter import Chatter
from gate.errors import LoweringError
from gate.spec import LoweringSpec

INSTALL = 'pip install "trt-gate[lower]"'
"""The command that installs the tools."""

PERCENTILE = 99.999
"""Of the absolute values, where the spec does not say."""

_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
_DISTRIBUTION = {"autocast": "nvidia-modelopt", "modelopt": "nvidia-modelopt", "onnxruntime": "onnxruntime"}
_METHODS = {"onnxruntime": ("minmax", "entropy", "percentile"), "modelopt": ("entropy", "max")}
"""The methods of each tool for int8, its default first."""


@dataclass(frozen=True)
class Tool:
    """What makes a precision.

    Args:
        name: `copy`, `none`, `autocast`, `onnxruntime` or `modelopt`.
        method: How an activation's range is found; empty where nothing is calibrated.
        distribution: Its name on the package index; empty for `copy` and `none`.
    """

    name: str
    method: str = ""
    distribution: str = ""

    @property
    def version(self) -> str:
        """Of the distribution; empty for `copy` and `none`.

        Raises:
            LoweringError: It is not installed; the hint is the command that installs it.
        """
        if not self.distribution:
            return ""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError as err:
            raise LoweringError(f"{self.name} needs {self.distribution}, which is not installed", hint=INSTALL) from err


@contextmanager
def importing(maker: str, precision: str) -> Iterator[None]:
    """A tool that is not there, as a LoweringError with the command that installs it."""
    try:
        yield
    except ImportError as err:
        raise LoweringError(
            f"{precision} is made by {maker}, which is not installed ({err})",
            hint=INSTALL,
        ) from err


@contextmanager
def making(maker: str, precision: str, chatter: Chatter, *, lines: int = 3) -> Iterator[None]:
    """Whatever a tool raises, as a LoweringError with the last lines that it said."""
    try:
        yield
    except Exception as err:
        told = " · ".join(chatter.tail(lines))
        raise LoweringError(
            f"{maker} cannot make {precision}: {type(err).__name__}: {err}{f' ({told})' if told else ''}"
        ) from err


def tool_for(precision: str, lowering: LoweringSpec) -> Tool:
    """The tool and method that make a precision, defaults resolved.

    Raises:
        LoweringError: There is none, or it has no such method.
    """
    if precision not in _PRECISIONS:
        raise LoweringError(f"no tool makes {precision!r}; there is {', '.join(_PRECISIONS)}")
    if precision in ("fp32", "tf32"):
        return Tool("copy")
    if precision in ("fp16", "bf16"):
        return Tool("autocast", distribution=_DISTRIBUTION["autocast"])
    if lowering.tool == "none":
        return Tool("none")
    name = lowering.tool or ("modelopt" if precision == "fp8" else "onnxruntime")
    methods = ("max",) if precision == "fp8" else _METHODS[name]
    method = lowering.method or methods[0]
    if (precision == "fp8" and name != "modelopt") or method not in methods:
        raise LoweringError(
            f"{name} does not make {precision} by method {method!r}",
            hint='fp8 is made by tool = "modelopt" with method "max".'
            if precision == "fp8"
            else f"It has {', '.join(methods)}.",
        )
    return Tool(name, method, _DISTRIBUTION[name])


def tool_version(precision: str, lowering: LoweringSpec | None = None) -> str:
    """The tool that makes a precision, with its version, for a cache's key; `copy` where the graph is taken as it is.

    Raises:
        LoweringError: It is not installed; the hint is the command that installs it.
    """
    tool = tool_for(precision, lowering or LoweringSpec())
    return f"{tool.distribution} {tool.version}" if tool.distribution else "copy"
