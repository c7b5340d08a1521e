"""The rows of a batch prediction: Parquet files that are written whole or not at all."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from knet_jax.app.batch_pictures import Picture
from knet_jax.segmentation.result import Result
from knet_jax.system.errors import UserError, naming_file
from knet_jax.system.output_files import write_whole

LEAST_SEEN = 1000
"""The share of bad pictures is judged as if at least so many had been seen: a few bad ones at the start
prove nothing."""

Row = dict[str, Any]


class Rows:
    """The folder of rows; a context, whose end writes what is not written yet.

    Args:
        folder: created if need be.
        ids: of the pictures that it may have.
        least: how many rows a file has at least, but for the last.
        max_bad: the share of pictures that may be bad.

    Raises:
        UserError: a file is damaged, has rows of other pictures, or a picture twice.
    """

    def __init__(self, folder: Path, ids: Sequence[str], least: int, max_bad: float):
        self.folder = folder
        self.ids = ids
        self._least = least
        self._max_bad = max_bad
        self.reload()

    def reload(self) -> None:
        """Reads what there is."""
        from pyarrow.parquet import read_table

        self.done: set[str] = set()
        self.reasons: Counter[str] = Counter()
        self.model: str | None = None
        self._waiting: list[Row] = []
        self._number = 0
        known = set(self.ids)
        for file in sorted(self.folder.glob("*.parquet")):
            with naming_file(file):
                self._number = 1 + int(file.stem)
                table = read_table(file, columns=["id", "reason", "model"])
                for id, reason, model in zip(*(column.to_pylist() for column in table.columns)):
                    if id in self.done or id not in known:
                        why = "twice" if id in self.done else "which is not among the pictures"
                        raise UserError(f"it has {id!r:.200}, {why}; accepted: another --output")
                    self._count(id, reason)
                    self.check_model(model)

    def check_model(self, digest: str) -> None:
        """Raises UserError where the rows are of another model."""
        self.model = self.model or digest
        if digest != self.model:
            raise UserError(
                f"{self.folder} has rows of the model {self.model}, this one is {digest}; "
                "accepted: that model with the same config, or another --output"
            )

    def _count(self, id: str, reason: str | None) -> None:
        self.done.add(id)
        if reason is not None:
            self.reasons[reason] += 1

    def add(self, rows: Sequence[Row]) -> None:
        """Takes rows, and writes them when there are enough."""
        self._waiting += rows
        for row in rows:
            self._count(row["id"], row["reason"])
        if len(self._waiting) >= self._least:
            self.write()

    def check_share(self) -> None:
        """Raises UserError where too many pictures are bad."""
        bad = self.reasons.total()
        if bad > self._max_bad * max(len(self.done), min(len(self.ids), LEAST_SEEN)):
            [(reason, count)] = self.reasons.most_common(1)
            raise UserError(
                f"{bad} of {len(self.done)} pictures are bad, {count} of them: {reason}; accepted: "
                f"up to a share of --max_bad={self._max_bad:g}"
            )

    def write(self) -> None:
        """Writes the rows that are waiting."""
        import pyarrow
        from pyarrow.parquet import write_table

        if self._waiting:
            rows = [row | {"model": self.model} for row in self._waiting]
            encoded = io.BytesIO()
            write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), encoded)
            write_whole(self.folder / f"{self._number:08}.parquet", encoded.getvalue())
            self._number += 1
            self._waiting = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()


def _schema() -> Any:
    import pyarrow as pa

    whole = pa.list_(pa.int32())
    segment = {
        "category_id": pa.int64(),
        "category_name": pa.string(),
        "score": pa.float64(),
        "area": pa.int64(),
        "bbox": whole,
        "segmentation": pa.struct({"size": whole, "counts": pa.string()}),
    }
    return pa.schema(
        {
            "id": pa.string(),
            "path": pa.string(),
            "status": pa.string(),
            "reason": pa.string(),
            "size": whole,
            "segments": pa.list_(pa.struct(segment)),
            "model": pa.string(),
        }
    )


def good_row(picture: Picture, result: Result) -> Row:
    """The row of a picture with its segments."""
    coco = result.to_coco()
    records = coco["segments_info"] if isinstance(coco, dict) else coco
    names = (segment.name for segment in result.segments)
    return {
        "id": picture.id,
        "path": picture.path,
        "status": "good",
        "reason": None,
        "size": result.size,
        "segments": [record | {"category_name": name} for record, name in zip(records, names)],
    }


def bad_row(picture: Picture, reason: str) -> Row:
    """The row of a picture that has no segments for a reason."""
    return {"id": picture.id, "path": picture.path, "status": "bad", "reason": reason}
