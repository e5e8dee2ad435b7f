"""How fast a layer's experts come from disk to the GPU, against what the machine can do.

    python -m bench.loading

Writes a checkpoint of random numbers: the 32 experts of one DeepSeek-V3 rank, 1.4 GB in four
shards. Once the files are in the page cache, each of these is timed five times, in turn:

    load      `jax_moe.checkpoint.load_experts`, until the arrays are on the device
    read      the same bytes from the files into new host memory, by as many threads
    copy      one copy of as many bytes from pinned host memory to the device, by torch

`share` is (read + copy) over load, medians: what the loader reaches of doing one after the other.
Without a GPU the checkpoint is small, there is no copy, and times mean nothing.
"""

import concurrent.futures as futures
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import commands, environment
from bench.failures import FileError, writing
from bench.workloads import FULL, REDUCED, Sizes
from jax_moe import checkpoint
from jax_moe.checkpoint.transfer import MAX_THREADS
from jax_moe.io.files import kept_if_used, shown, write_atomically
from pallas_kernels import interruption

LAYER, SHARDS, REPEATS = 3, 4, 5
ROOT, FILES = "out/loading", ("loading.json",)
NEEDED = {"torch": "torch", "safetensors": "safetensors"}  # modules, and their packages
_PIECE = 2**25  # bytes that a thread reads at a time
_QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def write_checkpoint(folder: Path, sizes: Sizes) -> None:
    """One layer in the names of DeepSeek-V3: e4m3 values and f32 scales, all random.

    Args:
        folder: Where to; it exists.
        sizes: Of the rank, whose local experts are all there are.

    Raises:
        FileError: A file does not fit; names it.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    draw = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        tensors = {}
        for expert in range(shard, sizes.num_local_experts, SHARDS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                rows, columns = (hidden, inner) if name == "down_proj" else (inner, hidden)
                key = f"model.layers.{LAYER}.mlp.experts.{expert}.{name}."
                bits = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, generator=draw)
                tensors[key + "weight"] = bits.view(torch.float8_e4m3fn)
                grid = (rows // 128, columns // 128)
                tensors[key + "weight_scale_inv"] = torch.rand(grid, generator=draw)
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        try:
            save_file(tensors, folder / file)
        except SafetensorError as error:  # a full disk
            raise FileError(f"{folder / file}: cannot be written: {error}") from None
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    config = {"n_routed_experts": sizes.num_local_experts, "quantization_config": _QUANTIZATION}
    for file, content in (("model.safetensors.index.json", index), ("config.json", config)):
        with writing(folder / file):
            (folder / file).write_text(json.dumps(content))


def read_all(files: Sequence[Path], threads: int) -> int:
    """Reads files into new memory, a piece per task; returns their bytes."""
    pieces = [(path, at) for path in files for at in range(0, path.stat().st_size, _PIECE)]

    def read(piece: tuple[Path, int]) -> int:
        path, at = piece
        buffer = np.empty(min(_PIECE, path.stat().st_size - at), np.uint8)
        with path.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [buffer], at)

    with futures.ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, pieces))


def pinned_copy(nbytes: int) -> Callable[[], None]:
    """A function that copies pinned host memory to the device and waits for it."""
    import torch

    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    return copy


def measure(folder: Path, *, on_gpu: bool) -> dict[str, Any]:
    """Times the loader and what it is compared with.

    Args:
        folder: Of the checkpoint.
        on_gpu: Whether there is a device to copy to.

    Returns:
        Bytes, threads, seconds of each call, their medians, and the share.
    """
    files = sorted(folder.glob("*.safetensors"))
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    nbytes = read_all(files, threads)  # from here on the files are in the page cache

    def load() -> None:
        jax.block_until_ready(checkpoint.load_experts(folder, LAYER, num_threads=threads))

    calls: dict[str, Callable[[], Any]] = {"load": load, "read": lambda: read_all(files, threads)}
    if on_gpu:
        calls["copy"] = pinned_copy(nbytes)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    load()  # what is compiled is compiled once per process
    for _ in range(REPEATS):
        for name, call in calls.items():
            interruption.check()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    share = (medians["read"] + medians["copy"]) / medians["load"] if on_gpu else None
    return {
        "bytes": nbytes,
        "threads": threads,
        "seconds": seconds,
        "medians": medians,
        "share": share,
    }


def run(folder: Path, scratch: Path | None) -> int:
    """Measures, prints and writes `loading.json`.

    Args:
        folder: Of the result.
        scratch: Where the checkpoint is written and removed again; None is the usual place.
    """
    on_gpu = environment.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    about = environment.about(sizes, are_checked=False)
    with kept_if_used(scratch), tempfile.TemporaryDirectory(dir=scratch) as made:
        write_checkpoint(Path(made), sizes)
        found = measure(Path(made), on_gpu=on_gpu)
    for name, median in found["medians"].items():
        print(f"{name:5} {median * 1e3:8.1f} ms  {found['bytes'] / median / 1e9:8.3g} GB/s")
    print(about["note"] if found["share"] is None else f"share {found['share']:.2f}", flush=True)
    path = folder / "loading.json"
    with writing(path), write_atomically(path, "w") as file:
        json.dump({"about": about} | found, file, indent=1)
    print(f"wrote {shown(path)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    if lacking := environment.lacking_packages(NEEDED):
        names = " ".join(lacking)
        sys.exit(f"python -m bench.loading: needs {names}: pip install {names}")
    parser = commands.parser("bench.loading", __doc__)
    commands.add_output(parser, ROOT)
    parser.add_argument("--scratch", type=commands.usable, help="folder for 1.4 GB of files")
    args = parser.parse_args(argv)
    try:
        with commands.results(args.output, ROOT, FILES, overwrite=args.overwrite) as folder:
            return run(folder, args.scratch)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
