"""Mixed precision: the types, and processors without bfloat16."""

import pytest
import torch

from utils.update import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("level, dtype", [("O0", torch.float32), ("O1", torch.bfloat16)])
def test_products_have_the_type_of_the_level(level, dtype):
    with Precision(level, CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    "level, known, emulated",
    [
        ("O1", {"avx512_bf16": False, "amx_bf16": False}, True),
        ("O1", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("O1", {}, False),  # another architecture
        ("O0", {"avx512_bf16": False, "amx_bf16": False}, False),
    ],
)
def test_processors_without_bfloat16_are_known(monkeypatch, level, known, emulated):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert Precision(level, CPU).emulated == emulated


def test_unknown_level():
    with pytest.raises(ValueError, match="O0, O1 or O2"):
        Precision("O3", CPU)
