"""Ray Tune's searcher of a search: which trial comes next, a function of the plan and of what is known so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.search import Searcher, SearchGenerator

from lape_ray.search.session import Session


class Points(SearchGenerator):
    """Hand out the plan's trials in the order of their numbers.

    The search is over when all have ended, not when all are handed out: until then Tune keeps idle actors.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(_Suggestions(session))
        self.session = session

    def is_finished(self) -> bool:
        """Tell whether every trial of the plan is over."""
        return self.session.over


class _Suggestions(Searcher):
    """Suggest the next trial's config; its trials are its only state."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next trial's config; None while there is none."""
        return self.session.next_trial()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: what a trial came to is in its record."""

    def save(self, checkpoint_path: str) -> None:
        """Write how many trials were handed out; Tune expects a file."""
        Path(checkpoint_path).write_text(f"{len(self.session.trials)}\n")

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the trials that Tune restores say which were handed out."""
