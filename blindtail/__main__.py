"""`python -m blindtail` is the `blindtail` command."""

from blindtail.cli import main

if __name__ == "__main__":
    main()
