"""`python -m sltrain_dist.cli`, or this folder as a script."""

from sltrain_dist.cli import main

if __name__ == "__main__":
    main()
