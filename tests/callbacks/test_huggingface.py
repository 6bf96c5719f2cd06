"""The Trainer of Hugging Face, and a plain loop with accelerate: trained as without, measured as by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from phasewatch import Watch
from phasewatch.estimators import BehavioralCoefficient, Estimator, HessianSpectrum, LearningCoefficient
from phasewatch.record import Run, load_run

OF_THE_LOSS = LearningCoefficient(chains=2, draws=6, burn_in=20)
FEW = (OF_THE_LOSS, BehavioralCoefficient(chains=2, draws=16, burn_in=20), HessianSpectrum(num_eigenvalues=2))
FEWER = (OF_THE_LOSS, BehavioralCoefficient(sampled="none"), HessianSpectrum(num_eigenvalues=2))


class Sequences(Dataset[Any]):
    """Counting up modulo 11, from anywhere."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(6) + index) % 11
        return {"input_ids": tokens, "labels": tokens}


def measured(run: Run) -> list[tuple[int, dict[str, Any]]]:
    return [(m.step, {k: v for k, v in m.estimates.items() if k != "overhead"}) for m in run.measurements]


def hugged(root: Path, *callbacks: Any, max_steps: int = 8, resume: str | None = None) -> dict[str, Tensor]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=6,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.1,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(root),
            max_steps=max_steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=4,
            eval_strategy="steps",
            eval_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Sequences(),
        eval_dataset=Sequences(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


def watching(*estimators: Estimator) -> Any:
    pytest.importorskip("transformers")
    from phasewatch.callbacks.huggingface import PhaseWatchCallback

    return PhaseWatchCallback(schedule=4, probe_samples=16, estimators=estimators or FEW, on_error="raise")


def evaluates(watching: Any) -> Any:
    """Evaluates the loss on the probe of another callback by hand, before every fourth step and at the end."""
    transformers = pytest.importorskip("transformers")

    class Evaluates(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        losses: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step % 4 == 0:
                was, stream = model.training, torch.get_rng_state()
                model.eval()
                batches = watching.watch.main.probe.batches
                with torch.no_grad():
                    self.losses.append(sum(float(model(**batch).loss) for batch in batches) / len(batches))
                model.train(was)
                torch.set_rng_state(stream)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.on_step_begin(args, state, control, **others)

    return Evaluates()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_trainer_trains_as_without_and_its_record_is_one(tmp_path: Path) -> None:
    callback = watching(*FEWER)
    by_hand = evaluates(callback)
    weights = hugged(tmp_path / "watched", callback, by_hand)
    assert equal(weights, hugged(tmp_path / "plain"))
    run = load_run(tmp_path / "watched" / "phasewatch.jsonl")
    assert [m.step for m in run.measurements] == [0, 4, 8] and run.finished and not run.failures
    assert run.header["n"] == 32 and run.header["monitors"][0]["probe"]["samples"] == 16
    assert {"llc", "effective_rank", "hessian_max", "loss"} <= set(run.names)
    assert {"loss", "learning_rate", "eval_loss"} <= set(run.observed)
    assert run.observed["loss"].steps.tolist() == list(range(8))
    assert run.observed["eval_loss"].steps.tolist() == [4, 8]
    assert not [name for name in run.observed if "runtime" in name or "per_second" in name]
    assert run.series("loss").values.tolist() == pytest.approx(by_hand.losses, rel=1e-5)


def test_a_resumed_run_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    whole = watching(OF_THE_LOSS)
    weights = hugged(tmp_path / "whole", whole)
    hugged(tmp_path / "cut", watching(OF_THE_LOSS), max_steps=4)
    resumed = watching(OF_THE_LOSS)
    again = hugged(tmp_path / "cut", resumed, resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert equal(weights, again)
    run = load_run(tmp_path / "cut" / "phasewatch.jsonl")
    assert run.header["run_id"] == resumed.watch.run.header["run_id"] and run.finished
    assert [step for step, _ in measured(run)] == [step for step, _ in measured(whole.watch.run)]
    for (_, ours), (_, theirs) in zip(measured(run), measured(whole.watch.run), strict=True):
        for name in ("loss", "llc"):
            assert ours[name].value == pytest.approx(theirs[name].value, rel=1e-6, nan_ok=True)


def test_what_cannot_be_drawn_from_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    callback = watching()

    class Endless:
        dataset = iter(())

    state = type("State", (), {"is_world_process_zero": True, "global_step": 0, "max_steps": 8})
    arguments = type("Arguments", (), {"output_dir": str(tmp_path), "device": torch.device("cpu")})
    with pytest.raises(ValueError, match=r"no length; give PhaseWatchCallback\(probe=\[batches\], n="):
        callback.on_train_begin(arguments, state, None, model=nn.Linear(1, 1), train_dataloader=Endless())
    arguments.fsdp = "full_shard"
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard them"):
        callback.on_train_begin(arguments, state, None, model=nn.Linear(1, 1), train_dataloader=Endless())


INPUTS = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] * INPUTS[:, 1] > 0).long()


def looped(tmp_path: Path, accelerated: bool, watched: bool) -> tuple[dict[str, Tensor], Run | None]:
    """A loop of one's own; what accelerate prepares is trained and watched like what it does not."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8)
    backward: Any = Tensor.backward
    if accelerated:
        accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    watch = None
    if watched:
        probe = [(INPUTS[:16], TARGETS[:16])]
        watch = Watch(model, probe, loss_fn=loss_fn, n=48, schedule=3, estimators=FEW, on_error="raise")
    step = 0
    for _ in range(2):
        for batch in loader:
            if watch is not None:
                watch.at(step)
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            backward(loss)
            if watch is not None:
                watch.observe(step, getattr(optimizer, "optimizer", optimizer), loss=loss)
            optimizer.step()
            step += 1
    if watch is not None:
        watch.close(step)
    return dict(model.state_dict()), None if watch is None else watch.run


def test_a_loop_with_accelerate_is_watched_like_one_without(tmp_path: Path) -> None:
    weights, run = looped(tmp_path, accelerated=True, watched=True)
    assert equal(weights, looped(tmp_path, accelerated=True, watched=False)[0])
    plain_weights, plain = looped(tmp_path, accelerated=False, watched=True)
    assert equal(weights, plain_weights)
    assert run is not None and plain is not None and measured(run) == measured(plain)
    assert [m.step for m in run.measurements] == [0, 3, 6, 9, 12] and run.finished


def test_a_setting_that_there_is_not_is_refused_at_once() -> None:
    pytest.importorskip("transformers")
    from phasewatch.callbacks.huggingface import PhaseWatchCallback

    with pytest.raises(TypeError, match=r"has no setting 'max_overheat'; .* Did you mean max_overhead\?"):
        PhaseWatchCallback(max_overheat=0.2)
    with pytest.raises(
        TypeError, match=r"no setting 'listeners'; there are schedule, probe, .*, free_seconds, estimators,"
    ):
        PhaseWatchCallback(listeners=[])
    with pytest.raises(ValueError, match="every -1 steps; expected a number of steps, at least 1"):
        PhaseWatchCallback(schedule=-1)
    with pytest.raises(TypeError, match="on_transition is 'stop'; expected a function"):
        PhaseWatchCallback(on_transition="stop")  # type: ignore[arg-type]
