"""Run by wheel.sh in an environment that has nothing but the wheel. Argument: the root of the repository."""

import importlib.util
import sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path[:] = [entry for entry in sys.path if not Path(entry or ".").resolve().is_relative_to(root)]

import phasewatch  # noqa: E402

assert not Path(phasewatch.__file__).is_relative_to(root), phasewatch.__file__
assert (Path(phasewatch.__file__).parent / "py.typed").exists()
for name in phasewatch.__all__:
    getattr(phasewatch, name)
assert not {"pytorch_lightning", "lightning", "tensorboard"} & set(sys.modules), "import phasewatch is not light"

from phasewatch.callbacks import HessianMonitor, LLCMonitor, PhaseWatch, TransitionDetector  # noqa: E402

assert importlib.util.find_spec("callbacks") is None, "a top-level import name `callbacks` was installed"
for callback in (HessianMonitor, LLCMonitor, PhaseWatch, TransitionDetector):
    callback()
print("the installed wheel is sound")
