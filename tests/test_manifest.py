import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import BundleError
from gate.manifest import canonical_json, pretty_json, sha256_hex, strict_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(), each, max_size=4),
    max_leaves=20,
)


@given(values)
def test_canonical_json_reads_back_as_the_same_value(value):
    assert strict_json(canonical_json(value)) == value


@given(values)
def test_canonical_json_of_what_was_read_is_the_same_bytes(value):
    data = canonical_json(value)
    assert canonical_json(strict_json(data)) == data
    assert canonical_json(strict_json(pretty_json(value))) == data


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_change_the_digest(table):
    reversed_table = dict(reversed(table.items()))
    assert sha256_hex(canonical_json(table)) == sha256_hex(canonical_json(reversed_table))


def test_canonical_json_is_sorted_compact_utf8_and_ends_in_a_newline():
    assert canonical_json({"b": 0.1, "a": ["é", 1e22]}) == '{"a":["é",1e+22],"b":0.1}\n'.encode()


def test_digest_is_sha256():
    assert sha256_hex(b"abc").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": math.nan}])
def test_a_number_that_is_not_finite_is_not_written(value):
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        canonical_json(value)


def test_a_key_that_is_not_text_is_not_written():
    with pytest.raises(BundleError, match="key 1, which is not text"):
        canonical_json({1: "a", "1": "b"})


def test_a_value_that_json_does_not_have_is_not_written():
    with pytest.raises(BundleError, match="set is not JSON serializable"):
        canonical_json({"a": {1, 2}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 1}', "key 'a' stands twice"),
        (b'[{"x": {"a": 1, "b": 2, "a": 3}}]', "key 'a' stands twice"),
        (b'{"a": NaN}', "number NaN is not finite"),
        (b"[Infinity]", "number Infinity is not finite"),
        (b"[-Infinity]", "number -Infinity is not finite"),
        (b"[1e999]", "number 1e999 is not finite"),
        (b"{} {}", "Extra data at line 1, column 4"),
        (b'{"a": 1}x', "Extra data"),
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b'{"a": 1,}', "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'"\xff"', "is not UTF-8: byte 1 is 0xff"),
        (b'"\\ud800"', "text that is not Unicode"),
        (b'{"\\udfff": 1}', "text that is not Unicode"),
        (b"[" * 65 + b"]" * 65, "nests deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nests deeper than 64"),
        (b"[" * 1_000_000, "nests deeper than 64"),
    ],
)
def test_json_with_more_than_one_meaning_is_refused(data, message):
    with pytest.raises(BundleError, match=message) as caught:
        strict_json(data, where="metadata.json")
    assert caught.value.where == "metadata.json"


def test_a_document_of_the_deepest_allowed_nesting_is_read():
    assert strict_json(b"[" * 64 + b"]" * 64)


def test_a_document_over_the_limit_is_not_even_parsed():
    with pytest.raises(BundleError, match="too long: 11 bytes, the limit is 10"):
        strict_json(b" " * 11, limit_bytes=10)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(BundleError):
        strict_json(data)
