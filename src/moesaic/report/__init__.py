"""One self-contained HTML page about a training run, or about a sparse run beside its dense twin.

from moesaic.report import write_report
write_report(Path("runs/first"))          # -> runs/first/report.html
"""

from moesaic.report.page import write_report as write_report
