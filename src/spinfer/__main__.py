"""`python -m spinfer`."""

from spinfer.cli import main

main()
