"""The note in a search's folder: whose trials it has, and by what they know it."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from hessreg.gan.checkpoint import write_atomically
from hessreg.tuning.study import STUDY_ID, StudyError

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["claim_folder"]


def claim_folder(path: Path, study: Study) -> str:
    """Note that a folder is for trials of a study: those of another have the same numbers.

    Args:
        path: The folder.
        study: The study.

    Returns:
        What tells the folder from all others; its path does not, on another machine.

    Raises:
        StudyError: If the folder is another study's.
    """
    file, wanted = path / "search.json", study.user_attrs[STUDY_ID]
    if not file.exists():
        note = {"study": wanted, "folder": uuid.uuid4().hex}
        write_atomically(file, json.dumps(note).encode())
    note = json.loads(file.read_text(encoding="utf-8"))
    if note["study"] != wanted:
        raise StudyError(
            f"{path} has trials of another study than {study.study_name}: choose another --out"
        )
    return note["folder"]
