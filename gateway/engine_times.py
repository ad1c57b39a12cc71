"""What the engine has counted of its time, written down once a minute while it works."""

from dataclasses import dataclass

from gateway.services import Services
from tenancy.usage.engine_time import note_engine_time


@dataclass(slots=True)
class EngineTimes:
    _last: tuple[str, int] = ("", 0)  # epoch and time of its steps, as last written

    async def write(self, services: Services) -> None:
        """Nothing where the engine has not worked since, or is not there."""
        status = services.engine.status
        if status.ready is None or status.stats is None:
            return
        epoch, stats = status.ready.epoch, status.stats
        if not stats.step_ns or (epoch, stats.step_ns) == self._last:
            return
        async with services.database.transaction() as conn:
            await note_engine_time(
                conn,
                epoch=epoch,
                at_ns=services.world.now_ns(),
                gateway_id=services.gateway_id,
                step_ns=stats.step_ns,
                own_ns=stats.own_ns,
            )
        self._last = epoch, stats.step_ns
