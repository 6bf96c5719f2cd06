"""The loss of a LightningModule's ``training_step``, recomputed without a trace in the run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from torch import Tensor, nn

ADVICE = "Pass loss_fn=(module, batch) -> scalar mean loss, for example PhaseWatch(loss_fn=my_loss)."


class TrainingStepLoss:
    """``loss_fn`` that calls ``training_step`` on the copy of the module that it is given.

    Logging, optimizers and schedulers are inert on the copy, so a step of manual optimization computes its loss and
    moves nothing.
    """

    def __init__(self, trainer: Any) -> None:
        """Keep the trainer, which the copy may read from."""
        self._trainer = trainer

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            ValueError: If ``training_step`` returns no loss; says what to pass instead.
        """
        if not isinstance(module, _Inert):
            self._make_inert(module)
        output = module.training_step(*_arguments(module.training_step, batch))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"training_step of {type(module).__name__} returned {type(output).__name__}, no loss. {ADVICE}"
            )
        return loss

    def _make_inert(self, root: nn.Module) -> None:
        for module in root.modules():
            if hasattr(module, "training_step") and hasattr(module, "_trainer"):
                for compiled in ("forward", "training_step"):
                    module.__dict__.pop(compiled, None)
                kind: Any = type(module)
                module.__class__ = _inert_class(kind)
                module._trainer = self._trainer


def returns_nothing(training_step: Any) -> bool:
    """Whether the source of a ``training_step`` has no ``return`` with a value, so that no loss can come of it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(training_step)))
    except (OSError, TypeError, SyntaxError):
        return False
    if not any(isinstance(node, ast.FunctionDef) for node in tree.body):  # a lambda, which returns what it is
        return False
    return not any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree))


def _arguments(training_step: Any, batch: Any) -> tuple[Any, ...]:
    """What Lightning would pass: an iterator to ``dataloader_iter``, else by position, whatever the names."""
    parameters = inspect.signature(training_step).parameters
    if "dataloader_iter" in parameters:
        return (iter([(batch, 0, 0)]),)
    takes_index = len(parameters) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return (batch, 0) if takes_index else (batch,)


class _Inert:
    """Placed before a LightningModule's own class: everything that would touch the run does nothing."""

    _trainer: Any

    def log(self, *_: Any, **__: Any) -> None: ...

    def log_dict(self, *_: Any, **__: Any) -> None: ...

    def print(self, *_: Any, **__: Any) -> None: ...

    def manual_backward(self, *_: Any, **__: Any) -> None: ...

    def backward(self, *_: Any, **__: Any) -> None: ...

    def clip_gradients(self, *_: Any, **__: Any) -> None: ...

    def toggle_optimizer(self, *_: Any, **__: Any) -> None: ...

    def untoggle_optimizer(self, *_: Any, **__: Any) -> None: ...

    def toggled_optimizer(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        wrapped, plain = self._trainer.strategy._lightning_optimizers, self._trainer.optimizers
        return _one_or_all([_ReadOnly(optimizer) for optimizer in (wrapped if use_pl_optimizer else plain)])

    def lr_schedulers(self) -> Any:
        return _one_or_all([_ReadOnly(config.scheduler) for config in self._trainer.lr_scheduler_configs])

    @property
    def logger(self) -> Any:
        return _Swallow()

    @property
    def loggers(self) -> list[Any]:
        return [_Swallow()]


class _ReadOnly:
    """An optimizer or scheduler that can be read and not moved; ``isinstance`` says of it what it says of that."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._wrapped)

    @property
    def optimizer(self) -> Any:
        return _ReadOnly(self._wrapped.optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def step(self, *_: Any, **__: Any) -> None: ...

    def zero_grad(self, *_: Any, **__: Any) -> None: ...

    def toggle_model(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()


class _Swallow:
    """A logger that takes any call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


@cache
def _inert_class(kind: Any) -> type:
    return type(kind.__name__, (_Inert, kind), {"__module__": kind.__module__})


def _one_or_all(wrapped: list[Any]) -> Any:
    if not wrapped:
        return None
    return wrapped[0] if len(wrapped) == 1 else wrapped
