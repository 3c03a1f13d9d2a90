"""Privacy: secure sums, ranges that cannot wrap, and accounting.

| module | what it holds |
| --- | --- |
| `client`, `server`; `messages` | one secure sum with dropouts; its bytes |
| `conversation`, `simulation` | a whole sum, message by message or at once |
| `dropout`, `securing`; `conversing` | rounds that are secure sums |
| `degree`, `graph`, `terms` | neighbours and threshold, and what is agreed |
| `keys`, `purpose`, `shamir`; `streams`, `bits` | secrets; masks and fields |
| `ranges`, `loads`, `proofs`, `tails`; `grid` | sums that cannot wrap |
| `mechanism`, `distributed`; `charging` | private sums; epsilon of each round |
| `banded`, `cyclic` | noise correlated over rounds, and who then comes |
| `examples`, `intrinsic` | steps that hide examples; clipping a product |
| `accounting`, `ledger`, `events`, `calibration` | epsilon of a run |
| `grid_noise`, `grid_events` | noise of whole numbers, and what it tells |
| `integer_noise`, `noise_table` | the same inside a compiled round |

Modules are imported by name. Keys and epsilon need the extra `privacy`.
"""
