"""What is said to a client whose request is refused: OpenAI's error objects."""

from __future__ import annotations

from typing import Any

from lowtide.errors import InputError, LowtideError
from lowtide.infer.answer import PromptTooLong


class Fault(Exception):
    """A request that is not answered.

    Args:
        status: HTTP's.
        message: what was found, what was expected, what to do.
        param: the field of the request that is at fault.
        code: OpenAI's word for it, where there is one.
        retry_after: seconds after which it may be worth another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        if self.status >= 500:
            return "server_error"
        names = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error")

    def document(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def fault_of(error: Exception) -> Fault:
    """The fault that tells of an exception while a request was worked on."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, InputError):
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        return Fault(400, str(error), code=code)
    if isinstance(error, LowtideError):
        return Fault(500, str(error))
    memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error)
    )
    if memory:
        return Fault(
            503, "the machine has not enough memory for this request. Shorten it, or start the "
            "server with a smaller --context.", code="out_of_memory",
        )  # fmt: skip
    return Fault(500, "the server failed; its own output says how.", code="internal_error")
