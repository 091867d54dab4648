"""Full load for a while: no valid request fails, and memory stays flat."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.serving import tiny
from tests.serving.figures import tell
from tests.serving.server import Server, serving
from tests.serving.test_pictures import SOUND, UNSOUND

CONNECTIONS = 32


@dataclass
class Soak:
    """What a run came to."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def slope(self) -> tuple[float, float]:
        """Return the growth of memory over the second half, MB an hour, and its 95% margin."""
        half = len(self.seconds) // 2
        hours = [second / 3600 for second in self.seconds[half:]]
        megabytes = self.megabytes[half:]
        slope, offset = statistics.linear_regression(hours, megabytes)
        residuals = [y - slope * x - offset for x, y in zip(hours, megabytes, strict=True)]
        spread = statistics.pvariance(hours) * len(hours)
        error = (sum(r * r for r in residuals) / (len(hours) - 2) / spread) ** 0.5
        return slope, 1.96 * error


def _request(body: bytes) -> bytes:
    lines = ["POST /predict HTTP/1.1", "host: test", f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def _requests() -> list[tuple[bytes, bytes]]:
    """Return requests of every picture, sound and not, each with how its status begins."""
    sound = [(_request(make()), b" 200 ") for make, _ in SOUND.values()]
    unsound = [(_request(make()), b" 4") for make, _ in UNSOUND.values()]
    return [pair for both in zip(sound, sound[1:] + unsound, strict=False) for pair in both]


async def _ask(
    server: Server, soak: Soak, until: float, requests: list[tuple[bytes, bytes]], offset: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    number = offset
    while time.monotonic() < until:
        data, status = requests[number % len(requests)]
        number += 1
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        soak.answered += 1
        if status not in head.split(b"\r\n")[0]:
            soak.wrong.append(repr(head + body))
    writer.close()
    await writer.wait_closed()


async def _watch(server: Server, soak: Soak, until: float) -> None:
    workers = server.workers()
    begun = time.monotonic()
    while time.monotonic() < until:
        soak.seconds.append(time.monotonic() - begun)
        soak.megabytes.append(sum(worker.memory_info().rss for worker in workers) / 2**20)
        await asyncio.sleep(0.25)


def run(folder: Path, seconds: float) -> Soak:
    """Load a server of one worker with every kind of picture, sound and not."""
    tiny.save_colour_model(folder / "model.onnx")
    soak, requests = Soak(), _requests()

    async def all_at_once(server: Server) -> None:
        until = time.monotonic() + seconds
        asks = [_ask(server, soak, until, requests, number) for number in range(CONNECTIONS)]
        await asyncio.gather(_watch(server, soak, until), *asks)

    with serving(folder) as server:
        asyncio.run(all_at_once(server))
        assert len(server.workers()) == 1
    return soak


def test_a_short_soak(tmp_path: Path) -> None:
    soak = run(tmp_path, seconds=6)
    assert soak.wrong == []
    assert soak.answered > 100
    half = len(soak.megabytes) // 2
    assert soak.megabytes[-1] - soak.megabytes[half] < 100


@pytest.mark.long
def test_a_long_soak(tmp_path: Path) -> None:
    seconds = float(os.environ.get("SOAK_S", "1800"))
    soak = run(tmp_path, seconds)
    slope, margin = soak.slope()
    tell(
        f"soak, {seconds:g} s, {CONNECTIONS} connections, sound and unsound pictures",
        f"{soak.answered} answers, {len(soak.wrong)} wrong; memory {soak.megabytes[0]:.0f} MB at "
        f"first, {soak.megabytes[-1]:.0f} MB at last; slope over the second half "
        f"{slope:+.1f} MB an hour, 95% interval {slope - margin:+.1f} to {slope + margin:+.1f}",
        "soak",
    )
    assert soak.wrong == []
    assert slope + margin <= 20
