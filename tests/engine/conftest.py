from pathlib import Path

import pytest
import torch

from tests.strategies.tiny_model import write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are slower on two threads than on one, and ten times slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder
