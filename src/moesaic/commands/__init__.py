"""Commands with a page of their own; ``cli.py`` names them all."""
