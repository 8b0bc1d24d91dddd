"""Under which versions of torch a build of the extension may run: each is tried before the table has it."""
