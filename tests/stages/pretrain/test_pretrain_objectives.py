"""What each objective makes of blocks: answers known by hand, reconstruction, and rates within binomial bounds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining_parts import LENGTH, FakeRun, params_for, scratch
from scipy import stats
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional

from stages.core.errors import UserError
from stages.core.training.loop import split
from stages.pretrain.__main__ import Pretraining, run_pretrain
from stages.pretrain.blocks import Blocks
from stages.pretrain.masking import mask_rate, mask_tokens
from stages.pretrain.objectives import build_objective
from stages.pretrain.objectives.denoising import infill, permute_sentences, span_lengths
from stages.pretrain.objectives.next_sentence import FOLLOWS, OTHER, UNKNOWN, make_pairs
from stages.pretrain.objectives.replaced_tokens import ReplacedTokens, draw, generator_config
from stages.pretrain.objectives.span_corruption import corrupt, corruption_lengths, noise_spans
from stages.pretrain.words import word_starts, words_of

TEXT = "an unbelievable riverside remembers the houselessness in london."
PAD, CLS, SEP, MASK = 0, 2, 3, 4


def _chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _objective(kind: str, family: str, folder: Path, tokenizer: Any, **values: Any) -> Any:
    params = params_for(kind, **values).pretrain.objective
    return build_objective(params, scratch(folder, family), tokenizer, LENGTH)


def _likely(count: int, of: int, probability: float) -> bool:
    """Whether a count could come of this probability; wrong once in a hundred thousand times."""
    return stats.binomtest(count, of, probability).pvalue > 1e-5


# Masked tokens


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_words_are_those_of_the_text(kind: str, tokenizers_of: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers_of[kind])
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    ids, offsets = torch.tensor([encoded["input_ids"]]), encoded["offset_mapping"][1:-1]
    special = torch.tensor(tokenizer.all_special_ids)
    words = words_of(ids, word_starts(tokenizer, len(tokenizer)), special)[0].tolist()
    if kind == "wordpiece":  # its full stop is a word of its own
        expected = [word for word in encoded.word_ids() if word is not None]
    else:
        expected = [TEXT[:end].count(" ") for _, end in offsets]
    assert len(expected) > max(expected) + 1, "no word of several tokens, so that nothing is tested"
    assert words == [0, *(word + 1 for word in expected), max(expected) + 2]


def test_words_of_a_tokenizer_that_marks_none_are_refused() -> None:
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(UserError, match=r"pretrain\.objective\.whole_words"):
        word_starts(plain, 2)


def test_words_are_hidden_whole_and_as_often_as_asked() -> None:
    starts = torch.ones(100, dtype=torch.bool)
    starts[50:] = False
    ids = torch.randint(5, 100, (400, 100), generator=_chance(1))
    words = words_of(ids, starts, torch.tensor([PAD, CLS, SEP, MASK]))
    seen, chosen = mask_tokens(ids, torch.tensor([PAD, CLS, SEP, MASK]), MASK, 100, 0.15, _chance(), words)
    counts = [
        (row[word == number].float().mean())
        for row, word in zip(chosen[:20], words[:20], strict=True)
        for number in word.unique()
    ]
    assert set(map(float, counts)) == {0.0, 1.0}
    opening = torch.ones_like(chosen)
    opening[:, 1:] = words[:, 1:] != words[:, :-1]
    assert _likely(int(chosen[opening].sum()), int(opening.sum()), 0.15)
    masked, hidden = int((seen[chosen] == MASK).sum()), int(chosen.sum())
    assert _likely(masked, hidden, 0.8)


def test_shares_of_mask_other_and_same_are_the_papers() -> None:
    ids = torch.full((400, 500), 50)
    seen, chosen = mask_tokens(ids, torch.tensor([PAD, CLS, SEP, MASK]), MASK, 100, 0.15, _chance())
    fate, hidden = seen[chosen], int(chosen.sum())
    assert _likely(hidden, ids.numel(), 0.15)
    assert _likely(int((fate == MASK).sum()), hidden, 0.8 + 0.1 / 100)
    assert _likely(int((fate == 50).sum()), hidden, 0.1 + 0.1 / 100)


def test_the_mask_rate_goes_in_a_straight_line_and_the_stage_follows_it(
    tmp_path: Path, tokenizer: Any, blocks_folder: Path
) -> None:
    params = params_for("masked", steps=5, mask_probability=0.6, final_mask_probability=0.1)
    objective: Any = params.pretrain.objective
    assert [mask_rate(objective, part) for part in (0.0, 0.5, 1.0)] == pytest.approx([0.6, 0.35, 0.1])
    assert mask_rate(params_for("masked").pretrain.objective, 0.7) == 0.15  # type: ignore[arg-type]

    built = build_objective(objective, scratch(tmp_path, "bert"), tokenizer, LENGTH)
    run: Any = FakeRun(tmp_path, params)
    pretraining = Pretraining(built, Blocks(blocks_folder, 5, 64 * LENGTH, 0), tokenizer, run)
    special = torch.tensor(tokenizer.all_special_ids)
    for step, rate in ((0, 0.6), (2, 0.35), (4, 0.1)):
        batch = pretraining.batches(0)[0]
        tensors = pretraining.prepare([step, *batch[1:]])
        assert _likely(int(tensors["chosen"].sum()), int((~torch.isin(tensors["blocks"], special)).sum()), rate)


# Next sentence

ONE = [CLS, 10, 11, SEP, 12, 13, 14, SEP]  # cut at 3: the last place is no cut
TWO = [CLS, 20, SEP, 21, 22, SEP, 23, 24]  # cut at 5, nearer the middle than 2


def test_pairs_are_as_worked_by_hand() -> None:
    expected = {
        (0, FOLLOWS): [CLS, 10, 11, SEP, 12, 13, PAD, PAD],
        (0, OTHER): [CLS, 10, 11, SEP, 23, 24, PAD, PAD],
        (1, FOLLOWS): [CLS, 20, SEP, 21, 22, SEP, 23, 24],
        (1, OTHER): [CLS, 20, SEP, 21, 22, SEP, 12, 13],
    }
    met = set()
    for seed in range(20):
        pairs = make_pairs(torch.tensor([ONE, TWO]), SEP, PAD, _chance(seed))
        for row, follows in enumerate(pairs["follows"].tolist()):
            assert pairs["blocks"][row].tolist() == expected[row, follows]
            met.add((row, follows))
        assert pairs["mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]
        assert pairs["parts"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]
    assert met == set(expected)


def test_half_of_the_pairs_do_not_follow() -> None:
    blocks = torch.tensor([ONE, TWO]).repeat(2000, 1)
    follows = make_pairs(blocks, SEP, PAD, _chance())["follows"]
    assert _likely(int((follows == OTHER).sum()), 4000, 0.5)


def test_a_block_without_a_separator_and_one_alone_are_not_judged() -> None:
    plain = [CLS, *range(10, 17)]
    pairs = make_pairs(torch.tensor([ONE, plain, TWO]), SEP, PAD, _chance())
    assert pairs["follows"][1:].tolist() == [UNKNOWN, UNKNOWN]
    assert pairs["blocks"][1:].tolist() == [plain, TWO]
    assert make_pairs(torch.tensor([ONE]), SEP, PAD, _chance())["follows"].tolist() == [UNKNOWN]


def test_a_batch_of_one_block_cannot_teach_pairs(tmp_path: Path, tokenizer: Any, blocks_folder: Path) -> None:
    run: Any = FakeRun(tmp_path, params_for("next_sentence"))
    objective = _objective("next_sentence", "bert", tmp_path, tokenizer)
    with pytest.raises(UserError, match=rf"batch_tokens: must be at least {2 * LENGTH}"):
        Pretraining(objective, Blocks(blocks_folder, 5, LENGTH, 0), tokenizer, run)


# What micro-batches add up to


@pytest.mark.parametrize(
    ("kind", "family", "values"),
    [
        ("masked", "bert", {}),
        ("next_sentence", "bert", {}),
        ("causal", "gpt2", {}),
        ("span_corruption", "t5", {}),
        ("denoising", "bart", {}),
        # The discriminator's tokens are drawn anew at every call, so its loss is left out.
        ("replaced_tokens", "electra", {"discriminator_weight": 1e-9}),
    ],
)
def test_parts_of_a_batch_add_up_to_its_loss(
    kind: str, family: str, values: dict[str, Any], tmp_path: Path, tokenizer: Any, blocks_folder: Path
) -> None:
    objective = _objective(kind, family, tmp_path, tokenizer, **values)
    objective.model.eval()
    blocks = Blocks(blocks_folder, 1, 7 * LENGTH, 0).train[:7]
    tensors = objective.prepare(blocks, 0.0, _chance())
    parts = split(tensors, 3)
    weights = [objective.weight(part) for part in parts]
    with torch.no_grad():
        added = sum(
            float(objective.loss(part)) * weight / sum(weights) for part, weight in zip(parts, weights, strict=True)
        )
        assert added == pytest.approx(float(objective.loss(tensors)), rel=1e-5)


# Causal


def test_every_token_but_pads_is_guessed_from_those_before_it(tmp_path: Path, tokenizer: Any) -> None:
    objective = _objective("causal", "gpt2", tmp_path, tokenizer)
    blocks = torch.tensor([[CLS, 7, 8, SEP, 9, SEP], [CLS, 7, 8, SEP, PAD, PAD]])
    tensors = objective.prepare(blocks, 0.0, _chance())
    assert tensors["following"][tensors["chosen"]].tolist() == [7, 8, SEP, 9, SEP, 7, 8, SEP]
    own = objective.model(input_ids=blocks, labels=blocks.masked_fill(blocks == PAD, -100)).loss
    assert float(objective.loss(tensors).detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    assert int(objective.scored(blocks).sum()) == objective.weight(tensors) == 8


# Span corruption


def test_lengths_are_those_of_t5() -> None:
    noise, spans = corruption_lengths(568, 0.15, 3.0)
    # compute_input_and_target_lengths of T5's code: 568 tokens give inputs of 512 and targets of 114.
    assert (568 - noise + spans + 1, noise + spans + 1) == (512, 114)


def test_a_text_is_corrupted_as_in_the_paper() -> None:
    text = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    noise = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    inputs, targets = corrupt(text, noise, torch.tensor([90, 91]), 1)
    assert inputs.tolist() == [[10, 11, 90, 14, 15, 16, 91, 1]]
    assert targets.tolist() == [[90, 12, 13, 91, 17, 1]]


@given(st.integers(4, 80), st.floats(0.05, 0.8), st.floats(1.0, 6.0), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_input_and_target_hold_the_text(length: int, density: float, mean: float, seed: int) -> None:
    noise, spans = corruption_lengths(length, density, mean)
    hidden = noise_spans(3, length, noise, spans, _chance(seed))
    assert hidden.sum(dim=1).tolist() == [noise] * 3
    assert ((hidden[:, 1:] & ~hidden[:, :-1]).sum(dim=1) + hidden[:, 0]).tolist() == [spans] * 3
    text = torch.randint(5, 500, (3, length), generator=_chance(seed))
    sentinels = torch.arange(900, 900 + spans)
    inputs, targets = corrupt(text, hidden, sentinels, 1)
    assert inputs.shape == (3, length - noise + spans + 1)
    assert targets.shape == (3, noise + spans + 1)
    for row in range(3):
        told = targets[row, :-1].tolist()
        starts = [told.index(sentinel) for sentinel in sentinels.tolist()] + [len(told)]
        told_of = {
            sentinel: told[start + 1 : end]
            for sentinel, start, end in zip(sentinels.tolist(), starts[:-1], starts[1:], strict=True)
        }
        rebuilt = [token for shown in inputs[row, :-1].tolist() for token in told_of.get(shown, [shown])]
        assert rebuilt == text[row].tolist()


def test_every_way_to_cut_is_as_likely() -> None:
    hidden = noise_spans(6000, 8, 4, 2, _chance())
    ways = torch.unique(hidden, dim=0, return_counts=True)[1]
    assert len(ways) == 9  # three ways to cut four tokens of text in two, and three to cut four of noise
    assert stats.chisquare(ways.numpy()).pvalue > 1e-5


def test_sentinels_are_the_tokenizers_own_where_it_has_some(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra_id_1>", "<extra_id_0>"], special_tokens=True)
    objective = _objective("span_corruption", "t5", tmp_path, tokenizer, noise_density=0.3, mean_span_length=3.5)
    tensors = objective.prepare(torch.full((1, LENGTH), 9), 0.0, _chance())
    assert [token for token in tensors["targets"][0].tolist() if token >= size] == [size + 1, size]
    with pytest.raises(UserError, match="take 3 sentinels and the tokenizer has 2"):
        _objective("span_corruption", "t5", tmp_path, tokenizer, noise_density=0.3, mean_span_length=2.5)


# Denoising


@given(st.lists(st.integers(5, 99), min_size=2, max_size=60), st.floats(0.1, 0.9), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_infilling_keeps_order_and_takes_what_was_asked(row: list[int], density: float, seed: int) -> None:
    broken = infill(numpy.array(row), density, 3.0, MASK, numpy.random.default_rng(seed))
    left = iter(row)
    assert all(token in left for token in broken if token != MASK), "a token was moved or made up"
    kept = len([token for token in broken if token != MASK])
    # Only where the text is too short to keep its spans apart is less taken out.
    assert len(row) - kept <= round(len(row) * density)
    assert not any(one == other == MASK for one, other in itertools.pairwise(broken))


def test_three_tenths_of_a_long_text_are_taken_out_in_poisson_spans() -> None:
    row = numpy.arange(5, 1005)
    broken = infill(row, 0.3, 3.0, MASK, numpy.random.default_rng(0))
    assert len([token for token in broken if token != MASK]) == 700
    lengths = span_lengths(30_000, 3.0, numpy.random.default_rng(0))
    assert sum(lengths) == 30_000
    counts = numpy.bincount(numpy.minimum(lengths[:-1], 8), minlength=9)
    expected = numpy.append(stats.poisson(3.0).pmf(range(8)), stats.poisson(3.0).sf(7))
    assert stats.chisquare(counts, expected * counts.sum()).pvalue > 1e-5


def test_texts_change_places_whole() -> None:
    row = numpy.array([10, 11, SEP, 12, SEP, 13, 14])
    texts = [[10, 11, SEP], [12, SEP], [13, 14]]
    orders = {tuple(permute_sentences(row, SEP, numpy.random.default_rng(seed)).tolist()) for seed in range(60)}
    assert orders == {tuple(itertools.chain(*order)) for order in itertools.permutations(texts)}


def test_the_decoder_is_to_write_the_block(tmp_path: Path, tokenizer: Any) -> None:
    objective = _objective("denoising", "bart", tmp_path, tokenizer)
    blocks = torch.tensor([[CLS, *range(10, 18), SEP, *range(20, 29), SEP]])
    tensors = objective.prepare(blocks, 0.0, _chance())
    assert torch.equal(tensors["targets"], blocks)
    assert tensors["input_ids"][0, 0] == CLS
    assert (tensors["input_ids"] == MASK).any()
    own = objective.model.eval()(
        input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], labels=blocks
    ).loss
    assert float(objective.loss(tensors).detach()) == pytest.approx(float(own.detach()), rel=1e-5)


# Replaced tokens


def test_tokens_are_drawn_by_their_probability() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = draw(probabilities.log().expand(20_000, 4), _chance())
    counts = torch.bincount(drawn, minlength=4).numpy()
    assert (
        stats.chisquare(counts, probabilities.double().numpy() / float(probabilities.double().sum()) * 20_000).pvalue
        > 1e-5
    )


def test_the_loss_is_the_generators_and_fifty_times_the_discriminators(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = _objective("replaced_tokens", "electra", tmp_path, tokenizer)
    objective.model.eval()
    blocks = torch.randint(5, len(tokenizer), (4, LENGTH), generator=_chance())
    tensors = objective.prepare(blocks, 0.0, _chance())
    guesses = torch.full((int(tensors["chosen"].sum()),), 6)
    monkeypatch.setattr("stages.pretrain.objectives.replaced_tokens.draw", lambda logits, chance: guesses)
    replaced = torch.where(tensors["chosen"], 6, blocks)
    with torch.no_grad():
        labels = torch.where(tensors["chosen"], blocks, -100)
        generator = objective.model.generator(input_ids=tensors["seen"], labels=labels).loss
        told = objective.model.discriminator(input_ids=replaced).logits
        discriminator = functional.binary_cross_entropy_with_logits(told, (replaced != blocks).float())
        assert float(objective.loss(tensors)) == pytest.approx(float(generator + 50 * discriminator), rel=1e-5)
        figures = objective.measure(tensors)
    assert figures["heldout_loss"] == pytest.approx(float(discriminator), rel=1e-5)
    assert figures["generator_loss"] == pytest.approx(float(generator), rel=1e-5)
    put = replaced != blocks
    assert figures["replaced_found"] == pytest.approx(float((told > 0)[put].float().mean()))
    assert figures["originals_kept"] == pytest.approx(float((told <= 0)[~put].float().mean()))


def test_the_generator_is_narrower_and_shares_the_embeddings(tmp_path: Path, tokenizer: Any) -> None:
    objective = _objective("replaced_tokens", "electra", tmp_path, tokenizer)
    discriminator, generator = objective.model.discriminator, objective.model.generator
    assert generator.electra.embeddings is discriminator.electra.embeddings
    assert generator.generator_lm_head.weight is discriminator.electra.embeddings.word_embeddings.weight
    sizes = [getattr(generator.config, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size")]
    assert sizes == [16, 2, 32]
    deeper: Any = params_for("replaced_tokens", generator_config={"num_hidden_layers": 5}).pretrain.objective
    assert generator_config(discriminator.config, deeper).num_hidden_layers == 5
    wrong: Any = params_for("replaced_tokens", generator_config={"depth": 5}).pretrain.objective
    with pytest.raises(UserError, match="depth is no value of an electra model"):
        generator_config(discriminator.config, wrong)


def _weights(run: Any, unit: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run.staging / unit / "model.safetensors")


def test_a_broken_off_run_ends_with_the_same_generator_and_discriminator(
    tmp_path: Path, tokenizer_folder: Path, blocks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_for("replaced_tokens", steps=8)
    every_step = params.model_copy(update={"saves": params.saves.model_copy(update={"seconds": 0.0})})
    inputs = {"checkpoint": scratch(tmp_path / "c", "electra"), "tokenizer": tokenizer_folder, "blocks": blocks_folder}
    whole: Any = FakeRun(tmp_path / "whole", every_step, **inputs)
    run_pretrain(whole)

    loss, calls = ReplacedTokens.loss, []

    def break_off(self: ReplacedTokens, tensors: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise ConnectionAbortedError
        return loss(self, tensors)

    with monkeypatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr(ReplacedTokens, "loss", break_off)
        run_pretrain(FakeRun(tmp_path / "broken", every_step, **inputs))  # type: ignore[arg-type]
    again: Any = FakeRun(tmp_path / "broken", every_step, **inputs)
    said: list[str] = []
    again.say = said.append
    run_pretrain(again)
    assert any("goes on from step 5" in line for line in said)
    for unit in ("model", "generator"):
        one, other = _weights(whole, unit), _weights(again, unit)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    kept = transformers.AutoModelForMaskedLM.from_pretrained(again.staging / "generator")
    assert torch.equal(
        kept.get_input_embeddings().weight, _weights(again, "model")["electra.embeddings.word_embeddings.weight"]
    )
