"""What open pages are sent: all of it once, then what is new, and never more than the newest state late."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

from server.dashboard.feed import Feed
from server.dashboard.view import View
from server.rounds.events import Ended, Rejected, Resumed, RoundEnded, Started
from tests.support import federation

FEDERATION = federation(training__rounds=5000)


def ended(number: int, **changes: Any) -> RoundEnded:
    return RoundEnded(round=number, rounds=5000, loss=1 / number, **changes)


def told(frame: bytes) -> tuple[str, Any]:
    """The event of a frame, as a browser reads it: lines of fields, ended by an empty one."""
    fields = [line.partition(": ") for line in frame.decode().split("\n") if line and not line.startswith(":")]
    values = {name: value for name, _, value in fields}
    assert frame.endswith(b"\n\n") and frame.count(b"\n\n") == 1
    return values["event"], json.loads(values["data"])


def merged(state: dict[str, Any], frame: bytes) -> dict[str, Any]:
    """What a page holds after a frame, by the page's own rules."""
    kind, value = told(frame)
    if kind == "whole":
        return value
    assert kind == "news"
    lines = dict(state["lines"])
    for key, (stay, points) in value.pop("more", {}).items():
        lines[key] = [*lines[key][:stay], *points]
    return {**state, **value, "lines": lines}


async def opened(feed: Feed) -> tuple[AsyncIterator[bytes], dict[str, Any]]:
    frames = feed.frames()
    first = await anext(frames)
    assert first.startswith(b"retry: 1000\n") and told(first)[0] == "now"
    return frames, merged({}, await anext(frames))


def test_a_page_that_follows_has_what_a_new_page_is_given():
    async def follow() -> None:
        rng, feed = random.Random(1), Feed(View(FEDERATION, "run"))
        feed(Started(rounds=5000))
        feed.publish()
        with feed.page():
            frames, held = await opened(feed)
            number = 0
            for _ in range(300):
                for _ in range(rng.randrange(1, 9)):
                    number += 1
                    late = (Rejected(f"c{number % 5}", "late", "was late"),) if rng.random() < 0.3 else ()
                    feed(ended(number, rejected=late, failed="no quorum" if rng.random() < 0.1 else ""))
                if rng.random() < 0.05:
                    number = max(number - 3, 1)
                    feed(Resumed(round=number, rounds=5000))
                feed.publish()
                frame = await anext(frames)
                assert told(frame)[0] == "news"
                held = merged(held, frame)
            _, new = await opened(feed)
            assert number > 1000 and len(held["lines"]["loss"]) < 900  # so lines have been thinned, too
            assert held == new

    asyncio.run(follow())


def test_a_slow_page_is_given_the_newest_state_and_nothing_in_between():
    async def dawdle() -> None:
        feed = Feed(View(FEDERATION, "run"))
        with feed.page():
            frames, _ = await opened(feed)
            for number in range(1, 60):
                feed(ended(number))
                feed.publish()
            kind, state = told(await anext(frames))
            assert (kind, len(state["lines"]["loss"])) == ("whole", 59)
            feed(ended(60))
            feed.publish()
            kind, news = told(await anext(frames))
            assert (kind, news["more"]["loss"]) == ("news", [59, [[60, 0.0166667]]])

    asyncio.run(dawdle())


def test_news_are_encoded_once_for_all_pages():
    async def share() -> None:
        feed = Feed(View(FEDERATION, "run"))
        with feed.page(), feed.page():
            one, other = feed.frames(), feed.frames()
            for frames in (one, other):
                await anext(frames)
            assert await anext(one) is await anext(other)
            feed(ended(1))
            feed.publish()
            assert await anext(one) is await anext(other)

    asyncio.run(share())


def test_many_events_make_one_frame():
    async def hurry() -> None:
        feed = Feed(View(FEDERATION, "run"))
        with feed.page():
            frames, _ = await opened(feed)
            for number in range(1, 100):
                feed(ended(number))
            feed.publish()
            assert len(told(await anext(frames))[1]["more"]["loss"][1]) == 99
            silent = asyncio.ensure_future(anext(frames))
            await asyncio.sleep(0.02)
            assert not silent.done()
            silent.cancel()

    asyncio.run(hurry())


def test_a_link_on_which_nothing_happens_is_kept_alive_by_a_comment():
    async def wait() -> None:
        feed = Feed(View(FEDERATION, "run"), keep_alive_s=0.01)
        frames, _ = await opened(feed)
        frame = await anext(frames)
        assert frame.startswith(b": ") and told(frame)[0] == "now"

    asyncio.run(wait())


def test_a_page_is_told_the_end_and_then_no_more():
    async def finish() -> None:
        feed = Feed(View(FEDERATION, "run"))
        with feed.page():
            frames, held = await opened(feed)
            feed(Ended(status="completed"))
            feed.close()
            held = merged(held, await anext(frames))
            assert held["state"]["over"] is True
            assert [frame async for frame in frames] == []

    asyncio.run(finish())


def test_who_is_there_is_asked_while_the_run_goes_on_and_a_silent_answer_stops_nothing():
    async def look() -> None:
        asked = 0

        async def clients() -> dict[str, tuple[str, float, str]]:
            nonlocal asked
            asked += 1
            raise TimeoutError

        feed = Feed(View(FEDERATION, "run"))
        following = asyncio.create_task(feed.run(clients))
        feed(ended(1))
        _, state = await opened(feed)
        while not state["lines"]["loss"]:
            await asyncio.sleep(0.01)
            _, state = await opened(feed)
        assert asked == 1 and not following.done()
        following.cancel()

    asyncio.run(look())
