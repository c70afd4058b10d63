"""A family that nobody has: what adding one takes, in one file.

Granite's four factors with GeGLU, under a name of its own. `FAMILY` would stand in a file of
`model/families/` and its name in FAMILIES; the rest is transformers' side of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.granite.modeling_granite import GraniteForCausalLM

from lowtide.model.families import FAMILIES
from lowtide.model.families.common import (
    GELU_TANH,
    Family,
    decoder_spec,
    one_rope,
    read_sizes,
    tiny,
)
from lowtide.model.families.reader import ConfigReader
from lowtide.model.spec import ModelSpec

NAME = "wombat"


def wombat_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """A spec from config.json."""
    reader = ConfigReader(raw)
    reader.refuse_unless("hidden_act", lambda v: v in GELU_TANH, GELU_TANH[0])
    sizes = read_sizes(reader, max_positions=2048)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        activation="gelu_tanh",
        embedding_scale=reader.number("embedding_multiplier", 1.0),
        residual_scale=reader.number("residual_multiplier", 1.0),
        attention_scale=reader.number("attention_multiplier", 1.0),
        logit_scale=1.0 / reader.number("logits_scaling", 1.0),
    )


FAMILY = Family(
    wombat_spec,
    (
        tiny(
            model_type=NAME,
            hidden_size=42,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=14,
            hidden_act="gelu_pytorch_tanh",
            embedding_multiplier=2.5,
            residual_multiplier=0.4,
            attention_multiplier=0.3,
        ),
    ),
)
ALL = {**FAMILIES, NAME: FAMILY}
"""The registry with it in its place."""


class WombatConfig(transformers.GraniteConfig):
    """transformers' config of it."""

    model_type = NAME


class WombatForCausalLM(GraniteForCausalLM):
    """transformers' model of it."""

    config_class = WombatConfig


transformers.AutoConfig.register(NAME, WombatConfig)
transformers.AutoModelForCausalLM.register(WombatConfig, WombatForCausalLM)


def command(*arguments: str) -> list[str]:
    """The command line of a lowtide that knows the made-up family."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import made_up; "
        "from lowtide.model.families import FAMILIES; "
        "FAMILIES[made_up.NAME] = made_up.FAMILY; "
        "from lowtide.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, *arguments, "--json"]
