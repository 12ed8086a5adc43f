"""Stand in for `training.loop.Training` until it is there."""

from __future__ import annotations

from typing import Any

from lape_ray.training import checkpoint
from lape_ray.training.loop import NOTHING_DONE, _validate, load_initial_weights, train_epoch
from lape_ray.training.state import build_state


class Snapshot:
    def __init__(self, state: Any, epochs_done: int, progress: Any, unsent: Any) -> None:
        self.copy = checkpoint.snapshot(
            model=state.network, ema=state.ema.model if state.ema else None, optimizer=state.optimizer
        )
        self.meta = checkpoint.Meta(
            epochs_done=epochs_done,
            steps_done=epochs_done * state.steps_per_epoch + progress.step,
            progress=progress,
            config=state.config,
            metrics=state.metrics,
            world_size=state.world.size,
            classes=state.classes,
            notes={"unsent": list(unsent)},
        )

    def save(self, folder: Any) -> None:
        checkpoint.save(folder, self.copy, self.meta)


class Adapter:
    def __init__(self, reporter: Any) -> None:
        self.r = reporter
        for name in ("step", "news", "stored", "line"):
            setattr(self, name, getattr(reporter, name))
        self.leaving = reporter.node_leaving


class Training:
    @classmethod
    def begin(cls, config: Any, *, device: Any, reporter: Any, resume_from: Any = None) -> Any:
        self = cls()
        self.config, self.reporter = config, reporter
        self.state = state = build_state(config, device)
        self.epochs_done, self.progress = 0, NOTHING_DONE
        if resume_from is not None:
            meta = checkpoint.restore(
                resume_from,
                config,
                model=state.network,
                ema=state.ema.model if state.ema else None,
                optimizer=state.optimizer,
            )
            self.epochs_done, self.progress, state.metrics = (
                meta.epochs_done,
                meta.progress,
                dict(meta.metrics),
            )
        elif config.run.init_from is not None:
            load_initial_weights(state, config.run.init_from)
        state.world.answers_within(config.run.start_timeout_s)
        return self

    def epoch(self) -> dict[str, float]:
        state, epoch = self.state, self.epochs_done

        def save(within: Any) -> None:
            self.progress = within
            steps = epoch * state.steps_per_epoch + within.step
            self.reporter.checkpoint({}, step=steps, snapshot=self.snapshot)

        start, self.progress = self.progress, NOTHING_DONE
        trained = train_epoch(state, epoch, Adapter(self.reporter), start=start, save=save)
        self.progress = NOTHING_DONE
        self.epochs_done += 1
        state.metrics = {"epoch": epoch + 1.0, **trained}
        if (epoch + 1) % self.config.run.eval_epochs == 0 or epoch + 1 == self.config.optim.total_epochs:
            state.metrics |= _validate(state)
        return dict(state.metrics)

    def snapshot(self, unsent: Any = ()) -> Any:
        return Snapshot(self.state, self.epochs_done, self.progress, unsent)

    def close(self) -> None:
        self.state.signals.close()
