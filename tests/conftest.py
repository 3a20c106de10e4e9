import os
import sys
from pathlib import Path

# before any Hugging Face library is imported: the tests need no network
os.environ["HF_HUB_OFFLINE"] = "1"
# before torch: one thread everywhere, the same last bits in every process
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, request, tmp_path):
    """Downloads would go to a directory of the test; those of the embedded models are used where they are."""
    if "embedded" not in request.keywords:
        monkeypatch.setenv("CRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Directory with a tiny model, SAE and tasks (small_run.py)."""
    import small_run

    return small_run.build(tmp_path_factory.mktemp("small"))


@pytest.fixture
def half_right(monkeypatch):
    """What a random model says is right half of the time."""
    import small_run

    import crl_tasks

    monkeypatch.setattr(crl_tasks, "score_tokens", small_run.parity)
