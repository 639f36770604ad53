"""Every error the gate raises, and the exit code of each.

    GateError
    ├─ SpecError            the spec is malformed or contradicts itself
    ├─ DataError            the samples or labels cannot be used
    ├─ ExportError          PyTorch to ONNX failed
    ├─ LoweringError        the precision cannot be made for this graph
    ├─ BuildError           the compiler refused the graph
    ├─ RunError             a runner failed, or its outputs do not fit the spec
    ├─ MeasurementError     nothing to decide on: too few samples, not finite, a required check missing
    ├─ ReferenceMismatch    the reference itself is wrong, so no engine can be judged by it
    ├─ BackendUnavailable   the backend is not installed or cannot be used here
    ├─ BaselineError        missing, unreadable, or of another device, precision or sample set
    ├─ BundleError          a bundle is malformed
    │  └─ VerificationError
    │     ├─ DigestMismatch
    │     ├─ SignatureMismatch
    │     ├─ IdentityMismatch
    │     ├─ StaleVerdict
    │     └─ ApprovalsMissing
    ├─ LedgerError          the ledger is not what was signed
    ├─ PromotionRefused     the policy does not allow it, or somebody else was first
    ├─ SigningError         a key cannot be read, made or used
    └─ IncompatibleEngine   a plan for another TensorRT version, GPU or platform

Errors carry fields and a hint. They never log, print or exit.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the command returns. No option turns a failure into 0."""

    PASSED = 0
    FAILED = 1
    USAGE = 2
    INCONCLUSIVE = 3
    REFUSED = 4
    INTERNAL = 70


class GateError(Exception):
    """Base of all errors: says what, where, got and expected, and what to do next.

    Args:
        message: What is wrong, in one sentence without a final full stop.
        where: The file, line or object it is wrong in, such as `gate.toml:23`.
        hint: What to do next; a command that can be pasted where there is one.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n{self.hint}" if self.hint else text


class SpecError(GateError):
    """The spec is malformed or contradicts itself."""

    exit_code = ExitCode.USAGE


class DataError(GateError):
    """The samples or labels cannot be used: missing, too few, of another shape, or not finite."""

    exit_code = ExitCode.USAGE


class ExportError(GateError):
    """PyTorch to ONNX failed, or the exported graph does not compute what PyTorch computes."""


class LoweringError(GateError):
    """The precision cannot be made for this graph."""


class BuildError(GateError):
    """The compiler refused the graph.

    Args:
        log: The compiler's last log lines.
        node: The ONNX node that it refused, where it named one.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        log: tuple[str, ...] = (),
        node: str | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.log = log
        self.node = node

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.node:
            lines.append(f"node: {self.node}")
        lines.extend(f"  | {line}" for line in self.log)
        return "\n".join(lines)


class RunError(GateError):
    """A runner failed, or its inputs or outputs do not fit the spec."""


class MeasurementError(GateError):
    """Nothing to decide on: too few samples, not finite, a required check missing."""

    exit_code = ExitCode.INCONCLUSIVE


class ReferenceMismatch(GateError):
    """The reference itself is wrong, so no engine can be judged by it."""


class BackendUnavailable(GateError):
    """The backend is not installed, or cannot be used on this machine."""

    exit_code = ExitCode.USAGE


class BaselineError(GateError):
    """The baseline is missing, unreadable, or of another device, precision or sample set."""


class BundleError(GateError):
    """A bundle is malformed."""

    exit_code = ExitCode.REFUSED


class VerificationError(BundleError):
    """A bundle is not what it says it is."""


class DigestMismatch(VerificationError):
    """A file's bytes are not the bytes that were sealed."""


class IncompatibleEngine(GateError):
    """A plan for another TensorRT version, GPU or platform, said before deserialising."""

    exit_code = ExitCode.USAGE


class SignatureMismatch(VerificationError):
    """Nobody whom the policy trusts signed it."""


class IdentityMismatch(VerificationError):
    """It is of another model, slot, data set, baseline or spec than was asked for."""


class StaleVerdict(VerificationError):
    """The verdict expired, is too old, was revoked, or one with a higher serial was accepted before."""


class ApprovalsMissing(VerificationError):
    """Fewer approvals than the policy asks for."""


class LedgerError(GateError):
    """The ledger is not what was signed: a line was edited, removed, reordered or cut off."""

    exit_code = ExitCode.REFUSED


class PromotionRefused(GateError):
    """The policy does not allow it, or somebody else was first."""

    exit_code = ExitCode.REFUSED


class SigningError(GateError):
    """A key cannot be read, made or used."""

    exit_code = ExitCode.USAGE
