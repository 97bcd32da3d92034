"""`python -m gpt2 COMMAND`; see gpt2.commands."""

from gpt2.commands import main

main()
