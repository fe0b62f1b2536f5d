"""Entry point of `python -m sltrain_dist.cli`, and of this folder run as a script."""

from sltrain_dist.cli import main

if __name__ == "__main__":
    main()
