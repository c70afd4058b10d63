"""What the model says on the way: prompts answered during training, greedily."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from lowtide.data.prompts import Interpreter
from lowtide.errors import DataError, LowtideError, LowtideWarning
from lowtide.infer.generate import generate

from .history import StepReport
from .looking import SAMPLE_TOKENS
from .loop import Trainer
from .observers import Quiet, Sample


class Sampler(Quiet):
    """Answers the prompts after some of the updates.

    The tokenizer lives in child processes only. The buffers of the training step are given back
    before the buffers of generation are made, so that a run peaks where it did without samples.
    """

    def __init__(
        self, trainer: Trainer, interpreter: Interpreter, tell: Callable[[Sample], None]
    ) -> None:
        """Encode the prompts.

        Args:
            trainer: of the run; its adapter is only read.
            interpreter: encodes and decodes.
            tell: hears each sample.

        Raises:
            DataError: a prompt cannot be used.
        """
        self._trainer, self._interpreter, self._tell = trainer, interpreter, tell
        settings = trainer.settings
        self._texts = settings.sample_prompt
        self._tokens = settings.sample_tokens or SAMPLE_TOKENS
        self._every = settings.steps_per_sample or settings.steps_per_eval
        self._prompts, self._stops = interpreter.encode(self._texts)
        for text, ids in zip(self._texts, self._prompts, strict=True):
            try:
                trainer.model.check_sequences([len(ids)], max(ids))
            except DataError as error:
                raise DataError(f"--sample-prompt {text!r}: {error}") from error

    def on_step(self, report: StepReport) -> None:
        """Answer, when it is time, and after the last update."""
        due = report.step % self._every == 0 or report.step == self._trainer.iters
        if due and not self._trainer.stop.requested:
            self.answer(report.step)

    def answer(self, step: int) -> None:
        """Answer all prompts.

        Args:
            step: how many updates made the adapter.
        """
        trainer = self._trainer
        trainer.method.release()
        try:
            made = [
                list(generate(trainer.model, trainer.adapter, prompt, self._tokens,
                              stop_ids=self._stops))
                for prompt in self._prompts
            ]  # fmt: skip
            texts = self._interpreter.decode(list(zip(self._prompts, made, strict=True)))
        except LowtideError as error:  # what is wrong with the run itself, the next update will say
            warnings.warn(f"no sample at step {step}: {error}", LowtideWarning, stacklevel=2)
            return
        for prompt, text in zip(self._texts, texts, strict=True):
            self._tell(Sample(step, prompt, text))
