from __future__ import annotations

import copy

import numpy
import pytest
import torch

from stages.core.judging import predict_logits
from stages.core.metrics import softmax
from stages.core.structure import encoder_layers, keep_parts
from stages.explain.attention import attention_maps, rollout
from stages.explain.path import first_layers, first_token_vectors, layer_probabilities, nearest, settled_at
from stages.explain.reader import Reader


@pytest.fixture
def rows(reader: Reader, texts: list[str]) -> list[list[int]]:
    return [reader.tokenizer.encode(text).ids for text in texts[:20]]


def test_the_last_layer_of_the_path_is_the_answer(
    reader: Reader, quantized_reader: Reader, rows: list[list[int]]
) -> None:
    for each in (reader, quantized_reader):
        path = layer_probabilities(each.model, rows, each.pad_id)
        assert path.shape == (3, 20, 3)
        expected = softmax(predict_logits(each.model, rows, each.pad_id).numpy())
        numpy.testing.assert_array_equal(path[-1], expected)
        assert not numpy.allclose(path[0], path[-1], atol=1e-3)
        assert len(encoder_layers(each.model)) == 2


def test_a_layer_of_the_path_is_the_head_on_its_state(reader: Reader, rows: list[list[int]]) -> None:
    model = reader.model
    with torch.no_grad():
        states = model(input_ids=torch.tensor(rows[:1]), output_hidden_states=True).hidden_states
        logits = [model.classifier(model.bert.pooler(state)) for state in states]
    path = layer_probabilities(model, rows[:1], reader.pad_id)[:, 0]
    numpy.testing.assert_allclose(path, softmax(torch.cat(logits).numpy()), atol=1e-6)


def test_layers_come_back_after_a_fault(reader: Reader) -> None:
    with pytest.raises(RuntimeError), first_layers(reader.model, 1):
        assert len(encoder_layers(reader.model)) == 1
        raise RuntimeError
    assert len(encoder_layers(reader.model)) == 2


def test_an_answer_settles_where_it_last_changed() -> None:
    answers = numpy.array([[1, 0, 2, 1], [1, 1, 2, 0], [1, 1, 0, 1]])
    assert settled_at(answers).tolist() == [0, 1, 2, 2]


def test_attention_maps_are_those_of_the_model(reader: Reader, rows: list[list[int]]) -> None:
    maps = attention_maps(reader.model, rows[0])
    assert len(maps) == 2
    assert reader.model.config._attn_implementation == "sdpa"
    model = copy.deepcopy(reader.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(rows[:1]), output_attentions=True).attentions
    for own, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(own, other[0])


def test_rows_of_the_rollout_sum_to_one_and_match_the_paper(reader: Reader, rows: list[list[int]]) -> None:
    maps = attention_maps(reader.model, rows[1])
    flow = rollout(maps, len(rows[1]))
    torch.testing.assert_close(flow.sum(dim=1), torch.ones(len(rows[1])))
    first, second = (0.5 * part.mean(dim=0) + 0.5 * torch.eye(len(rows[1])) for part in maps if part is not None)
    torch.testing.assert_close(flow, second @ first)


def test_layers_without_heads_have_no_map_and_pass_the_flow_on(reader: Reader, rows: list[list[int]]) -> None:
    model = copy.deepcopy(reader.model)
    keep_parts(encoder_layers(model)[0], torch.tensor([]).long(), torch.arange(8))
    keep_parts(encoder_layers(model)[1], torch.tensor([0, 3]), torch.arange(8))
    none, two = attention_maps(model, rows[0])
    assert none is None
    assert two is not None and two.shape == (2, len(rows[0]), len(rows[0]))
    torch.testing.assert_close(rollout([none, two], len(rows[0])), rollout([two], len(rows[0])))
    torch.testing.assert_close(rollout([None], 4), torch.eye(4))
    assert layer_probabilities(model, rows, reader.pad_id).shape == (3, 20, 3)


def test_a_text_is_its_own_nearest_neighbour(reader: Reader, rows: list[list[int]]) -> None:
    vectors = first_token_vectors(reader.model, rows, reader.pad_id)
    with torch.no_grad():
        state = reader.model.bert(input_ids=torch.tensor(rows[3:4])).last_hidden_state[0, 0]
    numpy.testing.assert_allclose(vectors[3], state.numpy(), atol=1e-5)
    indices, similarities = nearest(vectors, vectors, 3)
    assert indices.shape == (20, 3)
    numpy.testing.assert_allclose(similarities[:, 0], 1.0, atol=1e-5)
    own = [rows[found[0]] == rows[place] for place, found in enumerate(indices)]
    assert all(own)
    assert nearest(vectors, vectors[:2], 3)[0].shape == (20, 2)
