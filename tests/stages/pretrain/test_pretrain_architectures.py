"""Every family that pretraining takes is trained for a few steps from a tiny random configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from pretraining_parts import CONFIGS, LENGTH, OBJECTIVES, FakeRun, params_for, scratch
from tokenizers import Tokenizer
from torch import Tensor, nn

from stages.core.checkpoints import load_model, save_model
from stages.core.errors import UserError
from stages.core.masked_language import chosen_logits, only_at
from stages.core.params import PretrainParams
from stages.core.tasks import TextClassification
from stages.pretrain.__main__ import Pretraining, run_pretrain
from stages.pretrain.blocks import Blocks
from stages.pretrain.model import probe, sees_ahead
from stages.pretrain.objectives import build_objective

FITTING = {
    "bert": "next_sentence",
    "roberta": "masked",
    "albert": "masked",
    "distilbert": "masked",
    "electra": "replaced_tokens",
    "modernbert": "masked",
    "xlnet": "masked",
    "gpt2": "causal",
    "llama": "causal",
    "t5": "span_corruption",
    "bart": "denoising",
}
PAIRS = [
    *FITTING.items(),
    ("bert", "masked"),
    ("albert", "next_sentence"),
    ("electra", "masked"),
    ("bart", "span_corruption"),
]


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_a_few_steps_teach_something_and_finetune_takes_the_result(
    family: str, kind: str, tmp_path: Path, tokenizer_folder: Path, blocks_folder: Path, tokenizer: Any
) -> None:
    params = params_for(kind)
    checkpoint = scratch(tmp_path / "checkpoint", family)
    run: Any = FakeRun(
        tmp_path / "run", params, checkpoint=checkpoint, tokenizer=tokenizer_folder, blocks=blocks_folder
    )
    metrics = run_pretrain(run)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert metrics["after"]["heldout_loss"] < metrics["before"]["heldout_loss"]
    assert ("perplexity" in metrics["after"]) == (kind != "replaced_tokens")

    folder = run.staging / "model"
    again = build_objective(params.pretrain.objective, folder, tokenizer, LENGTH)
    if kind != "replaced_tokens":
        _, figures = Pretraining(again, _blocks(blocks_folder, params.pretrain), tokenizer, run).evaluate()
        assert figures == metrics["after"]
    written = safetensors.torch.load_file(folder / "model.safetensors")
    loaded = again.handed_on()["model"].state_dict()
    assert set(written) <= set(loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())

    classifier = TextClassification().build_model(folder, ["a", "b"]).eval()
    assert _share_of_body_in(classifier, written) > 0.7
    (tmp_path / "finetuned").mkdir()
    save_model(classifier, tmp_path / "finetuned", tokenizer_folder, [])
    inputs = tokenizer(["the cat sees paris.", "a dog"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "finetuned")(**inputs).logits, classifier(**inputs).logits)


def _blocks(folder: Path, params: PretrainParams) -> Blocks:
    return Blocks(folder, params.steps, params.optimizer.batch_tokens, 0)


def _share_of_body_in(model: Any, written: dict[str, Tensor]) -> float:
    """Share of the parameters of a model's body that are, value for value, among those written."""
    known = {(tuple(tensor.shape), float(tensor.double().sum())) for tensor in written.values()}
    own = [(tuple(value.shape), float(value.detach().double().sum())) for value in model.base_model.parameters()]
    return sum(value in known for value in own) / len(own)


@pytest.mark.parametrize("family", [*CONFIGS])
def test_special_tokens_of_a_new_model_are_the_tokenizers(family: str, tmp_path: Path, tokenizer: Any) -> None:
    objective = params_for(FITTING[family]).pretrain.objective
    built = build_objective(objective, scratch(tmp_path, family), tokenizer, LENGTH)
    config: Any = built.handed_on()["model"].config
    wanted = {"pad": "pad", "bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep", "mask": "mask"}
    for role, token in wanted.items():
        if hasattr(config, f"{role}_token_id"):
            assert getattr(config, f"{role}_token_id") == getattr(tokenizer, f"{token}_token_id"), role
    sentinels = {"t5": 1}.get(family, 0)
    assert config.vocab_size == len(tokenizer) + sentinels
    starts = {"t5": tokenizer.pad_token_id, "bart": tokenizer.sep_token_id}
    if family in starts:
        assert config.decoder_start_token_id == starts[family]


class _Widest(nn.Module):
    """Remembers the most rows of logits that any linear layer gave over the vocabulary."""

    def __init__(self, model: nn.Module, vocabulary: int):
        super().__init__()
        self.rows = 0
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == vocabulary:
                module.register_forward_hook(self._look)

    def _look(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.rows = max(self.rows, output.numel() // output.shape[-1])


@pytest.mark.parametrize("family", [*FITTING])
def test_logits_are_made_at_chosen_positions_only_and_are_those_of_the_whole_model(
    family: str, tmp_path: Path, tokenizer: Any
) -> None:
    kind = {"bert": "masked", "electra": "masked"}.get(family, FITTING[family])
    built = build_objective(params_for(kind).pretrain.objective, scratch(tmp_path, family), tokenizer, LENGTH)
    model: Any = built.model.eval()
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(5, len(tokenizer), (3, 9), generator=chance)
    chosen = torch.rand(3, 9, generator=chance) < 0.4
    inputs: dict[str, Tensor] = {"attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    widest = _Widest(model, model.config.vocab_size)
    with torch.inference_mode():
        with only_at(model, chosen):
            few = model(input_ids=ids, **inputs).logits
        assert widest.rows == int(chosen.sum())
        whole = model(input_ids=ids, **inputs).logits
        assert widest.rows == ids.numel()
        torch.testing.assert_close(few.squeeze(0), whole[chosen])
        if not model.config.is_encoder_decoder:
            torch.testing.assert_close(chosen_logits(model, ids, chosen), whole[chosen])


def test_a_model_is_whole_again_after_an_error_among_chosen_positions(tmp_path: Path, tokenizer: Any) -> None:
    built = build_objective(params_for("masked").pretrain.objective, scratch(tmp_path, "bert"), tokenizer, LENGTH)
    ids = torch.full((2, 6), 7)
    with pytest.raises(RuntimeError), only_at(built.model, torch.ones(2, 6, dtype=torch.bool)):
        raise RuntimeError
    assert probe(built.model, ids).logits.shape == (2, 6, len(tokenizer))


def test_albert_shares_the_parameters_of_its_layers(tmp_path: Path, tokenizer: Any) -> None:
    objective = params_for("masked").pretrain.objective
    sizes = {
        layers: sum(
            parameter.numel()
            for parameter in build_objective(
                objective, scratch(tmp_path / str(layers), "albert", num_hidden_layers=layers), tokenizer, LENGTH
            ).model.parameters()
        )
        for layers in (1, 6)
    }
    assert sizes[1] == sizes[6]


@pytest.mark.parametrize(
    ("family", "kind", "values", "message"),
    [
        ("gpt2", "masked", {}, "reads from left to right only; set pretrain.objective.kind to causal"),
        ("bert", "causal", {}, "sees the tokens that it should guess"),
        ("xlnet", "causal", {}, "sees the tokens that it should guess"),
        ("t5", "masked", {}, "no model for pretrain.objective.kind masked"),
        ("bert", "span_corruption", {}, "no model for pretrain.objective.kind span_corruption"),
        ("roberta", "next_sentence", {}, "roberta has no next-sentence head"),
        ("t5", "next_sentence", {}, "t5 has no next-sentence head"),
        ("bert", "replaced_tokens", {}, "takes model_type electra, not bert"),
        ("roberta", "masked", {"max_position_embeddings": LENGTH}, f"does not take blocks of {LENGTH} tokens"),
        ("gpt2", "causal", {"n_positions": LENGTH - 1}, f"does not take blocks of {LENGTH} tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    family: str, kind: str, values: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    checkpoint = scratch(tmp_path, family, **values)
    with pytest.raises(UserError, match=message) as refused:
        build_objective(params_for(kind).pretrain.objective, checkpoint, tokenizer, LENGTH)
    assert "\n" not in str(refused.value)


def test_an_encoder_told_to_look_back_only_learns_causally(tmp_path: Path, tokenizer: Any) -> None:
    checkpoint = scratch(tmp_path, "bert", is_decoder=True)
    built = build_objective(params_for("causal").pretrain.objective, checkpoint, tokenizer, LENGTH)
    assert not sees_ahead(built.model, LENGTH)


@pytest.mark.parametrize("kind", [*OBJECTIVES])
def test_a_tokenizer_without_the_tokens_an_objective_needs_is_refused(
    kind: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = str(tokenizer_folder / "tokenizer.json")
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(path))
    with pytest.raises(UserError, match=f"pretrain.objective.kind {kind}: the tokenizer has no .*_token"):
        build_objective(params_for(kind).pretrain.objective, scratch(tmp_path, "bert"), bare, LENGTH)


def test_a_checkpoint_without_room_for_sentinels_grows(tmp_path: Path, tokenizer: Any) -> None:
    objective = params_for("span_corruption").pretrain.objective
    first = build_objective(objective, scratch(tmp_path / "a", "t5"), tokenizer, LENGTH)
    model: Any = first.model
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "b")
    grown: Any = build_objective(objective, tmp_path / "b", tokenizer, LENGTH).model
    assert grown.get_input_embeddings().num_embeddings == len(tokenizer) + 1
    assert torch.equal(grown.shared.weight[: len(tokenizer)], model.shared.weight)
