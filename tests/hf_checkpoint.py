"""Small FP8 checkpoints in Hugging Face's layout, written by a few lines of our own."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.uint8): "U8",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(E4M3): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}
LONG, SHORT = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


class Family(NamedTuple):
    """How a family of models names its tensors: module, projections, scale, bias, shared."""

    module: str = "model.layers.{}.mlp."
    projections: tuple[str, str, str] = LONG
    scale: str = "weight_scale_inv"
    scale_dtype: Any = np.float32
    bias: str | None = "gate.e_score_correction_bias"
    shared: str | None = "shared_experts."
    shared_gate: str | None = None
    count: str = "n_routed_experts"


FAMILIES = {
    "deepseek_v3": Family(),
    "kimi_k25": Family(module="language_model.model.layers.{}.mlp."),
    "qwen3_moe": Family(
        scale_dtype=ml_dtypes.bfloat16, bias=None, shared=None, count="num_experts"
    ),
    "qwen3_next": Family(
        scale_dtype=ml_dtypes.bfloat16,
        bias=None,
        shared="shared_expert.",
        shared_gate="shared_expert_gate.weight",
        count="num_experts",
    ),
    "qwen3_5": Family(
        module="model.language_model.layers.{}.mlp.",
        scale_dtype=ml_dtypes.bfloat16,
        bias=None,
        shared="shared_expert.",
        shared_gate="shared_expert_gate.weight",
        count="num_experts",
    ),
    "minimax_m2": Family(
        module="model.layers.{}.block_sparse_moe.",
        projections=SHORT,
        bias="e_score_correction_bias",
        shared=None,
        count="num_local_experts",
    ),
    "deepseek_native": Family(
        module="layers.{}.ffn.",
        projections=SHORT,
        scale="scale",
        scale_dtype=ml_dtypes.float8_e8m0fnu,
        bias="gate.bias",
    ),
}


class Made(NamedTuple):
    """A checkpoint on disk and what is in it."""

    folder: pathlib.Path
    tensors: dict[str, np.ndarray]
    family: Family
    layer: int

    def expert(self, expert: int | str) -> list[np.ndarray]:
        """gate, up, down and their scales, as stored; a name picks the shared experts."""
        prefix = self.family.module.format(self.layer)
        prefix += f"experts.{expert}." if isinstance(expert, int) else expert
        arrays = [self.tensors[f"{prefix}{name}.weight"] for name in self.family.projections]
        scales = [
            self.tensors[f"{prefix}{name}.{self.family.scale}"] for name in self.family.projections
        ]
        return arrays + scales

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[self.family.module.format(self.layer) + name]


def make_checkpoint(
    folder: pathlib.Path,
    family: str = "deepseek_v3",
    *,
    layer: int = 3,
    num_experts: int = 8,
    hidden: int = 256,
    intermediate: int = 128,
    shards: int | None = 3,
    seed: int = 0,
) -> Made:
    """Writes a checkpoint of one layer with random bits; `shards=None` is a single file."""
    rng = np.random.default_rng(seed)
    names = FAMILIES[family]
    module = names.module.format(layer)
    tensors: dict[str, np.ndarray] = {}

    def add_expert(prefix: str) -> None:
        for name in names.projections:
            is_down = name == names.projections[2]
            shape = (hidden, intermediate) if is_down else (intermediate, hidden)
            grid = tuple(-(-size // 128) for size in shape)
            tensors[f"{module}{prefix}{name}.weight"] = random_e4m3(rng, shape)
            exponents = rng.integers(-9, -3, grid).astype(np.float32)
            mantissas = 1 if names.scale == "scale" else rng.uniform(1, 2, grid)
            scale = (2.0**exponents * mantissas).astype(names.scale_dtype)
            tensors[f"{module}{prefix}{name}.{names.scale}"] = scale

    for expert in range(num_experts):
        add_expert(f"experts.{expert}.")
    if names.shared:
        add_expert(names.shared)
    gate = rng.standard_normal((num_experts, hidden)) / np.sqrt(hidden)
    tensors[f"{module}gate.weight"] = gate.astype(ml_dtypes.bfloat16)
    if names.bias:
        bias = rng.standard_normal(num_experts) / 10
        tensors[f"{module}{names.bias}"] = bias.astype(np.float32)
    if names.shared_gate:
        shared_gate = rng.standard_normal((1, hidden)) / np.sqrt(hidden)
        tensors[f"{module}{names.shared_gate}"] = shared_gate.astype(ml_dtypes.bfloat16)
    # Something before and behind, which is none of the loader's business.
    tensors = {"model.embed_tokens.weight": np.ones((3, 5), ml_dtypes.bfloat16), **tensors}
    tensors["model.norm.weight"] = np.ones(7, np.float16)
    config = {names.count: num_experts, "quantization_config": QUANTIZATION}
    write_folder(folder, tensors, config, shards)
    return Made(folder, tensors, names, layer)


def write_folder(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any] | None = None,
    shards: int | None = 3,
) -> None:
    """Writes config, index and shards; experts are spread over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards is None:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[index * size : (index + 1) * size]}
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index_text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)


def write_safetensors(
    path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes one file; the wide dtypes first, then by name, as the safetensors package does."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    begin = 0
    for name in order:
        array = tensors[name]
        header[name] = {
            "dtype": DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }
        begin += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].tobytes())


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Finite values of all kinds: both zeros, denormals, 448."""
    bits = rng.integers(0, 256, shape, np.uint8)
    bits[bits & 0x7F == 0x7F] = 0x80  # NaN becomes -0
    return bits.view(E4M3)


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 matrix of e4m3 values and one scale per 128x128 block."""
    rows, columns = values.shape
    wide = np.repeat(np.repeat(scale.astype(np.float64), 128, 0), 128, 1)
    return values.astype(np.float64) * wide[:rows, :columns]
