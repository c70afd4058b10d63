"""What a decoder is, as data. Code is driven by these fields, never by a model's name."""

from __future__ import annotations

import math
from dataclasses import dataclass

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
INPUT_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base and how low frequencies are rescaled for long contexts.

    `kind` is Hugging Face's `rope_type`: `default`, `linear` (all frequencies divided by `factor`)
    or `llama3` (low frequencies divided by `factor`, high ones kept, a ramp between).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """A pre-norm decoder with rotary GQA attention and a SwiGLU MLP."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_positions: int
    tied_head: bool
    biased: frozenset[str] = frozenset()
    """Names out of LINEARS that carry a bias."""

    @property
    def q_width(self) -> int:
        """Columns of q and of the attention output."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k and of v."""
        return self.num_kv_heads * self.head_dim

    def linear_shape(self, name: str) -> tuple[int, int]:
        """`(out, in)` of one of LINEARS."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.q_width, hidden),
            "self_attn.k_proj": (self.kv_width, hidden),
            "self_attn.v_proj": (self.kv_width, hidden),
            "self_attn.o_proj": (hidden, self.q_width),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }[name]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by Hugging Face name of every tensor the checkpoint must hold."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab_size, self.hidden_size),
            FINAL_NORM: (self.hidden_size,),
        }
        if not self.tied_head:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + INPUT_NORM] = (self.hidden_size,)
            shapes[prefix + MLP_NORM] = (self.hidden_size,)
            for name in LINEARS:
                shapes[f"{prefix}{name}.weight"] = self.linear_shape(name)
                if name in self.biased:
                    shapes[f"{prefix}{name}.bias"] = (self.linear_shape(name)[0],)
        return shapes

    @property
    def n_parameters(self) -> int:
        """Parameters of the model; a tied head is counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def linear_parameters(self, *names: str) -> int:
        """Weight parameters of these linears in one block (biases left out)."""
        return sum(math.prod(self.linear_shape(name)) for name in names)
