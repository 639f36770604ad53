"""JSON Schemas (2020-12) of the files that people and other programs read, and of what is signed.

The spec's schema takes its descriptions from the docstrings of gate.spec, so that an editor shows them.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec

from gate.results import NOT_STORED, CheckRun
from gate.spec import GateSpec
from gate.wording import anchor

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SPEC_ID = "urn:trt-gate:schema:gate:1"
REPORT_ID = "urn:trt-gate:schema:report:1"
NON_FINITE = ("NaN", "Infinity", "-Infinity")
KINDS = ("spec", "report", "metadata", "baseline", "trust", "verdict", "approval", "ledger")

_LIMITS = {"ParityLimits": "parity", "ParitySpec": "parity", "TaskLimits": "task", "MemorySpec": "memory"}
"""Tables whose keys are limits on the check of that group."""
_STATUSES = ["PASSED", "FAILED", "INCONCLUSIVE"]
_WITH_STATUS = ("CheckRun", "EngineResult", "Verdict", "Finding", "Failure")


def schema(kind: str) -> dict[str, Any]:
    """The schema of a file: one of `KINDS`."""
    if kind == "spec":
        return spec_schema()
    if kind == "report":
        return report_schema()
    if kind == "metadata":
        from gate.metadata import metadata_schema

        return metadata_schema()
    if kind == "baseline":
        from gate.baseline import baseline_schema

        return baseline_schema()
    if kind == "trust":
        from gate.release.policy import policy_schema

        return policy_schema()
    return signed_schema(kind)


def signed_schema(kind: str) -> dict[str, Any]:
    """The schema of what is signed: the payload of an envelope."""
    from gate.release.statements import ApprovalStatement, LedgerEntry, VerdictStatement, statement_schema

    found: dict[str, tuple[type[msgspec.Struct], str]] = {
        "verdict": (VerdictStatement, "the verdict on a bundle, in seals/verdict.dsse.json"),
        "approval": (ApprovalStatement, "an approval of a verdict, in seals/approval-*.dsse.json"),
        "ledger": (LedgerEntry, "an entry of the ledger, one line of its file"),
    }
    struct, title = found[kind]
    return statement_schema(struct, title, f"urn:trt-gate:schema:{kind}:1")


def spec_schema() -> dict[str, Any]:
    """The schema of a `gate.toml`, for editors and for people who look up a key."""
    (_,), definitions = msgspec.json.schema_components([GateSpec], ref_template="#/$defs/{name}")
    documented = {struct.__name__: _documented(struct) for struct in _structs(GateSpec)}
    for name, definition in definitions.items():
        definition["description"] = _first_line(definition.get("description", ""))
        for key, text in documented.get(name, {}).items():
            if key in definition.get("properties", {}):
                definition["properties"][key]["description"] = text
    for name, group in _LIMITS.items():
        for key, limit in definitions[name]["properties"].items():
            limit.setdefault("description", f"A limit; what it measures: {anchor(f'{group}.{_measured(key)}')}")
    model, given = definitions["ModelSpec"], definitions["InputSpec"]
    model["oneOf"] = [{"required": [key]} for key in ("factory", "onnx", "outputs")]
    engine = definitions["EngineSpec"]
    limits = engine["properties"].pop("task_limits")
    engine["properties"]["task"] = {
        "anyOf": [
            {"$ref": "#/$defs/TaskLimits"},
            {"type": "object", "additionalProperties": {"type": "number"}, "description": "Of another task."},
        ],
        "description": limits["description"],
    }
    axes = given["properties"].pop("axes")
    given["additionalProperties"] = {
        **axes["additionalProperties"],
        "description": "The range of the axis with this name.",
    }
    root = definitions.pop("GateSpec")
    root["properties"]["engine"]["minItems"] = 1
    found: dict[str, Any] = _without_null(
        {"$schema": DIALECT, "$id": SPEC_ID, **root, "title": "gate.toml", "$defs": _sorted(definitions)}
    )
    return found


def report_schema() -> dict[str, Any]:
    """The schema of a `report.json` as `gate.results.builtins_from` writes it."""
    (_,), definitions = msgspec.json.schema_components([CheckRun], ref_template="#/$defs/{name}")
    for name, definition in definitions.items():
        definition["description"] = _first_line(definition.get("description", ""))
        properties = definition.get("properties", {})
        for key in NOT_STORED & set(properties):
            del properties[key]
        if name in _WITH_STATUS:
            optional = name == "EngineResult"
            properties["status"] = {"enum": [*_STATUSES, None] if optional else _STATUSES}
        if "properties" in definition:
            for each in properties.values():
                each.pop("default", None)
            definition["required"] = sorted(properties)
    definitions["Verdict"]["properties"]["findings"]["minItems"] = 1
    root = definitions.pop("CheckRun")
    finite = {"$schema": DIALECT, "$id": REPORT_ID, **root, "title": "report.json", "$defs": _sorted(definitions)}
    found: dict[str, Any] = _with_non_finite(finite)
    return found


def schema_bytes(found: dict[str, Any]) -> bytes:
    """A schema as it is committed and printed."""
    from gate.manifest import pretty_json

    return pretty_json(found)


def _with_non_finite(node: Any) -> Any:
    """The same schema, where a number may also be one of the strings that stand for what JSON has no number for."""
    if isinstance(node, dict):
        changed = {key: _with_non_finite(value) for key, value in node.items()}
        if node.get("type") == "number":
            return {"anyOf": [changed, {"enum": list(NON_FINITE)}]}
        return changed
    if isinstance(node, list):
        return [_with_non_finite(each) for each in node]
    return node


def _without_null(node: Any) -> Any:
    """The same schema for TOML, which has no null: a key that has no value is left out."""
    if isinstance(node, list):
        return [_without_null(each) for each in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _without_null(value) for key, value in node.items() if not (key == "default" and value is None)}
    given = [each for each in changed.get("anyOf", ()) if each != {"type": "null"}]
    if len(given) == 1:
        del changed["anyOf"]
        return {**given[0], **changed}
    return {**changed, "anyOf": given} if given else changed


def _structs(root: type[msgspec.Struct]) -> tuple[type[msgspec.Struct], ...]:
    """Every struct that a struct is made of, itself included."""
    from msgspec import inspect as types

    found: dict[str, type[msgspec.Struct]] = {}
    todo: list[Any] = [types.type_info(root)]
    while todo:
        node = todo.pop()
        if isinstance(node, types.StructType):
            if node.cls.__name__ in found:
                continue
            found[node.cls.__name__] = node.cls
            todo.extend(field.type for field in node.fields)
        else:
            todo.extend(getattr(node, "types", ()))
            todo.extend(getattr(node, "item_types", ()))
            todo.extend(getattr(node, each) for each in ("item_type", "value_type") if hasattr(node, each))
    return tuple(found.values())


def _documented(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the `Args:` of a struct and of the structs it extends say of each field."""
    found: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, args = doc.partition("Args:\n")
        entries = re.split(r"\n(?=    \S)", f"\n{args}")
        for entry in entries:
            match = re.match(r"\s*([a-z0-9_, ]+): (.*)", entry, re.DOTALL)
            if match:
                text = " ".join(match[2].split())
                found.update(dict.fromkeys((name.strip() for name in match[1].split(",")), text))
    return found


def _measured(key: str) -> str:
    """The check that a limit is for: `top1_drop_at_most_pp` is of `top1_drop_pp`."""
    return key.replace("_drop_at_most_pp", "_drop_pp").removesuffix("_at_least")


def _first_line(doc: str) -> str:
    return doc.strip().partition("\n\n")[0].replace("\n", " ")


def _sorted(definitions: dict[str, Any]) -> dict[str, Any]:
    return {name: definitions[name] for name in sorted(definitions)}
