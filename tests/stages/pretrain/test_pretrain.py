import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pretrain.masking import mask_tokens

SPECIAL = torch.tensor([0, 2, 3, 4])


def _mask(ids: torch.Tensor, probability: float = 0.15, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return mask_tokens(ids, SPECIAL, 4, 100, probability, torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_special_tokens_are_never_chosen_and_others_never_change_unchosen(seed: int) -> None:
    ids = torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(seed))
    seen, chosen = _mask(ids, seed=seed)
    assert not chosen[torch.isin(ids, SPECIAL)].any()
    assert torch.equal(seen[~chosen], ids[~chosen])
