from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.params import LocalSource, load_params
from stages.core.tables import read_table

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def test_the_four_presets_are_shipped() -> None:
    assert [path.stem for path in PRESETS] == ["questions", "reviews", "spam", "tiny"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_explained(path: Path) -> None:
    params = load_params(path)
    assert params.tracking.experiment == params.tracking.model_name == f"headroom-{path.stem}"
    text = path.read_text(encoding="utf-8")
    assert f"# Preset: {path.stem} — " in text
    assert "# null turns it off" in text


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_local_files_of_presets_are_shipped(path: Path) -> None:
    acquire = load_params(path).acquire
    sources = [part.source for part in (acquire.data, *acquire.shifted, *acquire.corpus, acquire.lexicon) if part]
    for source in sources:
        if isinstance(source, LocalSource):
            assert (ROOT / source.path).is_file()


def test_the_tiny_data_set_is_what_its_readme_says() -> None:
    frame = read_table(ROOT / "presets" / "tiny" / "questions.tsv", None, "utf-8")
    assert len(frame) == 726
    assert frame["label"].nunique() == 6
    assert frame["label"].value_counts().min() == 80
