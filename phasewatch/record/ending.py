"""How a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

How = Literal["finished", "interrupted", "SIGTERM", "exception"]

NOT_CLOSED = "The run was not closed: it is still going on, or was killed."


@dataclass(frozen=True)
class Ending:
    """How a run ended, as far as it could still say.

    Attributes:
        how: ``"finished"``: it came to its end; ``"interrupted"``: by Ctrl-C; ``"SIGTERM"``: by that signal, as
            schedulers of clusters send it; ``"exception"``: by another error.
        error: Type and message of the error; empty where there was none.
    """

    how: How
    error: str = ""

    @classmethod
    def by(cls, error: BaseException | None) -> Ending:
        """What an exception that ended a run means; None where there was none."""
        if error is None:
            return cls("finished")
        told = f"{type(error).__name__}: {error}".removesuffix(": ")
        if isinstance(error, KeyboardInterrupt):
            return cls("interrupted", told)
        # by its name: of Lightning's two namespaces, neither of which is imported here
        return cls("SIGTERM" if type(error).__name__ == "SIGTERMException" else "exception", told)

    def __str__(self) -> str:
        """A sentence for those who look at the run."""
        if self.how == "exception":
            return f"The run was ended by an exception: {self.error}."
        return {
            "finished": "The run came to its end.",
            "interrupted": "The run was interrupted (Ctrl-C).",
            "SIGTERM": "The run was ended by SIGTERM.",
        }[self.how]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, as it stands in the record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ending:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: If it is of no kind known.
        """
        how, error = plain.get("how", "finished"), plain.get("error", "")
        if how not in get_args(How) or not isinstance(error, str):
            raise ValueError(f"a run that ended as {how!r}; expected one of {', '.join(get_args(How))}")
        return cls(how, error)
