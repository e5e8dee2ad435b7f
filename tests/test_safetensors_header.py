"""What a safetensors header says of a tensor: a field that cannot be is named."""

from __future__ import annotations

import json
import re

import pytest

from jax_moe.io.safetensors_header import check_header

INTEGERS = "integers from 0 to 2^63 - 1, got"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_offsets": [-8, 0]}, f"data_offsets: expected two {INTEGERS} [-8, 0]"),
        ({"data_offsets": [0, 2**63]}, f"data_offsets: expected two {INTEGERS} [0, {2**63}]"),
        ({"data_offsets": [0, 4, 8]}, f"data_offsets: expected two {INTEGERS} [0, 4, 8]"),
        ({"data_offsets": "08"}, f"data_offsets: expected two {INTEGERS} '08'"),
        (
            {"data_offsets": [8, 0]},
            "data_offsets: expected 8 bytes between them, which F32[2] takes, got [8, 0]",
        ),
        ({"shape": [-2]}, f"shape: expected at most 8 {INTEGERS} [-2]"),
        ({"shape": [1] * 9}, f"shape: expected at most 8 {INTEGERS} [1, 1, 1, 1, 1, 1, ...]"),
        ({"shape": [3], "dtype": "F4"}, "shape: expected whole bytes of F4, got [3]"),
        ({"dtype": "F8"}, "dtype: expected one of BOOL, U8, .*, F64, C64, got 'F8'"),
        ({"dtype": [2] * 9}, "dtype: expected one of .*, got [2, 2, 2, 2, 2, 2, ...]"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields, message):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields
    header = json.dumps({"a": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    expected = re.escape(f"x.safetensors: 'a': {message}").replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        check_header(content, "x.safetensors")
