"""Privacy: secure sums, ranges that cannot wrap, and accounting.

| module | what it holds |
| --- | --- |
| `client`, `server`; `messages` | one secure sum with dropouts; its bytes |
| `conversation`, `simulation` | a whole sum, message by message or at once |
| `degree`, `graph`, `terms` | neighbours and threshold, and what is agreed |
| `keys`, `purpose`, `shamir`; `streams`, `bits` | secrets; masks and fields |
| `ranges`, `loads`, `proofs`, `tails`; `grid` | sums that cannot wrap |
| `accounting`, `ledger`, `events`, `calibration` | epsilon of a run |
| `grid_noise` | noise of whole numbers |

Modules are imported by name. Keys and epsilon need the extra `privacy`.
"""
