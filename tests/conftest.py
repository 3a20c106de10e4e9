import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: the tests need no network
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: one thread everywhere, the same last bits in every process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Directory with a tiny model, SAE and tasks (small_run.py)."""
    import small_run
    return small_run.build(tmp_path_factory.mktemp("small"))


@pytest.fixture
def half_right(monkeypatch):
    """Random models' long answers are right half of the time."""
    import crl_tasks
    import small_run
    monkeypatch.setattr(crl_tasks, "score_answer", small_run.parity)
