"""`python -m wegeft_cli`: the command line; also what a launcher of many processes runs."""

from wegeft_cli.cli.app import main

if __name__ == "__main__":
    main()
