"""A look before the spend: `look` at configs, rows, template, access, disk, memory by role, and real steps."""
