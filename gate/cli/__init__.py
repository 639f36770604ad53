"""The command `gate`: one module per sub-command, each imported when it is called."""

from __future__ import annotations

COMMANDS = {
    "check": "build the engines of a spec, compare them with the reference, and give a verdict",
    "init": "write a commented gate.toml for a model factory or an ONNX file",
    "latency": "time an engine in fresh processes, against budgets or in turn with another",
    "baseline": "accept, show and compare the stored measurements",
    "seal": "check a spec and seal the engines that passed",
    "verify": "verify a sealed bundle, step by step",
    "key": "make a signing key, or show the public part of one",
    "approve": "sign an approval of a bundle's verdict",
    "promote": "let an approved bundle into the next stage of a slot",
    "rollback": "go back to the last good bundle of a slot",
    "revoke": "take back a verdict for good",
    "ledger": "verify the ledger, or show what was deployed when",
    "record": "record the reference, for a machine without PyTorch",
    "explain": "say what a check means, and what to do when it does not pass",
    "inspect": "say what a bundle, a plan, an ONNX file or an AOTInductor package is, without running it",
    "doctor": "say what is installed and usable here, with the fix for what is not",
    "schema": "print the JSON Schema of a file",
}
"""Each sub-command with what it does; gate.cli.<name> has its `add_parser` and `run`."""
