import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.core import teacher as room
from stages.core.artifacts import write_manifest
from stages.core.checkpoints import load_model
from stages.core.examples import load_examples
from stages.core.relations import recorded_projections
from stages.core.teacher import CACHE, Recorded, TeacherOutputs, average_logits, teacher_outputs

EVERYTHING = Recorded(hidden=(0, 1), attention=(1,), relations=0)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rows(tiny_data: Path) -> list[list[int]]:
    return load_examples(tiny_data, "train").input_ids


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many texts the teacher was asked about, each time it was."""
    counts: list[int] = []
    ask = room._ask

    def counting(model: torch.nn.Module, rows: list[list[int]], recorded: Recorded) -> dict[str, Tensor]:
        counts.append(len(rows))
        return ask(model, rows, recorded)

    monkeypatch.setattr(room, "_ask", counting)
    yield counts


def _same(one: TeacherOutputs, other: TeacherOutputs) -> bool:
    tensors = [
        (one.logits, other.logits),
        (one.starts, other.starts),
        *zip(one.hidden, other.hidden, strict=True),
        *zip(one.attention, other.attention, strict=True),
        *([(one.relations, other.relations)] if one.relations is not None and other.relations is not None else []),
    ]
    return all(torch.equal(a, b) for a, b in tensors)


def test_outputs_are_those_of_the_teacher_text_by_text(tiny_checkpoint: Path, rows: list[list[int]]) -> None:
    outputs = teacher_outputs(tiny_checkpoint, rows, EVERYTHING, "fp32")
    model = load_model(tiny_checkpoint)
    assert outputs.relations is not None
    for index in (0, 7, 59):
        with torch.no_grad(), recorded_projections(model, [0, 1]) as seen:
            alone = model(input_ids=torch.tensor([rows[index]]), output_hidden_states=True)
        tokens = outputs.tokens(torch.tensor([index]))
        torch.testing.assert_close(outputs.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
        expected = {
            outputs.hidden[0]: alone.hidden_states[1][0],
            outputs.hidden[1]: alone.hidden_states[2][0],
            outputs.attention[0]: torch.stack(seen[1][:2], dim=2)[0],
            outputs.relations: torch.stack(seen[0], dim=2)[0],
        }
        for kept, states in expected.items():
            torch.testing.assert_close(kept[tokens].float(), states, atol=0.02, rtol=0.01)


def test_the_teacher_is_asked_about_new_texts_alone(
    tiny_checkpoint: Path, rows: list[list[int]], asked: list[int]
) -> None:
    teacher_outputs(tiny_checkpoint, rows[:20], EVERYTHING, "fp32")
    new = len({tuple(row) for row in rows} - {tuple(row) for row in rows[:20]})
    whole = teacher_outputs(tiny_checkpoint, rows, EVERYTHING, "fp32")
    again = teacher_outputs(tiny_checkpoint, rows, EVERYTHING, "fp32")
    backwards = teacher_outputs(tiny_checkpoint, rows[::-1], EVERYTHING, "fp32")
    part = teacher_outputs(tiny_checkpoint, rows[10:30], EVERYTHING, "fp32")
    assert asked == [len({tuple(row) for row in rows[:20]}), new]
    assert _same(whole, again)
    assert torch.equal(backwards.logits.flip(0), whole.logits)
    assert torch.equal(part.logits, whole.logits[10:30])
    tokens = whole.tokens(torch.arange(10, 30))
    assert torch.equal(part.hidden[1], whole.hidden[1][tokens])
    turned = torch.tensor([59, 3, 3])
    tokens = backwards.tokens(59 - turned)
    assert torch.equal(backwards.attention[0][tokens], whole.attention[0][whole.tokens(turned)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_answers_are_the_same_bit_for_bit_however_they_were_asked(
    tiny_checkpoint: Path, rows: list[list[int]], precision: room.Precision
) -> None:
    at_once = teacher_outputs(tiny_checkpoint, rows, EVERYTHING, precision)
    shutil.rmtree(CACHE)
    for count in (1, 8, 33):
        teacher_outputs(tiny_checkpoint, rows[:count], EVERYTHING, precision)
    assert _same(teacher_outputs(tiny_checkpoint, rows, EVERYTHING, precision), at_once)


def test_another_teacher_precision_or_record_is_asked_anew(
    tiny_checkpoint: Path, rows: list[list[int]], asked: list[int], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    (other / "note.txt").write_text("another")
    write_manifest(other)
    for teacher, recorded, precision in (
        (tiny_checkpoint, Recorded(), "fp32"),
        (other, Recorded(), "fp32"),
        (tiny_checkpoint, Recorded(), "bf16"),
        (tiny_checkpoint, Recorded(relations=1), "fp32"),
        (tiny_checkpoint, Recorded(), "fp32"),
    ):
        teacher_outputs(teacher, rows[:3], recorded, precision)  # type: ignore[arg-type]
    assert len(asked) == 4


def test_nothing_is_kept_that_was_not_wanted(tiny_checkpoint: Path, rows: list[list[int]]) -> None:
    outputs = teacher_outputs(tiny_checkpoint, rows, Recorded(), "fp32")
    assert (outputs.hidden, outputs.attention, outputs.relations) == ([], [], None)
    (file,) = CACHE.glob("*/*/outputs.safetensors")
    assert room._names(file.parent) == {"keys", "starts", "logits"}


def test_asking_leaves_the_generator_as_it_was(tiny_checkpoint: Path, rows: list[list[int]]) -> None:
    before = torch.get_rng_state()
    teacher_outputs(tiny_checkpoint, rows, EVERYTHING, "fp32")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_part_is_asked_again(tiny_checkpoint: Path, rows: list[list[int]], asked: list[int]) -> None:
    first = teacher_outputs(tiny_checkpoint, rows[:10], Recorded(), "fp32")
    teacher_outputs(tiny_checkpoint, rows[:20], Recorded(), "fp32")
    file = sorted(CACHE.glob("*/*/outputs.safetensors"), key=lambda path: path.stat().st_mtime_ns)[0]
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert torch.equal(teacher_outputs(tiny_checkpoint, rows[:10], Recorded(), "fp32").logits, first.logits)
    assert len(asked) == 3
    assert asked[2] == asked[0]


def test_a_killed_write_leaves_nothing_that_counts(
    tiny_checkpoint: Path, rows: list[list[int]], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(room, "publish", lambda draft, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            teacher_outputs(tiny_checkpoint, rows, Recorded(), "fp32")
    teacher_outputs(tiny_checkpoint, rows, Recorded(), "fp32")
    teacher_outputs(tiny_checkpoint, rows, Recorded(), "fp32")
    assert len(asked) == 2


def test_the_cache_is_bounded_and_what_was_used_last_stays(
    tiny_checkpoint: Path, rows: list[list[int]], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in (0, 1):
        teacher_outputs(tiny_checkpoint, rows, Recorded(hidden=(layer,)), "fp32")
    teacher_outputs(tiny_checkpoint, rows, Recorded(hidden=(0,)), "fp32")
    sizes = [room._size(path) for path in CACHE.glob("*/*")]
    monkeypatch.setattr(room, "CACHE_BYTES", max(sizes) * 2 + 1)
    teacher_outputs(tiny_checkpoint, rows, Recorded(), "fp32")
    assert len(list(CACHE.glob("*/*"))) == 2
    teacher_outputs(tiny_checkpoint, rows, Recorded(hidden=(0,)), "fp32")
    assert len(asked) == 3
    monkeypatch.setattr(room, "CACHE_BYTES", 0)
    teacher_outputs(tiny_checkpoint, rows, Recorded(hidden=(0,)), "fp32")
    assert len(list(CACHE.glob("*/*"))) == 1


def test_teachers_are_averaged_by_their_probabilities() -> None:
    """At temperature 2, logits of 2 log p have the softened probabilities p."""
    one, other = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.1, 0.8]])
    mean = average_logits([2 * one.log(), 2 * other.log() + 7.0], temperature=2.0)
    torch.testing.assert_close((mean / 2.0).softmax(dim=-1), torch.tensor([[0.3, 0.2, 0.5]]))


def test_one_teacher_is_taken_as_it_is_and_a_twin_changes_nothing() -> None:
    logits = torch.tensor([[3.0, -1.0, 0.5]])
    assert average_logits([logits], 2.0) is logits
    twins = average_logits([logits, logits], 2.0)
    torch.testing.assert_close(twins.softmax(dim=-1), logits.softmax(dim=-1))
