"""Module, data and callback of a finished run of Lightning, made again from what it has saved."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phasewatch.callbacks.monitors import PhaseWatch
from phasewatch.callbacks.watching import WatchingCallback
from phasewatch.sweep.source import imported

KEPT_SETTINGS = (
    *("accelerator", "precision", "deterministic", "benchmark", "inference_mode", "use_distributed_sampler"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "accumulate_grad_batches"),
    *("limit_train_batches", "limit_val_batches", "overfit_batches", "num_sanity_val_steps"),
    *("val_check_interval", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"),
)
"""Settings of the trainer that have a say in what is measured; the others write, show, or spread over machines."""
NO_ARGUMENTS = ("_instantiator", "_class_path")
"""What LightningCLI keeps beside the hyper-parameters. It names code to run, which no checkpoint may."""


@dataclass(frozen=True)
class Remade:
    """What a run was made of.

    Attributes:
        module: The LightningModule.
        data: The LightningDataModule, or loaders; None where the module has its own.
        callbacks: Those that watch, one at least.
        settings: Of the trainer.
    """

    module: Any
    data: Any
    callbacks: list[WatchingCallback]
    settings: Mapping[str, Any] = field(default_factory=dict)


def of_checkpoint(content: Any, module: Any, data: Any, watch: Any) -> Remade:
    """From the hyper-parameters in a checkpoint.

    Args:
        content: What is in it.
        module: The class, or where it is.
        data: The class, or a function that returns a data module or a loader, or where that is; None if it has none.
        watch: The callback, or a function that returns it, or where that is; None for ``PhaseWatch()``.

    Raises:
        ValueError: If something cannot be found, or not be made of what the checkpoint holds.
        TypeError: If it is something else than it should be.
    """
    kind = _module_class(module)
    held = content if isinstance(content, Mapping) else {}
    own = _with_hyper_parameters(kind, held.get("hyper_parameters"), held.get("hparams_name"))
    made = imported(data, "a LightningDataModule class, or a function that returns one or a loader")
    if isinstance(made, type):
        if not hasattr(made, "train_dataloader"):
            raise TypeError(f"{data} is {made!r}; expected a LightningDataModule class, or a function.")
        of_data = held.get("datamodule_hyper_parameters")
        made = _with_hyper_parameters(made, of_data, held.get("datamodule_hparams_name"))
    elif inspect.isroutine(made):
        made = made()
    return Remade(own, made, _callbacks(watch))


def of_config(path: Path, module: Any, data: Any, watch: Any) -> Remade:
    """From the ``config.yaml`` that LightningCLI saved, with its seed and in its order.

    Args:
        path: The config.
        module: The class of the module, or where it is, if the config does not name it.
        data: That of the data.
        watch: Takes the place of the callback in the config.

    Raises:
        ImportError: If jsonargparse is not installed.
        ValueError: If there is no such config, it names no class, or what it names cannot be made.
    """
    if importlib.util.find_spec("jsonargparse") is None:
        raise ImportError("A config is read by jsonargparse, which is not installed: pip install jsonargparse")
    jsonargparse = importlib.import_module("jsonargparse")
    config = _read(path)
    wanted: dict[str, Any] = {"model": _class_of(config.get("model"), module, path, "model", "--module")}
    framework = framework_of(_module_class(_place(wanted["model"]["class_path"])))
    settings = config.get("trainer") or {}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[WatchingCallback])
    if watching := _watching(settings.get("callbacks")):
        wanted["callbacks"] = watching
    parser.add_subclass_arguments(framework.LightningModule, "model", fail_untyped=False)
    if config.get("data") is not None or data is not None:
        wanted["data"] = _class_of(config.get("data"), data, path, "data", "--data")
        parser.add_subclass_arguments(framework.LightningDataModule, "data", fail_untyped=False)
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        framework.seed_everything(seed, workers=True, verbose=False)
    try:
        made = parser.instantiate_classes(parser.parse_object(wanted))
    except Exception as error:
        raise ValueError(f"What {path} names cannot be made ({type(error).__name__}: {error}).") from error
    callbacks = list(made.get("callbacks") or []) if watch is None else []
    kept = {name: settings[name] for name in KEPT_SETTINGS if settings.get(name) is not None}
    return Remade(made.model, made.get("data"), callbacks or _callbacks(watch), kept)


def base_of(kind: type) -> Any:
    """``LightningModule`` or ``LightningDataModule`` itself, of the namespace that a class is derived from."""
    return next(base for base in kind.__mro__ if base.__name__ in ("LightningModule", "LightningDataModule"))


def framework_of(kind: type) -> Any:
    """``lightning.pytorch`` or ``pytorch_lightning``: the trainer of one rejects the modules of the other."""
    return importlib.import_module(base_of(kind).__module__.partition(".core.")[0])


def _module_class(given: Any) -> type:
    kind = imported(given, "a LightningModule class")
    if kind is None:
        raise ValueError("It is not known of which class the module is; give --module package.module:Class.")
    if not isinstance(kind, type) or all(base.__name__ != "LightningModule" for base in kind.__mro__):
        raise TypeError(
            f"{given} is {kind!r}; expected a LightningModule class. For any other network give --build "
            "package.module:function, which returns (module, probe, loss_fn)."
        )
    return kind


def _callbacks(watch: Any) -> list[WatchingCallback]:
    given = imported(watch, "a PhaseWatch, or a function that returns one")
    made = PhaseWatch() if given is None else given() if callable(given) else given
    found = list(made) if isinstance(made, Sequence) else [made]
    if not found or not all(isinstance(one, WatchingCallback) for one in found):
        raise TypeError(f"{watch} gives {made!r}; expected a PhaseWatch, or a function that returns one.")
    return found


def _with_hyper_parameters(kind: type, kept: Mapping[str, Any] | None, name: str | None) -> Any:
    """An instance with the arguments that ``save_hyperparameters`` has put into a checkpoint.

    Args:
        kind: The class.
        kept: The arguments; None where none were kept.
        name: Of the one argument that holds them all, if they were kept so.
    """
    arguments = {key: value for key, value in dict(kept or {}).items() if key not in NO_ARGUMENTS}
    parameters = inspect.signature(kind).parameters
    if name is not None and name in parameters and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
        parsing = importlib.import_module(f"{framework_of(kind).__name__}.utilities.parsing")
        arguments = {name: parsing.AttributeDict(arguments)}
    elif all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    lacking = [
        key
        for key, p in parameters.items()
        if key not in arguments and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if lacking:
        raise ValueError(
            f"{kind.__name__} takes {', '.join(lacking)}, of which the first checkpoint says nothing; expected what "
            "save_hyperparameters() keeps there. Give --config, a subclass with defaults, or --build."
        )
    try:
        return kind(**arguments)
    except Exception as error:
        raise ValueError(
            f"{kind.__name__} cannot be made with the hyper-parameters in the first checkpoint "
            f"({', '.join(arguments) or 'none'}): {type(error).__name__}: {error}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    yaml = importlib.import_module("yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give the config.yaml that LightningCLI saved.") from error
    if isinstance(config, dict) and "model" not in config and isinstance(config.get("fit"), dict):
        config = config["fit"]  # as it is written for LightningCLI, and not by it
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} says of no model; expected the config.yaml that LightningCLI saved.")
    return config


def _class_of(node: Any, given: Any, path: Path, what: str, option: str) -> dict[str, Any]:
    """Class and arguments as jsonargparse takes them."""
    if isinstance(node, str):
        node = {"class_path": node}
    if isinstance(node, dict) and isinstance(node.get("class_path"), str):
        return {key: value for key, value in node.items() if value is not None}
    if given is None:
        raise ValueError(
            f"{path} names no class for {what}, as where LightningCLI is given it in code; give {option} "
            "package.module:Class beside it."
        )
    kind = imported(given, f"the class of {what}")
    if not isinstance(kind, type):
        raise TypeError(f"{given} is {kind!r}; expected a class.")
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": node or {}}


def _watching(callbacks: Any) -> list[Any]:
    """What of the callbacks in a config watches."""
    found = []
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        named = one.get("class_path") if isinstance(one, dict) else one
        if isinstance(named, str):
            with suppress(ValueError):  # that of another callback need not be installed here
                kind = imported(_place(named), "a callback")
                if isinstance(kind, type) and issubclass(kind, WatchingCallback):
                    found.append(one)
    return found


def _place(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    return f"{module}:{name}"
