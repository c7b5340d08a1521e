import pytest

from knet_jax.system.errors import UserError
from knet_jax.system.locks import lock


def test_a_folder_is_locked_once_at_a_time(tmp_path):
    claim = lock(tmp_path, "")
    with pytest.raises(UserError, match="^it is taken$"):
        lock(tmp_path, "it is taken")
    claim.close()
    lock(tmp_path, "it is taken").close()
