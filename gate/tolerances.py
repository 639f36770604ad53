"""What difference is allowed: defaults per precision, limits of the spec, and the findings that follow.

A limit for one output goes before a limit for all, and both before the precision's default. Limits in the spec for all
outputs apply to those that they mean something for; one that means something for none is a finding that fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec

from gate.errors import SpecError
from gate.results import OutputMetrics
from gate.spec import EngineSpec, JudgedEngine, ParityLimits, ParitySpec, SpecFile
from gate.statistics import clopper_pearson, least_samples_for_proportion
from gate.verdict import Evidence, Finding, Interval, Limit, Status

DEFAULTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "fp32": MappingProxyType({"rel_rmse": 1e-5, "cosine_distance": 1e-9, "allclose_at_least": 0.9999}),
        "tf32": MappingProxyType({"rel_rmse": 2e-3, "cosine_distance": 5e-6, "allclose_at_least": 0.999}),
        "fp16": MappingProxyType({"rel_rmse": 2e-3, "cosine_distance": 5e-6, "allclose_at_least": 0.999}),
        "bf16": MappingProxyType({"rel_rmse": 1.6e-2, "cosine_distance": 3e-4, "allclose_at_least": 0.999}),
        "int8": MappingProxyType({"rel_rmse": 5e-2, "cosine_distance": 1e-2, "mean_cosine_distance": 2e-3}),
        "fp8": MappingProxyType({"rel_rmse": 1.5e-1, "cosine_distance": 3e-2, "mean_cosine_distance": 1e-2}),
    }
)
"""Limits by precision and key of `[engine.parity]`. `max_abs` follows from `rel_rmse`; exact outputs must be equal."""

_ROUNDING: Mapping[str, float] = MappingProxyType(
    # k times the precision's epsilon: 64 for fp32, 4 for the others; int8's epsilon is a 128th of its range, and
    # e4m3 has three bits behind the point.
    {
        "fp32": 64 * 2.0**-23,
        "tf32": 4 * 2.0**-10,
        "fp16": 4 * 2.0**-10,
        "bf16": 4 * 2.0**-7,
        "int8": 4 * 2.0**-7,
        "fp8": 4 * 2.0**-3,
    }
)

_CHECK_OF = {
    "sqnr_db_at_least": "sqnr_db",
    "allclose_at_least": "allclose",
    "top1_agreement_at_least": "top1_agreement",
    "top5_agreement_at_least": "top5_agreement",
}
_EXACT_KEYS = ("mismatch_fraction",)
_ORDER = (
    "rel_rmse",
    "max_abs",
    "mean_abs",
    "cosine_distance",
    "mean_cosine_distance",
    "centered_cosine_distance",
    "sqnr_db_at_least",
    "allclose_at_least",
    "mismatch_fraction",
    "top1_agreement_at_least",
    "top5_agreement_at_least",
)
_AGREEMENT = ("top1_agreement_at_least", "top5_agreement_at_least")
METAMORPHIC: Mapping[str, float] = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2, "int8": 1e-2, "fp8": 5e-2}
"""What a sample's answer may differ by, relatively, when it is asked for in another way. Other kernels round otherwise;
for INT8 that turns a few values over to the next step, far less than quantisation itself changes."""

_ALPHA = 0.05


class Tolerances(NamedTuple):
    """Tolerances behind the allclose fraction: `|d| <= atol + rtol |reference|`."""

    atol: float
    rtol: float


@dataclass(frozen=True)
class ResolvedLimit:
    """A limit that applies to an output.

    Args:
        output: Its name; None for a limit in the spec that means something for no output.
        check: The finding's name, such as `parity.rel_rmse[boxes]`.
        key: Of `[engine.parity]`; `nonfinite` for the one that is always there.
        kind: `at_most` or `at_least`.
        value: The limit.
        source: `spec` or `default`.
        path: Keys in `[engine]` under which it stands; empty for a default.
    """

    output: str | None
    check: str
    key: str
    kind: Literal["at_most", "at_least"]
    value: float
    source: Literal["spec", "default"]
    path: tuple[str, ...] = ()


def default_limits(precision: str) -> Mapping[str, float]:
    """Default limits of a precision by key of `[engine.parity]`.

    Raises:
        SpecError: There is no such precision.
    """
    if precision not in DEFAULTS:
        raise SpecError(f"there are no limits for precision {precision!r}; there are for {', '.join(DEFAULTS)}")
    return DEFAULTS[precision]


def allclose_tolerances(engine: EngineSpec, *, rms: float) -> Tolerances:
    """Tolerances of the spec, else k·eps·rms(reference) and k·eps of the engine's precision.

    Args:
        engine: Says precision and what the spec sets.
        rms: Root mean square of the reference's output.

    Raises:
        SpecError: There is no such precision.
    """
    default_limits(engine.precision)
    rounding = _ROUNDING[engine.precision]
    parity = engine.parity or ParitySpec()
    return Tolerances(
        atol=rounding * rms if parity.atol is None else parity.atol,
        rtol=rounding if parity.rtol is None else parity.rtol,
    )


def default_max_abs(*, rel_rmse: float, elements: int, rms: float) -> float:
    """The default limit of max |d|: what the largest of so many normal errors stays below, with a factor of 2.

    Args:
        rel_rmse: The limit of the relative error.
        elements: How many were compared.
        rms: Root mean square of the reference.

    Source: `sqrt(2 ln N)`, the expected maximum of N normal values; docs/findings.md#parity-max_abs.
    """
    return 2.0 * math.sqrt(2.0 * math.log(max(2, elements))) * rel_rmse * rms


def resolved_limits(
    metrics: Sequence[OutputMetrics], *, engine: EngineSpec | JudgedEngine
) -> tuple[ResolvedLimit, ...]:
    """Every limit on parity that applies, output by output, with where it comes from.

    Raises:
        SpecError: The spec limits an output that there is not.
    """
    parity = engine.parity or ParitySpec()
    names = [each.output for each in metrics]
    for name in parity.outputs:
        if name not in names:
            raise SpecError(
                f"[engine.parity.outputs] of engine {engine.name!r} has {name!r}; "
                f"the reference's outputs are {', '.join(map(repr, names)) or 'none'}"
            )
    found: list[ResolvedLimit] = []
    for each in metrics:
        suffix = f"[{each.output}]" if len(metrics) > 1 else ""
        found.append(ResolvedLimit(each.output, f"parity.nonfinite{suffix}", "nonfinite", "at_most", 0.0, "default"))
        found.extend(_limits_of(each, parity, engine.precision, suffix))
    used = {limit.key for limit in found if limit.source == "spec"}
    for key in _ORDER:
        value = getattr(parity, key)
        everywhere_overridden = bool(names) and all(
            getattr(parity.outputs.get(name, ParityLimits()), key) is not None for name in names
        )
        if value is not None and key not in used and not everywhere_overridden:
            found.append(ResolvedLimit(None, f"parity.{_check(key)}", key, _kind(key), value, "spec", ("parity", key)))
    return tuple(found)


def _limits_of(metrics: OutputMetrics, parity: ParitySpec, precision: str, suffix: str) -> Iterator[ResolvedLimit]:
    own = parity.outputs.get(metrics.output, ParityLimits())
    defaults = dict(default_limits(precision)) if parity.defaults else {}
    if metrics.kind == "exact":
        # Equality of integers is no matter of precision, so `defaults = false` does not switch it off.
        defaults = {"mismatch_fraction": 0.0}
    elif parity.defaults:
        relative = own.rel_rmse if own.rel_rmse is not None else parity.rel_rmse
        defaults["max_abs"] = default_max_abs(
            rel_rmse=defaults["rel_rmse"] if relative is None else relative,
            elements=metrics.elements,
            rms=metrics.rms_reference,
        )
    for key in _ORDER:
        check = f"parity.{_check(key)}{suffix}"
        mine, all_outputs = getattr(own, key), getattr(parity, key)
        if mine is not None:
            path = ("parity", "outputs", metrics.output, key)
            yield ResolvedLimit(metrics.output, check, key, _kind(key), mine, "spec", path)
        elif all_outputs is not None and _means_something(key, metrics):
            yield ResolvedLimit(metrics.output, check, key, _kind(key), all_outputs, "spec", ("parity", key))
        elif key in defaults:
            yield ResolvedLimit(metrics.output, check, key, _kind(key), defaults[key], "default")


def _means_something(key: str, metrics: OutputMetrics) -> bool:
    """Whether a limit for all outputs is about this one."""
    if metrics.kind == "exact":
        return key in _EXACT_KEYS
    return key not in _EXACT_KEYS and _measured(key, metrics) is not None


def _check(key: str) -> str:
    return _CHECK_OF.get(key, key)


def _kind(key: str) -> Literal["at_most", "at_least"]:
    return "at_least" if key.endswith("_at_least") else "at_most"


def _measured(key: str, metrics: OutputMetrics) -> float | None:
    """The number that a limit is about; None where it is not defined for the output."""
    if key == "nonfinite":
        return float(metrics.nonfinite_reference + metrics.nonfinite_candidate)
    if key == "allclose_at_least":
        return metrics.allclose_fraction
    if key == "sqnr_db_at_least":
        return metrics.sqnr_db
    if key in _AGREEMENT:
        agree = metrics.top1_agree if key == "top1_agreement_at_least" else metrics.top5_agree
        return None if agree is None or not metrics.topk_samples else agree / metrics.topk_samples
    value: float | None = getattr(metrics, key)
    return value


def parity_findings(
    metrics: Sequence[OutputMetrics], *, engine: EngineSpec, file: SpecFile, evidence: Evidence
) -> tuple[Finding, ...]:
    """One finding for each output and limit, in the outputs' order.

    Args:
        metrics: Of every output.
        engine: Says what is asked.
        file: Where the limits stand; asked only for findings that do not pass.
        evidence: Of the run.

    Raises:
        SpecError: The spec limits an output that there is not.
    """
    try:
        limits = resolved_limits(metrics, engine=engine)
    except SpecError as err:
        err.where = file.engine_location(engine.name, "parity", "outputs")
        raise
    by_name = {each.output: each for each in metrics}
    found: list[Finding] = []
    for limit in limits:
        finding = _finding(limit, None if limit.output is None else by_name[limit.output], evidence)
        if finding.status is not Status.PASSED and limit.path:
            location = file.engine_location(engine.name, *limit.path)
            finding = msgspec.structs.replace(finding, limit=msgspec.structs.replace(finding.limit, location=location))
        found.append(finding)
    return tuple(found)


def findings_again(
    metrics: Sequence[OutputMetrics], *, engine: JudgedEngine, evidence: Evidence
) -> tuple[Finding, ...]:
    """The findings of `parity_findings`, without the lines of a spec: for who verifies them.

    Raises:
        SpecError: The spec limits an output that there is not.
    """
    by_name = {each.output: each for each in metrics}
    return tuple(
        _finding(limit, None if limit.output is None else by_name[limit.output], evidence)
        for limit in resolved_limits(metrics, engine=engine)
    )


def _finding(limit: ResolvedLimit, metrics: OutputMetrics | None, evidence: Evidence) -> Finding:
    value = None if metrics is None else _measured(limit.key, metrics)
    name = _check(limit.key)
    estimate = math.nan if value is None else value
    samples = 0 if metrics is None else metrics.samples
    interval = Interval(estimate, estimate)
    if value is not None and metrics is not None and limit.key in _AGREEMENT:
        agree = metrics.top1_agree if limit.key == "top1_agreement_at_least" else metrics.top5_agree
        samples = metrics.topk_samples or 0
        interval = clopper_pearson(agree or 0, samples, alpha=_ALPHA)
    finding = Finding(
        check=limit.check,
        estimate=estimate,
        interval=interval,
        limit=Limit(limit.kind, limit.value, limit.source),
        n=samples,
        evidence=evidence,
        unit="dB" if name == "sqnr_db" else "",
        hint=f"docs/findings.md#parity-{name}",
    )
    if value is None or metrics is None:
        where = "any output" if metrics is None else f"output {metrics.output!r}"
        detail = f"{name} is not defined for {where}: {_NEEDS.get(limit.key, 'it is an integer or boolean output')}"
    elif limit.key in _AGREEMENT:
        detail = _agreement_detail(limit, metrics, finding)
    else:
        detail = "" if finding.status is Status.PASSED else _detail(limit.key, metrics)
    return msgspec.structs.replace(finding, detail=detail)


_NEEDS = {
    "top1_agreement_at_least": "it needs an output [N, classes]",
    "top5_agreement_at_least": "it needs an output [N, classes] with six classes or more",
    "centered_cosine_distance": "it needs floating outputs of one shape for every sample",
    "mismatch_fraction": "for all outputs it is about integers and booleans; set it for one floating output by name",
}


def _agreement_detail(limit: ResolvedLimit, metrics: OutputMetrics, finding: Finding) -> str:
    n = metrics.topk_samples or 0
    top1 = limit.key == "top1_agreement_at_least"
    wrong = n - ((metrics.top1_agree if top1 else metrics.top5_agree) or 0)
    text = f"{wrong} of {n} disagree"
    if top1 and wrong and metrics.top1_near_ties:
        text += f", {metrics.top1_near_ties} of them near-ties of the reference"
    if finding.status is Status.INCONCLUSIVE:
        text += f"; {_more_samples(wrong, n, limit.value)}"
    elif finding.status is Status.FAILED and _bad(metrics):
        text += f"; {_bad(metrics)}"
    return text


def _more_samples(wrong: int, n: int, floor: float) -> str:
    if floor >= 1.0:
        return f"no number of samples shows an agreement of 1; {n} samples can show {0.05 ** (1 / n):.4g}"
    if wrong and 1.0 - wrong / n < floor:
        return f"{1.0 - wrong / n:.4g} agree, and more samples would show whether that is below {floor:g}"
    needed = least_samples_for_proportion(wrong, floor, alpha=_ALPHA)
    return f"it would take {needed} samples with no more disagreements to show {floor:g}: {(needed or n) - n} more"


def _bad(metrics: OutputMetrics) -> str:
    parts = [
        f"{count} in {who}"
        for count, who in (
            (metrics.nonfinite_candidate, "the engine's output"),
            (metrics.nonfinite_reference, "the reference's"),
        )
        if count
    ]
    return f"NaN or Inf: {', '.join(parts)} of {metrics.elements} elements" if parts else ""


def _detail(key: str, metrics: OutputMetrics) -> str:
    """What a reader needs who has to find out why."""
    if bad := _bad(metrics):
        first = ""
        if metrics.max_abs_sample is not None:
            first = f"; first at sample {metrics.max_abs_sample}, element {metrics.max_abs_element}"
        return bad + first
    if key == "max_abs":
        return f"at sample {metrics.max_abs_sample}, element {metrics.max_abs_element}"
    if key == "allclose_at_least":
        count = round((1.0 - metrics.allclose_fraction) * metrics.elements)
        tolerances = f"atol {metrics.allclose_atol:.2g}, rtol {metrics.allclose_rtol:.2g}"
        return f"{count} of {metrics.elements} elements are not close ({tolerances})"
    if key == "mismatch_fraction":
        count = round(metrics.mismatch_fraction * metrics.elements)
        return f"{count} of {metrics.elements} elements differ{_worst(metrics)}"
    return _worst(metrics).removeprefix("; ")


def _worst(metrics: OutputMetrics) -> str:
    if not metrics.worst_samples:
        return ""
    what = "relative error" if metrics.kind == "float" else "fraction that differs"
    (index, error), *others = metrics.worst_samples
    text = f"; worst sample {index}: {what} {error:.2g}"
    if others:
        text += f", then {', '.join(str(each) for each, _ in others)}"
    return text
