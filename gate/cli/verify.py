"""`gate verify BUNDLE`: the numbered steps of a verification."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.errors import ExitCode, GateError, SpecError

if TYPE_CHECKING:
    from gate.store import Step


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "verify",
        help=COMMANDS["verify"],
        description="Verify a sealed bundle, offline. With --policy: who signed it, for what, and whether it may go there "
        "now. Without: that it is whole and follows from its own numbers, whoever made it.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder made by gate seal")
    add_policy_options(parser, required=False)
    parser.add_argument(
        "--stage", help="the stage of the slot that it is to enter (left out: the last, all of the traffic)"
    )
    parser.add_argument(
        "--require-evidence",
        choices=("preflight", "host", "device"),
        help="the least evidence that the verdict may rest on, without a policy",
    )
    parser.add_argument("--json", action="store_true", help="print the steps as JSON")
    parser.set_defaults(run=run)


def add_policy_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """`--policy`, `--model` and `--slot`."""
    parser.add_argument("--policy", type=Path, required=required, metavar="TRUST.TOML", help="the trust policy")
    parser.add_argument(
        "--model", required=required, help="the model that it has to be of, as [model.NAME] in the policy"
    )
    parser.add_argument("--slot", required=required, help="what it is to be deployed as, as [slot.NAME] in the policy")


def run(args: argparse.Namespace) -> ExitCode:
    """Verify, and show each step as it is done; exit 4 where one is refused.

    Raises:
        SpecError: The options do not go together, or the policy cannot be used.
    """
    from gate.report.screen import show

    # NumPy sorts some thousand durations here: threads for linear algebra would only take time to start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _require_options(args)
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if not args.json:
            show(step_line(len(steps), step), sys.stdout)

    refused: GateError | None = None
    warnings: list[str] = []
    try:
        _verify(args, on_step, warnings)
    except GateError as err:
        if err.exit_code is not ExitCode.REFUSED:
            raise
        refused = err
    word = "REFUSED" if refused is not None else "INTACT" if args.policy is None else "VERIFIED"
    if args.json:
        found = {
            "bundle": str(args.bundle),
            "result": word,
            "verified": word == "VERIFIED",
            "error": None if refused is None else {"type": type(refused).__name__, "message": str(refused)},
            "warnings": list(warnings),
            "steps": [{"name": step.name, "ok": step.ok, "detail": step.detail} for step in steps],
        }
        print(json.dumps(found, ensure_ascii=False))
    else:
        show("".join(f"   {'note':<11} {warning}\n" for warning in warnings), sys.stdout)
    if not args.json and refused is None:
        more = "" if args.policy else "   who made it is not known: gate verify --policy TRUST.TOML --model … --slot …"
        show(f"{word}  {args.bundle}{more}\n", sys.stdout)
    if refused is None:
        return ExitCode.PASSED
    sys.stdout.flush()
    said = str(refused)
    print(f"REFUSED  {said if said.startswith(str(args.bundle)) else f'{args.bundle}: {said}'}", file=sys.stderr)
    if below := bundles_below(args.bundle):
        from gate.cli.check import pasted

        print(
            "\n".join(["it holds bundles; verify each:", *(f"  gate verify {pasted(path)}" for path in below)]),
            file=sys.stderr,
        )
    return ExitCode.REFUSED


def _require_options(args: argparse.Namespace) -> None:
    given = [name for name in ("model", "slot", "stage") if getattr(args, name) is not None]
    if args.policy is None and given:
        raise SpecError(f"--{given[0]} says what a policy is asked for", hint="Give the policy: --policy TRUST.TOML")
    if args.policy is not None and args.require_evidence is not None:
        raise SpecError("--require-evidence is for a look without a policy", hint="Set evidence in the policy's slot.")
    if args.policy is not None and (missing := [name for name in ("model", "slot") if getattr(args, name) is None]):
        raise SpecError(
            f"--policy needs --{missing[0]}: a bundle is verified for something",
            hint="gate verify BUNDLE --policy TRUST.TOML --model MODEL --slot SLOT",
        )


def _verify(args: argparse.Namespace, on_step: Any, warnings: list[str]) -> None:
    """Verify, with the policy or by itself; what a reader must know although it passed is added to the warnings."""
    from gate.verdict import Evidence

    if args.policy is None:
        from gate.store import verify_seal

        needed = None if args.require_evidence is None else Evidence(args.require_evidence)
        warnings += verify_seal(args.bundle, require_evidence=needed, on_step=on_step).metadata.warnings
        return
    from gate.ledger import read_ledger
    from gate.trust import ledger_path, read_policy
    from gate.verification import verify

    policy = read_policy(args.policy)
    path = ledger_path(policy)
    ledger = None if path is None else read_ledger(path, policy)
    warnings += () if ledger is None else ledger.notes
    with verify(
        args.bundle,
        policy=policy,
        model=args.model,
        slot=args.slot,
        stage=args.stage,
        history=None if ledger is None else ledger.history,
        on_step=on_step,
    ) as found:
        warnings += found.warnings


def bundles_below(folder: Path) -> tuple[Path, ...]:
    """The bundles in a folder that is none itself, such as the one that `gate seal` was given."""
    from gate.store import VERDICT_PATH

    if (folder / VERDICT_PATH).exists():
        return ()
    found = {*folder.glob(f"*/{VERDICT_PATH}"), *folder.glob(f"*/*/{VERDICT_PATH}")}
    return tuple(sorted(path.parents[1] for path in found))


def step_line(index: int, step: Step) -> str:
    """` 5 digests     6 of 6     ok`."""
    return f"{index:2} {step.name:<11} {step.detail:<72} {'ok' if step.ok else 'refused'}\n"
