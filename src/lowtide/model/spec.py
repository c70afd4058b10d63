"""What a decoder is, as data. Code is driven by these fields, never by a model's name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lowtide.ops.attention import Heads

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Projection(NamedTuple):
    """A linear of a block: its module name, and what its rows are, in order.

    Roles are `q`, `k`, `v`, `o`, `gate`, `up` and `down`. A fused projection has several, and one
    adapter.
    """

    name: str
    roles: tuple[str, ...]


SEPARATE = tuple(
    Projection(f"{module}.{role}_proj", (role,))
    for module, roles in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for role in roles
)


class NormNames(NamedTuple):
    """Names of the RMSNorms around a block's two branches; None where there is none.

    A branch is `x + norm_after(branch(norm_before(x)))`.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE_NORMS = NormNames("input_layernorm", None, "post_attention_layernorm", None)
SANDWICH_NORMS = NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
POST_NORMS = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base, rotated columns, and how frequencies are rescaled for long contexts.

    Attributes:
        theta: the base.
        kind: `default`; `linear` (all frequencies divided by `factor`); `banded` (low frequencies
            divided by `factor`, high ones kept, a ramp between); `yarn` (the same with a ramp over
            the places of frequencies); `longrope` (each frequency divided by one of
            `short_factors`, or of `long_factors` in sequences longer than
            `original_max_positions`).
        factor: see `kind`.
        low_freq_factor: of `banded`.
        high_freq_factor: of `banded`.
        ramp: of `yarn`: the last frequency that is kept, and the first that is divided.
        original_max_positions: of `banded`, `yarn` and `longrope`.
        short_factors: of `longrope`, one for each frequency.
        long_factors: of `longrope`, one for each frequency.
        table_factor: cosines and sines are multiplied by it.
        rotated: columns of each head that are rotated, the first ones; 0 means all.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    ramp: tuple[float, float] = (0.0, 0.0)
    original_max_positions: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    table_factor: float = 1.0
    rotated: int = 0

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's angles depend on how long its sequence is."""
        return self.kind == "longrope" and self.short_factors != self.long_factors


class LayerSpec(NamedTuple):
    """What attention does in one block.

    Attributes:
        window: keys that a query sees, its own included; 0 lets it see all before it.
        rope: place in `ModelSpec.ropes`; None rotates nothing.
    """

    window: int = 0
    rope: int | None = 0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of RMSNorms, grouped-query attention and gated MLPs.

    Attributes:
        model_type: config.json's; for people.
        vocab_size: V.
        hidden_size: H.
        intermediate_size: I.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: columns of a head.
        layers: the blocks, in order.
        ropes: rotary tables that layers share.
        rms_norm_eps: of every norm.
        max_positions: the longest sequence.
        tied_head: whether the head is the embedding.
        biased: names of projections that carry a bias.
        projections: the linears of a block.
        norms: around its branches.
        norm_offset: added to every norm's weight.
        qk_norm: norms on q and k before rotation: `head` (each head by itself, one weight for
            all), `full` (over all heads), or none.
        activation: one of `ops.glu.ACTIVATIONS`.
        attention_scale: of the scores; None is `head_dim ** -0.5`.
        attention_softcap: of the scores; 0 caps nothing.
        embedding_scale: what embeddings are multiplied by, rounded to the compute dtype.
        noise_scale: what noise on the embedding's output is multiplied by, where a factor comes
            after the module that noise is added to.
        residual_scale: what each branch is multiplied by before it is added.
        logit_scale: what logits are multiplied by.
        logit_softcap: of the scaled logits; 0 caps nothing.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    rms_norm_eps: float
    max_positions: int
    tied_head: bool
    biased: frozenset[str] = frozenset()
    projections: tuple[Projection, ...] = SEPARATE
    norms: NormNames = PRE_NORMS
    norm_offset: float = 0.0
    qk_norm: str | None = None
    activation: str = "silu"
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    noise_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def q_width(self) -> int:
        """Columns of q and of the attention output."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k and of v."""
        return self.num_kv_heads * self.head_dim

    @property
    def raw_width(self) -> int:
        """Columns of q and k before their norms, where they have norms."""
        return self.q_width + self.kv_width if self.qk_norm else 0

    @property
    def scales_branches(self) -> bool:
        """Whether what the MLP adds is not its output: a norm or a factor comes after it."""
        return self.norms.after_mlp is not None or self.residual_scale != 1.0

    def heads(self, layer: int) -> Heads:
        """The division of q, k and v into heads in a block, and what happens to its scores."""
        return Heads(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.attention_scale,
            self.attention_softcap,
            self.layers[layer].window,
        )

    def kinds_of_heads(self) -> list[Heads]:
        """Those of all blocks, without repetition."""
        return list(dict.fromkeys(self.heads(layer) for layer in range(self.num_layers)))

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the projections, in block order."""
        return tuple(projection.name for projection in self.projections)

    def role_shape(self, role: str) -> tuple[int, int]:
        """`(out, in)` of the rows with that role."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q": (self.q_width, hidden),
            "k": (self.kv_width, hidden),
            "v": (self.kv_width, hidden),
            "o": (hidden, self.q_width),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }[role]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """`(out, in)` of a projection."""
        roles = next(projection.roles for projection in self.projections if projection.name == name)
        shapes = [self.role_shape(role) for role in roles]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def vector_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's norms, by their names in the block."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (self.hidden_size,) for name in self.norms if name is not None
        }
        if self.qk_norm:
            widths = {"head": (self.head_dim,) * 2, "full": (self.q_width, self.kv_width)}
            for name, width in zip(QK_NORMS, widths[self.qk_norm], strict=True):
                shapes[f"{name}.weight"] = (width,)
        return shapes

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
            for name, shape in self.vector_shapes().items():
                shapes[prefix + name] = shape
            for name in self.linears:
                shapes[f"{prefix}{name}.weight"] = self.linear_shape(name)
                if name in self.biased:
                    shapes[f"{prefix}{name}.bias"] = (self.linear_shape(name)[0],)
        return shapes

    @property
    def n_parameters(self) -> int:
        """Parameters of the model; a tied head is counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def linear_parameters(self, *roles: str) -> int:
        """Weight parameters of these roles in one block, of all without any (biases left out)."""
        chosen = roles or tuple(role for one in self.projections for role in one.roles)
        return sum(math.prod(self.role_shape(role)) for role in chosen)
