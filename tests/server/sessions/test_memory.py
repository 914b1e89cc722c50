from __future__ import annotations

import asyncio

from server.sessions.memory import Room


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_finds_no_room_waits_for_it_in_turn():
    async def check() -> None:
        room, came = Room(10), []

        async def enter(name: str, size: int) -> None:
            await room.take(size)
            came.append(name)

        waiting = [asyncio.create_task(enter(name, size)) for name, size in [("a", 6), ("b", 6), ("c", 1)]]
        await settled()
        assert came == ["a"]  # c would fit, but b was first
        room.give_back(6)
        await settled()
        assert came == ["a", "b", "c"]
        await asyncio.gather(*waiting)

    asyncio.run(check())


def test_what_is_larger_than_the_room_takes_all_of_it_alone():
    async def check() -> None:
        room = Room(10)
        assert await room.take(99) == 10
        next_one = asyncio.create_task(room.take(1))
        await settled()
        assert not next_one.done()
        room.give_back(10)
        assert await next_one == 1

    asyncio.run(check())


def test_who_stops_waiting_holds_up_nobody_and_keeps_nothing():
    async def check() -> None:
        room = Room(10)
        await room.take(9)
        impatient, modest = asyncio.create_task(room.take(10)), asyncio.create_task(room.take(1))
        await settled()
        assert not modest.done()
        impatient.cancel()
        await settled()
        assert modest.done()
        room.give_back(10)
        assert await room.take(10) == 10

    asyncio.run(check())


def test_room_that_comes_back_as_its_first_waiter_gives_up_goes_to_the_next():
    async def check() -> None:
        room = Room(10)
        await room.take(10)
        impatient, patient = asyncio.create_task(room.take(5)), asyncio.create_task(room.take(5))
        await settled()
        impatient.cancel()
        room.give_back(10)  # in the same step
        await settled()
        assert patient.done() and impatient.cancelled()
        room.give_back(5)
        assert await asyncio.wait_for(room.take(10), 1) == 10

    asyncio.run(check())


def test_who_is_cancelled_in_the_moment_of_getting_room_gives_it_back():
    async def check() -> None:
        room = Room(10)
        await room.take(10)
        waiting = asyncio.create_task(room.take(10))
        await settled()
        room.give_back(10)  # it is waiting's now
        waiting.cancel()
        await settled()
        assert await asyncio.wait_for(room.take(10), 1) == 10

    asyncio.run(check())
