import fcntl
import multiprocessing
from multiprocessing import shared_memory as segments

from knet_jax.system import shared_memory, workers


def test_what_dead_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_memory, "name_segments", lambda name: None)
    dead, lost, live = (f"{shared_memory.PREFIX}{letter * 16}" for letter in "abc")
    files = [dead, f"{dead}_1", f"sem.{dead}-2", f"{lost}_1", f"sem.{lost}-3"]
    files += [live, f"{live}_1", f"sem.{live}-a", "psm_0123", "sem.mp-x", "knet_a", "knet_coco.tar"]
    for name in files:
        (tmp_path / name).touch()
    with (tmp_path / live).open() as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        own = shared_memory.claim.__wrapped__()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files[5:], own])
        # What is alive is not taken for dead, by this process or another one.
        other = shared_memory.claim.__wrapped__()
        assert (tmp_path / own).exists() and (tmp_path / other).exists()
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "absent")
    assert shared_memory.claim.__wrapped__() == ""


def test_all_workers_share_under_the_claim():
    with workers.starting():
        semaphore = multiprocessing.get_context("spawn").Semaphore()
        segment = segments.SharedMemory(create=True, size=1)
    segment.close()
    segment.unlink()
    if claimed := shared_memory.claim():
        assert semaphore._semlock.name.startswith(f"/{claimed}-")
        assert segment.name.startswith(f"{claimed}_")
