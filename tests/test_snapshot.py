import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from knet_jax.saved import checkpoint_record
from knet_jax.saved.checkpoint_record import CheckpointError, DamagedError

ARRAYS = {
    "params/a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "params/b": np.ones(3, ml_dtypes.bfloat16),
    "opt_state/0/mu/a": np.zeros((2, 3), np.float32),
    "step": np.array(7, np.int32),
}


@pytest.mark.parametrize("path", ARRAYS)
def test_any_other_bit_type_or_shape_is_seen(path):
    record = checkpoint_record.make_record(ARRAYS, step=7)
    checkpoint_record.check_arrays(ARRAYS, record)
    array = ARRAYS[path]
    flipped = array.copy()
    flipped.reshape(-1).view(np.uint8)[0] ^= 1
    for other in (flipped, array.reshape(1, -1), array.reshape(-1).view(np.uint8)):
        with pytest.raises(DamagedError, match=path):
            checkpoint_record.check_arrays({path: other}, record)


def test_minus_zero_is_another_value():
    record = checkpoint_record.make_record({"a": np.array(0.0)})
    with pytest.raises(DamagedError):
        checkpoint_record.check_arrays({"a": np.array(-0.0)}, record)


def test_a_changed_record_is_seen():
    record = checkpoint_record.make_record(ARRAYS, step=7, progress={"examples": 112})
    checkpoint_record.check_record(record)
    for change in ({"step": 8}, {"progress": {"examples": 113}}, {"digest": ""}, {"more": 1}):
        with pytest.raises(DamagedError, match="its record is not what was saved"):
            checkpoint_record.check_record(record | change)


def test_the_host_copy_shares_no_memory():
    source = np.zeros(3, np.float32)
    state = {"numpy": source, "jax": jnp.arange(3), "nest": (jnp.float32(1),)}
    copy = checkpoint_record.copy_to_host(state)
    assert list(copy) == ["jax", "nest/0", "numpy"]
    source += 1
    assert not copy["numpy"].any()
    assert copy["jax"].flags.owndata


def test_a_misfit_names_the_parameter_before_its_optimizer_state():
    record = checkpoint_record.make_record(
        ARRAYS, model={"num_things": 80, "backbone": {"depths": (3, 4)}}
    )
    wanted = {path: np.empty((2, 4), np.float32) for path in ("params/a", "opt_state/0/mu/a")}
    with pytest.raises(CheckpointError) as caught:
        checkpoint_record.check_fit(
            wanted | {"params/b": ARRAYS["params/b"]},
            record,
            {"num_things": 5, "backbone": {"depths": (3, 4)}},
        )
    assert str(caught.value) == (
        "params/a is (2, 3) in it, (2, 4) here; config.model.num_things is 80 in it, 5 here"
    )


def test_whole_parts_may_be_left_out_but_no_half():
    record = checkpoint_record.make_record(ARRAYS, model={})
    params = {path: array for path, array in ARRAYS.items() if path.startswith("params")}
    checkpoint_record.check_fit(params, record, {})
    with pytest.raises(CheckpointError, match="^params/b is in it, not here$"):
        checkpoint_record.check_fit({"params/a": ARRAYS["params/a"]}, record, {})
    with pytest.raises(CheckpointError, match="^params/c is not in it$"):
        checkpoint_record.check_fit(params | {"params/c": ARRAYS["step"]}, record, {})
