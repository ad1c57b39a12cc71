from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway_admin.house import House, build_house


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(tmp_path: Path, valkey_socket: Path, anyio_backend: str) -> AsyncIterator[House]:
    async with build_house(tmp_path, valkey_socket) as built:
        yield built
