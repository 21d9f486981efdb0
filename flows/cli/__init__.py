"""The programs: Hydra, the terminal and exit codes. Nothing else in `flows` knows them."""
