"""Markdown and pictures of the files in docs/results, by subject. `scripts.make_tables` puts them into the pages.

A new table: a function from the file's content to Markdown in a file of its own here, a line in `make_tables.blocks`, and the
lines `<!-- results:NAME -->` and `<!-- /results:NAME -->` in a page, below the command that made the file.
"""
