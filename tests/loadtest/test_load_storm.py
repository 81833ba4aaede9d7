"""A storm of loads against a served fake engine."""

import asyncio
import itertools

from server_fixture import serving_server

from fusionserve.errors import CapacityError
from fusionserve.loadtest.load_storm import Storm, load_pinned, storm_of_loads


async def test_a_storm_loads_while_the_block_runs_and_counts_what_happened() -> None:
    async with serving_server() as served:
        target, storm = str(served.app.grpc_address), Storm()
        async with storm_of_loads(target, ["new1", "new2", "alpha"], 50.0, storm):
            while not storm.num_present:
                await asyncio.sleep(0.01)
        assert set(served.engine.adapters) == {"alpha", "beta", "new1", "new2"}
        assert (storm.num_loaded, storm.num_present) == (2, 1)
        assert storm.median_s > 0
        served.engine.load_error = CapacityError("no room", reason="HOST_FULL")
        async with storm_of_loads(target, ["new3"], 50.0, storm):
            while not storm.num_refused:
                await asyncio.sleep(0.01)
        assert storm.num_loaded == 2


async def test_the_next_storm_goes_on_where_the_last_one_ended() -> None:
    async with serving_server() as served:
        target, storm = str(served.app.grpc_address), Storm()
        names = itertools.cycle(f"new{n}" for n in range(1000))
        for _ in range(2):
            before = storm.num_loaded
            async with storm_of_loads(target, names, 50.0, storm):
                while storm.num_loaded < before + 3:
                    await asyncio.sleep(0.01)
        assert storm.num_present == 0


async def test_pinned_adapters_are_loaded_anew_and_pinned() -> None:
    async with serving_server() as served:
        await load_pinned(str(served.app.grpc_address), ["alpha", "gamma"])
        pinned = {name for name, status in served.engine.adapters.items() if status.pinned}
        assert pinned == {"alpha", "gamma"}
