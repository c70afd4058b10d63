"""mlx-lm's LoRA training on the CPU, in the dtype that the weights are stored in, measured."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .peer_child import step_meter


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on random token ids, as lowtide's own cases do.

    Args:
        settings: of the case, `model` being a directory.

    Returns:
        `steps`, the first of which warms up, and the versions of the libraries.
    """
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_flatten
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    total, seq_len = settings["steps"] + 1, settings["seq_len"]
    with step_meter() as loaded:
        model, config = load_model(Path(settings["model"]))
        model.freeze()
        linear_to_lora_layers(
            model, len(model.layers), {"rank": settings["lora_r"], "scale": 2.0, "dropout": 0.0}
        )
        meter = loaded()

        class Told(TrainingCallback):  # type: ignore[misc]  # mlx_lm is not typed
            def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
                meter.end()

        def batches(**_: Any) -> Iterator[tuple[Any, Any]]:
            while True:  # one id more than positions: inputs and labels are shifted outside
                shape = (settings["batch_size"], seq_len + 1)
                ids = mx.random.randint(0, config["vocab_size"], shape)
                lengths = mx.array([[1, seq_len]] * settings["batch_size"])
                mx.eval(ids, lengths)
                meter.begin()
                yield ids, lengths

        arguments = trainer.TrainingArgs(
            batch_size=settings["batch_size"],
            iters=total,
            steps_per_report=1,
            max_seq_length=seq_len + 1,
            adapter_file="adapters.safetensors",
            grad_checkpoint=settings["checkpointing"],
        )
        optimizer = mlx.optimizers.SGD(learning_rate=1e-4)
        trainer.train(
            model, optimizer, None, None, arguments,
            iterate_batches=batches, training_callback=Told(),
        )  # fmt: skip
    trainable = tree_flatten(model.trainable_parameters())
    return {
        "n_adapter_parameters": sum(value.size for _, value in trainable),
        "model_anon_bytes": meter.model_bytes,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "steps": meter.steps,
    }
