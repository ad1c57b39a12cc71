"""What request handlers are given: every collaborator of the HTTP process, built once by bootstrap.py."""

from dataclasses import dataclass, field

from redis.asyncio import Redis

from engine.text.tokenizer import Tokenizer
from gateway.allowance import Allowance
from gateway.database import Database
from gateway.engine_link import EngineLink
from gateway.key_uses import KeyUses
from gateway.metrics import Metrics
from gateway.remembered import Remembered
from gateway.rights.standing import StandingWatch
from gateway.running import Running
from gateway.secrets import Secrets
from gateway.settings import Settings
from gateway.stages import Stages
from gateway.world import World
from tenancy.access.operator_tokens import note_token_uses
from tenancy.quotas.quota import Quota


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    world: World
    database: Database
    redis: Redis
    quota: Quota
    engine: EngineLink
    tokenizer: Tokenizer
    secrets: Secrets
    key_uses: KeyUses = field(default_factory=KeyUses)
    token_uses: KeyUses = field(default_factory=lambda: KeyUses(note_token_uses))
    running: Running = field(default_factory=Running)
    remembered: Remembered = field(default_factory=Remembered)
    metrics: Metrics = field(default_factory=Metrics)
    gateway_id: str = ""  # of this data folder, whose journal counts what its requests produced
    stages: Stages | None = None  # only in benchmarks
    allowance: Allowance = field(init=False)
    standing: StandingWatch = field(init=False)

    def __post_init__(self) -> None:
        allowance = Allowance(
            self.quota, self.redis, self.database, self.world, self.metrics, self.settings.lease_ttl_s
        )
        object.__setattr__(self, "allowance", allowance)
        object.__setattr__(self, "standing", StandingWatch(self.database))
        self.metrics.watch_standing(self.standing)
