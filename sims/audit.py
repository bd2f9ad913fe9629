"""Audit the tables that the RoRA paper and earlier publications print, and the differences that the paper quotes.

    python -m sims.audit

Printed averages are compared with their rows, quoted differences with the averages, entries with guessing and with each
other. A finding is a reason to look closer, not a statement about its cause.
"""

import dataclasses
from dataclasses import dataclass

from rora_theory.paper import audit, published
from rora_theory.runs import frames
from rora_theory.runs.folder import RunFolder
from sims.common import answers, cli, tables
from sims.common.summaries import summarised

NAME = "audit"


@dataclass(frozen=True)
class AuditOptions:
    out: cli.Out = None


def audit_tables(config: AuditOptions) -> None:
    """Write every finding as a row of `findings.csv`, and print the findings of each check."""
    findings = audit.audit(published.published_rows(), published.claims())
    folder = RunFolder.open(NAME, {}, out=config.out)
    columns = [field.name for field in dataclasses.fields(audit.Finding)]
    folder.write_frame(frames.from_rows(map(dataclasses.asdict, findings), columns), "findings.csv")
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    with summarised(folder, []):
        answers.print_answer(f"The printed tables have {len(findings)} findings of {len(kinds)} kinds.")
        for kind in kinds:
            rows = [[finding.where, finding.text] for finding in findings if finding.kind == kind]
            tables.print_table(kind.capitalize(), ["where", "finding"], rows, left=2)
    folder.finish()
    answers.print_files(folder.path)


main = cli.command(AuditOptions, audit_tables, __doc__)

if __name__ == "__main__":
    main()
