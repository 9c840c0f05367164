"""`python -m dsv4_jax`: the command `dsv4`."""

from dsv4_jax.cli import main

if __name__ == "__main__":
    main()
