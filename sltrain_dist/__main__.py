"""`python -m sltrain_dist`: the `sltrain` command, where it is not on the path, and under launchers."""

from sltrain_dist.cli import main

if __name__ == "__main__":
    main()
