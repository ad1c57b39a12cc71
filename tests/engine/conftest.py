from pathlib import Path

import pytest
import torch

from tests.model import model_dir
from tests.strategies.tiny_model import write_tiny_model

__all__ = ["model_dir", "tiny_model_dir"]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder
