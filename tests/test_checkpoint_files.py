"""Checkpoints that are damaged, hostile or of another kind are refused by file and tensor."""

from __future__ import annotations

import json
import os
import struct

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_moe import checkpoint
from jax_moe.checkpoint import shards
from tests.hf_checkpoint import E4M3, QUANTIZATION, make_checkpoint, write_folder
from tests.test_checkpoint import assert_expert

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"
EXPERT = "model.layers.3.mlp.experts.5."


@pytest.fixture
def made(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def reads(monkeypatch):
    """What is read of the shards' data: (file, begin, bytes)."""
    found = []
    read_into = shards.Shard.read_into

    def record(self, begin, target):
        found.append((os.path.basename(self.where), begin, len(target)))
        return read_into(self, begin, target)

    monkeypatch.setattr(shards.Shard, "read_into", record)
    return found


def refused(made, *parts, error=ValueError, load=checkpoint.load_layer, **options):
    with pytest.raises(error) as caught:
        load(made.folder, 3, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def rewritten(made, changes, config=None):
    """The checkpoint with some tensors replaced, or left out where the value is None."""
    tensors = {**made.tensors, **changes}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    default = {"n_routed_experts": 8, "quantization_config": QUANTIZATION}
    write_folder(made.folder, tensors, default if config is None else config)


def edit_index(made, **changes):
    path = made.folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def edit_header(path, edit):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    edit({name: entry for name, entry in header.items() if name != "__metadata__"})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd.safetensors",
        "../model.safetensors",
        "..safetensors",
        "folder/model.safetensors",
        "C:\\model.safetensors",
        "model\0.safetensors",
        "model.bin",
        "x" * 300 + ".safetensors",
        "",
        7,
        None,
    ],
)
def test_the_index_names_files_of_its_folder_only(made, reads, file):
    edit_index(made, **{"some.tensor": file})
    refused(made, INDEX, "'some.tensor': expected the name of a .safetensors file")
    assert not reads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a weight_map with tensors in it, got None"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}', "a key appears twice"),
    ],
)
def test_an_index_that_is_malformed_is_refused(made, text, message):
    (made.folder / INDEX).write_text(text)
    refused(made, INDEX, message)


def test_an_index_of_any_size_is_not_read(made, monkeypatch):
    monkeypatch.setattr(shards, "MAX_JSON_BYTES", 1000)
    refused(made, INDEX, "bytes, more than 1000")


def test_folders_without_a_checkpoint(made, tmp_path):
    (tmp_path / "empty").mkdir()
    wrong = dict.fromkeys((None, 3, b"x", ()), TypeError)
    wrong |= dict.fromkeys(("", "a\0b", "\ud800"), ValueError)
    for folder, error in wrong.items():
        for function in (checkpoint.Checkpoint, checkpoint.load_packed):
            with pytest.raises(error, match=r"^folder: expected a path, got"):
                function(folder)
    for folder, message in (
        ("no", "expected the folder of .*, got nothing"),
        ("empty", "expected model.*, got neither"),
    ):
        with pytest.raises(ValueError, match=f"{folder}: {message}"):
            checkpoint.load_experts(tmp_path / folder, 3)


def test_a_pointer_of_git_lfs_is_called_one(made):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (made.folder / FIRST).write_text(text)
    refused(made, f"checkpoint/{FIRST}: a pointer of Git LFS, not the file")


@pytest.mark.parametrize("kind", ["missing", "dangling", "loop", "folder", "pipe"])
def test_a_shard_that_is_no_file_is_refused(made, kind):
    path = made.folder / FIRST
    path.unlink()
    if kind in ("dangling", "loop"):
        path.symlink_to("elsewhere" if kind == "dangling" else FIRST)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    refused(made, f"checkpoint/{FIRST}: ")


def shift(entries):
    """The last two tensors begin a byte early."""
    last = max(entries.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset - 1 for offset in last["data_offsets"]]


def leave(entries):
    last = max(entries.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset + 2**40 for offset in last["data_offsets"]]


def grow(entries):
    last = max(entries.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"][1] += last["data_offsets"][1] - last["data_offsets"][0]
    last["shape"][0] *= 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shift, "overlaps another tensor"),
        (leave, "leaves a hole before it"),
        (grow, "bytes, the file holds"),
        (lambda entries: entries[f"{EXPERT}up_proj.weight"].pop("dtype"), "exactly dtype, shape"),
        (lambda entries: entries[f"{EXPERT}up_proj.weight"].update(dtype="F9"), "got 'F9'"),
        (
            lambda entries: entries[f"{EXPERT}up_proj.weight"].update(shape=[128]),
            "expected 128 bytes",
        ),
    ],
)
def test_a_shard_whose_header_lies_is_refused(made, reads, edit, message):
    shard = json.loads((made.folder / INDEX).read_text())["weight_map"][f"{EXPERT}up_proj.weight"]
    edit_header(made.folder / shard, edit)
    refused(made, f"checkpoint/{shard}: ", "model.layers.3.mlp.experts.", message)
    assert not reads


@pytest.mark.parametrize("kept", [0, 7, 60, -10_000, -1])
def test_a_truncated_shard_is_refused(made, reads, kept):
    path = made.folder / FIRST
    path.write_bytes(path.read_bytes()[:kept])
    refused(made, f"checkpoint/{FIRST}: ")
    assert not reads


def test_a_shard_that_shrinks_while_it_is_read_is_named(made):
    source = checkpoint.Checkpoint(made.folder)
    checkpoint.load_experts(source, 3, rank=0, num_ranks=8)  # the headers are known from here on
    os.truncate(made.folder / FIRST, 5000)
    with pytest.raises(ValueError, match=rf"{FIRST}: 'model.*': the file was truncated while"):
        checkpoint.load_experts(source, 3)


def test_a_shard_that_is_replaced_changes_nothing(made):
    source = checkpoint.Checkpoint(made.folder)
    checkpoint.load_experts(source, 3)
    (made.folder / "other").write_bytes(b"other")
    (made.folder / "other").rename(made.folder / FIRST)
    assert_expert(checkpoint.load_experts(source, 3), 0, made.expert(0))


def zeros(shape, dtype):
    return np.zeros(shape, dtype)


BF16, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("up_proj.weight", zeros((128, 256), BF16), "F8_E4M3 [128, 256], got BF16 [128, 256]"),
        ("gate_proj.weight", zeros((128, 128), np.uint8), "F8_E4M3 [128, 256], got U8 [128, 128]"),
        ("up_proj.weight", zeros((256, 256), E4M3), "F8_E4M3 [128, 256], got F8_E4M3 [256, 256]"),
        ("up_proj.weight", zeros((256,), E4M3), "F8_E4M3 [128, 256], got F8_E4M3 [256]"),
        ("down_proj.weight", zeros((128, 256), E4M3), "F8_E4M3 [256, 128], got F8_E4M3 [128, 256]"),
        ("up_proj.weight_scale_inv", zeros((1,), np.float32), "[1, 2] (one per 128x128 block of"),
        ("up_proj.weight_scale_inv", zeros((), np.float32), "[1, 2] (one per 128x128 block of"),
        ("up_proj.weight_scale_inv", zeros((128, 8), E8M0), "[1, 2] (one per 128x128 block of"),
        ("down_proj.weight_scale_inv", zeros((2, 2), np.float32), "F32 or BF16 or F8_E8M0 [2, 1]"),
        ("down_proj.weight_scale_inv", zeros((2, 1), np.float16), "[2, 1] (one per 128x128"),
        ("gate_proj.weight", None, "missing, of 8 experts"),
        ("gate_proj.weight_scale_inv", None, "missing scale"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_refused(made, reads, name, array, message):
    rewritten(made, {f"{EXPERT}{name}": array})
    refused(made, ".safetensors", f"'{EXPERT}{name}': ", message)
    assert not reads
    if name != "gate_proj.weight" or array is not None:  # another rank does not look at it
        checkpoint.load_experts(made.folder, 3, rank=0, num_ranks=2)


def test_576_rows_need_5_rows_of_scales(tmp_path):
    made = make_checkpoint(tmp_path, intermediate=576, num_experts=2)
    checkpoint.load_experts(tmp_path, 3)
    name = "model.layers.3.mlp.experts.1.up_proj.weight_scale_inv"
    rewritten(made, {name: np.ones((4, 2), np.float32)}, {})
    refused(made, f"'{name}': expected F32 or BF16 or F8_E8M0 [5, 2]", "got F32 [4, 2]")


def test_a_hidden_size_that_is_no_multiple_is_refused(tmp_path):
    made = make_checkpoint(tmp_path, hidden=192)
    refused(
        made, "up_proj.weight': expected a hidden size that is a multiple of 128, got [128, 192]"
    )


def test_scales_per_channel_are_named(made):
    name = f"{EXPERT}up_proj.weight_scale"
    rewritten(made, {f"{name}_inv": None, name: np.ones((128, 1), np.float32)}, {})
    refused(made, f"'{name}_inv': missing scale; '{name}' is there: scales per tensor or channel")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "compressed-tensors"}, "quant_method: expected 'fp8'"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method: expected 'fp8'"),
        ({"quant_method": "mxfp4"}, "quant_method: expected 'fp8'"),
        ({"quant_method": None}, "quant_method: expected 'fp8'"),
        ({"weight_block_size": None}, "weight_block_size: expected [128, 128]"),
        ({"weight_block_size": [1, 32]}, "weight_block_size: expected [128, 128]"),
        ({"fmt": "e5m2"}, "fmt: expected 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme: expected 'dynamic'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_another_quantization_is_refused(made, changes, message, nested):
    config = {"quantization_config": {**QUANTIZATION, **changes}}
    config = {"text_config": config} if nested else config
    (made.folder / "config.json").write_text(json.dumps(config))
    refused(made, "config.json: quantization_config: ", message)


def test_config_json_may_be_missing_but_not_malformed(made):
    (made.folder / "config.json").unlink()
    assert checkpoint.load_experts(made.folder, 3).num_local_experts == 8
    (made.folder / "config.json").write_text("{")
    refused(made, "config.json: not valid JSON")
    (made.folder / "config.json").write_text('{"quantization_config": "fp8"}')
    refused(made, "config.json: quantization_config: expected an object, got str")


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"gate.weight": np.zeros((4, 256), BF16)}, {}, "[8, 256], got BF16 [4, 256]"),
        ({"gate.weight": np.zeros((8, 256), E4M3)}, {}, "expected F32 or BF16"),
        ({"gate.weight": None}, {}, "gate.weight': missing"),
        ({"gate.e_score_correction_bias": np.zeros(4, np.float32)}, {}, "[8], got F32 [4]"),
        ({"gate.e_score_correction_bias": None}, {"topk_method": "noaux_tc"}, "routing bias"),
        ({"shared_experts.up_proj.weight": np.zeros((128, 256), BF16)}, {}, "expected F8_E4M3"),
        ({}, {"n_routed_experts": 9}, "experts.8.gate_proj.weight': missing, of 9 experts"),
        ({}, {"n_routed_experts": 7}, "config.json has 7 experts only"),
    ],
)
def test_a_layer_whose_other_parts_do_not_fit_is_refused(made, reads, changes, config, message):
    rewritten(made, {f"model.layers.3.mlp.{n}": array for n, array in changes.items()}, config)
    refused(made, message, "model.layers.3.mlp.")
    assert not reads


def test_shared_experts_are_never_dropped(made):
    prefix = "model.layers.3.mlp.shared_experts."
    without = {name: None for name in made.tensors if name.startswith(prefix)}
    rewritten(made, without, {"n_shared_experts": 1})
    refused(made, "missing, though", "n_shared_experts")
    rewritten(made, without | {f"{prefix}gate_up_proj.weight": np.zeros(3, E4M3)}, {})
    refused(made, f"'{prefix}gate_up_proj.weight': shared experts of an unknown kind")


def test_layers_that_are_not_there(made):
    fused = {"model.layers.4.mlp.experts.gate_up_proj": np.zeros((2, 2, 2), E4M3)}
    rewritten(made, fused | {"model.layers.5.mlp.up_proj.weight": np.zeros(3, E4M3)})
    for layer, message in (
        (4, "expected one tensor per expert and projection, .*, got .*gate_up_proj'"),
        (5, "layer 5: no tensor such as"),
        (33, "layer 33: no tensor such as"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load_layer(made.folder, layer)


def test_the_index_and_a_shard_disagree(made):
    edit_index(made, **{f"{EXPERT}up_proj.weight": FIRST})
    refused(made, f"checkpoint/{FIRST}: '{EXPERT}up_proj.weight': no such tensor")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 2, "num_ranks": 2}, ValueError, "rank: expected 0..1, got 2"),
        ({"num_ranks": 3}, ValueError, "num_ranks: expected a divisor of the 8 experts, got 3"),
        ({"num_ranks": 0}, ValueError, "num_ranks: expected"),
        ({"rank": "0"}, TypeError, "rank: expected"),
        ({"tensor_parallel": (2, 2)}, ValueError, "tensor_parallel[0]: expected 0..1, got 2"),
        ({"tensor_parallel": 2}, TypeError, "tensor_parallel: expected (rank, ranks), got 2"),
        ({"num_threads": 0}, ValueError, "num_threads: expected"),
        ({"progress": "no"}, TypeError, "progress: expected a bool, got 'no'"),
        ({"sharding": "expert"}, TypeError, "sharding: expected a jax.sharding.Mesh"),
    ],
)
def test_options_that_do_not_fit(made, options, error, message):
    refused(made, message, error=error, **options)


@pytest.mark.parametrize(
    "name", ["layer", "rank", "num_ranks", "tensor_parallel", "num_threads", "sharding", "progress"]
)
def test_options_of_other_types(made, name):
    none = jax.sharding.Mesh(np.array(jax.devices()[0]), ())
    for value in ([], {}, "x", float("nan"), -1, 10**5000, [10**5000], (10**5000, 2), none):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[.\])?: expected .*, got "):
            checkpoint.load_experts(made.folder, **{"layer": 3, name: value})


def test_only_this_ranks_bytes_are_read_in_file_order(made, reads):
    checkpoint.load_experts(made.folder, 3, rank=1, num_ranks=4, num_threads=1)
    values = [read for read in reads if read[2] > 16]
    assert values == sorted(values)
    assert sum(count for _, _, count in values) == 2 * 3 * 128 * 256
    headers = checkpoint.Checkpoint(made.folder)
    wanted = set()
    for expert in (2, 3):
        for name in ("gate_proj", "up_proj", "down_proj"):
            for ending in ("weight", "weight_scale_inv"):
                tensor = headers.tensor(f"model.layers.3.mlp.experts.{expert}.{name}.{ending}")
                file = os.path.basename(tensor.shard.where)
                wanted.add((file, tensor.info.begin, tensor.nbytes))
    assert set(reads) == wanted


def test_a_header_of_any_size_is_not_read(made):
    with (made.folder / FIRST).open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)
    refused(made, f"{FIRST}: header of {2**30} bytes in a file of {2**31}")
