"""Tables of tilings in the user's cache folder: used where valid, ignored with a warning else."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import pytest

from bench import environment, workloads
from pallas_kernels import device, files
from pallas_kernels.mosaic import tiling_check, tilings
from pallas_kernels.tuning import cache, table_format
from pallas_kernels.tuning.table_format import DEEPSEEK_V3, Kernels, Key, Pair, Sizes

KIND = "NVIDIA H100 80GB HBM3"
ROOT = pathlib.Path(__file__).parent.parent


_SHIPPED = table_format.shipped(tilings.KERNELS, "sm_90", DEEPSEEK_V3)


def gpu(kind=KIND, capability="9.0"):
    return types.SimpleNamespace(
        device_kind=kind, compute_capability=capability, platform="gpu", core_count=132
    )


@pytest.fixture
def path(monkeypatch, tmp_path):
    """Where the table of this machine's GPU lies; the folder exists."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.SWITCH, raising=False)
    monkeypatch.setattr(device, "local_gpu", gpu)
    cache.choose.cache_clear()
    path = cache.path_of("mosaic", KIND, DEEPSEEK_V3)
    path.parent.mkdir(parents=True)
    yield path
    cache.choose.cache_clear()


def shipped():
    return _SHIPPED


def other_table(number=0):
    """Two tables with another ring throughout."""
    ring = {"num_stages": 3, "stages_per_fill": 1} | ({"tail_widths": ()} if number else {})
    return {
        block_m: Pair(*(dataclasses.replace(config, **ring) for config in pair))
        for block_m, pair in shipped().items()
    }


def write(path, table=None, kind=KIND, sizes=DEEPSEEK_V3):
    key = Key("mosaic", kind, sizes)
    table_format.write(path, key, table or other_table(), measured=[])


def used(sizes=DEEPSEEK_V3):
    cache.choose.cache_clear()
    return {m: tilings.choose(m, *sizes) for m in tilings.KERNELS.block_ms}


def is_shipped():
    return tilings.chosen(DEEPSEEK_V3).is_shipped


def test_a_table_for_this_device_is_used(path):
    name = "mosaic-NVIDIA-H100-80GB-HBM3-h7168-i2048-e32.json"
    assert path == path.parents[2] / "jax_moe" / "tuning" / name
    assert used() == shipped()
    assert is_shipped()
    write(path)
    assert used() == other_table() != shipped()
    assert not is_shipped()


def test_the_benchmark_says_whose_tilings_it_used(path, monkeypatch):
    here = gpu()
    here.memory_stats = lambda: {"bytes_limit": 1}
    monkeypatch.setattr(jax, "devices", lambda: [here])
    assert environment.device()["tuned"] == []
    write(path)
    cache.choose.cache_clear()
    assert environment.device()["tuned"] == ["mosaic"]
    assert environment.device(workloads.FULL)["tuned"] == ["mosaic"]


def test_sizes_without_a_table_get_that_of_deepseek(path, monkeypatch):
    kimi = Sizes(7168, 2048, 48)
    monkeypatch.setattr(tilings, "KERNELS", dataclasses.replace(tilings.KERNELS, check=passing))
    assert used(kimi) == shipped()
    write(path)
    assert used(kimi) == other_table()
    write(path.with_name(Key("mosaic", KIND, kimi).file_name), other_table(1), sizes=kimi)
    assert used(kimi) == other_table(1)
    assert used() == other_table()


def passing(role, config, sizes):
    """The check of kernels that can always be built."""


@pytest.mark.parametrize("kind", ["NVIDIA H20", "NVIDIA GH200 480GB", None])
def test_a_gpu_without_a_table_gets_that_of_its_capability(path, monkeypatch, kind):
    monkeypatch.setattr(device, "local_gpu", lambda: kind and gpu(kind))
    assert used() == shipped()


def test_a_shipped_table_of_the_gpu_itself_comes_first(path, monkeypatch, tmp_path):
    """Its sizes before its kind: a table for other sizes serves only where there is no fitting."""
    folder, kimi = tmp_path / "package", Sizes(7168, 2048, 48)
    monkeypatch.setattr(table_format, "FOLDER", folder)
    monkeypatch.setattr(tilings, "KERNELS", dataclasses.replace(tilings.KERNELS, check=passing))
    one, two = other_table(0), other_table(1)
    for key, table in (
        (Key("mosaic", "sm_90", DEEPSEEK_V3), one),
        (Key("mosaic", KIND, kimi), two),
    ):
        table_format.write(folder / key.file_name, key, table, [])
    assert (used(), used(kimi)) == (one, two)
    monkeypatch.setattr(device, "local_gpu", lambda: gpu("NVIDIA H200"))
    assert used(kimi) == one


def test_a_capability_without_any_table_is_an_error():
    with pytest.raises(LookupError, match="no shipped tilings of mosaic for sm_80"):
        cache.choose(tilings.KERNELS, cache.Gpu("8.0"), DEEPSEEK_V3)


def test_it_is_read_once_a_process(path):
    write(path)
    before = used()
    path.write_text("spoilt since")
    assert tilings.choose(16, *DEEPSEEK_V3) == before[16]


def test_it_can_be_switched_off(path, monkeypatch):
    write(path)
    monkeypatch.setenv(cache.SWITCH, "off")
    assert used() == shipped()
    cache.choose.cache_clear()
    monkeypatch.setenv(cache.SWITCH, "bogus")
    with pytest.warns(match="^JAX_MOE_TUNING: ignored: expected 'off' or nothing, got 'bogus'$"):
        assert used() != shipped()


def test_without_a_gpu_no_file_is_looked_at(path, monkeypatch):
    path.write_text("not even read")
    monkeypatch.setattr(device, "local_gpu", lambda: None)
    assert used() == shipped()


def test_a_target_that_is_not_here_is_no_local_gpu(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu()])
    assert device.local_gpu().device_kind == KIND
    target = jax.sharding.AbstractDevice(KIND, 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=target)
    with jax.sharding.use_abstract_mesh(mesh):
        assert device.local_gpu() is None


def spoil(**changes):
    """Replaces top-level fields of the file."""
    return lambda content: json.dumps(content | changes)


def spoil_config(**changes):
    """Replaces fields of one configuration; None removes one."""

    def spoilt(content):
        config = content["table"]["128"]["up_projection"]
        config.update(changes)
        content["table"]["128"]["up_projection"] = {
            key: value for key, value in config.items() if value != "absent"
        }
        return json.dumps(content)

    return spoilt


def without_class(content):
    del content["table"]["16"]
    return json.dumps(content)


FAULTS = {
    "empty": (lambda content: "", "Expecting value"),
    "cut off": (lambda content: json.dumps(content)[:-40], "delimiter|Unterminated|Expecting"),
    "code": (lambda content: "__import__('os').abort()", "Expecting value"),
    "not UTF-8": (lambda content: b"\xff\xfe{}", "can't decode"),
    "nested": (lambda content: "[" * 200_000, "nested too deeply"),
    "a huge number": (lambda content: "9" * 10_000, "digits"),
    "a list": (lambda content: "[]", "expected a JSON object, got list"),
    "large": (lambda content: " " * (2**20 + 1), "expected at most 1048576 bytes, got 1048577"),
    "foreign device": (spoil(device="NVIDIA A100"), "device: expected 'NVIDIA H100"),
    "other JAX": (spoil(jax="0.4.0"), "jax: expected"),
    "old schema": (spoil(schema=1), "schema: expected 2, got 1"),
    "other sizes": (spoil(hidden_size=4096), "hidden_size: expected 7168, got 4096"),
    "other kernels": (spoil(kernels="triton"), "kernels: expected 'mosaic', got 'triton'"),
    "no table": (spoil(table=None), "table: expected the fields"),
    "missing class": (without_class, r"table: expected the fields .*'16'"),
    "unknown field": (spoil_config(colour=1), r"table\.128\.up_projection: expected the fields"),
    "missing field": (spoil_config(num_stages="absent"), "expected the fields"),
    "a string": (spoil_config(num_stages="4"), r"num_stages: expected .*int.*, got '4'"),
    "a float": (spoil_config(num_stages=4.0), "num_stages: expected"),
    "a bool": (spoil_config(num_stages=True), "num_stages: expected"),
    "null": (spoil_config(num_stages=None), "num_stages: expected"),
    "beyond 32 bits": (spoil_config(num_stages=2**40), "num_stages: expected"),
    "no tuple": (spoil_config(tail_widths=16), "tail_widths: expected"),
    "an unknown scheduler": (spoil_config(scheduler="fair"), "scheduler: expected one of"),
    "a scheduler in a list": (spoil_config(scheduler=["static"]), "scheduler: expected one of"),
    "out of range": (spoil_config(num_stages=1), "num_stages: expected at least 2"),
    "no CTA": (spoil_config(sms=0), "sms: expected None or at least 1, got 0"),
    "fewer than no CTA": (spoil_config(sms=-1), "sms: expected None or at least 1"),
    "more CTAs than SMs": (spoil_config(sms=133), "sms: expected at most the 132 of this GPU"),
    "another class": (spoil_config(block_m=64, tail_widths=[]), "block_m: expected 128"),
    "too large for shared memory": (spoil_config(num_stages=40), "bytes of shared memory"),
    "a slot too large": (spoil_config(num_stages=5, tail_widths=[]), "bytes of shared memory"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_file_is_ignored_with_a_warning(path, fault, reason):
    write(path, shipped())
    content = fault(json.loads(path.read_text()))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=f"{path.name}: ignored, the shipped tilings .*({reason})"):
        assert used() == shipped()


def link(path):
    write(path.with_name("elsewhere.json"))
    path.symlink_to("elsewhere.json")


ODD_FILES = {
    "link": (link, "symbolic"),
    "loop": (lambda path: path.symlink_to(path), "symbolic"),
    "pipe": (os.mkfifo, "regular file, got a pipe"),
    "folder": (pathlib.Path.mkdir, "regular file, got a folder"),
}


@pytest.mark.parametrize(("make", "reason"), ODD_FILES.values(), ids=ODD_FILES)
def test_what_is_no_regular_file_is_ignored(path, make, reason):
    make(path)
    with pytest.warns(UserWarning, match=reason):
        assert used() == shipped()


def test_writing_replaces_a_link_and_spares_its_target(path, tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    path.symlink_to(target)
    write(path)
    assert target.read_text() == "precious"
    assert not path.is_symlink()
    assert used() == other_table()


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    write(path)

    def refuse(source, destination):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write(path, other_table(1))
    assert used() == other_table()
    assert list(path.parent.iterdir()) == [path]


WRITER = """
import pathlib, sys
from tests.test_tuning_cache import other_table, write
for _ in range(300):
    write(pathlib.Path(sys.argv[1]), other_table(int(sys.argv[2])))
"""


def test_two_processes_write_at_once(path):
    """A reader finds either table whole, at any moment."""
    write(path, other_table(0))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)], env=environment)
        for number in (0, 1)
    ]
    known, seen, key = (other_table(0), other_table(1)), [0, 0], Key("mosaic", KIND, DEEPSEEK_V3)
    while any(writer.poll() is None for writer in writers):
        table = table_format.parse(path.read_text(), tilings.KERNELS, key)
        seen[known.index(table)] += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sum(seen) > 0
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("root", ["", "relative/cache"])
def test_without_an_absolute_cache_folder_it_is_the_one_at_home(monkeypatch, tmp_path, root):
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "jax_moe"


def test_without_a_home_the_shipped_table_is_used(path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert used() == shipped()


@dataclasses.dataclass(frozen=True)
class Fields:
    """One of each type that a configuration may have."""

    block_m: int
    switch: bool = False
    some: tuple[int, ...] = ()
    maybe: int | None = None
    old_style: typing.Optional[int] = None  # noqa: UP045
    choice: typing.Literal["slow", "fast"] = "slow"


KEY = Key("any", KIND, DEEPSEEK_V3)
KERNELS = Kernels("any", Fields, (16,), lambda *_: None)


@pytest.mark.parametrize("config", [Fields(16), Fields(16, True, (1, 2), 3, 4, "fast")])
def test_configurations_of_plain_fields_come_back(tmp_path, config):
    file, table = tmp_path / "t.json", {16: Pair(config, config)}
    table_format.write(file, KEY, table, measured=[{"us": 1.5}, {"us": 2.5}], note="by hand")
    result = table_format.parse(file.read_text(), KERNELS, KEY)
    assert result == table
    assert type(result[16].up_projection.switch) is bool
    content = json.loads(file.read_text())
    assert (content["measured"], content["note"]) == ([{"us": 1.5}, {"us": 2.5}], "by hand")
    assert file.read_text().count("\n") == 20  # a line per tiling and per measurement


@pytest.mark.parametrize(
    "bad",
    [{"switch": 1}, {"some": [1, "2"]}, {"some": [[1]]}, {"maybe": ""}]
    + [{"choice": value} for value in ("", "quick", 1, None)],
)
def test_other_types_are_refused(tmp_path, bad):
    config = dataclasses.replace(Fields(16), **bad)
    table_format.write(tmp_path / "t.json", KEY, {16: Pair(config, config)}, measured=[])
    with pytest.raises(ValueError, match=rf"table\.16\.up_projection\.{next(iter(bad))}: expected"):
        table_format.parse((tmp_path / "t.json").read_text(), KERNELS, KEY)


@pytest.mark.parametrize("file", sorted(table_format.FOLDER.iterdir()), ids=lambda file: file.stem)
def test_shipped_files_are_named_by_what_they_are_for(file):
    content = json.loads(file.read_text())
    sizes = Sizes(*(content[name] for name in Sizes._fields))
    assert file.name == Key(content["kernels"], content["device"], sizes).file_name
    assert content["note"]
    assert file.read_text() == table_format._text(content) + "\n"


SHIPPED = sorted(table_format.FOLDER.iterdir())


@pytest.mark.parametrize(
    "file", [file for file in SHIPPED if file.name.startswith("mosaic")], ids=lambda file: file.stem
)
def test_the_shipped_tables_pass_their_own_check(file):
    content = json.loads(file.read_text())
    sizes = Sizes(*(content[name] for name in Sizes._fields))
    table = table_format.shipped(tilings.KERNELS, content["device"], sizes)
    for pair in table.values():
        for role, config in pair._asdict().items():
            tiling_check.check(role, config, sizes)


def test_the_check_works_while_something_is_traced():
    config = dataclasses.replace(shipped()[128].up_projection, num_stages=40)

    def step(x):
        with pytest.raises(ValueError, match="shared memory"):
            tiling_check.check("up_projection", config, DEEPSEEK_V3)
        tiling_check.check("up_projection", shipped()[128].up_projection, DEEPSEEK_V3)
        return x

    assert jax.jit(jax.vmap(step))(jnp.ones(2)).shape == (2,)
