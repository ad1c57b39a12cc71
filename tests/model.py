"""The demo model for tests that need the real thing: fetched and converted once, kept under the data folder."""

import os
from pathlib import Path

import pytest

MODEL_DIR = Path(__file__).parents[1] / "data" / "models" / "smollm2-135m-instruct"


def demo_model_dir() -> Path:
    """BULKHEAD_TEST_MODEL_DIR where set, else the demo model, fetched by the same function that serves it."""
    if folder := os.environ.get("BULKHEAD_TEST_MODEL_DIR"):
        return Path(folder)
    from gateway.host.demo_model import ensure_demo_model

    ensure_demo_model(MODEL_DIR)
    return MODEL_DIR


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return demo_model_dir()
