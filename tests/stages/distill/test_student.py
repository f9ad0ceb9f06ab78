import json
import shutil
from pathlib import Path

import pytest
import torch

from stages.core.artifacts import write_manifest
from stages.core.checkpoints import load_model, save_model
from stages.core.errors import UserError
from stages.core.params import CheckpointStudent, LayersStudent, NarrowStudent
from stages.core.structure import LayerWidth, encoder_layers, keep_parts, layer_widths
from stages.core.tasks import get_task
from stages.distill.student import build_student, narrow_student

TASK = get_task("text-classification")
LABELS = ["animal", "number", "place"]
IDS = torch.arange(5, 29).reshape(3, 8)
NARROW = NarrowStudent(kind="narrow", layers=3, hidden=16, heads=2, neurons=24)


def test_chosen_layers_are_the_teachers(tiny_checkpoint: Path, tiny_data: Path) -> None:
    teacher = load_model(tiny_checkpoint)
    params = LayersStudent(kind="layers", layers=[1])
    student = build_student(params, load_model(tiny_checkpoint), TASK, LABELS, tiny_data)
    (layer,) = encoder_layers(student)
    assert torch.equal(layer.output.dense.weight, encoder_layers(teacher)[1].output.dense.weight)
    with pytest.raises(UserError, match=r"distill.student.layers: the teacher has layers 0 to 1, got \[5\]"):
        build_student(LayersStudent(kind="layers", layers=[5]), teacher, TASK, LABELS, tiny_data)


def test_a_narrow_student_has_the_asked_shape_and_survives_a_save(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    student = build_student(NARROW, load_model(tiny_checkpoint), TASK, LABELS, tiny_data).eval()
    assert layer_widths(student) == [LayerWidth(2, 24)] * 3
    folder = tmp_path / "student"
    folder.mkdir()
    save_model(student, folder, tiny_data / "tokenizer", [])
    with torch.no_grad():
        assert torch.equal(load_model(folder)(input_ids=IDS).logits, student(input_ids=IDS).logits)


def test_projected_embeddings_keep_inner_products_as_no_other_projection_can(tiny_checkpoint: Path) -> None:
    """Eckart & Young: the error is that of the singular values left out, as numpy finds them."""
    teacher = load_model(tiny_checkpoint)
    theirs = teacher.bert.embeddings.word_embeddings.weight.detach().double()
    own = narrow_student(NARROW, teacher).bert.embeddings.word_embeddings.weight.detach().double()
    left_out = torch.linalg.svdvals(theirs)[16:]
    error = (theirs @ theirs.T - own @ own.T).norm()
    assert error.item() == pytest.approx(left_out.pow(4).sum().sqrt().item(), rel=1e-4)


def test_a_student_as_wide_or_wider_keeps_the_embeddings(tiny_checkpoint: Path) -> None:
    teacher = load_model(tiny_checkpoint)
    theirs = teacher.bert.embeddings.word_embeddings.weight
    for hidden in (32, 48):
        params = NARROW.model_copy(update={"hidden": hidden})
        own = narrow_student(params, teacher).bert.embeddings.word_embeddings.weight
        assert torch.equal(own[:, :32], theirs)


def test_a_pruned_classifier_is_taken_as_it_is(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    pruned = load_model(tiny_checkpoint)
    keep_parts(encoder_layers(pruned)[0], torch.tensor([1, 2]), torch.arange(10))
    folder = tmp_path / "pruned"
    folder.mkdir()
    save_model(pruned, folder, tiny_data / "tokenizer", [])
    student = build_student(_checkpoint(folder), load_model(tiny_checkpoint), TASK, LABELS, tiny_data)
    with torch.no_grad():
        assert torch.equal(student(input_ids=IDS).logits, pruned(input_ids=IDS).logits)


def test_a_checkpoint_without_a_head_gets_one_for_the_labels(
    tiny_checkpoint: Path, tiny_data: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    body = BertModel(
        BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    body.save_pretrained(tmp_path / "body")
    shutil.copytree(tiny_tokenizer, tmp_path / "body", dirs_exist_ok=True)
    student = build_student(_checkpoint(tmp_path / "body"), load_model(tiny_checkpoint), TASK, LABELS, tiny_data)
    assert student.classifier.out_features == 3
    assert student.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)


def test_checkpoints_that_do_not_fit_are_refused(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    teacher = load_model(tiny_checkpoint)
    with pytest.raises(UserError, match="distill.student: .*nowhere has no config.json"):
        build_student(_checkpoint(tmp_path / "nowhere"), teacher, TASK, LABELS, tiny_data)
    words = tmp_path / "words"
    shutil.copytree(tiny_checkpoint, words)
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text().replace('"paris"', '"rome"'))
    with pytest.raises(UserError, match="distill.student: .*words has another tokenizer than the data"):
        build_student(_checkpoint(words), teacher, TASK, LABELS, tiny_data)
    with pytest.raises(UserError, match="distill.student: .* cannot get a head for 2 labels"):
        build_student(_checkpoint(tiny_checkpoint), teacher, TASK, ["yes", "no"], tiny_data)


def _checkpoint(folder: Path) -> CheckpointStudent:
    return CheckpointStudent(kind="checkpoint", path=str(folder))


def test_a_classifier_with_the_labels_in_another_order_is_not_taken_for_the_same(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned"
    shutil.copytree(tiny_checkpoint, turned)
    config = json.loads((turned / "config.json").read_text())
    config["id2label"] = {"0": "number", "1": "animal", "2": "place"}
    config["label2id"] = {"number": 0, "animal": 1, "place": 2}
    (turned / "config.json").write_text(json.dumps(config))
    write_manifest(turned)
    with pytest.raises(UserError, match="distill.student: .*turned knows the labels"):
        build_student(_checkpoint(turned), load_model(tiny_checkpoint), TASK, LABELS, tiny_data)
