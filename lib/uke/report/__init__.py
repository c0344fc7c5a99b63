"""Show results: figures, tables, sections, the report made of them, and verdicts on claims.

from uke.report import Section, figures, tables, verdicts
"""

from uke.report.section import Section
