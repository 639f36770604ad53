"""docs/latency.md: its tables are valid, its commands exist, and it names every key, number and reason that there is."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from gate.cli.main import _parser
from gate.latency import guards
from gate.latency.budgets import LEAST_PER_SESSION
from gate.latency.config import (
    PERCENTILES,
    SESSIONS,
    LatencySpec,
    RegressionSpec,
    SpeedupSpec,
    StagesSpec,
    UsageSpec,
    latency_checks,
)
from gate.latency.measurement import REGIONS
from gate.latency.ratio import ALPHA, LOOKS, kept_needed
from gate.latency.stages import STAGES, TOTAL, stage_checks
from gate.latency.usage import usage_checks
from gate.sessions.job import Job
from gate.spec import MemorySpec, spec_from_text
from gate.statistics import least_samples
from gate.steps.feeds import MOST_BATCHES, MOST_BYTES
from gate.steps.latency import LEG

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "latency.md").read_text(encoding="utf-8")
EXAMPLE = tomllib.loads((ROOT / "examples" / "digits" / "gate.toml").read_text(encoding="utf-8"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def section(title):
    """The text below a heading, up to the next heading of any level."""
    return re.split(r"^#+ ", PAGE.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def toml(value):
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def completed(fragment):
    """The spec of examples/digits with the engines of a fragment, or with its tables in an engine of its own."""
    given = tomllib.loads(fragment)["engine"]
    if isinstance(given, dict):
        given = [{"name": "one", "backend": "onnxruntime", "precision": "fp32", **given}]
    names = [each["name"] for each in given]
    engines = given + [each for each in EXAMPLE["engine"] if each["name"] not in names]
    tables = {**EXAMPLE, "engine": engines}
    file = spec_from_text("".join(f"{key} = {toml(each)}\n" for key, each in tables.items()), path=Path("gate.toml"))
    return file.engine(names[0])


def fragment_with(text):
    (found,) = [each for each in blocks("toml") if text in each]
    return found


def test_there_are_tables_to_hold():
    assert len(blocks("toml")) >= 6


@pytest.mark.parametrize("fragment", blocks("toml"))
def test_each_table_is_valid_in_a_spec(fragment):
    engine = completed(fragment)
    assert engine.latency or engine.stages or engine.usage or engine.memory


def test_the_tables_ask_for_what_the_page_says():
    assert latency_checks(completed(fragment_with("regression = {")).latency) == (
        "latency.p50_ms",
        "latency.p99_ms",
        "latency.throughput",
        "latency.regression_p50",
        "latency.regression_p95",
        "latency.speedup",
    )
    assert latency_checks(completed(fragment_with("[[engine.latency]]")).latency) == (
        "latency.p99_ms[batch=1]",
        "latency.p99_ms[batch=8]",
        "latency.throughput[batch=64]",
    )
    stages = stage_checks(completed(fragment_with("[engine.stages]")).stages)
    assert {"stages.p50_ms[decode]", "stages.p99_ms[total]"} < set(stages)
    assert len(usage_checks(completed(fragment_with("[engine.usage]")).usage)) == 4
    assert len(completed(fragment_with("[engine.memory]")).memory.budgets) == 3


@pytest.mark.parametrize("table", [LatencySpec, RegressionSpec, SpeedupSpec, StagesSpec, UsageSpec, MemorySpec])
def test_every_key_of_a_table_is_named(table):
    assert [key for key in table.__struct_fields__ if not re.search(rf"\b{key}\b", PAGE)] == []


def test_every_default_is_the_one_in_the_code():
    spec, text = LatencySpec(), section("What is timed")
    rows = {
        cells[1].strip().strip("`"): cells[3].strip()
        for cells in (line.split("|") for line in text.splitlines())
        if len(cells) == 5
    }
    assert rows["timed"] == f"`{spec.timed}`"
    assert rows["wait"] == f"`{spec.wait}`"
    numbers = {key: float(rows[key]) for key in ("streams", "sessions", "warm_up_s", "max_time_s", "session_timeout_s")}
    assert numbers == {key: getattr(spec, key) for key in numbers}
    assert rows["samples"].startswith(f"{LEAST_PER_SESSION} a session")
    assert RegressionSpec().limits == {"p50": 3.0, "p95": 5.0}
    assert "3 % at p50 and 5 % at p95" in PAGE.replace("\n", " ")
    assert (UsageSpec(cpu_percent_at_most=1.0).seconds, StagesSpec().samples) == (1.0, 100)
    assert (RegressionSpec().against, SpeedupSpec(at_least=1.0).against) == ("baseline", "reference")


def test_every_number_of_the_rule_is_the_one_in_the_code():
    text = section("One engine against another").replace("\n", " ")
    assert "looks at {}, {}, {} and {} sessions".format(*LOOKS) in text
    assert f"t(1 - {ALPHA:g}/{len(LOOKS)}, S - 1)" in text
    assert f"{kept_needed({'p50': 0.5})} inferences of each engine a session are enough for p50" in text
    kept = [kept_needed({"p95": percent}) for percent in (10.0, 5.0, 3.0, 2.9)]
    assert "it is {} from a tolerance of 10 % on, {} from 5 %, {} from 3 %, {} below".format(*kept) in text
    session = section("What is timed").replace("\n", " ")
    assert f"legs of {LEG} kept inferences" in session
    assert (Job(subjects=()).discard, MOST_BATCHES, MOST_BYTES) == (2, 64, 64 * 2**20)
    assert "two untimed inferences go" in session
    assert "up to 64 of the evaluation samples' batches, 64 MiB" in session


def test_least_numbers_are_those_of_the_bound():
    heads, _, numbers = [line for line in section("Budgets").splitlines() if line.startswith("|")]
    found = dict(zip(heads.split("|")[1:-1], map(int, numbers.split("|")[1:-1]), strict=True))
    expected = {key.removesuffix("_ms").replace("_", "."): least_samples(p) for key, p in PERCENTILES.items()}
    assert {name.strip(): number for name, number in found.items()} == expected
    assert f"fewer than {SESSIONS} sessions" in section("Budgets").replace("\n", " ")


def test_thresholds_of_the_guards_are_those_in_the_code():
    text = section("Guards")
    assert f"more than {guards.SLOWDOWN_PERCENT:g} % of the legs" in text
    assert f"by over {guards.SLOWDOWN_POINTS:g} points" in text
    assert f"differ by more than {guards.CLOCK_PERCENT:g} %" in text
    assert f"over {guards.BUSY_PERCENT:g} % busy before" in text


def test_every_region_and_stage_is_explained():
    regions, stages = section("What is timed"), section("Stages of the whole pipeline")
    assert [each for each in REGIONS if f"`{each}`" not in regions] == []
    assert [each for each in (*STAGES, TOTAL) if f"| `{each}` |" not in stages] == []


def told():
    """Literal parts of all texts in the code that may be a reason."""
    paths = [*sorted((ROOT / "gate" / "latency").glob("*.py")), ROOT / "gate" / "steps" / "latency.py"]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def reasons():
    """Quoted reasons, without their numbers and what else differs from one to the next."""
    for row in section("What INCONCLUSIVE means").splitlines():
        if row.startswith("| `"):
            for reason in re.findall(r"`([^`]+)`", row.split("|")[1]):
                yield [part.strip(" %(),") for part in re.split(r"\S*\d\S*(?: sessions\b)?|…|\bA\b(?!')", reason)]


def test_every_reason_is_one_that_the_gate_gives():
    texts, found = list(told()), list(reasons())
    assert len(found) > 12
    unknown = [part for parts in found for part in parts if part and not any(part in text for text in texts)]
    assert unknown == []


def commands():
    for line in PAGE.splitlines():
        found = re.match(r"\s+(?:\$ )?(gate .+?)(?:\s+#.*)?$|\$ (gate .+)$", line)
        if found:
            yield found.group(1) or found.group(2)


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_each_command_is_one_that_the_gate_takes(command):
    arguments = [each.strip('"') for each in re.findall(r'"[^"]*"|\S+', command)][1:]
    assert callable(_parser(arguments).parse_args(arguments).run)


def test_links_lead_somewhere():
    for file, anchor in re.findall(r"\]\((?!https:)([^)#\s]*)(?:#([^)\s]+))?\)", PAGE):
        assert not file or (ROOT / "docs" / file).exists(), file
        if anchor:
            page = (ROOT / "docs" / file).read_text(encoding="utf-8") if file else PAGE
            headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in slugs, anchor
