"""Where worker groups ask and the search answers: an actor between processes that cannot call each other."""

from __future__ import annotations

import asyncio
from typing import Any

Question = tuple[int, int, dict[str, Any]]
"""Ticket, number of the worker group, and what it says."""


class Desk:
    """An asynchronous actor: holds questions until the search fetches them, and askers until it has answered."""

    def __init__(self) -> None:
        self._questions: asyncio.Queue[Question] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._kept: dict[int, Any] = {}
        self._tickets = 0

    async def ask(self, lane: int, message: dict[str, Any]) -> tuple[int, Any]:
        """Wait, as a worker, for the answer; returns the ticket and it."""
        self._tickets += 1
        ticket = self._tickets
        self._answers[ticket] = asyncio.get_running_loop().create_future()
        await self._questions.put((ticket, lane, message))
        try:
            return ticket, await self._answers[ticket]
        finally:
            del self._answers[ticket]

    async def fetch(self, timeout_s: float) -> list[Question]:
        """Return, to the search, all questions that wait, or none after `timeout_s`."""
        try:
            found = [await asyncio.wait_for(self._questions.get(), timeout_s)]
        except TimeoutError:
            return []
        while not self._questions.empty():
            found.append(self._questions.get_nowait())
        return found

    async def answer(self, ticket: int, value: Any, keep: bool = False) -> None:
        """Answer a question, as the search.

        What is kept can be read by the asker's companions; an asker that died gets nothing.
        """
        if keep:
            self._kept[ticket] = value
        if ticket in self._answers and not self._answers[ticket].done():
            self._answers[ticket].set_result(value)

    async def kept(self, ticket: int) -> Any:
        """Return an answer that was kept."""
        return self._kept[ticket]
