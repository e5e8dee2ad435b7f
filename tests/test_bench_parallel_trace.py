"""Traces of `python -m bench.parallel_gpus` that are damaged."""

import gzip
import json

import pytest

from bench import parallel_gpus

CONTENTS = {
    "empty": b"",
    "no gzip": b"text",
    "cut off": gzip.compress(b"{}")[:12],
    "no blocks": gzip.compress(b"")[:10] + b"\xff" * 30,
    "no events": gzip.compress(b"{}"),
    "no JSON": gzip.compress(b"{"),
    "no text": gzip.compress(b"\xff\xfe\xff"),
    "a list": gzip.compress(b"[1]"),
    "null": gzip.compress(b'{"traceEvents": null}'),
    "a number for an event": gzip.compress(b'{"traceEvents": [1]}'),
    "an event without a name": gzip.compress(b'{"traceEvents": [{"ph": "M"}]}'),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_damaged_trace_is_named(tmp_path, capsys, content):
    trace = {"exchange": "collectives", "tokens": 128, "trace": "trace_collectives_128.json.gz"}
    (tmp_path / "trace_collectives_128.json").write_text(json.dumps({"about": {}, "rows": [trace]}))
    path = tmp_path / trace["trace"]
    path.write_bytes(content)
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m bench.parallel_gpus: --documents: {path}: ")
    assert said.count("\n") == 1
