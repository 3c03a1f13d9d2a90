"""Governance: which rounds become the model, and who can tell later.

| module | what it holds |
| --- | --- |
| `gate`, `holdout` | a rule for good rounds, and the examples it looks at |
| `rollback` | the state before a round, and the way back to it |
| `version`, `signing` | signed states that follow each other; keys |
| `log`, `history` | an audit log that cannot be edited, and what it tells |
| `trail` | a run that writes it |
| `configured`, `inspection` | both from a config, and the check afterwards |

Modules are imported by name. Those that sign, or read what is signed, need the
extra `privacy`.
"""
