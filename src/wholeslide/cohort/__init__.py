"""The table of slides, labels and patients; its splits, and the audit against leakage."""

from wholeslide.cohort.audit import AuditResult, audit
from wholeslide.cohort.checks import SPLITS
from wholeslide.cohort.config import SplitConfig, parse_fractions
from wholeslide.cohort.manifest import Cohort, cohort_from_files, read_cohort
from wholeslide.cohort.splits import fold_cohort, split_by_fold, split_cohort, write_split

__all__ = [
    "SPLITS",
    "AuditResult",
    "Cohort",
    "SplitConfig",
    "audit",
    "cohort_from_files",
    "fold_cohort",
    "parse_fractions",
    "read_cohort",
    "split_by_fold",
    "split_cohort",
    "write_split",
]
