"""Checkpoint files: whole or not there, and found out when they change."""
import pytest
import torch

from harness.checkpoint import DamagedCheckpoint, load, newest_intact, save, steps_newest_first


def content(step: int) -> dict:
    return {"step": step, "model": {"w": torch.arange(1000.0) + step}, "ledger": {"training": 1.5}, "target": {}}


def test_what_was_saved_is_loaded(tmp_path):
    loaded = load(save(tmp_path, 7, content(7), keep=2))
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["w"], torch.arange(1000.0) + 7)


def test_only_the_newest_are_kept_with_their_digests(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, content(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010.pt", "step_000010.pt.sha256",
                                                          "step_000015.pt", "step_000015.pt.sha256"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no digest"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, 5, content(5), keep=2)
    newest = save(tmp_path, 10, content(10), keep=2)
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    newest.write_bytes({"flip": data, "truncate": data[:-100], "empty": b"", "no digest": data}[damage])
    if damage == "no digest":
        (tmp_path / "step_000010.pt.sha256").unlink()
    with pytest.raises(DamagedCheckpoint, match="step_000010.pt"):
        load(newest)
    with pytest.warns(UserWarning, match="step_000010.pt"):
        path, loaded = newest_intact(tmp_path)
    assert path.name == "step_000005.pt" and loaded["step"] == 5


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_new_name(tmp_path, monkeypatch):
    """A full disk in the middle of torch.save."""
    save(tmp_path, 5, content(5), keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save(tmp_path, 10, content(10), keep=2)
    assert [p.name for p in steps_newest_first(tmp_path)] == ["step_000005.pt"]


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert newest_intact(tmp_path) is None


def test_damaged_files_are_moved_aside_and_never_cost_a_good_one(tmp_path):
    """Two damaged checkpoints of later steps do not count among those to keep."""
    for step in (20, 24):
        save(tmp_path, step, content(step), keep=2).write_bytes(b"")
    with pytest.warns(UserWarning):
        assert newest_intact(tmp_path) is None
    assert save(tmp_path, 5, content(5), keep=1).exists()
    assert newest_intact(tmp_path)[1]["step"] == 5
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step, content(step), keep=1)
    assert [p.name for p in steps_newest_first(tmp_path)] == ["step_1000000.pt"]
