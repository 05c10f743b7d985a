"""Look into a sparse model and intervene: record plans, edit them, run again."""

from moesaic.lens.intervene import Trace, edit, trace
from moesaic.lens.rule_log import RuleLog, rule_log

__all__ = ["RuleLog", "Trace", "edit", "rule_log", "trace"]
