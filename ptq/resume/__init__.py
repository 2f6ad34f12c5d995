"""Work that outlives a run: finished blocks in a directory beside the output."""

from ptq.resume.fingerprint import changes, fingerprint
from ptq.resume.folder import discard, saving_was_cut_off, work_root
from ptq.resume.heap import give_back, steady
from ptq.resume.work import Work

__all__ = [
    "Work",
    "changes",
    "discard",
    "fingerprint",
    "give_back",
    "saving_was_cut_off",
    "steady",
    "work_root",
]
