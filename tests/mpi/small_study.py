"""Data for a small study."""

from pathlib import Path


def small_data(tmp_path: Path) -> list[str]:
    """The flags for 60 small generated patients, one of whom has a file that is none."""
    from pneumo.data.sample import SampleConfig, plan, write_patients, write_tables

    config = SampleConfig(patients=60, seed=3, size=256)
    root = tmp_path / "rsna"
    root.mkdir()
    write_tables(root, config)
    write_patients(root, config, 0, 60)
    (root / "stage_2_train_images" / f"{plan(config)[7]}.dcm").write_text("no image")
    return ["--data", str(root), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
