"""From a folder of FP8 safetensors shards to the weights of one layer on one rank."""

import os
from typing import Any

from jax.sharding import Mesh, Sharding

from jax_moe import validate
from jax_moe.checkpoint.block_scales import read_float32
from jax_moe.checkpoint.huggingface import LayerNames, find_layer
from jax_moe.checkpoint.plan import Options, plan_experts, plan_shared
from jax_moe.checkpoint.shards import Checkpoint
from jax_moe.checkpoint.transfer import num_threads_of, readers
from jax_moe.scalars import quoted
from jax_moe.types import ExpertWeights, LayerWeights

type Folder = str | os.PathLike[str] | Checkpoint

_MAX_INDEX = 2**30
_GATE_DTYPES = ("F32", "BF16")


def load_experts(
    folder: Folder,
    layer: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    sharding: Mesh | Sharding | None = None,
    tensor_parallel: tuple[int, int] = (0, 1),
    progress: bool = False,
    num_threads: int | None = None,
) -> ExpertWeights:
    """Loads the routed experts of one layer, for one rank or for a mesh, onto the device.

    The e4m3 values keep their bits, nothing is dequantized; scales of any of the stored dtypes
    become f32, which holds them exactly. Checkpoints have the gate first, this package has the up
    projection first: each is read to where it belongs. Only what this process holds is read.

    Known are the tensor names of DeepSeek-V3, R1, V3.1 and V3.2, Kimi K2, GLM-5, Qwen3 MoE,
    Qwen3-Next, Qwen3.5 and MiniMax-M2, all in FP8 with 128x128 blocks, and DeepSeek's own.

    Args:
        folder: The checkpoint's folder, or a `Checkpoint` that is used for many layers.
        layer: The layer's number, as the tensor names have it.
        rank: This expert-parallel rank: it gets experts `rank * E // num_ranks` and following.
        num_ranks: How many ranks there are; they must divide E.
        sharding: None puts the arrays on the default device. A `jax.sharding.Mesh` splits this
            rank's experts over its axis "expert" (or its only axis); a `NamedSharding` says itself
            how, and may split the first axis only. Each process reads what its devices hold.
        tensor_parallel: Rank and number of ranks that share the intermediate size, each getting
            whole blocks of 128, at most one more than another. Ranks with fewer are padded with
            zeros, and scales of one, so that all have the same shapes; so is an intermediate size
            that is no multiple of 128. The ranks' outputs add up to the layer's.
        progress: Shows a bar of the bytes read, by tqdm.
        num_threads: Threads to read with; None chooses by the number of cores.

    Returns:
        The weights: jax Arrays, of E experts in all if `num_ranks` is 1, else of this rank's.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range; or the checkpoint is refused, with the file and
            tensor named: truncated, overlapping or out of range, a wrong dtype or shape, a tensor
            missing, an unknown quantization, H no multiple of 128.
        ImportError: `progress` without tqdm.
        RuntimeError: Called while JAX traces, as inside of `jax.jit`.
    """
    options = _options(rank, num_ranks, tensor_parallel, num_threads)
    source, names = _find(folder, layer)
    plan = plan_experts(source, names, options, sharding)
    with readers(plan.nbytes, f"layer {layer}", options.num_threads, progress) as (pool, advance):
        return plan.load(pool, advance)


def load_layer(
    folder: Folder,
    layer: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    sharding: Mesh | Sharding | None = None,
    tensor_parallel: tuple[int, int] = (0, 1),
    progress: bool = False,
    num_threads: int | None = None,
) -> LayerWeights:
    """Loads all of one mixture-of-experts layer: routed experts, router, shared experts.

    Args:
        folder: As in `load_experts`, and so on for the others.
        layer: The layer's number.
        rank: Of the routed experts. Router and shared experts are the same on all ranks.
        num_ranks: How many ranks there are.
        sharding: Of the routed experts; each device of it gets all of the router and of the shared
            experts.
        tensor_parallel: Splits routed and shared experts alike.
        progress: Shows a bar.
        num_threads: Threads to read with.

    Returns:
        The layer. The router's weight and the shared experts' gate keep their dtype, the bias
        becomes f32; what the model does not have is None.

    Raises:
        TypeError: As `load_experts`.
        ValueError: As `load_experts`; the shared experts must be FP8 as well.
        ImportError: As `load_experts`.
        RuntimeError: As `load_experts`.
    """
    options = _options(rank, num_ranks, tensor_parallel, num_threads)
    source, names = _find(folder, layer)
    plan = plan_experts(source, names, options, sharding)
    shared = plan_shared(source, names, options, plan)
    experts, hidden = names.num_experts, plan.hidden_size
    gate = source.tensor(names.gate_weight).check(_GATE_DTYPES, (experts, hidden))
    bias = shared_gate = None
    if names.has_bias(source):
        bias = source.tensor(names.bias).check(_GATE_DTYPES, (experts,))
    if shared and names.shared_gate in source.weight_map:
        shared_gate = source.tensor(names.shared_gate).check(_GATE_DTYPES, (1, hidden))
    put = plan.placement.put_replicated
    nbytes = plan.nbytes + (shared.nbytes if shared else 0)
    with readers(nbytes, f"layer {layer}", options.num_threads, progress) as (pool, advance):
        return LayerWeights(
            plan.load(pool, advance),
            put(gate.read()),
            put(read_float32(bias)) if bias else None,
            shared.load(pool, advance) if shared else None,
            put(shared_gate.read()) if shared_gate else None,
        )


def _options(rank: Any, num_ranks: Any, tensor_parallel: Any, num_threads: Any) -> Options:
    num_ranks = int(validate.integer("num_ranks", num_ranks, 1, _MAX_INDEX))
    rank = int(validate.integer("rank", rank, 0, num_ranks - 1))
    if not isinstance(tensor_parallel, tuple) or len(tensor_parallel) != 2:
        found = quoted(tensor_parallel)
        raise TypeError(f"tensor_parallel: expected (rank, ranks), got {found}")
    ranks = int(validate.integer("tensor_parallel[1]", tensor_parallel[1], 1, _MAX_INDEX))
    shard = int(validate.integer("tensor_parallel[0]", tensor_parallel[0], 0, ranks - 1))
    return Options(rank, num_ranks, (shard, ranks), num_threads_of(num_threads))


def _find(folder: Folder, layer: Any) -> tuple[Checkpoint, LayerNames]:
    layer = int(validate.integer("layer", layer, 0, _MAX_INDEX))
    source = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    return source, find_layer(source, layer)
