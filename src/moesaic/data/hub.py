"""Data sets of the ``datasets`` library -> rows: saved folders, folders for ``load_dataset``, names on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moesaic.data.formats import Found, missing_field, row_of
from moesaic.errors import DataError


def parse_dataset(name: str, text_field: str, label_field: str | None) -> Iterator[Found]:
    """A data set of the ``datasets`` library: ``OWNER/NAME[/CONFIG][:SPLIT]`` on the hub, or ``FOLDER[:SPLIT]``.

    A folder is one written by ``save_to_disk`` or one of data files. The split is "train" unless named.
    """
    try:
        import datasets
        import pyarrow as pa
    except ImportError as error:
        raise DataError(f"Reading {name} needs datasets; install it with: pip install 'moesaic[data]'.") from error
    match = re.fullmatch(r"((?:[A-Za-z]:)?[^:]+)(?::(\w+(?:\[[^\]]*\])?))?", name)
    if match is None:
        raise DataError(f"hf://{name} is not a data set; write hf://OWNER/NAME, with :SPLIT after it if need be.")
    place, split = Path(match[1]), match[2]
    try:
        if is_saved_dataset(place):
            saved = datasets.load_from_disk(str(place))
            if isinstance(saved, datasets.DatasetDict):
                chosen = split or ("train" if len(saved) != 1 else next(iter(saved)))
                if chosen not in saved:
                    raise DataError(f'The data set {name} has no split "{chosen}" (it has: {", ".join(saved)}).')
                table = saved[chosen]
            else:
                table = saved
        elif place.is_dir():
            table = datasets.load_dataset(str(place), split=split or "train")
        else:
            owner_and_name = "/".join(match[1].split("/")[:2])
            config = match[1].split("/")[2] if match[1].count("/") == 2 else None
            table = datasets.load_dataset(owner_and_name, config, split=split or "train")
        for field in (text_field, label_field):
            if field is not None and field not in table.column_names:
                yield DataError(f"The data set {name} {missing_field(field, table.column_names)}")
                return
        table = table.select_columns([field for field in (text_field, label_field) if field is not None])
        for number, record in enumerate(table):
            yield row_of(record, text_field, label_field, f"{name}:row {number + 1}")
    except ConnectionError as error:
        raise DataError(
            f"The data set {name} cannot be fetched: the hub is out of reach. Connect to the network, "
            "or give a local folder or file instead."
        ) from error
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        cause = error.__cause__ or error
        first_line = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise DataError(f"The data set {name} cannot be loaded: {first_line.rstrip('.')}.") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` was written by ``datasets``' ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )
