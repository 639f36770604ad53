"""Accuracy-regression and release gate for TensorRT deployments of PyTorch models.

Everything public is here by name and loaded when it is first asked for: `import gate` loads no framework, and no
part of the gate that is not used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gate.data.coco_results import read_results
    from gate.data.image_sources import read_images
    from gate.data.image_spec import ImagesSpec
    from gate.data.samples import Samples
    from gate.errors import (
        ApprovalsMissing,
        BackendUnavailable,
        BaselineError,
        BuildError,
        BundleError,
        DataError,
        DigestMismatch,
        ExitCode,
        ExportError,
        GateError,
        IdentityMismatch,
        IncompatibleEngine,
        LedgerError,
        LoweringError,
        MeasurementError,
        PromotionRefused,
        ReferenceMismatch,
        RunError,
        SignatureMismatch,
        SigningError,
        SpecError,
        StaleVerdict,
        VerificationError,
    )
    from gate.loading import LoadedEngine, load
    from gate.metrics.coco_results import results_from_detections
    from gate.pipeline import CheckOptions, check, seal_passed
    from gate.results import CheckRun, EngineResult
    from gate.spec import GateSpec, SpecFile, read_spec
    from gate.store import Release, SealedBundle, verify_seal
    from gate.targets import Categories, Detections, ImageRecord, ImageTarget, TrackedFrame
    from gate.trust import PolicyFile, read_policy
    from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Status, Verdict
    from gate.verification import VerifiedBundle, verify

__version__ = "0.1.0"

__all__ = [
    "ApprovalsMissing",
    "BackendUnavailable",
    "BaselineError",
    "BuildError",
    "BundleError",
    "Categories",
    "CheckOptions",
    "CheckRun",
    "DataError",
    "Detections",
    "DigestMismatch",
    "EngineResult",
    "Evidence",
    "ExitCode",
    "ExportError",
    "Failure",
    "Finding",
    "GateError",
    "GateSpec",
    "IdentityMismatch",
    "ImageRecord",
    "ImageTarget",
    "ImagesSpec",
    "IncompatibleEngine",
    "Interval",
    "LedgerError",
    "Limit",
    "LoadedEngine",
    "LoweringError",
    "MeasurementError",
    "PolicyFile",
    "PromotionRefused",
    "ReferenceMismatch",
    "Release",
    "RunError",
    "Samples",
    "SealedBundle",
    "SignatureMismatch",
    "SigningError",
    "SpecError",
    "SpecFile",
    "StaleVerdict",
    "Status",
    "TrackedFrame",
    "Verdict",
    "VerificationError",
    "VerifiedBundle",
    "check",
    "load",
    "read_images",
    "read_policy",
    "read_results",
    "read_spec",
    "results_from_detections",
    "seal_passed",
    "verify",
    "verify_seal",
]

_ELSEWHERE = {
    "CheckOptions": "gate.pipeline",
    "CheckRun": "gate.results",
    "EngineResult": "gate.results",
    "Evidence": "gate.verdict",
    "Failure": "gate.verdict",
    "Finding": "gate.verdict",
    "GateSpec": "gate.spec",
    "Interval": "gate.verdict",
    "Limit": "gate.verdict",
    "Categories": "gate.targets",
    "Detections": "gate.targets",
    "ImageRecord": "gate.targets",
    "ImageTarget": "gate.targets",
    "ImagesSpec": "gate.data.image_spec",
    "TrackedFrame": "gate.targets",
    "read_images": "gate.data.image_sources",
    "read_results": "gate.data.coco_results",
    "results_from_detections": "gate.metrics.coco_results",
    "Samples": "gate.data.samples",
    "SpecFile": "gate.spec",
    "Status": "gate.verdict",
    "Verdict": "gate.verdict",
    "check": "gate.pipeline",
    "read_spec": "gate.spec",
    "seal_passed": "gate.pipeline",
    "LoadedEngine": "gate.loading",
    "PolicyFile": "gate.trust",
    "Release": "gate.store",
    "SealedBundle": "gate.store",
    "VerifiedBundle": "gate.verification",
    "load": "gate.loading",
    "read_policy": "gate.trust",
    "verify": "gate.verification",
    "verify_seal": "gate.store",
}
"""The module of each public name; one that is not here is an error's, in gate.errors."""


def __getattr__(name: str) -> Any:
    """The public object of that name, imported now and kept (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'gate' has no attribute {name!r}")
    found = getattr(import_module(_ELSEWHERE.get(name, "gate.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
