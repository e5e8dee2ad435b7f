"""Data sets that nobody vouches for: read right, or refused with the file and entry named."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors.numpy import save_file

import bench_main
from interop.dataset import read_routing, read_workloads
from interop.workloads import definition

NAME = definition()["name"]
TOKENS = 5
BLOB = "blob/workloads/moe/routing.safetensors"
RANDOM = (
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
)


def line(uuid="abc-1", tokens=TOKENS, path=BLOB, offset=32, factor=2.5):
    blobs = ("routing_logits", "routing_bias")
    inputs = {name: {"type": "random"} for name in RANDOM}
    inputs |= {n: {"type": "safetensors", "path": path, "tensor_key": n} for n in blobs}
    inputs["local_expert_offset"] = {"type": "scalar", "value": offset}
    inputs["routed_scaling_factor"] = {"type": "scalar", "value": factor}
    workload = {"uuid": uuid, "axes": {"seq_len": tokens}, "inputs": inputs}
    return {"definition": NAME, "solution": None, "workload": workload, "evaluation": None}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "workloads" / "moe").mkdir(parents=True)
    (root / BLOB).parent.mkdir(parents=True)
    write_lines(root, [line()])
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((TOKENS, 256)).astype(np.float32)
    bias = rng.standard_normal(256).astype(ml_dtypes.bfloat16)
    save_file({"routing_logits": logits, "routing_bias": bias}, root / BLOB)
    return root


def write_lines(root, lines):
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    (root / "workloads" / "moe" / f"{NAME}.jsonl").write_text(text + "\n")


def write_blob(root, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (root / BLOB).write_bytes(struct.pack("<Q", len(text)) + text + data)


def routing_of(root):
    (row,) = read_workloads(root)
    return read_routing(root, row)


def test_workloads_and_tensors_come_back_as_written(folder):
    (row,) = read_workloads(folder)
    assert row.workload[:3] == ("abc-1", TOKENS, 32)
    assert row.routed_scaling_factor == 2.5
    logits, bias = read_routing(folder, row)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(logits, rng.standard_normal((TOKENS, 256)).astype(np.float32))
    assert bias.dtype == ml_dtypes.bfloat16
    assert bias.shape == (256,)


def test_a_path_may_start_with_a_dot(folder):
    write_lines(folder, [line(path=f"./{BLOB}")])
    assert routing_of(folder)[0].shape == (TOKENS, 256)


def changed(path, value):
    """The valid line with one entry replaced, or removed if `value` is `...`."""
    whole = line()
    *parents, last = path
    entry = whole
    for key in parents:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return whole


INPUTS = ("workload", "inputs")
LOGITS = (*INPUTS, "routing_logits")
OFFSET = (*INPUTS, "local_expert_offset", "value")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("definition",), "other", "definition 'other' is not"),
        (("workload",), [1], "workload: expected an object, got list"),
        (("extra",), 1, "unknown key 'extra'"),
        (("workload", "extra"), 1, "unknown key 'extra'"),
        (("workload", "uuid"), ..., "missing 'uuid'"),
        (("workload", "uuid"), "../x", "uuid: expected letters"),
        (
            ("workload", "axes", "seq_len"),
            -1,
            "seq_len: expected an integer in 0..1048576, got -1",
        ),
        (("workload", "axes", "seq_len"), True, "got True"),
        (("workload", "axes", "seq_len"), 10**30, "seq_len: expected an integer"),
        (("workload", "axes", "seq_len"), "5", "got '5'"),
        (OFFSET, 225, "local_expert_offset: expected an integer in 0..224, got 225"),
        (OFFSET, 1.0, "local_expert_offset"),
        ((*INPUTS, "routed_scaling_factor", "value"), "2", "routed_scaling_factor: expected a num"),
        ((*INPUTS, "hidden_states", "type"), "scalar", "hidden_states: expected type 'random'"),
        (
            (*LOGITS, "type"),
            "pickle",
            "routing_logits: expected type 'safetensors', got 'pickle'",
        ),
        ((*LOGITS, "path"), "/etc/passwd", "relative path without '..', got '/etc/passwd'"),
        ((*LOGITS, "path"), "blob/../../x", "relative path without '..'"),
        ((*LOGITS, "path"), "a\0b", "relative path"),
        ((*LOGITS, "path"), 3, "expected text"),
        (
            (*LOGITS, "path"),
            "\ud800",
            r"routing_logits: expected a path of Unicode text, got '\ud800'",
        ),
        ((*LOGITS, "tensor_key"), None, "expected text"),
    ],
)
def test_a_line_that_does_not_fit_is_refused(folder, path, value, message):
    write_lines(folder, [changed(path, value)])
    with pytest.raises(ValueError, match=rf"{NAME}\.jsonl:1.*") as caught:
        read_workloads(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"definition": 1, "definition": 2}', "a key appears twice"),
        ('{"definition": NaN}', "NaN is not a number"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("x" * (2**20 + 1), "line longer than"),
    ],
)
def test_text_that_is_no_workload_is_refused(folder, text, message):
    write_lines(folder, [line(), text])
    with pytest.raises(ValueError, match=rf"{NAME}\.jsonl:2: .*{message}"):
        read_workloads(folder)


@pytest.mark.parametrize(
    ("factor", "shown"),
    [
        ("1e999", "inf"),
        ("1e39", r"1e\+39"),
        ("-3.5e38", r"-3\.5e\+38"),
        ("1" + "0" * 400, r"10+\.\.\.0+"),
    ],
)
def test_a_factor_that_float32_does_not_hold_is_refused(folder, factor, shown):
    write_lines(folder, [line(), json.dumps(line("abc-2")).replace("2.5", factor)])
    accepted = r"a number in -3\.40282e\+38\.\.3\.40282e\+38"
    message = rf"\.jsonl:2: routed_scaling_factor: expected {accepted}, got {shown}"
    with pytest.raises(ValueError, match=message + "$"):
        read_workloads(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_lines_that_are_not_utf_8_are_refused(folder, encoding):
    path = folder / "workloads" / "moe" / f"{NAME}.jsonl"
    path.write_bytes(json.dumps(line(path="blob/\xe9"), ensure_ascii=False).encode(encoding))
    with pytest.raises(ValueError, match=rf"{NAME}\.jsonl:1: not valid JSON"):
        read_workloads(folder)


def test_the_same_uuid_twice_is_refused(folder):
    write_lines(folder, [line(), line()])
    with pytest.raises(ValueError, match="uuid abc-1 appears twice"):
        read_workloads(folder)


def test_missing_folders_and_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a data set folder"):
        read_workloads(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"no workloads/\*\*/{NAME}.jsonl"):
        read_workloads(tmp_path)
    (folder / BLOB).unlink()
    with pytest.raises(ValueError, match=r"routing\.safetensors: no such file"):
        routing_of(folder)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("blob/" + "x" * 256, "x" * 256 + ": .*too long"),
        ("y/" * 3000 + "z", r"/y/y/y.*\.\.\..*/y/z: .*too long"),
        ("blob/\xe9" + "\xe9" * 127, "\xe9" * 128 + ": .*"),  # 256 bytes
        ("blob/two\nlines", r"two\\nlines': no such file"),
        ("", "no such file"),
    ],
    ids=["component", "path", "bytes", "line break", "empty"],
)
def test_a_path_that_names_no_file_is_one_line(folder, path, shown):
    write_lines(folder, [line(path=path)])
    with pytest.raises(ValueError, match=f"^workload abc-1: routing_logits: .*{shown}") as caught:
        routing_of(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def loop(path):
    path.unlink()
    path.symlink_to(path.name)
    return path


def test_symlinks_that_lead_to_themselves_are_named(folder, tmp_path):
    loop(folder / BLOB)
    with pytest.raises(ValueError, match=r"abc-1: routing_logits: .*/routing\.safetensors: "):
        routing_of(folder)
    loop(folder / "workloads" / "moe" / f"{NAME}.jsonl")
    with pytest.raises(ValueError, match=rf"/{NAME}\.jsonl: "):
        read_workloads(folder)
    (tmp_path / "root").symlink_to("root")
    with pytest.raises(ValueError, match="/root: "):
        read_workloads(tmp_path / "root")


@pytest.mark.parametrize(("root", "shown"), [("a\0b", r"'a\\x00b': "), ("x" * 256, "x{256}: ")])
def test_a_root_that_is_no_path_is_named(root, shown):
    with pytest.raises(ValueError, match=f"^{shown}"):
        read_workloads(root)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: loop(root / BLOB), "routing.safetensors: "),
        (lambda root: write_lines(root, [line(path="x" * 256)]), "xxx: "),
        (lambda root: write_lines(root, [line(path="\ud800")]), "got '\\ud800'"),
        (lambda root: write_lines(root, [line(factor=10**400)]), "routed_scaling_factor: "),
        (lambda root: write_lines(root, [line(offset=5)]), "expected a multiple of 32, got 5"),
    ],
    ids=["loop", "long", "surrogate", "factor", "offset"],
)
def test_the_benchmark_ends_with_one_line_and_exit_code_2(folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    flags = [f"--dataset={folder}", "--inputs=dataset", f"--output={tmp_path}", "--warmup=1"]
    with flagsaver.flagsaver():
        flags = bench_main._parse(["bench_main.py", *flags, "--solutions=jax_moe_xla"])
        assert bench_main.main(flags) == bench_main.USAGE_ERROR
    *_, last = capsys.readouterr().err.splitlines()  # progress may come before
    assert last.startswith("bench_main.py: ")
    assert message in last


def test_symlinks_out_of_the_folder_are_not_followed(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / BLOB).rename(outside)
    (folder / BLOB).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the data set folder"):
        routing_of(folder)
    (folder / BLOB).unlink()
    outside.rename(folder / "elsewhere.safetensors")
    (folder / BLOB).symlink_to(folder / "elsewhere.safetensors")
    assert routing_of(folder)[0].shape == (TOKENS, 256)


def test_a_linked_workload_file_outside_is_not_read(folder, tmp_path):
    inside = folder / "workloads" / "moe" / f"{NAME}.jsonl"
    inside.rename(tmp_path / "lines.jsonl")
    inside.symlink_to(tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match="leads out of the data set folder"):
        read_workloads(folder)


def test_a_linked_workload_folder_outside_is_not_listed(folder, tmp_path, monkeypatch):
    (folder / "workloads").rename(tmp_path / "outside")
    (folder / "workloads").symlink_to(tmp_path / "outside")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    with pytest.raises(ValueError, match="/workloads: leads out of the data set folder"):
        read_workloads(folder)
    assert listed == []
    (folder / "workloads").unlink()
    (folder / "workloads").mkdir()
    (folder / "workloads" / "moe").symlink_to(tmp_path / "outside" / "moe")
    with pytest.raises(ValueError, match="no workloads"):
        read_workloads(folder)
    assert set(listed) <= {str(folder / "workloads")}


def test_a_linked_workload_folder_inside_is_read(folder):
    (folder / "workloads").rename(folder / "elsewhere")
    (folder / "workloads").symlink_to("elsewhere")
    assert len(read_workloads(folder)) == 1


LOGIT_BYTES = TOKENS * 256 * 4
GOOD = {
    "routing_logits": {"dtype": "F32", "shape": [TOKENS, 256], "data_offsets": [0, LOGIT_BYTES]},
    "routing_bias": {
        "dtype": "BF16",
        "shape": [256],
        "data_offsets": [LOGIT_BYTES, LOGIT_BYTES + 512],
    },
}
DATA = bytes(LOGIT_BYTES + 512)


def entry(name, **changes):
    return {**GOOD, name: {**GOOD[name], **changes}}


def test_the_hand_made_header_is_good_as_it_stands(folder):
    write_blob(folder, {"__metadata__": {"made": "by hand"}, **GOOD}, DATA)
    assert not routing_of(folder)[0].any()


@pytest.mark.parametrize("at", [0, LOGIT_BYTES, LOGIT_BYTES + 512])
def test_an_empty_tensor_may_be_named_last(folder, at):
    empty = {"dtype": "F32", "shape": [0, 256], "data_offsets": [at, at]}
    write_blob(folder, {**GOOD, "empty": empty}, DATA)
    assert routing_of(folder)[0].shape == (TOKENS, 256)


def test_no_tokens_are_an_empty_tensor(folder):
    write_lines(folder, [line(tokens=0)])
    bias = {**GOOD["routing_bias"], "data_offsets": [0, 512]}
    logits = {"dtype": "F32", "shape": [0, 256], "data_offsets": [0, 0]}
    write_blob(folder, {"routing_bias": bias, "routing_logits": logits}, DATA[:512])
    assert routing_of(folder)[0].shape == (0, 256)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (GOOD, DATA[:-1], "tensors take 5632 bytes, the file holds 5631"),
        (GOOD, DATA + b"x", "tensors take 5632 bytes, the file holds 5633"),
        (b"{", DATA, "header: not valid JSON"),
        (b"\xff\xfe", DATA, "header: not valid JSON"),
        (b"[]", DATA, "header: expected a JSON object"),
        (b'{"a": 1, "a": 2}', DATA, "a key appears twice"),
        ({"__metadata__": {"a": 1}, **GOOD}, DATA, "'__metadata__': expected an object of strings"),
        (entry("routing_bias", dtype="F8"), DATA, "'routing_bias': dtype: expected one of BOOL, "),
        (entry("routing_bias", extra=1), DATA, "expected exactly dtype, shape and data_offsets"),
        (entry("routing_bias", shape=[-256]), DATA, "shape: expected at most 8 integers"),
        (entry("routing_bias", shape=[True]), DATA, "shape: expected at most 8 integers"),
        (entry("routing_bias", shape=[2**62, 2**62]), DATA, "takes"),
        (entry("routing_bias", data_offsets=[0, 512]), DATA, "overlaps another tensor"),
        ({**GOOD, "e": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, DATA, "overlaps"),
        (json.dumps(GOOD).encode("utf-16"), DATA, "header: not valid JSON: expected UTF-8"),
        (entry("routing_bias", data_offsets=[2**40, 2**40 + 512]), DATA, "leaves a hole before it"),
        (entry("routing_bias", data_offsets=[LOGIT_BYTES]), DATA, "data_offsets: expected two"),
        (entry("routing_bias", dtype="F16"), DATA, "expected BF16[256], got F16[256]"),
        (
            entry("routing_logits", shape=[256, TOKENS]),
            DATA,
            "expected F32[5, 256], got F32[256, 5]",
        ),
        ({"routing_logits": GOOD["routing_logits"]}, DATA[:-512], "'routing_bias': no such tensor"),
    ],
)
def test_a_blob_that_does_not_fit_is_refused(folder, header, data, message):
    write_blob(folder, header, data)
    with pytest.raises(ValueError, match=r"routing\.safetensors") as caught:
        routing_of(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x01\x02", "truncated: 2 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes in a file of 10"),
    ],
)
def test_a_truncated_file_is_refused(folder, content, message):
    (folder / BLOB).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        routing_of(folder)
