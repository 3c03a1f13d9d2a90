"""The reference values are read, never made, by the tests: see README there."""

collect_ignore_glob = ["reference/*"]
