from pathlib import Path

from pipeline.trained_ids import TRAINED_IDS_NAME, trained_ids


def test_a_model_folder_names_what_it_was_trained_on_and_a_base_names_nothing(tmp_path: Path) -> None:
    assert trained_ids(tmp_path) == frozenset()
    (tmp_path / TRAINED_IDS_NAME).write_text("0a\n0b\n")
    assert trained_ids(tmp_path) == {"0a", "0b"}
