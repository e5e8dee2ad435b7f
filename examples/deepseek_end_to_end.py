"""A small DeepSeek-V3 from disk, its mixture-of-experts blocks replaced by jax_moe's.

    python examples/deepseek_end_to_end.py [FOLDER]

Makes the model with transformers (random weights, 2 MoE layers of 32 experts), writes it in FP8
with 128x128 blocks as DeepSeek publishes it, loads the MoE layers from disk with
`jax_moe.checkpoint`, and compares them and the logits of the whole model with transformers' in
float32 on the dequantized weights. The figures with `bf16_` are those of transformers' own model
in bfloat16: a token near a tie of two experts changes its expert, and its logits, there as well.
Needs torch, transformers and safetensors (`pip install '.[bench,models-test]'`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pathlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

try:
    import torch
    from safetensors.numpy import save_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
except ImportError as error:
    sys.exit(f"deepseek_end_to_end.py: {error}: pip install '.[bench,models-test]'")

from jax_moe import MoEConfig, checkpoint, nn, route
from jax_moe.io.files import naming
from pallas_kernels import interruption

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def small_config() -> DeepseekV3Config:
    """DeepSeek-V3's architecture with three layers, of which the first is dense."""
    return DeepseekV3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=256,
    )


def make(folder: pathlib.Path, config: DeepseekV3Config, seed: int = 0) -> DeepseekV3ForCausalLM:
    """Writes an FP8 checkpoint; returns transformers' model of the same weights in float32."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.mul_(4)  # livelier than they start
        for layer in model.model.layers[1:]:
            layer.mlp.gate.weight.mul_(10)
            layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(32) * 0.05)
    model.save_pretrained(folder)  # the names of the hub, one tensor per expert
    (path,) = folder.glob("*.safetensors")
    from safetensors.torch import load_file

    stored, exact = {}, {}
    for name, tensor in load_file(path).items():
        value = tensor.float().numpy()
        if value.ndim == 2 and "layers." in name and not name.endswith("mlp.gate.weight"):
            stored[name], stored[f"{name}_scale_inv"] = quantize(value)
            value = dequantize(stored[name], stored[f"{name}_scale_inv"])
        elif name.endswith("e_score_correction_bias"):
            stored[name] = value
        else:
            stored[name] = value.astype(ml_dtypes.bfloat16)
        exact[name] = torch.from_numpy(np.ascontiguousarray(value))
    save_file(stored, path, metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(document))
    return DeepseekV3ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=exact,
        dtype=torch.float32,
        experts_implementation="eager",
    ).eval()


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 and one scale per 128x128 block, the last ones ragged."""
    rows, columns = (-(-n // 128) for n in weight.shape)
    padded = np.zeros((rows * 128, columns * 128), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, 128, columns, 128)
    scales = np.maximum(np.abs(blocks).max(axis=(1, 3)) / 448, 2.0**-126).astype(np.float32)
    values = (blocks / scales[:, None, :, None]).reshape(padded.shape).astype(E4M3)
    return np.ascontiguousarray(values[: weight.shape[0], : weight.shape[1]]), scales


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 of a quantized matrix."""
    wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: values.shape[0], : values.shape[1]]
    return values.astype(np.float32) * wide


class JaxBlock(torch.nn.Module):
    """jax_moe's layer in the place of a torch block."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs it in bfloat16."""
        x = jnp.asarray(hidden_states.detach().numpy()).astype(jnp.bfloat16)
        return torch.from_numpy(np.array(self.layer(x), np.float32))


def compare(folder: pathlib.Path, backend: str = "auto") -> dict[str, float]:
    """Makes the model in `folder` and compares; returns figures by name."""
    config = small_config()
    model = make(folder, config)
    inputs: dict[int, torch.Tensor] = {}
    for number in (1, 2):
        model.model.layers[number].mlp.register_forward_hook(
            functools.partial(_keep, inputs, number)
        )
    tokens = torch.randint(
        0, config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        half = copy.deepcopy(model).to(torch.bfloat16)(tokens).logits.double()
        expected = model(tokens).logits.double()  # the hooks keep what came last
    layer_config = nn.LayerConfig.from_hf(json.loads((folder / "config.json").read_text()))
    figures = {"routed_error": 0.0, "equal_ids": 1.0}
    routed_of = jax.jit(
        functools.partial(nn.moe_layer, config=without_shared(layer_config), backend=backend)
    )
    blocks = {}
    for number in (1, 2):
        weights = checkpoint.load_layer(folder, number)
        theirs = model.model.layers[number].mlp
        x = inputs[number].to(torch.bfloat16).float().reshape(-1, config.hidden_size)
        with torch.no_grad():
            logits, topk_weights, topk_ids = theirs.gate(x)
            routed = theirs.experts(x, topk_ids, topk_weights).numpy()
        ids = route(
            jnp.asarray(logits.numpy()),
            weights.e_score_correction_bias,
            layer_config.routed_scaling_factor,
            config=layer_config.router,
            backend=backend,
        ).topk_ids
        equal = (np.sort(ids) == np.sort(topk_ids.numpy())).all(axis=1).mean()
        ours = routed_of(
            weights._replace(shared_experts=None), jnp.asarray(x.numpy(), jnp.bfloat16)
        )
        error = np.linalg.norm(np.asarray(ours, np.float32) - routed) / np.linalg.norm(routed)
        figures["routed_error"] = max(figures["routed_error"], float(error))
        figures["equal_ids"] = min(figures["equal_ids"], float(equal))
        layer = functools.partial(nn.moe_layer, weights, config=layer_config, backend=backend)
        blocks[number] = JaxBlock(jax.jit(layer))
    for number, block in blocks.items():
        model.model.layers[number].mlp = block
    with torch.no_grad():
        found = model(tokens).logits.double()
    figures |= distance(found, expected)
    return figures | {f"bf16_{name}": value for name, value in distance(half, expected).items()}


def without_shared(config: nn.LayerConfig) -> nn.LayerConfig:
    """The same layer with its routed experts only."""
    return nn.LayerConfig(
        MoEConfig(config.router.top_k, config.router.n_group, config.router.topk_group),
        config.num_experts,
        config.hidden_size,
        config.intermediate_size,
        config.routed_scaling_factor,
    )


def _keep(inputs: dict[int, torch.Tensor], number: int, _: Any, arguments: Any, __: Any) -> None:
    inputs[number], *_others = arguments


def distance(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """How far the logits of two models are apart."""
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        "kl_mean": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="keeps the checkpoint; new or empty"
    )
    given = parser.parse_args(argv).folder
    with tempfile.TemporaryDirectory() as temporary:
        if given == "":  # pathlib's current directory, which nobody means by it
            parser.error("FOLDER: expected a folder, got an empty name")
        folder = pathlib.Path(temporary if given is None else given)
        try:
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
                there = sorted(path.name for path in folder.iterdir())
        except ValueError as error:
            parser.error(f"FOLDER: {error}")
        if there:  # a model of the user's, perhaps
            parser.error(f"FOLDER: {folder}: expected an empty or new folder, got {there[0]} in it")
        for name, value in compare(folder).items():
            print(f"{name:24}{value:.6f}")


if __name__ == "__main__":
    interruption.exit_with(main)
