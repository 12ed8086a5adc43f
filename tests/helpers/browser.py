"""Headless Chromium, told over its own protocol what to open; it says when words are there, and makes a picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp


@contextlib.contextmanager
def chromium(profile: Path, port: int) -> Iterator[str]:
    """The address at which a browser of the block's own takes commands."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--remote-debugging-port={port}", "--window-size=1500,1300", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10))
                if found := [one["webSocketDebuggerUrl"] for one in pages if one["type"] == "page"]:
                    break
            if time.monotonic() > deadline:
                raise TimeoutError("chromium does not answer")
            time.sleep(0.5)
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


async def photograph(
    browser: str, address: str, target: Path, words: Sequence[str], timeout_s: float
) -> float:
    """Open a page and wait until its text or its source has all the words; returns after how many seconds it had them.

    Raises:
        TimeoutError: it does not show them in time; the picture is made all the same, of what it shows.
    """
    numbers = itertools.count(1)
    async with aiohttp.ClientSession() as session, session.ws_connect(browser, max_msg_size=0) as socket:

        async def call(method: str, **parameters: object) -> dict:
            number = next(numbers)
            await socket.send_json({"id": number, "method": method, "params": parameters})
            while True:
                answer = json.loads((await socket.receive()).data)
                if answer.get("id") == number:
                    return answer.get("result", {})

        await call("Page.enable")
        await call("Page.navigate", url=address)
        began, missing = time.monotonic(), list(words)
        while missing and time.monotonic() < began + timeout_s:
            await asyncio.sleep(0.2)
            shown = "document.documentElement.innerText + ' ' + document.documentElement.innerHTML"
            text = (await call("Runtime.evaluate", expression=shown)).get("result", {}).get("value", "")
            missing = [word for word in words if word not in text]
        took_s = time.monotonic() - began
        await asyncio.sleep(5)  # curves are drawn one after the other
        picture = await call("Page.captureScreenshot", format="png")
        target.write_bytes(base64.b64decode(picture["data"]))
    if missing:
        raise TimeoutError(f"{address} does not show {missing} after {timeout_s:g} s; see {target}")
    return took_s
