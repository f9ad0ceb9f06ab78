import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM

from stages.core.masked_language import chosen_logits
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


def test_shares_follow_the_paper() -> None:
    ids = torch.full((400, 500), 50)
    seen, chosen = _mask(ids)
    assert abs(chosen.float().mean() - 0.15) < 0.005
    fate = seen[chosen]
    assert abs((fate == 4).float().mean() - 0.8) < 0.02
    assert abs((fate == 50).float().mean() - 0.1) < 0.02


def test_logits_at_chosen_positions_are_those_of_the_whole_model() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForMaskedLM(config).eval()
    seen, chosen = _mask(torch.randint(5, 100, (3, 9)), probability=0.4)
    with torch.no_grad():
        torch.testing.assert_close(chosen_logits(model, seen, chosen), model(input_ids=seen).logits[chosen])
